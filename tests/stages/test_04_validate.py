"""04 validate: which pairs go on, which wait, and that raising the limit pays only for the rest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from shared.records import Domain, Generation, Pair, Reject, content_id
from shared.stage import read_records
from tests.conftest import ROOT, StandinLog, StandinWith, run_stage

STAGE = ROOT / "stages" / "04_validate"
_spec = importlib.util.spec_from_file_location("validate_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["validate_main"] = main
_spec.loader.exec_module(main)


def pair(text: str, compressed: str = "", domain: Domain = "prose", source: str = "s", tokens: int = 20) -> Pair:
    generation = Generation(
        generator="endpoint",
        model="m",
        prompt="0" * 16,
        tokenizer="t",
        verbose_tokens=tokens,
        compressed_tokens=tokens // 2,
        compression_ratio=0.5,
    )
    return Pair(
        id=content_id(text),
        domain=domain,
        source=source,
        origin=f"file#{text[:8]}",
        language="en",
        category="note",
        licence="MIT",
        verbose=text,
        compressed=compressed or text.replace(" the ", " "),
        generation=generation,
    )


def texts(count: int) -> list[str]:
    return [
        f"The number {n * 7} train leaves the station at {n % 24}:15 and must not stop in Berlin." for n in range(count)
    ]


def write(data: Path, pairs: list[Pair]) -> Path:
    path = data / "03_compress.jsonl"
    path.write_bytes(b"".join(p.line() for p in pairs))
    return path


def validate(data: Path, changes: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    settings = data / "trial.toml"
    lines = (STAGE / "trial.toml").read_text("utf-8").splitlines()
    keys = {line.partition("=")[0].strip() for line in changes.splitlines()}
    kept = [line for line in lines if line.partition("=")[0].strip() not in keys]
    table = next(n for n, line in enumerate(kept) if line.startswith("[tasks]"))
    top = [line for line in changes.splitlines() if not line.startswith(("prose", "code"))]
    under = [line for line in changes.splitlines() if line.startswith(("prose", "code"))]
    settings.write_text("\n".join([*kept[:table], *top, kept[table], *under, *kept[table + 1 :]]), "utf-8")
    files = ("--in", data / "03_compress.jsonl", "--out", data / "04_validate.jsonl", "--config", settings)
    return run_stage(STAGE / "main.py", *files, "--track", "compression", **environment)


def kept(data: Path) -> list[Pair]:
    return list(read_records(data / "04_validate.jsonl", Pair))


def rejects(data: Path) -> list[Reject]:
    lines = (data / "04_validate.rejects.jsonl").read_bytes().splitlines()
    return [Reject.model_validate_json(line) for line in lines]


def report(data: Path) -> dict[str, Any]:
    return dict(orjson.loads((data / "04_validate.report.json").read_bytes()))


def test_equivalent_pairs_go_on_with_their_verdicts_and_others_stop_with_theirs(
    standin: StandinLog, data: Path
) -> None:
    good = [pair(text) for text in texts(4)]
    bad = pair("The pump runs at 40 bar and must not be opened by Ada Lovelace before 12:30.", "pump runs")
    write(data, [*good, bad])
    done = validate(data)
    assert done.returncode == 0, done.stderr
    passed = kept(data)
    assert [p.id for p in passed] == [p.id for p in good]
    for p in passed:
        assert p.verdicts is not None and p.verdicts.passed and p.verdicts.min_equivalence >= 0.80
        assert [v.model for v in p.verdicts.panel] == ["anthropic/claude-haiku-5-5", "openai/gpt-6-luna"]
        assert [t.task for t in p.verdicts.panel[0].tasks] == ["key_points", "implications"]
    (failed,) = rejects(data)
    assert failed.reason == "not_equivalent" and "of 0.8" in failed.detail
    scores = Pair.model_validate(failed.record).verdicts
    assert scores is not None and not scores.passed and scores.min_equivalence < 0.80
    summary = report(data)["summary"]
    assert summary["all"]["pairs"] == 5 and summary["all"]["pass_rate"] == 0.8
    assert {"domain prose", "source s", "model openai/gpt-6-luna"} <= set(summary)
    assert summary["all"]["compression_ratio"] == 0.5


def test_a_limit_leaves_the_rest_pending_and_more_of_it_pays_only_for_the_rest(standin: StandinLog, data: Path) -> None:
    write(data, [pair(text) for text in texts(10)])
    assert validate(data, "limit = 4").returncode == 0
    assert Counter(reject.reason for reject in rejects(data)) == {"pending": 6}
    first = report(data)["spending"]["calls"]
    assert validate(data, "limit = 10").returncode == 0
    assert len(kept(data)) == 10 and rejects(data) == []
    spending = report(data)["spending"]
    assert first > 0 and spending["cached"] >= first, "what was answered is not asked again"
    assert first + spending["calls"] == len([line for line in standin.requests() if line["served"]])
    standin.mark()
    assert validate(data).returncode == 0 and standin.requests() == []


def test_a_larger_limit_only_adds(tmp_path: Path) -> None:
    pairs = [pair(text, source=f"source {n % 3}", tokens=20 + n) for n, text in enumerate(texts(60))]
    path = write(tmp_path, pairs)
    chosen = [main.subset(path, limit, 7) for limit in (5, 10, 30, 60)]
    assert [len(ids) for ids in chosen] == [5, 10, 30, 60]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]
    assert main.subset(path, 0, 7) is None
    assert main.subset(path, 10, 8) != chosen[1], "the seed decides"


def test_the_subset_has_the_sources_shares_and_prefers_the_cheap(tmp_path: Path) -> None:
    pairs = [
        pair(text, source="large" if n % 4 else "small", tokens=1000 if n % 2 else 10)
        for n, text in enumerate(texts(200))
    ]
    ids = main.subset(write(tmp_path, pairs), 40, 1)
    chosen = [p for p in pairs if p.id in ids]
    assert Counter(p.source for p in chosen) == {"large": 30, "small": 10}
    cheap = sum(p.generation.verbose_tokens == 10 for p in chosen if p.source == "large")
    assert cheap >= 20, "a third of the source is cheap, two thirds of what is chosen"


def test_a_limit_is_for_each_domain(tmp_path: Path) -> None:
    pairs = [pair(text, domain="code" if n % 2 else "prose") for n, text in enumerate(texts(20))]
    ids = main.subset(write(tmp_path, pairs), 3, 1)
    assert Counter(p.domain for p in pairs if p.id in ids) == {"code": 3, "prose": 3}


@pytest.mark.parametrize("limit", [0, 5])
def test_a_missing_input_says_how_to_make_it(standin: StandinLog, data: Path, limit: int) -> None:
    done = validate(data, f"limit = {limit}")
    assert done.returncode == 2
    assert "no input at" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ('prose = ["key_point"]', "there is no key_point"),
        ("prose = []", "tasks.prose: at least one of"),
        ("panel = []", "panel"),
        ("threshold = 80", "threshold"),
        ('embedder = "anthropic/claude-haiku-5-5"', "embeddings come from openai/ or endpoint/"),
        ('judge = "claude"', "a model is provider/name"),
    ],
)
def test_wrong_settings_stop_it_before_anything_is_asked(
    standin: StandinLog, data: Path, changes: str, says: str
) -> None:
    write(data, [pair(text) for text in texts(2)])
    done = validate(data, changes)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert standin.requests() == []


def test_answers_that_cannot_be_used_reject_the_pair_with_the_reason(standin_with: StandinWith, data: Path) -> None:
    standin_with(faults="refuse=0.4,seed=3")
    write(data, [pair(text) for text in texts(12)])
    done = validate(data)
    assert done.returncode == 0, done.stderr
    reasons = Counter(reject.reason for reject in rejects(data))
    assert set(reasons) <= {"refused"} and sum(reasons.values()) + len(kept(data)) == 12
    assert reasons["refused"] > 0
    assert all("from the" in reject.detail for reject in rejects(data)), "says which model, task and text"


@pytest.mark.slow
def test_faults_and_concurrency_do_not_change_a_byte(standin_with: StandinWith, data: Path) -> None:
    write(data, [pair(text) for text in texts(12)])
    standin_with()
    assert validate(data, "concurrency = 1").returncode == 0
    calm = (data / "04_validate.jsonl").read_bytes()
    for path in (data.parent.parent / "cache").iterdir():
        path.unlink()
    standin_with(faults="429=0.1,500=0.05,reset=0.05,retry_after=0.05,seed=5")
    assert validate(data, "concurrency = 16").returncode == 0
    assert report(data)["spending"]["retries"] > 0
    assert (data / "04_validate.jsonl").read_bytes() == calm
