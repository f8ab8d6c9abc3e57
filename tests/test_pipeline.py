"""`make trial` in fresh clones: what it makes, that it is the same bytes every time, and that nothing is sent twice.

The first of them is the trial that .ci/run has just made in this checkout, where it has: ``NATIVE_TRIAL``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from safetensors.numpy import load_file

import shared.estimate as forecast
from shared.llm.store import Store
from shared.records import Example, Pair, RawText
from shared.stage import read_records
from tests.conftest import ROOT, StandinLog, clone_of, closed_environment, copy_of_repository, environment_of, make
from tests.tiny_qwen3 import make_model

pytestmark = pytest.mark.slow

TRACKS = ("compression", "grounded", "patterns")
VALIDATED = "data/trial/compression/04_validate.jsonl"
PANEL, TASKS, CONCURRENCY = 2, 2, 8
"""Of stages/04_validate/trial.toml."""
NATIVE_TRIAL = os.environ.get("NATIVE_TRIAL", "")
"""A file: the messages (stderr) of `make trial` from nothing in this checkout, and behind them its processor time."""


@dataclass
class Clone:
    """A clone in which `make trial` ran."""

    root: Path
    log: StandinLog
    done: subprocess.CompletedProcess[str]
    cpu_s: float

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.mark()
        return make(self.root, *arguments, STANDIN_LOG=str(self.log.path), **environment)

    def to_models(self) -> list[dict[str, Any]]:
        """The requests to models since the last `make`."""
        return [line for line in self.log.requests() if line["method"] == "POST"]

    def track(self, name: str = "compression") -> Path:
        return self.root / "data" / "trial" / name

    def lines(self) -> dict[str, bytes]:
        """Every .jsonl of the run."""
        run = self.root / "data" / "trial"
        return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.jsonl"))}


DATA = ("compression", "grounded", "patterns")
"""What makes all the data of a trial, and trains nothing."""


def trial(root: Path, *flags: str) -> Clone:
    """Make a trial in the clone at ``root``."""
    clone = Clone(root, StandinLog(root / "data" / "requests.log"), None, 0.0)  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    clone.done = clone.make(*flags)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    clone.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert clone.done.returncode == 0, clone.done.stdout[-2000:] + clone.done.stderr[-6000:]
    return clone


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


def made_here(root: Path) -> Clone | None:
    """A clone with the trial that was made in this checkout; None when there is none of exactly what is committed."""
    said = Path(NATIVE_TRIAL).read_text("utf-8") if NATIVE_TRIAL else ""
    head = git("rev-parse", "HEAD").strip()
    reports = [path for run in ("data", "models") for path in (ROOT / run / "trial").rglob("*.report.json")]
    from_nothing = "01_acquire  in " in said and "16_release  in " in said
    of_head = reports and all(orjson.loads(path.read_bytes())["git"] == head for path in reports)
    if not from_nothing or not of_head or git("status", "--porcelain"):
        return None
    clone_of(ROOT, root)
    for name in git("ls-files", "-z").split("\0")[:-1]:
        os.utime(root / name, (1_000_000_000, 1_000_000_000))  # older than what was made of it
    for made in ("data/trial", "data/cache", "models/trial"):
        shutil.copytree(ROOT / made, root / made, symlinks=True, ignore=shutil.ignore_patterns("*live*"))
    seconds = re.search(r"^processor time: ([\d.]+) \+ ([\d.]+) s$", said, re.M)
    assert seconds, f"{NATIVE_TRIAL} does not end as .ci/run has it"
    done = subprocess.CompletedProcess(["make", "trial"], 0, "", said)
    return Clone(root, StandinLog(root / "data" / "requests.log"), done, float(seconds[1]) + float(seconds[2]))


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    root = tmp_path_factory.mktemp("first") / "synthmill"
    with environment_of(closed_environment()):
        return made_here(root) or trial(copy_of_repository(root), "-j1", "trial")


@pytest.fixture(scope="session")
def second(first: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    root = tmp_path_factory.mktemp("second") / "elsewhere" / "a-clone"
    with environment_of(closed_environment()):
        return trial(clone_of(first.root, root), "-j4", *DATA)


# ---------------------------------------------------------------- what it makes


def test_what_the_trial_costs_was_estimated_before_anything_was_there(first: Clone, tmp_path: Path) -> None:
    if not (first.root / "models/trial/compression/15_evaluate.json").exists():
        pytest.skip("NOT COMPARED: without MLX nothing is evaluated")
    low, expected, high = forecast.total_usd(forecast.estimate("trial", tmp_path / "data"))
    with closing(Store(first.root / "data/cache/mock.sqlite")) as store:
        paid = store.spent_usd("trial")
    print(f"{low:.4f} / {expected:.4f} / {high:.4f}, paid {paid:.4f}: {expected / paid - 1:+.1%}")
    assert low < paid < high and expected == pytest.approx(paid, rel=0.2)


def test_the_trial_ends_with_a_table_and_enough_examples(first: Clone) -> None:
    said = first.done.stderr
    examples = list(read_records(first.track() / "13_format.jsonl", Example))
    assert len(examples) >= 40
    assert {example.domain for example in examples} == {"code", "prose"}
    assert all(sum(example.split == split for example in examples) for split in ("train", "valid", "test"))
    table = said[said.index("trial/compression") :]
    for stage in ("01_acquire", "02_merge", "03_compress", "04_validate", "12_choose", "total"):
        assert re.search(rf"^ +{stage} +[\d,]+ +[\d,]+ +[\d,]+", table, re.M), f"{stage} is not in the table"
    assert f"{len(examples)} training examples" in said
    assert "stand-in" in table, "it says that nothing was paid"


def test_the_trial_is_a_matter_of_minutes(first: Clone) -> None:
    # Processor time, so that a busy machine does not matter: on one core it is the most the clock can show.
    print(f"make trial: {first.cpu_s:.0f} s of processor time")
    assert first.cpu_s < 240


def test_every_stage_accounts_for_every_record(first: Clone) -> None:
    reports = sorted((first.root / "data" / "trial").glob("*/*.report.json"))
    assert len(reports) >= 8
    for path in reports:
        counts = orjson.loads(path.read_bytes())["counts"]
        records = path.with_name(path.name.replace(".report.json", ".jsonl")).read_bytes().count(b"\n")
        rejects = path.with_name(path.name.replace(".report.json", ".rejects.jsonl")).read_bytes().count(b"\n")
        assert counts["planned"] == counts["kept"] + counts["rejected"], path
        assert (records, rejects) == (counts["kept"], counts["rejected"]), path
    assert all(orjson.loads(path.read_bytes())["apis"] == "mock" for path in reports)


def test_most_pairs_pass_the_panel_and_some_do_not(first: Clone) -> None:
    summary = orjson.loads((first.track() / "04_validate.report.json").read_bytes())["summary"]
    assert 0.6 < summary["all"]["pass_rate"] < 1, "the stand-in compresses a share of the texts badly"
    rejects = [orjson.loads(line) for line in (first.track() / "04_validate.rejects.jsonl").read_bytes().splitlines()]
    failed = [reject for reject in rejects if reject["reason"] == "not_equivalent"]
    assert failed and all(reject["record"]["verdicts"]["panel"] for reject in failed), "failed pairs keep their scores"


def test_nothing_is_left_lying_about(first: Clone) -> None:
    status = subprocess.run(["git", "-C", str(first.root), "status", "--porcelain"], capture_output=True, text=True)
    assert status.stdout == ""
    assert [p.name for p in (first.root / "data").rglob("*.part")] == []


# ---------------------------------------------------------------- the same every time


def test_two_clones_make_the_same_bytes_whatever_j(first: Clone, second: Clone) -> None:
    one, two = first.lines(), second.lines()
    assert sorted(one) == sorted(two)
    assert {f"{track}/13_format.jsonl" for track in TRACKS} <= set(one)
    assert [name for name in one if one[name] != two[name]] == []


def test_no_path_of_this_machine_and_no_time_is_in_the_records(first: Clone) -> None:
    for name, lines in first.lines().items():
        assert str(first.root).encode() not in lines, name
        assert not re.search(rb'"[^"]*(_at|time|date)":"?20\d\d-', lines), name


def test_a_second_trial_does_nothing(first: Clone) -> None:
    assert make(first.root, "-q", "trial").returncode == 0
    again = first.make("trial")
    assert "stages/" not in again.stdout and first.log.requests() == []


def test_an_output_that_is_lost_is_made_again_without_a_request(first: Clone) -> None:
    before = first.lines()
    (first.root / VALIDATED).unlink()
    again = first.make("trial")
    assert again.returncode == 0, again.stderr
    assert first.to_models() == [] == first.log.requests()
    assert first.lines() == before
    report = orjson.loads((first.track() / "04_validate.report.json").read_bytes())
    assert report["spending"]["calls"] == 0 and report["spending"]["cost_usd"] == 0


def test_a_run_from_stored_answers_is_the_same_under_j8(second: Clone) -> None:
    before = second.lines()
    shutil.rmtree(second.root / "data" / "trial")
    again = second.make("-j8", *DATA)
    assert again.returncode == 0, again.stderr
    assert second.to_models() == []
    assert second.lines() == before


def test_a_wrong_setting_stops_make_and_leaves_what_was_there(second: Clone) -> None:
    before = second.lines()
    settings = second.root / "stages" / "12_choose" / "trial.toml"
    good = settings.read_text()
    settings.write_text("not_a_setting = 1\n" + good)
    try:
        refused = second.make("compression")
    finally:
        settings.write_text(good)
        os.utime(settings, (1_000_000_000, 1_000_000_000))
    assert refused.returncode != 0
    assert "stages/12_choose/trial.toml" in refused.stderr and "unknown key 'not_a_setting'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert second.lines() == before
    assert make(second.root, "-q", *DATA).returncode == 0


def test_live_after_mock_is_refused_with_the_command_that_clears_the_way(second: Clone) -> None:
    before = second.lines()
    settings = second.root / "stages" / "10_embed" / "trial.toml"
    settings.touch()
    refused = second.make("compression", APIS="live")
    os.utime(settings, (1_000_000_000, 1_000_000_000))
    assert refused.returncode != 0
    assert "holds outputs of APIS=mock" in refused.stderr and "make clean RUN=trial" in refused.stderr
    assert second.lines() == before and second.log.requests() == []


# ---------------------------------------------------------------- money and kills


@pytest.fixture
def unasked(first: Clone, tmp_path: Path) -> Iterator[Clone]:
    """A clone in which the trial got as far as 03; nothing is stored yet."""
    root = clone_of(first.root, tmp_path / "unasked")
    target = root / "data" / "trial" / "compression"
    target.mkdir(parents=True)
    for mark in (first.root / "data" / "trial").glob(".*"):  # whose run it is, with which variables it was made
        shutil.copy2(mark, target.parent)
    for path in first.track().glob("0[123]_*"):
        shutil.copy2(path, target)
        path = target / path.name
        os.utime(path, None)
    for name in ("01_acquire", "02_merge", "03_compress"):  # each newer than what it was made from
        os.utime(target / f"{name}.jsonl", None)
        time.sleep(0.02)
    yield Clone(root, StandinLog(tmp_path / "requests.log"), first.done, 0.0)


def ledger(clone: Clone, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(clone.root / "data" / "cache" / "mock.sqlite")) as db:
        return db.execute(query).fetchall()


def test_a_budget_stops_the_trial_and_more_of_it_goes_on(unasked: Clone, first: Clone) -> None:
    stopped = unasked.make("compression", "BUDGET_USD=0.01")
    assert stopped.returncode != 0
    assert "BUDGET_USD=0.01 is reached for RUN=trial" in stopped.stderr
    assert "go on with BUDGET_USD=<more> make trial" in stopped.stderr
    assert "Error 5" in stopped.stderr and "Traceback" not in stopped.stderr
    ((spent,),) = ledger(unasked, "SELECT nano FROM spent WHERE run = 'trial'")
    assert 0.008e9 < spent <= 0.01e9, f"${spent / 1e9:.4f} of $0.01"
    assert not (unasked.root / VALIDATED).exists()
    sent = len(unasked.to_models())

    assert unasked.make(VALIDATED).returncode == 0
    assert sent + len(unasked.to_models()) == len(ledger(unasked, "SELECT key FROM ledger")), "nothing was sent twice"
    assert (unasked.root / VALIDATED).read_bytes() == (first.root / VALIDATED).read_bytes()


def python_of(parent: int, script: str) -> int:
    """The process that make started for a stage."""
    every = ["ps", "-A", "-ww", "-o", "pid=,ppid=,command="]  # -ww: whole, where some cut a line at 80 characters
    listing = subprocess.run(every, capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        pid, ppid, command = line.split(None, 2)
        if int(ppid) == parent and script in command:
            return int(pid)
    return 0


def test_kill_9_on_the_way_costs_nothing_but_what_was_under_way(unasked: Clone, first: Clone) -> None:
    environment = os.environ | {"STANDIN_LOG": str(unasked.log.path)}
    environment.pop("STANDIN_URL", None)
    store = unasked.root / "data" / "cache" / "mock.sqlite"
    running = subprocess.Popen(
        ["make", VALIDATED], cwd=unasked.root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    answered = 0
    while answered < 150 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        if store.exists():
            try:
                ((answered,),) = ledger(unasked, "SELECT COUNT(*) FROM replies")
            except sqlite3.OperationalError:  # not set up yet
                continue
    stage = python_of(running.pid, "stages/04_validate/main.py")
    assert stage, "04 was still running"
    os.kill(stage, signal.SIGKILL)
    assert running.wait(timeout=30) != 0
    assert not (unasked.root / VALIDATED).exists()
    stored = {key for (key,) in ledger(unasked, "SELECT key FROM replies")}
    assert 150 <= len(stored) < len(ledger(first, "SELECT key FROM replies WHERE key IN (SELECT key FROM ledger)"))
    served = Counter(line["sha256"] for line in unasked.log.requests() if line["served"])

    again = unasked.make(VALIDATED)
    assert again.returncode == 0, again.stderr
    assert (unasked.root / VALIDATED).read_bytes() == (first.root / VALIDATED).read_bytes()
    rejects = VALIDATED.replace(".jsonl", ".rejects.jsonl")
    assert (unasked.root / rejects).read_bytes() == (first.root / rejects).read_bytes()

    # A second answer to a stored question would be a second line in the ledger: an answer and its line come together.
    twice = ledger(unasked, "SELECT key FROM ledger GROUP BY key HAVING COUNT(*) > 1")
    assert {key for (key,) in twice} & stored == set() and twice == []
    resent = sum((served & Counter(line["sha256"] for line in unasked.to_models() if line["served"])).values())
    print(f"killed with {len(stored)} replies stored; {resent} answered requests were sent again")
    assert resent <= CONCURRENCY * PANEL * TASKS * 2, "only what was under way, its answer not stored yet"


# ---------------------------------------------------------------- what the exports are good for


def test_mlx_lm_trains_a_step_on_the_exported_directory(first: Clone, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--model", model, "--adapter-path", tmp_path / "out"]
    command += ["--data", first.track() / "training", "--iters", "1", "--batch-size", "1", "--num-layers", "1"]
    command += ["--max-seq-length", "512", "--val-batches", "1", "--steps-per-report", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    weights = load_file(tmp_path / "out" / "adapters.safetensors")
    seconds = [weight for name, weight in weights.items() if name.endswith("lora_b")]
    assert seconds and all(abs(weight).max() > 0 for weight in seconds), "they start at 0, so a step was taken"


def test_datasets_loads_the_exported_data_set(first: Clone, tmp_path: Path) -> None:
    code = (
        "import sys, json, datasets\n"
        "found = datasets.load_dataset(sys.argv[1])\n"
        "print(json.dumps({name: len(split) for name, split in found.items()}))\n"
        "print(json.dumps(found['train'][0]))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(first.track() / "dataset")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    sizes, row = map(json.loads, done.stdout.splitlines())
    examples = list(read_records(first.track() / "13_format.jsonl", Example))
    assert sizes == {split: sum(e.split == split for e in examples) for split in ("train", "valid", "test")}
    example = next(e for e in examples if e.id == row["id"])
    assert [(m["role"], m["content"]) for m in row["messages"]] == [(m.role, m.content) for m in example.messages]
    assert (row["origin"], row["licence"]) == (example.origin, example.licence)


def test_an_example_leads_back_to_the_bytes_it_came_from(first: Clone) -> None:
    examples = {e.id: e for e in read_records(first.track() / "13_format.jsonl", Example)}
    texts = {r.id: r for r in read_records(first.track() / "01_acquire.jsonl", RawText)}
    pairs = {p.id: p for p in read_records(first.track() / "04_validate.jsonl", Pair)}
    head = subprocess.run(["git", "-C", str(first.root), "rev-parse", "HEAD"], capture_output=True, text=True)
    followed = 0
    for example in examples.values():
        origin = re.fullmatch(r".*@([0-9a-f]{40}):(.+)#L(\d+)-L?(\d+)", example.origin)
        if origin is None or origin[1] != head.stdout.strip():
            continue
        commit, path, start, end = origin.groups()
        show = ["git", "-C", str(first.root), "show", f"{commit}:{path}"]
        lines = subprocess.run(show, capture_output=True, check=True).stdout.decode().split("\n")
        there = "\n".join(lines[int(start) - 1 : int(end)])
        assert texts[example.id].text.strip() == there.strip()
        assert pairs[example.id].verbose == example.messages[1].content or pairs[example.id].verbose in (
            example.messages[1].content
        )
        assert example.licence == "MIT"
        followed += 1
    assert followed >= 5, "the repository itself is a source of the trial"


def test_trace_tells_the_life_of_an_example(first: Clone) -> None:
    example = next(iter(read_records(first.track() / "13_format.jsonl", Example)))
    told = first.make("trace", f"ID={example.id}")
    assert told.returncode == 0, told.stderr
    for word in (example.origin, example.licence, "01_acquire", "03_compress", "04_validate", "13_format"):
        assert word in told.stdout
    short = first.make("trace", f"ID={example.id[:8]}")
    assert example.id in short.stdout


def test_stats_and_estimate_and_help_work_in_a_clone(first: Clone) -> None:
    for target, word in (("stats", "04_validate"), ("estimate", "04_validate"), ("help", "trial")):
        done = first.make(target)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
        assert first.log.requests() == [], f"{target} asks nobody"
