"""Text as every stage means it: normalised, counted in tokens, and without secrets or personal contacts.

::

    text, edits = normalise(raw)                     # NFC, \\n, no trailing spaces, trimmed
    tokens = Tokenizer("models/tiny").counts([text])
    scrubbed = scrub(text, ScrubRules())             # .text, .edits, .rejected_by
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from shared.errors import SettingsError

if TYPE_CHECKING:
    import tokenizers

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- normalisation


def squeezed(text: str) -> str:
    """The text with every run of white space as one space: how quotes are compared."""
    return " ".join(text.split())


_TRAILING_SPACES = re.compile(r"[^\S\n]+$", re.MULTILINE)
_INDENT = re.compile(r"[^\S\n]*")


def normalise(text: str) -> tuple[str, tuple[str, ...]]:
    """The text in one canonical form, and the names of the rules that changed it, in the order applied.

    ``nfc`` composes characters, ``newlines`` turns ``\\r\\n`` and ``\\r`` into ``\\n``, ``trailing_spaces`` goes line
    by line, ``trim`` takes away blank lines at both ends, a byte order mark, and the first line's indentation: from
    every line when all share it (a method cut out of its class stays valid code), else from the first line only.
    Idempotent.
    """
    edits: list[str] = []
    for name, rule in _RULES:
        changed = rule(text)
        if changed != text:
            edits.append(name)
            text = changed
    return text, tuple(edits)


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _trim(text: str) -> str:
    while (trimmed := _trim_once(text)) != text:  # a byte order mark may hide behind spaces
        text = trimmed
    return text


def _trim_once(text: str) -> str:
    text = text.lstrip("\ufeff\n").rstrip()
    indent = _INDENT.match(text).group()  # type: ignore[union-attr]  # the pattern matches the empty string too
    if indent and all(line.startswith(indent) for line in text.split("\n") if line):
        return "\n".join(line[len(indent) :] for line in text.split("\n"))
    return text[len(indent) :]


_RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("nfc", lambda text: unicodedata.normalize("NFC", text)),
    ("newlines", _newlines),
    ("trailing_spaces", lambda text: _TRAILING_SPACES.sub("", text)),
    ("trim", _trim),
)


# ---------------------------------------------------------------- tokens

_HUB_SPEC = re.compile(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>.+)")
_REVISION = re.compile(r"[0-9a-f]{40}")


class Tokenizer:
    """Counts tokens as one model sees them, special tokens left out. Loaded on the first count.

    Args:
        spec: a directory holding ``tokenizer.json``, or that file, relative to the repository; or ``org/name@revision``
            on the Hub, where the revision is a full commit hash, so that counts never change under our feet.

    Raises:
        SettingsError: nothing is there, the revision is not 40 hex digits, or the file is no tokenizer; see also
            :func:`shared.hub.download`.

    For a Hub tokenizer call :meth:`shared.stage.Stage.services` before the first count: ``huggingface_hub`` reads its
    endpoint when it is imported.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._local, self._hub = _find_tokenizer(spec)

    def count(self, text: str) -> int:
        """Tokens in one text."""
        return self.counts([text])[0]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens in each text, in order; the texts are encoded in parallel."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        import tokenizers

        from shared.hub import download

        path = self._local or download(*self._hub, ["tokenizer.json"]) / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for every malformed file
            raise SettingsError(
                f"tokenizer {self.spec!r} cannot be read: {error}", "give one saved as tokenizer.json"
            ) from None
        # Files saved after training carry the trainer's truncation and padding, which would falsify counts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _find_tokenizer(spec: str) -> tuple[Path | None, tuple[str, str]]:
    """The local file, or ``None`` and the repository and revision on the Hub."""
    path = ROOT / spec
    for candidate in (path / "tokenizer.json", path):
        if spec and candidate.is_file():
            return candidate, ("", "")
    hub = _HUB_SPEC.fullmatch(spec)
    if hub and _REVISION.fullmatch(hub["revision"]):
        return None, (hub["repository"], hub["revision"])
    if hub:
        raise SettingsError(
            f"tokenizer {spec!r}: the revision must be a commit hash of 40 hex digits, got {hub['revision']!r}",
            f"copy the hash from the Hub's history of {hub['repository']}: a branch or tag would move",
        )
    raise SettingsError(
        f"no tokenizer at {spec!r}: expected a directory with tokenizer.json, that file, or org/name@<commit hash>",
        "correct the tokenizer in the settings",
    )


# ---------------------------------------------------------------- secrets and personal contacts

Action = Literal["reject", "replace", "keep"]
_ATTEMPTS = 10


class ScrubRules(BaseModel):
    """What happens to each kind of find: the text is rejected, the find is replaced by its mark, or it is kept.

    Attributes:
        private_key: a PEM, OpenSSH, PGP or PuTTY private key; replaced by ``<private_key>``.
        secret: a token or password, by detect-secrets and a few formats it lacks; replaced by ``<secret>``.
        email: an e-mail address; replaced by ``<email>``.
        phone: a valid telephone number; replaced by ``<phone>``.
        phone_regions: ISO 3166 regions whose national formats count; ``+`` numbers of every region always do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    private_key: Action = "reject"
    secret: Action = "reject"
    email: Action = "replace"
    phone: Action = "replace"
    phone_regions: tuple[str, ...] = ("US", "GB")

    @field_validator("phone_regions")
    @classmethod
    def _known(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        from phonenumbers import SUPPORTED_REGIONS

        if unknown := sorted(set(regions) - SUPPORTED_REGIONS):
            raise ValueError(f"unknown regions {', '.join(unknown)}: two capital letters, as in ISO 3166")
        return regions


@dataclass(frozen=True)
class Scrubbed:
    """What :func:`scrub` made of a text.

    Attributes:
        text: the text, finds replaced by their marks; unchanged when rejected.
        edits: names of the rules that replaced something, in the order applied.
        rejected_by: name of the rule that refuses the text; ``""`` when none does.
        detail: what was found and on which line, never the secret itself.
    """

    text: str
    edits: tuple[str, ...] = ()
    rejected_by: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Find:
    """``text[start:end]`` is one find; ``what`` names it for a person."""

    start: int
    end: int
    what: str


def scrub(text: str, rules: ScrubRules) -> Scrubbed:
    """The text without secrets, private keys, e-mail addresses and phone numbers, or the rule that refuses it.

    Deterministic and offline: a token is never tried against its provider. Code is what it mostly reads, so the
    detectors that fire on ordinary code (entropy, any quoted string after ``password``, IP addresses) are off or ask
    for more; see :func:`find_secrets` and :func:`find_phones`.
    """
    original, edits = text, []
    finders: tuple[tuple[str, Action, Callable[[str], Iterable[Find]]], ...] = (
        ("private_key", rules.private_key, find_private_keys),
        ("secret", rules.secret, find_secrets),
        ("email", rules.email, find_emails),
        ("phone", rules.phone, lambda text: find_phones(text, rules.phone_regions)),
    )
    for name, action, finder in finders:
        if action == "keep":
            continue
        # Again until nothing is found: some detectors tell one find a line. What does not go away is rejected.
        for attempt in range(_ATTEMPTS):
            finds = _disjoint(finder(text))
            if not finds:
                break
            if action == "reject" or attempt == _ATTEMPTS - 1:
                line = text.count("\n", 0, finds[0].start) + 1
                return Scrubbed(original, rejected_by=name, detail=f"{finds[0].what} on line {line}")
            for find in reversed(finds):
                text = f"{text[: find.start]}<{name}>{text[find.end :]}"
            if name not in edits:
                edits.append(name)
    return Scrubbed(text, tuple(edits))


def _disjoint(finds: Iterable[Find]) -> list[Find]:
    """In text order; of overlapping finds the first and longest stays."""
    chosen: list[Find] = []
    for find in sorted(finds, key=lambda f: (f.start, -f.end, f.what)):
        if not chosen or find.start >= chosen[-1].end:
            chosen.append(find)
    return chosen


# -- private keys

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:.*?-----END (?P=kind)-----|[A-Za-z0-9+/=\s:,\\\"'-]*)"  # a key cut off by the extraction has no END
    r"|---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----(?:.*?---- END SSH2 ENCRYPTED PRIVATE KEY ----)?"
    r"|PuTTY-User-Key-File-[23]:.*",
    re.DOTALL,
)


def find_private_keys(text: str) -> Iterator[Find]:
    """Every private key, from its BEGIN line to its END line, or to the end of what looks like key material."""
    if "PRIVATE KEY" not in text and "PuTTY-User-Key-File" not in text:
        return
    for match in _PRIVATE_KEY.finditer(text):
        yield Find(*match.span(), match["kind"] or "SSH or PuTTY private key")


# -- secrets

# Off: the two entropy detectors (hashes, test vectors and base64 data are ordinary in code), public IP addresses (not
# a secret), PrivateKeyDetector (fires on code that merely looks for the BEGIN line; find_private_keys does it).
_OFF = ("Base64HighEntropyString", "HexHighEntropyString", "IPPublicDetector", "PrivateKeyDetector")

_NEED_LONG = {"CloudantDetector", "IbmCloudIamDetector", "IbmCosHmacDetector", "SoftlayerDetector"}
_LONG = re.compile(r"[\w-]{24}")  # the shortest value any of the four looks for

# Formats that detect-secrets 1.5.0 does not know; the keys of the services this repository uses come first.
_MORE_TOKENS = {
    "Anthropic key": re.compile(r"sk-ant-[a-z]+\d\d-[\w-]{20,}"),
    "Google API key": re.compile(r"AIza[\w-]{35}(?![\w-])"),
    "Hugging Face token": re.compile(r"hf_[A-Za-z]{30,40}\b"),
    "OpenAI key": re.compile(r"sk-(?:proj|svcacct|admin)-[\w-]{40,}"),
    "GitHub fine-grained token": re.compile(r"github_pat_\w{60,}"),
    "Slack app token": re.compile(r"xapp-\d-[A-Z0-9]+-\d+-[a-f0-9]{32,}"),
}

_PLACEHOLDER = re.compile(
    r".*(?:[<>{}$\s*%]|\.\.\.|x{4}|example|placeholder|changeme|dummy|your[-_]).*"
    r"|[a-z]\w*(?:[._][a-z]\w*)+",  # user_password_v2, hashers.PBKDF2Hasher: a name, not a value
    re.IGNORECASE | re.DOTALL,
)
_MIN_PASSWORD = 6


def find_secrets(text: str) -> Iterator[Find]:
    """Tokens and passwords: the provider formats of detect-secrets 1.5.0 with its heuristics, and a few it lacks.

    Two of its detectors read ordinary code as secrets, so what they find must also look like one: a quoted string
    after a word such as ``password``, and the password in ``://user:password@host``, count when they have at least 6
    characters, letters as well as digits, no white space, and are neither a placeholder nor a dotted or snake name.
    """
    for kind, pattern in _MORE_TOKENS.items():
        for match in pattern.finditer(text):
            if not text[match.start() - 1 : match.start()].isalnum():  # a leading \b would cost 50 x the search
                yield Find(*match.span(), kind)
    # A detector that finds nothing in the whole text finds nothing in a line of it, and asking once is cheaper.
    pointless = _pointless(text)
    detectors = [
        detector
        for detector in _detectors()
        if type(detector).__name__ not in pointless and any(True for _ in detector.analyze_string(text))
    ]
    if not detectors:
        return
    start = 0
    for line in text.split("\n"):
        for detector in detectors:
            for value in detector.analyze_string(line):
                if value and _is_secret(value, line, detector):
                    # Some patterns yield only the first part of a token: the find is all of it.
                    for match in re.finditer(rf"[\w-]*{re.escape(value)}[\w.+/=~-]*", line):
                        yield Find(start + match.start(), start + match.end(), detector.secret_type)
        start += len(line) + 1


@lru_cache(maxsize=1)
def _detectors() -> tuple[Any, ...]:
    """detect-secrets' detectors, made once; only their ``analyze_string`` is used, which asks no service."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.settings import get_plugins, transient_settings

    names = sorted({kind.__name__ for kind in get_mapping_from_secret_type_to_class().values()} - set(_OFF))
    with transient_settings({"plugins_used": [{"name": name} for name in names]}):
        return tuple(get_plugins())


@lru_cache(maxsize=1)
def _secret_words() -> tuple[str, ...]:
    """The words one of which KeywordDetector needs, without the underscores that are optional in them."""
    from detect_secrets.plugins.keyword import DENYLIST

    return tuple(word.replace("_?", "") for word in DENYLIST)


def _pointless(text: str) -> set[str]:
    """Detectors that cannot find anything in the text: these five take nine tenths of the time, the tests none."""
    squeezed = text.lower().replace("_", "")
    pointless = set() if any(word in squeezed for word in _secret_words()) else {"KeywordDetector"}
    return pointless if _LONG.search(text) else pointless | _NEED_LONG


def _is_secret(value: str, line: str, detector: Any) -> bool:
    from detect_secrets.filters import heuristic

    name = type(detector).__name__
    if (
        heuristic.is_sequential_string(value)
        or heuristic.is_potential_uuid(value)
        or heuristic.is_likely_id_string(value, line, detector)
        or heuristic.is_templated_secret(value)
        or heuristic.is_prefixed_with_dollar_sign(value)
        or heuristic.is_not_alphanumeric_string(value)
    ):
        return False
    if name == "KeywordDetector":
        return not heuristic.is_indirect_reference(line) and _is_password(value)
    return name != "BasicAuthDetector" or _is_password(value)


def _is_password(value: str) -> bool:
    return (
        len(value) >= _MIN_PASSWORD
        and any(c.isdigit() for c in value)
        and any(c.isalpha() for c in value)
        and not _PLACEHOLDER.fullmatch(value)
    )


# -- e-mail

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = re.compile(
    rf"(?<![\w.%+'/@-])(?P<local>[A-Za-z0-9_](?:[\w.%+-]{{0,62}}[\w%+-])?)@(?P<domain>(?:{_LABEL}\.)+[A-Za-z]{{2,24}})"
    r"(?![\w@(\[-]|\.\w|:[\w/~])",
    re.ASCII,
)
_URL_USER = re.compile(r"://[^\s/]*$")
_TLD = re.compile(
    r"academy|agency|app|art|biz|blog|cloud|club|com|company|consulting|design|dev|digital|edu|email|example|"
    r"expert|finance|foundation|fund|games|global|gov|group|guru|health|help|info|institute|int|international|"
    r"invalid|jobs|law|legal|life|limited|live|local|localhost|ltd|mail|media|mil|mobi|museum|name|net|network|"
    r"news|online|org|page|partners|press|pro|research|school|science|services|shop|site|social|software|"
    r"solutions|space|store|studio|support|systems|team|tech|technology|test|today|tools|university|ventures|web|"
    r"website|wiki|work|works|world|xyz|zone",
    re.IGNORECASE,
)


def find_emails(text: str) -> Iterator[Find]:
    """E-mail addresses.

    ``x@weights.shape`` (matrix product), ``icon@2x.png``, ``git@host:path`` and ``https://user@host`` are none: the
    last label is a common top-level domain or two letters of one case, or the address stands alone between quotes
    or angle brackets.
    """
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        tld = match["domain"].rpartition(".")[2]
        country = len(tld) == 2 and (tld.islower() or tld.isupper())
        if _URL_USER.search(text, max(0, match.start() - 200), match.start()):
            continue
        around = text[match.start() - 1 : match.start()] + text[match.end() : match.end() + 1]
        if _TLD.fullmatch(tld) or country or around in ("<>", '""', "''", "``"):
            yield Find(*match.span(), "e-mail address")


# -- phone

_PHONE_LIKE = re.compile(r"(?:\+|\(|\d)(?:[\s().\-/\u2010-\u2015]{0,3}\d){6}")
_BEFORE = re.compile(r"[\w.\-/#%$&@+*^~\\]")
_BEFORE_PLUS = re.compile(r"[\w)\]]")  # a sum
_AFTER = re.compile(r"[\w\-/%@*^~]|[.,:]\d|\s?[*/%]\s?\d")
_DOTTED = re.compile(r"[\d.]+")
_SPACED_MINUS = re.compile(r"\s-\s")
_MIN_DIGITS = 7


def find_phones(text: str, regions: Sequence[str]) -> Iterator[Find]:
    """Telephone numbers: valid by libphonenumber's plans and grouped as people write them in that region.

    Strict grouping, and rules of ours that keep numbers in code out: what is not written with ``+`` needs separators
    (a bare run of digits is a numeric literal); two dotted groups are a float, four an IP address, and fewer than ten
    dotted digits a version; a minus between spaces subtracts; no letter, operator, slash or hash may touch it.
    """
    if not _PHONE_LIKE.search(text):
        return
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in regions or ("ZZ",):
        for match in PhoneNumberMatcher(text, region, Leniency.STRICT_GROUPING):
            if _is_phone(text, match.start, match.end):
                yield Find(match.start, match.end, f"phone number ({region})")


def _is_phone(text: str, start: int, end: int) -> bool:
    raw = text[start:end].strip("[]")
    digits = sum(c.isdigit() for c in raw)
    international = raw.startswith("+")
    touching = (_BEFORE_PLUS if international else _BEFORE).match(text, start - 1) if start else None
    if digits < _MIN_DIGITS or touching or _AFTER.match(text, end):
        return False
    if international:
        return raw[1] != " "
    if _SPACED_MINUS.search(raw):
        return False
    bare = raw.strip("()- ")
    if _DOTTED.fullmatch(bare):
        return digits >= 10 and bare.count(".") in (2, 4)
    return not bare.isdigit()
