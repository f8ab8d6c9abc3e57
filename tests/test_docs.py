"""What people read is true: README, `make help` and env.example name what there is, all of it and nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, make

README = ROOT / "README.md"
INTERNAL = {
    # between our own processes
    "SYNTHMILL_CONNECTED",
    "SYNTHMILL_REVISION",
    "STANDIN_URL",
    "STANDIN_LOG",
    "WITHOUT_MLX",  # `make trial` to its stages
    # other programs' own, which we only respect
    "GIT_ALLOW_PROTOCOL",
    "HF_ENDPOINT",
    "HF_HOME",
    "MAKELEVEL",
    "GOOGLE_API_KEY",  # google-genai's older name of GEMINI_API_KEY
    "LOGFIRE_BASE_URL",
}
"""Variables the code reads that no user needs to know."""


def text() -> str:
    assert README.exists(), "there is no README.md"
    return README.read_text("utf-8")


def help_text() -> str:
    return make(ROOT, "help").stdout


def targets() -> list[str]:
    return re.findall(r"^  (\w+) ", help_text().split("\nvariables\n")[0], re.M)


def variables() -> list[str]:
    return re.findall(r"^  (\w+) ", help_text().split("\nvariables\n")[1], re.M)


def stages() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "stages").glob("*/main.py"))


# ---------------------------------------------------------------- README


def test_the_readme_names_every_target() -> None:
    assert targets()
    named = set(re.findall(r"\bmake(?: -\S+)* ([a-z][a-z0-9]*)", text()))
    missing = [target for target in targets() if target not in named and not re.fullmatch(r"stage\d+", target)]
    assert missing == [], "say what they do"
    assert any(re.fullmatch(r"stage\d*N?", target) for target in named), "and that each stage is a target"


def test_the_readme_names_every_variable() -> None:
    assert [name for name in variables() if not re.search(rf"\b{name}\b", text())] == []


def test_every_command_of_the_readme_exists() -> None:
    known = set(targets())
    for target in re.findall(r"(?:^|`|\s{2}|; )make(?: -\S+)* ([a-z][a-z0-9]*)", text(), re.M):
        assert target in known or target == "stageN", f"make {target}: no such target"
    for name in re.findall(r"\bmake [^`\n#]*?\b([A-Z][A-Z_]+)=", text()):
        assert name in variables(), f"{name}: no such variable"


def test_every_path_of_the_readme_exists() -> None:
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {str(parent) for name in tracked for parent in Path(name).parents}
    for path in set(re.findall(r"`((?:shared|stages|docker|tests|data|models)/[\w./-]+?)/?`", text())):
        ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", path]).returncode == 0  # a run makes it
        assert path in tracked or path in folders or ignored, f"{path} is not in the repository"


def test_the_readme_names_every_stage() -> None:
    assert [stage for stage in stages() if stage not in text() and stage[3:] not in text()] == []


def test_the_readme_has_no_blanks_left() -> None:
    assert re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", text()) == []


def test_links_inside_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text()):
        assert (ROOT / target).exists(), target


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("stage", stages())
def test_a_stage_says_what_it_takes_and_makes_and_how_to_run_it(stage: str) -> None:
    doc = ast.get_docstring(ast.parse((ROOT / "stages" / stage / "main.py").read_text("utf-8"))) or ""
    assert doc.startswith(f"{stage[:2]} {stage[3:]}: "), "number and name first"
    assert re.search(r"->|→|\bIn(put)?: .*\bOut(put)?: ", doc, re.S), "what goes in and what comes out"
    assert f"python stages/{stage}/main.py" in doc, "a line that runs it"


@pytest.mark.parametrize("run", ["trial", "full"])
@pytest.mark.parametrize("stage", stages())
def test_every_setting_is_explained_where_it_is_set(stage: str, run: str) -> None:
    # A comment may stand beside a key or over its paragraph, and once explained a key may come again.
    whole = (ROOT / "stages" / stage / f"{run}.toml").read_text("utf-8")
    comments = "\n".join(line.partition("#")[2] for line in whole.splitlines())
    unexplained = {
        key
        for paragraph in re.split(r"\n\s*\n", whole)
        for key in re.findall(r"^([a-z]\w*) *=", paragraph, re.M)
        if "#" not in paragraph and not re.search(rf"\b{key}\b", comments)
    }
    explained = {key for key in unexplained if re.search(rf"^{key} *=.*#", whole, re.M)}
    assert unexplained - explained == set()


# ---------------------------------------------------------------- environment


def read_from_the_environment() -> set[str]:
    """Names that code reads from ``os.environ``: ``get``, ``[...]`` and ``in``; names it only sets do not count."""
    found: set[str] = set()
    for path in [*(ROOT / "shared").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=where, attr="get"), args=[ast.Constant(value=str(name)), *_]):
                    pass
                case ast.Subscript(value=where, slice=ast.Constant(value=str(name)), ctx=ast.Load()):
                    pass
                case ast.Compare(left=ast.Constant(value=str(name)), ops=[ast.In()], comparators=[where]):
                    pass
                case _:
                    continue
            if ast.unparse(where) in ("os.environ", "environ"):
                found.add(name)
    return found | keys()


def keys() -> set[str]:
    """Names of keys, which are read by way of a table."""
    from shared.apis import KEYS
    from shared.llm.providers import PROVIDERS

    return {name for provider in PROVIDERS.values() for name in provider().key_names} | set(KEYS)


def in_env_example() -> set[str]:
    return set(re.findall(r"^#? ?([A-Z][A-Z0-9_]*)=", (ROOT / "env.example").read_text("utf-8"), re.M))


def test_every_variable_of_env_example_is_read() -> None:
    names = in_env_example()
    assert names
    assert names - read_from_the_environment() == set(), "nobody reads these"


def test_every_variable_a_user_may_set_is_explained() -> None:
    known = in_env_example() | set(variables()) | INTERNAL
    told = (ROOT / "env.example").read_text("utf-8") + text()
    unknown = {name for name in read_from_the_environment() - known if not re.search(rf"\b{name}\b", told)}
    unknown -= {name for name in unknown if name.startswith("STANDIN_")}
    missing_keys = {name for name in keys() - INTERNAL - in_env_example() if _has_a_stage(name)}
    assert unknown - keys() == set(), "put them into env.example or the README"
    assert missing_keys == set(), "a key belongs into env.example"


def _has_a_stage(key: str) -> bool:
    """Whether the service of a key is used by a stage that exists."""
    return key != "TINKER_API_KEY" or "[tinker]" in (ROOT / "stages" / "14_train" / "full.toml").read_text("utf-8")


def test_every_line_of_env_example_is_a_comment_or_an_empty_value() -> None:
    for line in (ROOT / "env.example").read_text("utf-8").splitlines():
        assert re.fullmatch(r"(#.*|[A-Z][A-Z0-9_]*=|)", line), f"a value in env.example: {line}"


# ---------------------------------------------------------------- everything


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    # Spelled in pieces, so that this file is not its own finding.
    hosts = re.compile("|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "registry" + r"\.npmjs"]))
    homes = re.compile("|".join(["/ro" + "ot/", "/ho" + r"me/\w", "/Us" + r"ers/\w"]))
    found = []
    for name in filter(None, names):
        path = ROOT / name
        if not path.is_file():
            continue
        held = path.read_bytes().decode("utf-8", "ignore")
        for pattern in (hosts, homes) if not name.startswith("docker/") else (hosts,):  # an image has a home of its own
            if match := pattern.search(held):
                found.append(f"{name}: {match[0]}")
    assert found == []


def test_the_top_level_holds_what_the_design_says() -> None:
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in names}
    expected = {"Makefile", "README.md", "LICENSE", "pyproject.toml", "env.example", ".ci", ".github", ".gitignore"}
    expected |= {"stages", "shared", "docker", "data", "models", "tests"}
    assert expected <= top
    assert top - expected <= {"benchmarks", ".dockerignore"}
