"""`make chaos` in small: a stage that is killed -9 again and again pays once, and writes the same bytes."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from benchmarks.chaos import Kill, Life, Trial, environment, standin, undisturbed, verdict
from tests.conftest import ROOT

FAULTS = "429=0.05,529=0.03,500=0.05,reset=0.05,retry_after=0.05,seed=3"
SETTINGS = {"max_chunks = 24": "max_chunks = 0", "concurrency = 8": "concurrency = 4"}
KILLS = 5


def command(trial: Trial) -> list[str]:
    """05 over every bullet of the facts file: some eighty calls."""
    text = (ROOT / "stages" / "05_extract_qa" / "trial.toml").read_text("utf-8")
    for old, new in SETTINGS.items():
        assert old in text
        text = text.replace(old, new)
    config = trial.root.with_suffix(".toml")
    config.write_text(text, "utf-8")
    out = trial.root / "data" / "trial" / "grounded" / "05_extract_qa.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "stages" / "05_extract_qa" / "main.py")
    return [sys.executable, script, "--out", str(out), "--config", str(config), "--track", "grounded"]


@pytest.fixture
def a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Trial]:
    monkeypatch.setenv("STANDIN_LATENCY_S", "0.02")
    return lambda name: Trial(tmp_path / name, tmp_path / f"{name}.jsonl")


@pytest.mark.slow
def test_a_stage_that_is_killed_again_and_again_pays_once_and_writes_the_same_bytes(
    a_trial: Callable[[str], Trial], tmp_path: Path
) -> None:
    reference, trial, draw = a_trial("undisturbed"), a_trial("disturbed"), random.Random(11)
    said = tmp_path / "said.log"
    for one in (reference, trial):
        with standin(one, FAULTS, "native") as url:
            env = environment(url, "native", tmp_path / "tmp") | {"PYTHONPATH": str(ROOT)}
            for _ in range(KILLS if one is trial else 0):
                until = len(one.served()) + draw.randint(1, 10)  # sooner, and nothing would be there to lose
                with Life(command(one), ROOT, env, said) as life:
                    life.ended(60, lambda: len(one.served()) >= until)  # noqa: B023  (called here only)
                    time.sleep(draw.uniform(0, 0.03))
                    one.kills.append(life.kill(draw))
            undisturbed(one, env, command(one), said)
    assert [kill.stages for kill in trial.kills] == [("05_extract_qa/grounded",)] * KILLS
    found = verdict(reference, trial, a_kill=4)  # the calls under way: each kill comes when answers do
    assert found["broken"] == [], said.read_text()
    assert found["files_same"] >= 2 and found["billed"] == len(reference.served()) > 60
    assert found["served"] == found["billed"] + len(found["asked_again"])


# ---------------------------------------------------------------- that it can fail


@pytest.fixture
def kept(a_trial: Callable[[str], Trial]) -> tuple[Trial, Trial]:
    """Two trials that keep every promise, written by hand: one answer, 10 tokens in, 2 out, and one kill."""
    line = {"at": 99.0, "path": "/v1/messages", "sha256": "a", "model": "claude-haiku-5-5", "served": True}
    line |= {"input_tokens": 10, "output_tokens": 2}
    for trial in (trials := (a_trial("one"), a_trial("two"))):
        output = trial.root / "data" / "trial" / "grounded" / "05_extract_qa.jsonl"
        output.parent.mkdir(parents=True)
        output.write_text("{}\n")
        output.with_name("05_extract_qa.report.json").write_text(str(trial.root))
        trial.store.parent.mkdir()
        with contextlib.closing(sqlite3.connect(trial.store)) as db:
            db.executescript(
                "CREATE TABLE ledger (nano INTEGER); CREATE TABLE spent (nano INTEGER); CREATE TABLE reserved (nano);"
                "INSERT INTO ledger VALUES (2000); INSERT INTO spent VALUES (2000);"
            )
        trial.log.write_bytes(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        trial.kills.append(Kill(100.0, 100.1, 1.0, 1, ()))
    return trials


def served_again(trial: Trial, first_at: float) -> None:
    """As if the answer had been sent twice, the first time at ``first_at``; the kill is at 100."""
    line = orjson.loads(trial.log.read_bytes())
    lines = [line | {"at": first_at}, line | {"at": 200.0}]
    trial.log.write_bytes(b"".join(orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in lines))


def sql(trial: Trial, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(trial.store)) as db:
        db.execute(statement)
        db.commit()


def test_a_run_that_keeps_every_promise_is_believed(kept: tuple[Trial, Trial]) -> None:
    assert verdict(*kept)["broken"] == []


@pytest.mark.parametrize("at", [99.5, 99.9999, 100.2])
def test_an_answer_that_was_under_way_at_a_kill_is_counted_and_forgiven(kept: tuple[Trial, Trial], at: float) -> None:
    served_again(kept[1], at)
    found = verdict(*kept)
    assert found["broken"] == [] and found["paid_twice_usd"] == 2e-06
    assert [one["before_kill_s"] for one in found["asked_again"]] == [pytest.approx(100 - at)]


@pytest.mark.parametrize("at", [50.0, 98.9, 100.5])
def test_an_answer_that_is_asked_again_without_a_kill_breaks_the_promise(kept: tuple[Trial, Trial], at: float) -> None:
    served_again(kept[1], at)
    assert [broken.partition(":")[0] for broken in verdict(*kept)["broken"]] == ["paid"]


def test_more_than_one_a_kill_breaks_the_promise(kept: tuple[Trial, Trial]) -> None:
    line = orjson.loads(kept[1].log.read_bytes())
    lines = [line | {"at": 99.99, "sha256": name} for name in "bc"] + [line | {"sha256": name} for name in "abc"]
    kept[1].log.write_bytes(b"".join(orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in lines))
    sql(kept[1], "UPDATE ledger SET nano = 6000")
    sql(kept[1], "UPDATE spent SET nano = 6000")
    assert [broken.partition(":")[0] for broken in verdict(*kept)["broken"]] == ["paid"]


@pytest.mark.parametrize(
    ("statement", "promise"),
    [
        ("INSERT INTO ledger VALUES (1)", "ledger"),
        ("DELETE FROM ledger", "ledger"),
        ("UPDATE spent SET nano = 2001", "ledger"),
        ("INSERT INTO reserved VALUES (7)", "left"),
    ],
)
def test_money_that_does_not_add_up_breaks_a_promise(kept: tuple[Trial, Trial], statement: str, promise: str) -> None:
    sql(kept[1], statement)
    assert [broken.partition(":")[0] for broken in verdict(*kept)["broken"]] == [promise]


@pytest.mark.parametrize("litter", ["data/trial/grounded/.x.jsonl.part", "data/cache/.owner-1.lock"])
def test_what_is_left_behind_breaks_a_promise(kept: tuple[Trial, Trial], litter: str) -> None:
    (kept[1].root / litter).touch()
    assert "left" in {broken.partition(":")[0] for broken in verdict(*kept)["broken"]}


def test_a_file_that_is_missing_or_has_other_bytes_breaks_a_promise(kept: tuple[Trial, Trial]) -> None:
    output = kept[1].root / "data" / "trial" / "grounded" / "05_extract_qa.jsonl"
    output.write_text("{} \n")
    assert verdict(*kept)["files_different"] == ["data/trial/grounded/05_extract_qa.jsonl has other bytes"]
    shutil.rmtree(output.parent)
    assert len(verdict(*kept)["files_different"]) == 2
