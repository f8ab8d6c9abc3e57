"""The Makefile: what hangs on what, that planning changes nothing, and that GNU Make 3.81 (macOS) sees it the same way.

No stage runs here: outputs are empty files with the right ages. `MAKE381=/path/to/make` adds that version.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import ROOT, copy_of_repository, make

STAGES = sorted(path.name for path in (ROOT / "stages").iterdir() if (path / "main.py").exists() and path.name < "14")
"""Those that make records; 14 to 16 make receipts, and a rule of their own kind."""
DESIGN = {
    "compression": ("01", "02", "03", "04", "10", "11", "12", "13"),
    "grounded": ("05", "06", "07", "09", "10", "11", "12", "13"),
    "patterns": ("08", "09", "10", "11", "12", "13"),
}
"""Which stages each track has, in order."""
PLAN = {track: [stage for stage in STAGES if stage[:2] in numbers] for track, numbers in DESIGN.items()}
STEP = re.compile(r"stages/(\d\d_\w+)/main\.py.* --out (\S+) --config (\S+) --track (\w+) --limit (\d+)")

Step = tuple[str, str]
"""A stage and a track."""
Make = Callable[..., subprocess.CompletedProcess[str]]


def tracks_of(stage: str) -> list[str]:
    return [track for track, stages in PLAN.items() if stage in stages]


def after(*stages: str) -> set[Step]:
    """These stages and all that hangs on them."""
    return {
        (later, track)
        for stage in stages
        for track in tracks_of(stage)
        for later in PLAN[track][PLAN[track].index(stage) :]
    }


def steps(plan: str, run: str = "trial") -> list[Step]:
    """The stages of a run in the order that `make -n` would run them."""
    found = []
    for line in plan.splitlines():
        if match := STEP.search(line):
            stage, out, config, track, _ = match.groups()
            if out.startswith(f"data/{run}/"):
                assert out.startswith(f"data/{run}/{track}/{stage}."), line
                assert config == f"stages/{stage}/{run}.toml", line
                found.append((stage, track))
    return found


def listing(root: Path) -> dict[str, float]:
    """Every file and directory with its age."""
    return {str(p.relative_to(root)): p.lstat().st_mtime for p in root.rglob("*") if ".git" not in p.parts}


@pytest.fixture(params=["make", "make 3.81"])
def program(request: pytest.FixtureRequest) -> str:
    if request.param == "make":
        return "make"
    old = os.environ.get("MAKE381", "")
    if not old:
        pytest.skip("NOT TESTED with GNU Make 3.81: set MAKE381=/path/to/make (on macOS: /usr/bin/make)")
    version = subprocess.run([old, "--version"], capture_output=True, text=True, check=True).stdout
    assert "GNU Make 3.81" in version
    return old


@pytest.fixture(scope="module")
def _copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_repository(tmp_path_factory.mktemp("makefile") / "synthmill")


@pytest.fixture
def fresh(_copy: Path) -> Iterator[Path]:
    """A copy in which nothing was made yet, everything in it equally old."""
    yield _copy
    for run in ("trial", "full", "cache"):
        shutil.rmtree(_copy / "data" / run, ignore_errors=True)
        shutil.rmtree(_copy / "models" / run, ignore_errors=True)
    for path in _copy.rglob("*"):
        if path.is_file() and ".git" not in path.parts and ".venv" not in path.parts:
            os.utime(path, (1_000_000_000, 1_000_000_000))
    os.utime(_copy / ".venv" / ".setup", (1_000_000_001, 1_000_000_001))
    os.utime(_copy / "uv.lock", (1_000_000_002, 1_000_000_002))


@pytest.fixture
def run_make(fresh: Path, program: str) -> Make:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return make(fresh, *arguments, MAKE=program)

    return call


@pytest.fixture
def built(fresh: Path, run_make: Make) -> Path:
    """A copy in which both runs are made."""
    for path in fresh.rglob("*"):
        if path.is_file() and ".git" not in path.parts and ".venv" not in path.parts:
            os.utime(path, (1_000_000_000, 1_000_000_000))
    os.utime(fresh / ".venv" / ".setup", (1_000_000_001, 1_000_000_001))
    age = 1_000_000_010
    for run in ("trial", "full"):
        for line in run_make("-n", run).stdout.splitlines():
            if mark := re.match(rf"touch (data/{run}/\S+)", line):  # with which variables the run was made
                (fresh / mark[1]).parent.mkdir(parents=True, exist_ok=True)
                (fresh / mark[1]).touch()
                os.utime(fresh / mark[1], (1_000_000_003, 1_000_000_003))
            if match := STEP.search(line):  # receipts too
                out = fresh / match[2]
                out.parent.mkdir(parents=True, exist_ok=True)
                out.touch()
                os.utime(out, (age, age))
                age += 1
    return fresh


def touch(path: Path) -> None:
    assert path.exists()
    os.utime(path, (1_100_000_000, 1_100_000_000))


# ---------------------------------------------------------------- the plan


def test_the_trial_is_every_stage_of_every_track_in_order(run_make: Make) -> None:
    plan = run_make("-n", "trial")
    assert plan.returncode == 0, plan.stderr
    for track, stages in PLAN.items():
        assert [stage for stage, t in steps(plan.stdout) if t == track] == stages
    assert steps(plan.stdout, "full") == []


def test_the_full_run_is_the_same_and_starts_with_preflight(run_make: Make) -> None:
    plan = run_make("-n", "full").stdout
    for track, stages in PLAN.items():
        assert [stage for stage, t in steps(plan, "full") if t == track] == stages
    first = min(plan.index(f"stages/{stage}/main.py") for stage in STAGES)
    assert "shared.preflight --run full" in plan[:first]
    assert plan.count("shared.preflight") == 1


def test_each_step_reads_what_the_step_before_it_wrote(run_make: Make) -> None:
    plan = run_make("-n", "trial").stdout
    for track, stages in PLAN.items():
        for before, stage in itertools.pairwise(stages):
            (line,) = (
                one for one in plan.splitlines() if f"stages/{stage}/main.py" in one and f"--track {track}" in one
            )
            assert f"--in data/trial/{track}/{before}.jsonl " in line


def test_planning_creates_nothing_and_needs_no_set_up(tmp_path: Path, program: str) -> None:
    copy = copy_of_repository(tmp_path / "synthmill")
    shutil.rmtree(copy / ".venv")
    (copy / "uv.lock").unlink()
    before = listing(copy)
    for target in ("trial", "full", "setup", "test", "stage4"):
        plan = make(copy, "-n", target, MAKE=program)
        assert plan.returncode == 0, plan.stderr
        assert plan.stdout.count("docker/setup.py") == 1, "it says that set-up comes first, once"
    assert make(copy, "help", MAKE=program).returncode == 0
    assert listing(copy) == before


def test_planning_in_parallel_finds_the_same_steps(run_make: Make) -> None:
    assert sorted(steps(run_make("-n", "-j8", "trial").stdout)) == sorted(steps(run_make("-n", "trial").stdout))


# ---------------------------------------------------------------- what hangs on what


def test_a_second_run_does_nothing(built: Path, run_make: Make) -> None:
    again = run_make("-q", "trial")
    assert again.returncode == 0, run_make("-n", "trial").stdout
    assert steps(run_make("-n", "full").stdout, "full") == []


def test_changed_settings_run_again_what_hangs_on_them_and_nothing_else(built: Path, run_make: Make) -> None:
    for stage in STAGES:
        for run, other in (("trial", "full"), ("full", "trial")):
            settings = built / "stages" / stage / f"{run}.toml"
            touch(settings)
            assert set(steps(run_make("-n", run).stdout, run)) == after(stage)
            assert steps(run_make("-n", other).stdout, other) == [], f"{stage}/{run}.toml is no business of {other}"
            os.utime(settings, (1_000_000_000, 1_000_000_000))


def source_files(stage: str) -> list[str]:
    """Everything in a stage's directory that its output depends on, but for the settings."""
    root = ROOT / "stages" / stage
    return [
        str(path.relative_to(ROOT))
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.name not in ("trial.toml", "full.toml", "bootstrap.toml")
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_every_prompt_and_module_of_a_stage_is_a_prerequisite(built: Path, run_make: Make, stage: str) -> None:
    assert f"stages/{stage}/main.py" in source_files(stage)
    for name in source_files(stage):
        touch(built / name)
        planned = steps(run_make("-n", "trial").stdout)
        missing = after(stage) - set(planned)
        assert not missing, f"{name} changes what {stage} writes, but make would not run it again"
        os.utime(built / name, (1_000_000_000, 1_000_000_000))


def test_a_lost_output_is_made_again_with_what_hangs_on_it(built: Path, run_make: Make) -> None:
    (built / "data/trial/compression/04_validate.jsonl").unlink()
    expected = {(stage, track) for stage, track in after("04_validate") if track == "compression"}
    assert set(steps(run_make("-n", "trial").stdout)) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_stage_n_runs_that_one_again_although_it_is_up_to_date(built: Path, run_make: Make, stage: str) -> None:
    plan = run_make("-n", f"stage{int(stage[:2])}").stdout
    assert sorted(steps(plan)) == sorted((stage, track) for track in tracks_of(stage))
    full = run_make("-n", f"stage{int(stage[:2])}", "RUN=full").stdout
    assert sorted(steps(full, "full")) == sorted((stage, track) for track in tracks_of(stage))
    assert steps(full) == []


def test_a_fresh_environment_does_not_make_paid_outputs_anew(built: Path, run_make: Make) -> None:
    touch(built / ".venv" / ".setup")
    assert run_make("-q", "trial").returncode == 0


def test_clean_removes_one_run_and_leaves_the_paid_answers(built: Path, run_make: Make) -> None:
    (built / "data/cache").mkdir()
    (built / "data/cache/live.sqlite").write_text("paid")
    inputs = set((built / "data/inputs").rglob("*"))
    assert run_make("clean").returncode == 0
    assert not (built / "data/trial").exists()
    assert (built / "data/full/compression/13_format.jsonl").exists()
    assert (built / "data/cache/live.sqlite").read_text() == "paid"
    assert set((built / "data/inputs").rglob("*")) == inputs
    assert (built / "models" / "tiny").exists() == (ROOT / "models" / "tiny").exists()


@pytest.mark.parametrize("run", ["inputs", "cache", "tiny", "", "../..", "trail", ". trial"])
def test_clean_refuses_what_is_no_run(run_make: Make, run: str) -> None:
    refused = run_make("-n", "clean", f"RUN={run}")  # only planned: this test must not depend on being right
    assert refused.returncode != 0 and "RUN" in refused.stderr
    assert "rm " not in refused.stdout


def test_limit_reaches_every_stage(run_make: Make) -> None:
    plan = run_make("-n", "trial", "LIMIT=7").stdout
    assert {match[5] for match in STEP.finditer(plan)} == {"7"}


@pytest.mark.parametrize("variable", ["LIMIT=7", "FACTS=data/inputs/README.md"])
def test_a_run_made_with_other_variables_is_made_again(built: Path, run_make: Make, variable: str) -> None:
    assert run_make("-q", "trial").returncode == 0
    assert len(steps(run_make("-n", "trial", variable).stdout)) == sum(map(len, PLAN.values())), "or a few would do"
    assert run_make("-q", "trial").returncode == 0, "planning it changed nothing"


# ---------------------------------------------------------------- help and directories


def words(name: str) -> list[str]:
    return [
        word for line in re.findall(rf"^{name}:(.*)$", (ROOT / "Makefile").read_text(), re.M) for word in line.split()
    ]


def test_help_names_every_target_and_every_variable(run_make: Make) -> None:
    shown = run_make("help").stdout
    assert run_make().stdout == shown, "make alone is make help"
    targets_shown, variables_shown = (
        set(re.findall(r"^  (\w+) ", part, re.M)) for part in shown.split("\nvariables\n")
    )
    assert targets_shown == {word for word in words(r"\.PHONY") if re.fullmatch(r"[a-z]\w*", word)}
    assert variables_shown == set(re.findall(r"^(\w+) *\?=", (ROOT / "Makefile").read_text(), re.M))


def test_every_stage_has_a_rule_a_help_line_and_its_settings() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for stage in STAGES:
        assert re.search(rf"^\$\(call out,{stage},", makefile, re.M), f"no rule for {stage}"
        name = stage[3:]
        assert re.search(rf"^stage{int(stage[:2])}: .*## {name}: ", makefile, re.M), f"no help line for {stage}"
        for run in ("trial", "full"):
            assert (ROOT / "stages" / stage / f"{run}.toml").exists()
    ruled = {stage for stage in re.findall(r"^\$\(call out,(\d\d_\w+),", makefile, re.M) if stage < "14"}
    assert ruled == set(STAGES), "and no rule is for a stage that does not exist"


def test_make_test_runs_every_test_file_in_one_of_its_parts(run_make: Make) -> None:
    plan = run_make("-n", "test").stdout
    parts = [shlex.split(line)[3:] for line in plan.splitlines() if " -m pytest " in line]
    assert len(parts) > 1

    def runs(part: list[str], path: Path) -> bool:
        flags = [flag.partition("=") for flag in part if flag.startswith("--")]
        assert {name for name, _, _ in flags} <= {"--ignore", "--ignore-glob"}, "nothing else leaves anything out"
        wanted = any(path.is_relative_to(ROOT / place) for place in part if not place.startswith("--"))
        left_out = any(
            fnmatch(str(path), value) if name == "--ignore-glob" else path.is_relative_to(ROOT / value)
            for name, _, value in flags
        )
        return wanted and not left_out

    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        assert sum(runs(part, path) for part in parts) == 1, path


# ---------------------------------------------------------------- training, measuring, releasing


def receipts(plan: str) -> list[str]:
    """The receipts that a plan writes, in order."""
    return re.findall(r"--out (models/\S+\.json)", plan)


def test_the_trial_goes_on_to_train_measure_and_lay_out_one_track(run_make: Make) -> None:
    made = [f"models/trial/compression/{name}.json" for name in ("14_train", "15_evaluate", "16_release")]
    assert receipts(run_make("-n", "trial").stdout) == made


def test_bootstrap_ends_with_an_adapter_and_begins_with_preflight(run_make: Make) -> None:
    plan = run_make("-n", "bootstrap").stdout
    assert "shared.preflight --run bootstrap" in plan
    assert receipts(plan) == ["models/bootstrap/compression/14_train.json"]
    assert {track for _, track in steps(plan, "bootstrap")} == {"compression"}


@pytest.mark.parametrize("stage", ["14_train", "16_release"])
def test_editing_code_never_trains_or_publishes_again(built: Path, run_make: Make, stage: str) -> None:
    for path in (built / "stages" / stage).glob("*.py"):
        touch(path)
    assert receipts(run_make("-n", "trial").stdout) == []


def test_new_data_is_trained_on_measured_and_laid_out(built: Path, run_make: Make) -> None:
    touch(built / "data/trial/compression/13_format.jsonl")
    assert [Path(name).stem for name in receipts(run_make("-n", "trial").stdout)] == [
        "14_train",
        "15_evaluate",
        "16_release",
    ]


@pytest.mark.parametrize("number", [14, 15, 16])
@pytest.mark.parametrize("track", PLAN)
def test_a_stage_with_a_receipt_runs_again_on_the_track_that_is_named(
    built: Path, run_make: Make, number: int, track: str
) -> None:
    plan = run_make("-n", f"stage{number}", f"TRACK={track}").stdout
    assert receipts(plan)[-1].startswith(f"models/trial/{track}/{number}_")
    assert ("RETRAIN=1" in plan) == (number == 14), "only who asks for 14 trains again"


@pytest.mark.parametrize("goal", ["trial", "full", "stage16", "models/trial/compression/16_release.json"])
def test_no_dependency_publishes_whatever_push_says(run_make: Make, goal: str) -> None:
    plan = run_make("-n", goal, "PUSH=1", "HF_REPO=org/name").stdout
    assert [line for line in plan.splitlines() if "16_release/main.py" in line and not line.startswith("PUSH= ")] == []


def test_release_publishes_only_when_asked(built: Path, run_make: Make) -> None:
    assert "16_release" not in run_make("-n", "release").stdout
    assert "16_release" not in run_make("-n", "release", "PUSH=0").stdout
    assert "PUSH=1 HF_REPO=org/name" in run_make("-n", "release", "PUSH=1", "HF_REPO=org/name").stdout


def test_no_decision_is_made_while_the_makefile_is_read() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "$(shell" not in makefile
    lines = [line for line in makefile.splitlines() if "wildcard" in line]
    assert all(re.match(r"\w+ +=", line) for line in lines), "in what recipes expand, when they run"
    assert not re.search(r"^\t[^#\n]*[^|]\|[^|]", makefile, re.M), (
        "3.81 knows no pipefail: a pipe in a recipe hides a failure"
    )
    assert "&:" not in makefile, "3.81 runs the recipe of grouped targets twice"


@pytest.mark.parametrize(
    "wrong",
    ["APIS=lve", "BATCH=2", "RUNNER=dockr", "ENGINE=spark", "TRACK=nope", "BUDGET_USD=abc", "LIMIT=-1", "LIMIT=5 6"],
)
def test_a_wrong_variable_is_said_also_where_nothing_would_be_made(built: Path, run_make: Make, wrong: str) -> None:
    assert run_make("-q", "trial", "BUDGET_USD=0.50", "LIMIT=0", "BATCH=", "APIS=").returncode == 0
    done = run_make("trial", wrong)
    assert done.returncode == 2 and f"{wrong.partition('=')[0]} must be" in done.stderr, done.stderr


def test_a_stage_that_is_not_there_is_said(run_make: Make) -> None:
    assert "stages are stage1 to stage16, got 'stage99'" in run_make("stage99").stderr


@pytest.mark.parametrize("goal", ["trial", "compression", "stage4"])
def test_a_run_of_the_standin_does_not_pass_for_a_live_one(built: Path, run_make: Make, goal: str) -> None:
    (built / "data" / "trial" / ".apis-mock").touch()
    assert run_make("-q", "trial").returncode == run_make("-q", "trial", "APIS=mock").returncode == 0
    done = run_make("-n", goal, "APIS=live")
    assert "data/trial holds outputs of APIS=mock; this command has APIS=live" in done.stdout
    assert "never mix" not in run_make("-n", "full", "APIS=live").stdout
    (built / ".env").touch()
    done = run_make("trial", "APIS=")
    assert done.returncode == 2 and "next: make clean RUN=trial" in done.stderr, done.stdout
