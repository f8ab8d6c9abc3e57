"""Text: the one canonical form, tokens counted as the model counts them, secrets and contacts found, nothing else."""

from __future__ import annotations

import ast
import os
import random
import shutil
import string
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.errors import SettingsError
from shared.text import ScrubRules, Tokenizer, _detectors, _pointless, find_emails, find_phones, normalise, scrub
from tests.conftest import ROOT

DRAW = random.Random(7)
ALPHANUMERIC = string.ascii_letters + string.digits
MANY = ("US", "GB", "DE", "IN", "JP", "BR", "AU", "ES", "IT")


def drawn(count: int, alphabet: str = ALPHANUMERIC) -> str:
    return "".join(DRAW.choice(alphabet) for _ in range(count))


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize(
    ("raw", "text", "edits"),
    [
        ("plain", "plain", ()),
        ("", "", ()),
        ("e\u0301", "é", ("nfc",)),
        ("a\r\nb\rc", "a\nb\nc", ("newlines",)),
        ("a  \nb\t\n\u00a0\nc", "a\nb\n\nc", ("trailing_spaces",)),
        ("\n\n  a\n", "a", ("trim",)),
        ("\ufeffa", "a", ("trim",)),
        ("    def f():\n        return 1\n", "def f():\n    return 1", ("trim",)),
        ("    a\n  b", "a\n  b", ("trim",)),
        (" e\u0301 \r\n", "é", ("nfc", "newlines", "trailing_spaces", "trim")),
    ],
)
def test_normalising_gives_one_form_and_names_what_changed(raw: str, text: str, edits: tuple[str, ...]) -> None:
    assert normalise(raw) == (text, edits)


def test_normalising_twice_is_normalising_once() -> None:
    draw = random.Random(3)
    atoms = ["a", "\n", " ", "\t", "\r", "\ufeff", "e", "\u0301", "\u00a0", "\x0c", "\u2028", "b  "]
    for _ in range(3_000):
        once, _ = normalise("".join(draw.choice(atoms) for _ in range(draw.randint(0, 14))))
        assert normalise(once) == (once, ())


# ---------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer as a trainer leaves it: with special tokens, truncation and padding switched on."""
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = ["<s>", "<unk>", *"the quick brown fox jumps over a lazy dog".split()]
    library = Library(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    library.pre_tokenizer = Whitespace()
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(4)
    library.enable_padding(length=16)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return path


def test_tokens_are_counted_without_special_tokens_truncation_or_padding(tokenizer_file: Path) -> None:
    for spec in (str(tokenizer_file), str(tokenizer_file.parent)):
        tokenizer = Tokenizer(spec)
        assert tokenizer.spec == spec
        assert tokenizer.count("the quick brown fox jumps over a lazy dog") == 9
        assert tokenizer.counts(["the fox", "", "a dog over the fox"]) == [2, 0, 5]
        assert tokenizer.counts([]) == []


def test_a_relative_spec_is_looked_for_in_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert 5 <= Tokenizer("models/tiny").count("Merge the sources and drop what is alike.") <= 40


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "no tokenizer at ''"),
        ("nowhere/at-all", "org/name@<commit hash>"),
        ("org/name@main", "40 hex digits, got 'main'"),
        ("org/name@0123abc", "40 hex digits, got '0123abc'"),
    ],
)
def test_a_tokenizer_that_is_not_there_or_not_pinned_is_refused_at_once(spec: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says.replace("(", r"\(")):
        Tokenizer(spec)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(SettingsError, match="cannot be read"):
        Tokenizer(str(tmp_path)).count("a")


def test_a_tokenizer_on_the_hub_is_taken_at_its_commit_from_the_cache(tokenizer_file: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "hub" / "models--me--words" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copy(tokenizer_file, snapshot)
    script = f"""
from shared.errors import SynthmillError
from shared.text import Tokenizer
print(Tokenizer("me/words@{commit}").counts(["the quick brown fox jumps", "a dog"]))
try:
    Tokenizer("me/nothing@{commit}").count("a")
except SynthmillError as error:
    print(error)
"""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    counts, *refused = done.stdout.splitlines()
    assert counts == "[5, 2]"
    assert "me/nothing" in refused[0] and "next:" in refused[-1]


# ---------------------------------------------------------------- secrets

TOKENS = {
    "AWS key": f'key = "AKIA{drawn(16, string.ascii_uppercase + string.digits)}"',
    "AWS secret": f'aws_secret_access_key = "{drawn(40)}"',
    "GitHub": f'TOKEN = "ghp_{drawn(36)}"',
    "GitHub fine-grained": f"github_pat_{drawn(22)}_{drawn(59)}",
    "Anthropic": f"sk-ant-api03-{drawn(93)}-{drawn(6)}AA",
    "OpenAI project": f"sk-proj-{drawn(40)}T3BlbkFJ{drawn(40)}",
    "OpenAI": f"export OPENAI=sk-{drawn(20)}T3BlbkFJ{drawn(20)}",
    "Hugging Face": f"hf_{drawn(34, string.ascii_letters)}",
    "Google": f"AIza{drawn(35)}",
    "Slack": f"xoxb-{drawn(12, string.digits)}-{drawn(12, string.digits)}-{drawn(24)}",
    "Stripe": f"sk_live_{drawn(24)}",
    "SendGrid": f"SG.{drawn(22)}.{drawn(43)}",
    "IBM": f'ibm_cloud_iam_api_key = "{drawn(44)}"',
    "SoftLayer": f'softlayer_api_key = "{drawn(64, string.ascii_lowercase + string.digits)}"',
    "password in a URL": 'url = "postgres://admin:s3cr3tPw99@db.prod.net/x"',
    "password": 'password = "Tr0ub4dor&3"',
    "client secret": '{"client_secret": "9f8e7d6c5b4a3f2e1d0c"}',
}
HARMLESS = [
    "password = getpass()",
    'password: str = "password"',
    'def connect(password="secret"): ...',
    'api_key = os.environ["API_KEY"]',
    'api_key = "YOUR_API_KEY_1"',
    'password = "<password1>"',
    'sslpassword = "${PG_PASS1}"',
    'PASSWORD_HASHERS = "auth.hashers.PBKDF2PasswordHasher"',
    'password_field = "user_password_v2"',
    'url = "http://user:pass@host"',
    'sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"',
    'run_id = "550e8400-e29b-41d4-a716-446655440000"',
    'if "-----BEGIN PRIVATE KEY" in text: raise ValueError("a key")',
    "shelf_abcdefghijklmnopqrstuvwxyzabcdefghij = 1",
]


@pytest.mark.parametrize("kind", TOKENS)
def test_a_secret_rejects_the_text_without_repeating_it(kind: str) -> None:
    text = f"def setup():\n    {TOKENS[kind]}\n    return 1"
    scrubbed = scrub(text, ScrubRules())
    assert scrubbed.rejected_by == "secret"
    assert "line 2" in scrubbed.detail
    secret = max(TOKENS[kind].replace('"', " ").split(), key=len)
    assert secret not in scrubbed.detail and scrubbed.text == text


@pytest.mark.parametrize("kind", TOKENS)
def test_a_secret_can_be_replaced_instead_and_then_nothing_is_found(kind: str) -> None:
    rules = ScrubRules(secret="replace")
    scrubbed = scrub(f"a {TOKENS[kind]} b", rules)
    assert scrubbed.edits == ("secret",) and "<secret>" in scrubbed.text
    assert scrubbed.text.startswith("a ") and scrubbed.text.endswith(" b")
    assert scrub(scrubbed.text, ScrubRules()).rejected_by == ""


def test_every_secret_on_a_line_is_replaced() -> None:
    line = f"ghp_{drawn(36)} ghp_{drawn(36)} password = 'x1y2z3w4' secret = 'a9b8c7d6'"
    replaced = scrub(line, ScrubRules(secret="replace")).text
    assert replaced == "<secret> <secret> password = '<secret>' secret = '<secret>'"


@pytest.mark.parametrize("line", HARMLESS)
def test_ordinary_code_about_secrets_is_no_secret(line: str) -> None:
    assert scrub(line, ScrubRules()).rejected_by == ""


@pytest.mark.parametrize(
    "key",
    [
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc=\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIFDjBABgkq\n-----END ENCRYPTED PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAA",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQdGBF\n-----END PGP PRIVATE KEY BLOCK-----",
    ],
)
def test_a_private_key_rejects_or_is_replaced_whole(key: str) -> None:
    text = f"KEY = '''\n{key}"
    rejected = scrub(text, ScrubRules())
    assert rejected.rejected_by == "private_key" and "PRIVATE KEY" in rejected.detail
    assert scrub(text, ScrubRules(private_key="replace")).text == "KEY = '''\n<private_key>"


def functions_of_site_packages(wanted: int) -> Iterator[str]:
    """Real code, at most four functions a file, from packages that handle passwords, tokens, dates and numbers."""
    root = Path(pytest.__file__).resolve().parent.parent
    found = 0
    for package in ("requests", "huggingface_hub", "aiohttp", "fsspec", "pydantic", "rich", "click", "numpy"):
        for path in sorted((root / package).rglob("*.py")):
            source = path.read_text("utf-8")
            lines = source.splitlines(keepends=True)
            nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
            for node in nodes[:4]:
                text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                if 150 <= len(text) <= 2_000:
                    yield text
                    found += 1
                    if found == wanted:
                        return


def test_real_code_holds_no_secret_and_next_to_no_phone_number() -> None:
    functions = list(functions_of_site_packages(500))
    assert len(functions) == 500
    rules = ScrubRules(phone_regions=MANY)
    scrubbed = [scrub(text, rules) for text in functions]
    assert [s.detail for s in scrubbed if s.rejected_by] == []
    assert sum("phone" in s.edits for s in scrubbed) <= 1


def test_the_shortcut_past_slow_detectors_finds_the_same() -> None:
    texts = [*TOKENS.values(), *HARMLESS, *functions_of_site_packages(60)]
    skipped = 0
    for text in texts:
        pointless = _pointless(text)
        skipped += len(pointless)
        for detector in _detectors():
            if type(detector).__name__ in pointless:
                assert list(detector.analyze_string(text)) == []
    assert skipped > len(texts)


# ---------------------------------------------------------------- e-mail and phone


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("Write to jane.doe+x@sub.example.co.uk.", "Write to <email>."),
        ("mailto:joe@corp.io?subject=x", "mailto:<email>?subject=x"),
        ('author = "me@startup.studio"', 'author = "<email>"'),
        ("Joe <joe@corp.io>, ann@x.org", "Joe <<email>>, <email>"),
        ("bob_1@uni-bonn.de", "<email>"),
    ],
)
def test_an_email_address_is_replaced(text: str, scrubbed: str) -> None:
    found = scrub(text, ScrubRules())
    assert (found.text, found.edits) == (scrubbed, ("email",))


@pytest.mark.parametrize(
    "text",
    [
        "y = x@self.weight + b",
        "q@k.transpose(-1, -2)",
        "A@B.T",
        "A@B.mT[0]",
        "icon@2x.png",
        "git@github.com:org/repo.git",
        "https://user@host.com/x",
        "http://user:pass@example.com/",
        "name@1.2.3",
        "x@git+https://host/a.git",
        '@app.get("/x")',
        "deploy@10.0.0.1",
        "a @ b",
    ],
)
def test_what_only_looks_like_an_email_address_stays(text: str) -> None:
    assert list(find_emails(text)) == []


@pytest.mark.parametrize(
    "number",
    [
        "(212) 555-1234",
        "212-555-1234",
        "650.253.0000",
        "+1 212 555 1234",
        "+12125551234",
        "+44 20 7946 0958",
        "020 7946 0958",
        "+33 1 42 68 53 00",
        "+91 98765 43210",
    ],
)
def test_a_phone_number_is_replaced(number: str) -> None:
    for frame in ("{}", "call {} now", '"{}"', "Phone:{}.", "<b>{}</b>"):
        scrubbed = scrub(frame.format(number), ScrubRules())
        assert (scrubbed.text, scrubbed.edits) == (frame.format("<phone>"), ("phone",))


@pytest.mark.parametrize(
    "number",
    """1.2.3|v10.12.2024.1|2024.10.15.1200|192.168.100.200|10.0.0.1:8080|2001:0db8:85a3:0000:0000:8a2e:0370:7334
2024-01-15|2024-01-15 08:30:00|2024-01-15T08:30:00+01:00|15/01/2024 10:20|15.06.2023|20240115123000|1700000000
x = 2125551234|x = 2_125_551_234|0x2125551234|650.2530000|3.1415926535897932|-68.60568999|01234567890|1,234,567,890
a[212:555] + 1234|a+12125551234|x + 4420 7946 0958|800 - 200 - 1000|650-253-0000-1|/item/212-555-1234/
550e8400-e29b-41d4-a716-446655440000|978-0-306-40615-7|4111 1111 1111 1111|123-45-6789|12345-67890
0 1 2 3 4 5 6 7 8 9|1 0 0 1 1 0 1 0 1 1|64 128 256 512|[0.25 0.5 0.75 1.0]|(1024, 768), (1920, 1080)|1080-1920-2160
10.1038/s41586-020-2649-2|12:34:56.789|1990-2000 2001-2010|0000 0000 0000""".replace("\n", "|").split("|"),
)
def test_numbers_in_code_are_no_phone_numbers(number: str) -> None:
    for frame in ("{}", "x = [{}]", '"{}"', "a {} b"):
        assert list(find_phones(frame.format(number), MANY)) == []


def test_national_formats_count_only_in_the_regions_listed() -> None:
    assert scrub("020 7946 0958", ScrubRules(phone_regions=("US",))).edits == ()
    assert scrub("020 7946 0958", ScrubRules(phone_regions=("GB",))).edits == ("phone",)
    assert scrub("+44 20 7946 0958", ScrubRules(phone_regions=())).edits == ("phone",)


def test_each_rule_can_reject_or_be_switched_off() -> None:
    text = "Mail joe@corp.io or call (212) 555-1234."
    assert scrub(text, ScrubRules(email="keep", phone="keep")).text == text
    assert scrub(text, ScrubRules()).text == "Mail <email> or call <phone>."
    assert scrub(text, ScrubRules()).edits == ("email", "phone")
    assert scrub(text, ScrubRules(phone="reject")).rejected_by == "phone"


def test_bad_rules_are_refused() -> None:
    with pytest.raises(ValidationError, match="unknown regions XX"):
        ScrubRules(phone_regions=("US", "XX"))
    with pytest.raises(ValidationError):
        ScrubRules.model_validate({"email": "hide"})
