"""docker/runner.py: where a stage runs, and what its container would get. None starts here; see test_docker.py."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.llm.models import DRAIN_S
from shared.llm.providers import PROVIDERS
from tests.conftest import BASE_URLS, ROOT, copy_of_repository, make

EVERY = sorted(path.name for path in (ROOT / "stages").iterdir() if (path / "main.py").exists())
OFFLINE = {"02_merge", "11_deduplicate", "12_choose", "13_format"}


def load(root: Path = ROOT) -> Any:
    """docker/runner.py as a module."""
    spec = importlib.util.spec_from_file_location("runner", root / "docker" / "runner.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner: Any = load()


STAGES = [name for name in EVERY if name not in runner.NATIVE]


def flags(stage: str, data: Path, config: str | Path = "", source: str | Path = "") -> Any:
    """What the runner makes of a stage's usual command."""
    config = config or ROOT / "stages" / stage / "trial.toml"
    return runner.Flags(
        str(ROOT / "stages" / stage / "main.py"), stage, str(source), str(data / f"{stage}.jsonl"), str(config)
    )


# ---------------------------------------------------------------- the table


def test_every_stage_has_its_line_in_the_table_or_a_reason_to_have_none() -> None:
    assert set(EVERY) <= {*runner.STAGES, *runner.NATIVE}
    assert not {*runner.STAGES} & {*runner.NATIVE}


def test_the_stages_that_need_no_network_never_have_one(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name in STAGES if not runner.STAGES[name].network} == OFFLINE
    assert runner.network(runner.STAGES["16_release"], {"APIS": "live"}) == "none", "it lays out and pushes nothing"
    monkeypatch.setenv("PUSH", "1")
    for name in STAGES:
        for mode, expected in (("mock", "none"), ("live", "none" if name in OFFLINE else "bridge")):
            assert runner.network(runner.STAGES[name], {"APIS": mode}) == expected, (name, mode)


HANDLED = {"APIS", "STANDIN_URL", "SYNTHMILL_CONNECTED", "SYNTHMILL_REVISION"}
"""Set by the runner, or by a stage for itself."""
NATIVE = {"RAY_ADDRESS", "STANDIN_LOG", "STANDIN_STATE", "MAKELEVEL"}
"""For stages that run natively: with ENGINE=ray the runner sees to it; a log has no place in a container; a stand-in
in one keeps its state where it does by default, in data/cache; for one, the runner has claimed the run outside."""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def is_lazy(path: Path) -> bool:
    """Modules whose functions import what only some stages use."""
    return path.relative_to(ROOT).as_posix() in ("shared/stage.py", "shared/apis.py")


def imports(path: Path) -> set[str]:
    """The modules a file imports, ``shared.llm.models`` or ``gates``; not those for type checkers."""
    found: set[str] = set()
    waiting: list[ast.AST] = [parsed(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_lazy(path):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def files_of(stage: str) -> set[Path]:
    """Every file of ours that a stage's process may run."""
    directory = ROOT / "stages" / stage
    waiting = sorted(directory.rglob("*.py"))
    text = "".join(path.read_text("utf-8") for path in waiting)
    if "stage.models" in text:
        waiting += [ROOT / "shared/llm/models.py", ROOT / "shared/llm/providers.py", ROOT / "shared/estimate.py"]
    if "stage.models" in text or "services" in text:
        waiting += [ROOT / "shared/standin/__init__.py"]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports(path):
            place = ROOT.joinpath(*module.split("."))
            parents = [
                ROOT.joinpath(*module.split(".")[:end]) / "__init__.py" for end in range(1, module.count(".") + 2)
            ]
            waiting += [
                file for file in (place.with_suffix(".py"), *parents) if file.is_file() and module[:6] == "shared"
            ]
    # The statistics, which 13 prints, import what asks models, and do not ask.
    return seen if "stage.models" in text else {path for path in seen if path.parent.name != "llm"}


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def reads(path: Path) -> set[str]:
    """The environment variables a file reads by name, or by a constant of the module that holds the name."""
    found, tree = set(), parsed(path)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        name: ast.AST | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if (is_environ(node.func.value) and node.func.attr == "get") or node.func.attr == "getenv":
                name = node.args[0]
        elif isinstance(node, ast.Subscript) and is_environ(node.value) and isinstance(node.ctx, ast.Load):
            name = node.slice
        elif isinstance(node, ast.Compare) and any(is_environ(place) for place in node.comparators):
            name = node.left
        if isinstance(name, ast.Name):
            name = constants.get(name.id)
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            found.add(name.value)
    return found


def read_by(stage: str) -> set[str]:
    """The environment variables our code reads when this stage runs."""
    files = files_of(stage)
    found = set().union(*(reads(path) for path in files))
    if ROOT / "shared/llm/providers.py" in files:
        found |= {key for provider in PROVIDERS.values() for key in provider().key_names}
    if ROOT / "shared/standin/__init__.py" in files:
        found |= set(re.findall(r"STANDIN_[A-Z_]+[A-Z]", (ROOT / "shared/standin/__main__.py").read_text("utf-8")))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_given_every_variable_its_code_reads(stage: str) -> None:
    needs = runner.STAGES[stage]
    given = {*needs.variables, *needs.live}
    unreachable = set() if needs.network else set(runner.TRACING)  # spans could not leave
    assert read_by(stage) - HANDLED - NATIVE - unreachable - given == set()


def test_the_reading_of_the_code_finds_what_is_known_to_be_read() -> None:
    assert {"ANTHROPIC_API_KEY", "ENDPOINT_API_KEY", "BUDGET_USD", "STANDIN_FAULTS"} <= read_by("03_compress")
    assert "ENGINE" in read_by("11_deduplicate")
    assert not {"ANTHROPIC_API_KEY", "BUDGET_USD", "HF_TOKEN"} & read_by("13_format")


IN_LIBRARIES = {
    "ANTHROPIC_BASE_URL": "anthropic/_client.py",
    "OPENAI_BASE_URL": "openai/lib/_client_auth.py",
    "GOOGLE_GEMINI_BASE_URL": "google/genai/_base_url.py",
    "HF_TOKEN": "huggingface_hub/utils/_auth.py",
    "HF_ENDPOINT": "huggingface_hub/constants.py",
    "SSL_CERT_FILE": "httpcore2/_ssl.py",
    "OTEL_EXPORTER_OTLP_HEADERS": "opentelemetry/sdk/environment_variables/__init__.py",
}
"""Variables that a library reads, not our code, and where."""


def test_no_stage_is_given_a_variable_that_nothing_reads() -> None:
    libraries = Path(str(importlib.util.find_spec("pydantic").origin)).parent.parent  # type: ignore[union-attr]
    for name, file in IN_LIBRARIES.items():
        assert name in (libraries / file).read_text("utf-8"), f"{file} does not read {name} any more"
    for stage in STAGES:
        needs = runner.STAGES[stage]
        proxies = set(runner.PROXIES) - {"SSL_CERT_FILE"}  # read by every HTTP library through urllib
        known = {*IN_LIBRARIES, *proxies} | read_by(stage)
        assert {*needs.variables, *needs.live} - known == set(), stage


ASKED = {"ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY", "ENDPOINT_API_KEY"}
SECRETS = {
    "ANTHROPIC_API_KEY": "sk-ant-1",
    "OPENAI_API_KEY": "sk-2",
    "GEMINI_API_KEY": "g-3",
    "HF_TOKEN": "hf_4",
    "ENDPOINT_API_KEY": "e-5",
    "TINKER_API_KEY": "tml-6",
    "LOGFIRE_TOKEN": "lf-7",
    "AWS_SECRET_ACCESS_KEY": "aws-8",
}


@pytest.mark.parametrize(
    ("stage", "mode", "expected"),
    [
        ("02_merge", "live", set()),
        ("13_format", "live", set()),
        ("01_acquire", "live", {"HF_TOKEN", "LOGFIRE_TOKEN"}),
        ("04_validate", "live", {*ASKED, "LOGFIRE_TOKEN"}),
        ("04_validate", "mock", set()),
        ("03_compress", "mock", set()),
        ("16_release", "live", set()),
        ("16_release", "mock", set()),
    ],
)
def test_a_stage_gets_its_own_secrets_only_and_none_on_the_command_line(
    stage: str, mode: str, expected: set[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runner, "user", lambda: "1:1")
    environment = runner.variables(flags(stage, data), mode)
    assert set(environment) & set(SECRETS) == expected
    command = runner.container(flags(stage, data), mode, environment, "name")
    assert not [part for part in command if any(value in part for value in SECRETS.values())]


def test_a_release_that_does_not_push_has_no_secret_and_one_that_does_the_hub_s(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SECRETS, "HF_REPO": "somebody/something"}.items():
        monkeypatch.setenv(name, value)
    given = flags("16_release", data)
    for value in ("", "0", "yes"):
        monkeypatch.setenv("PUSH", value)
        assert set(runner.variables(given, "live")) & set(SECRETS) == set(), value
    monkeypatch.setenv("PUSH", "1")
    assert set(runner.variables(given, "live")) & set(SECRETS) == {"HF_TOKEN", "LOGFIRE_TOKEN"}
    assert {"PUSH": "1", "HF_REPO": "somebody/something"}.items() <= runner.variables(given, "live").items()
    assert set(runner.variables(given, "mock")) & set(SECRETS) == set()


# ---------------------------------------------------------------- what is mounted


def seen(stage: str, data: Path, **more: Any) -> dict[str, bool]:
    """What the container sees, paths of the repository from its root, others from the data directory."""
    top = str(data.parent.parent)
    found = runner.mounts(flags(stage, data, **more), "mock")
    return {path.replace(str(ROOT), ".").replace(top, "<data>"): writable for path, writable in found.items()}


CODE = {"./shared": False, "./stages": False}


def test_a_stage_writes_to_its_track_only_once_the_run_is_marked(data: Path) -> None:
    assert seen("12_choose", data) == {"<data>/trial": True, **CODE}
    (data.parent / ".apis").write_text("mock\n")
    assert seen("12_choose", data) == {"<data>/trial/compression": True, "<data>/trial/.apis": False, **CODE}


def test_the_stages_that_ask_models_have_the_reply_store_besides(data: Path) -> None:
    (data.parent / ".apis").write_text("mock\n")
    marked = {"<data>/trial/compression": True, "<data>/trial/.apis": False, **CODE}
    assert seen("04_validate", data) == marked | {"<data>/cache": True}
    assert seen("03_compress", data) == marked | {"<data>/cache": True, "./models": False}


def test_a_release_writes_beside_its_receipt_and_sees_the_records_it_cites(tmp_path: Path) -> None:
    track = tmp_path / "models" / "trial" / "compression"
    records = tmp_path / "data" / "trial" / "compression"
    earlier = [tmp_path / name / "bootstrap" / "compression" for name in ("models", "data")]
    for path in (track, records, records.with_name("grounded"), *earlier, tmp_path / "data" / "private"):
        path.mkdir(parents=True)
        (path.parent / ".apis").write_text("mock\n")
    given = flags("16_release", track)._replace(out=str(track / "16_release.json"))
    found = {path.replace(str(tmp_path), "<tmp>"): writable for path, writable in runner.mounts(given, "mock").items()}
    assert {path: writable for path, writable in found.items() if path.startswith("<tmp>")} == {
        "<tmp>/models/trial/compression": True,
        "<tmp>/models/trial/.apis": False,
        "<tmp>/data/trial/compression": False,
        "<tmp>/data/bootstrap/compression": False,
        "<tmp>/models/bootstrap/compression": False,
        "<tmp>/data/cache": True,
    }


def test_acquire_sees_its_sources_and_the_repository_but_no_data_besides(data: Path) -> None:
    found = seen("01_acquire", data)
    assert {"./.git": False, "./data/inputs": False, "<data>/cache": True}.items() <= found.items()
    assert {"./data", "./data/cache", ".", "./.env"} & set(found) == set()


def test_an_input_from_elsewhere_comes_with_its_vectors_and_report_and_nothing_else(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("10_embed.jsonl", "10_embed.parquet", "10_embed.report.json", "11_deduplicate.jsonl", "secret.txt"):
        (other / name).touch()
    found = runner.mounts(flags("11_deduplicate", data, source=other / "10_embed.jsonl"), "mock")
    assert sorted(Path(path).name for path in found if path.startswith(str(other))) == [
        "10_embed.jsonl",
        "10_embed.parquet",
        "10_embed.report.json",
    ]


def test_a_linked_input_is_mounted_where_it_points(data: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "facts.md", tmp_path / "link" / "facts.md"
    for path in (real, link):
        path.parent.mkdir()
    real.write_text("- a fact\n")
    link.symlink_to(real)
    found = runner.mounts(flags("05_extract_qa", data, source=link), "mock")
    assert {str(real), str(link)} <= set(found)


def test_the_sources_of_acquire_that_lie_on_this_machine_are_mounted(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    clone = tmp_path / "clone"
    (tmp_path / "texts").mkdir()
    (tmp_path / "export.zip").touch()
    subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(clone)], check=True)
    config.write_text(
        f"""
        [[sources]]
        kind = "documents"
        files = ["{tmp_path}/texts/**/*.md"]
        [[sources]]
        kind = "claude_export"
        path = "{tmp_path}/export.zip"
        [[sources]]
        kind = "git"
        url = "{clone}"
        [[sources]]
        kind = "git"
        url = "https://example.org/some/where"
        """
    )
    found = runner.mounts(flags("01_acquire", data, config=config), "live")
    assert {str(tmp_path / name) for name in ("texts", "export.zip", "clone")} <= set(found)
    objects = Path(subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "--git-path", "objects"], text=True))
    assert str(ROOT / str(objects).strip()) in found, "a shared clone has its objects elsewhere"


def test_a_pattern_at_the_top_of_the_repository_mounts_the_files_it_matches_not_the_repository() -> None:
    found = set(runner.sources({"sources": [{"kind": "documents", "files": ["*.md"]}]}))
    assert found == {str(path) for path in ROOT.glob("*.md")}


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_no_setting_mounts_the_whole_repository(place: str, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    tables = [f'kind = "git"\nurl = "{place}"', f'kind = "claude_export"\npath = "{place}"']
    config.write_text("".join(f"[[sources]]\n{table}\n" for table in tables))
    found = runner.mounts(flags("01_acquire", data, config=config), "live")
    assert not [path for path in found if Path(path) == ROOT or Path(path) in ROOT.parents]


def test_the_facts_of_extract_qa_are_mounted_wherever_they_are(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "facts.md"
    facts.write_text("- a fact\n")
    monkeypatch.setenv("FACTS", str(facts))
    assert runner.mounts(flags("05_extract_qa", data), "mock")[str(facts)] is False


def test_settings_that_are_no_settings_are_left_to_the_stage(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text('sources = [1, "x"]\n')
    assert runner.mounts(flags("01_acquire", data, config=config), "mock")


def test_a_worktree_is_mounted_with_the_repository_it_belongs_to(tmp_path: Path) -> None:
    origin = copy_of_repository(tmp_path / "origin")
    subprocess.run(["git", "-C", str(origin), "worktree", "add", "-q", str(tmp_path / "tree")], check=True)
    tree = load(tmp_path / "tree")
    assert str(origin / ".git") in set(tree.sources({"sources": [{"kind": "git", "url": "."}]}))


def test_docker_stop_waits_for_as_long_as_a_stage_may_take_to_end() -> None:
    assert runner.STOP_S > DRAIN_S


def test_a_path_with_a_comma_stays_one_path() -> None:
    assert runner.mount("/a,b", False) == 'type=bind,"source=/a,b","target=/a,b",readonly'


# ---------------------------------------------------------------- where it runs

NO_ENGINE = {"DOCKER": "no-such-client"}


def run(stage: str, data: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a stage through the runner."""
    script, config = f"stages/{stage}/main.py", f"stages/{stage}/trial.toml"
    out = data.parent / "patterns" / f"{stage}.jsonl"
    given = ["--out", str(out), "--config", config, "--track", "patterns", "--limit", "5", *more]
    command = [sys.executable, "docker/runner.py", script, *given]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"RUNNER": "auto"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def records(tmp_path: Path, data: Path) -> str:
    """Five lines that are no records: a stage that reads them keeps nothing and exits with 4."""
    path = tmp_path / "records.jsonl"
    path.write_text("no record\n" * 5)
    return str(path)


def test_native_is_the_script_itself_exit_code_and_all(data: Path, records: str) -> None:
    done = run("12_choose", data, "--in", records, RUNNER="native", **NO_ENGINE)
    assert done.returncode == 4, done.stderr
    assert "runner" not in done.stderr
    assert len((data.parent / "patterns" / "12_choose.rejects.jsonl").read_bytes().splitlines()) == 5


@pytest.mark.parametrize("name", ["auto", "native"])
def test_natively_the_runner_becomes_the_stage_so_that_a_signal_to_it_is_one_to_the_stage(
    name: str, data: Path, tmp_path: Path
) -> None:
    script = tmp_path / "12_choose" / "main.py"
    script.parent.mkdir()
    script.write_text("import os\nprint(os.getpid())\n")
    command = [sys.executable, "docker/runner.py", str(script), "--out", str(data / "x.jsonl"), "--config", "none.toml"]
    env = os.environ | NO_ENGINE | {"RUNNER": name}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and int(process.stdout.read()) == process.pid


def test_auto_without_docker_runs_natively_and_says_so(data: Path, records: str) -> None:
    done = run("12_choose", data, "--in", records, **NO_ENGINE)
    assert done.returncode == 4
    assert done.stderr.startswith("runner: native, Docker is not installed; `make images` sets up containers")


@pytest.mark.skipif(shutil.which("docker") is None, reason="there is no Docker client here")
def test_auto_without_an_engine_runs_natively_and_says_so(data: Path, records: str) -> None:
    done = run("12_choose", data, "--in", records, DOCKER_HOST="unix:///nonexistent/docker.sock")
    assert done.returncode == 4
    assert done.stderr.startswith("runner: native, no Docker engine answers (")


def test_auto_says_it_once_for_all_stages_of_a_make(data: Path, records: str) -> None:
    first, second = (run("12_choose", data, "--in", records, MAKELEVEL="1", **NO_ENGINE) for _ in range(2))
    assert "runner: native" in first.stderr
    assert "runner: native" not in second.stderr
    assert "runner: native" in run("12_choose", data, "--in", records, **NO_ENGINE).stderr, "by hand: every time"
    note = data.parent.parent / ".runner"
    assert note.read_text("utf-8").splitlines()[0] == f"{os.getpid()} native"
    os.utime(note, (1_000_000_000, 1_000_000_000))
    late = run("12_choose", data, "--in", records, MAKELEVEL="1", **NO_ENGINE)
    assert "runner: native" in late.stderr, "an old note was another make's, of the same number"


def test_docker_without_docker_stops_before_anything(data: Path, records: str) -> None:
    done = run("12_choose", data, "--in", records, RUNNER="docker", **NO_ENGINE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RUNNER=docker, but Docker is not installed\n  next: start Docker")
    assert not (data.parent / "patterns").exists()


def test_another_runner_is_refused(data: Path) -> None:
    done = run("12_choose", data, RUNNER="podman")
    assert done.returncode == 2
    assert "RUNNER must be one of auto, docker, native, got 'podman'" in done.stderr


def test_help_is_the_stage_s_own(data: Path) -> None:
    command = [sys.executable, "docker/runner.py", "stages/12_choose/main.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"RUNNER": "docker"})
    assert done.returncode == 0
    assert done.stdout.startswith("usage: stages/12_choose/main.py")


def compress_with(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "compress.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('generator = "mlx"', "MLX is in no image"),
        ('generator = "teacher"\n[tracks.compression]\ngenerator = "mlx"', "MLX is in no image"),
        ('generator = "mlx"\n[tracks.compression]\ngenerator = "teacher"', ""),
        (
            'generator = "endpoint"\n[endpoint]\nbase_url = "http://127.0.0.1:8000/v1"',
            "the endpoint is on this machine",
        ),
        (
            'generator = "endpoint"\n[endpoint]\nbase_url = "http://localhost:8000/v1"',
            "the endpoint is on this machine",
        ),
        ('generator = "endpoint"\n[endpoint]\nbase_url = "https://gpu.example.org/v1"', ""),
        ('generator = "endpoint"\n[endpoint]\nbase_url = ""', ""),
        ('generator = "teacher"\n[endpoint]\nbase_url = "http://127.0.0.1:8000/v1"', ""),
        ("generator = [broken", ""),
    ],
)
def test_compress_runs_natively_when_what_it_needs_is_here_alone(
    settings: str, reason: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in BASE_URLS:
        monkeypatch.delenv(name)  # the tests' own point at loopback
    said = runner.only_here(flags("03_compress", data, config=compress_with(tmp_path, settings)), "live")
    assert said.startswith(reason) and bool(said) == bool(reason)


def test_a_server_on_loopback_is_asked_natively(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BASE_URLS:
        monkeypatch.delenv(name)
    assert runner.only_here(flags("04_validate", data), "live") == ""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert runner.only_here(flags("04_validate", data), "live") == "OPENAI_BASE_URL is on this machine's loopback"
    assert runner.only_here(flags("13_format", data), "live") == "", "it asks nobody"


def test_a_cluster_is_used_natively(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", "ray")
    assert "ENGINE=ray" in runner.only_here(flags("11_deduplicate", data), "mock")
    assert runner.only_here(flags("13_format", data), "mock") == ""


def test_the_makefile_has_the_same_default_and_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNNER")
    assert "RUNNER" in make(ROOT, "help").stdout and "(now: auto)" in make(ROOT, "help").stdout
    makefile = re.search(r"^IMAGES := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert makefile is not None and makefile[1].split() == list(runner.IMAGES)


def test_images_are_made_before_a_run_in_containers_and_are_no_reason_to_run_again(tmp_path: Path) -> None:
    copy = copy_of_repository(tmp_path / "synthmill")
    first = make(copy, "-n", "data/trial/patterns/08_pattern.jsonl", RUNNER="docker").stdout.splitlines()
    images = [number for number, line in enumerate(first) if "docker/images.py" in line]
    stage = next(number for number, line in enumerate(first) if "stages/08_pattern/main.py" in line)
    assert len(images) == len(runner.IMAGES) and max(images) < stage
    for runs in ("auto", "native"):
        plan = make(copy, "-n", "data/trial/patterns/08_pattern.jsonl", RUNNER=runs).stdout
        assert "docker/images.py" not in plan
        assert ("docker/runner.py stages" in plan) is (runs == "auto")


# ---------------------------------------------------------------- which image


def test_a_changed_pin_makes_another_image_and_another_group_does_not(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docker", tmp_path / "docker", ignore=shutil.ignore_patterns("__pycache__"))
    copy = load(tmp_path)
    before = {name: copy.reference(name) for name in copy.IMAGES}
    assert before == {name: runner.reference(name) for name in runner.IMAGES}
    with open(tmp_path / "docker/requirements/data.txt", "a", encoding="utf-8") as file:
        file.write("# another pin\n")
    assert copy.reference("data") != before["data"]
    assert copy.reference("llm") == before["llm"]


def test_no_image_is_called_latest() -> None:
    for name in runner.IMAGES:
        assert re.fullmatch(rf"synthmill-{name}:[0-9a-f]{{12}}", runner.reference(name))
    for file in ("Dockerfile", "compose.yaml"):
        assert "latest" not in (ROOT / "docker" / file).read_text("utf-8")


@pytest.mark.parametrize(
    ("names", "said"), [([], "no Docker engine answers: not installed"), (["gpu"], "no image is called 'gpu'")]
)
def test_images_that_cannot_be_built_are_an_error_with_a_way_on(names: list[str], said: str) -> None:
    command = [sys.executable, "docker/images.py", *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | NO_ENGINE, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}") and "\n  next: " in done.stderr
