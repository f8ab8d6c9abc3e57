"""08 pattern: plans that deal every pattern equally often, examples that keep their plan, few-shot files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from shared.errors import SettingsError
from shared.stage import load_settings
from tests.conftest import ROOT, StandinLog
from tests.conversations import Run, stage_module

STAGE = ROOT / "stages" / "08_pattern"
main = stage_module("08_pattern")
dealing = stage_module("08_pattern", "dealing")
PATTERNS = dealing.load_patterns(STAGE / "patterns.toml")
TOPICS = dealing.load_topics(STAGE / "topics.toml")


def params(run: str) -> Any:
    return load_settings(STAGE / f"{run}.toml", main.Params, "patterns")


def sources(*counts: int) -> list[Any]:
    return [main.Source(model=f"openai/model-{i}", count=count) for i, count in enumerate(counts)]


# ---------------------------------------------------------------- what is committed


def test_there_are_a_hundred_topics_and_the_ten_patterns() -> None:
    assert len(TOPICS) == 100
    assert list(PATTERNS) == [
        "Gap Analysis", "Tradeoff Analysis", "Production Readiness", "Brutal Accuracy", "Multi-Dimensional Evaluation",
        "Hint-Based Learning", "Diminishing Returns", "Mechanistic Understanding", "Context-Dependent Recommendations",
        "Precision Policing",
    ]  # fmt: skip
    assert all(row.definition and row.looks_like and len(row.cues) >= 3 for row in PATTERNS.values())


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("run", ["trial", "full"])
def test_the_planned_counts_of_the_settings_are_equal(run: str) -> None:
    settings = params(run)
    planned = dealing.plan(settings.providers, TOPICS, list(PATTERNS), settings.seed)
    counts = Counter(name for row in planned for name in row.patterns)
    cards = sum(5 * source.count // 2 for source in settings.providers)
    assert set(counts.values()) == {cards // 10}


@pytest.mark.parametrize("counts", [(200,), (100, 100), (7, 3), (1, 1), (13, 28, 4), (33,), (10, 10)])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_every_pattern_occurs_equally_often_within_one(counts: tuple[int, ...], seed: int) -> None:
    planned = dealing.plan(sources(*counts), TOPICS, list(PATTERNS), seed)
    assert len(planned) == sum(counts)
    for rows in (planned, *([row for row in planned if row.model == source.model] for source in sources(*counts))):
        occurs = Counter(dict.fromkeys(PATTERNS, 0))
        occurs.update(name for row in rows for name in row.patterns)
        assert max(occurs.values()) - min(occurs.values()) <= 1
    for row in planned:
        assert len(row.patterns) == len(set(row.patterns)) == 2 + row.number % 2


def test_topics_are_shuffled_by_seed_and_none_repeats_before_all_were_used() -> None:
    planned = dealing.plan(sources(150), TOPICS, list(PATTERNS), 42)
    topics = [row.topic for row in planned]
    assert set(topics[:100]) == set(TOPICS) and topics[:100] != TOPICS
    assert topics[100:] == topics[:50]
    assert topics != [row.topic for row in dealing.plan(sources(150), TOPICS, list(PATTERNS), 43)]


# ---------------------------------------------------------------- checks


def generated(exchanges: int = 3, **changes: Any) -> Any:
    turns = [{"role": role, "content": "text"} for _ in range(exchanges) for role in ("user", "assistant")]
    values = {
        "topic": "x",
        "patterns_applied": ["Gap Analysis", "Brutal Accuracy", "Precision Policing"],
        "conversation": turns,
        "learning_notes": ["It is so."],
    }
    return main.Generated.model_validate(values | changes)


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (generated(3), ""),
        (generated(5), ""),
        (generated(2), "planned 3 to 5 exchanges, got 2"),
        (generated(6), "planned 3 to 5 exchanges, got 6"),
        (generated(patterns_applied=["Gap Analysis"]), "patterns_applied lacks Brutal Accuracy"),
        (generated(patterns_applied=[]), "patterns_applied lacks Brutal Accuracy, Gap Analysis"),
        (generated(learning_notes=[]), "learning_notes is empty"),
        (generated(conversation=[{"role": "assistant", "content": "Hello."}]), "roles must alternate"),
    ],
)
def test_an_example_is_checked_against_its_plan(made: Any, fault: str) -> None:
    planned = dealing.Planned(model="m", number=0, topic="x", patterns=("Gap Analysis", "Brutal Accuracy"))
    found = main.fault(made, planned, params("trial"))
    assert found.startswith(fault) and bool(found) == bool(fault)


def test_few_shot_examples_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Question {i}"}]} for i in range(3)]
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
    text = main.few_shot(path, 2)
    assert "user: Question 0" in text and "Question 1" in text and "Question 2" not in text
    assert main.few_shot(None, 2) == main.few_shot(path, 0) == ""


@pytest.mark.parametrize("content", [None, "no json", '{"turns": []}', '{"messages": [{"role": "user"}]}', "[1]"])
def test_a_bad_examples_file_is_a_message(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "examples.jsonl"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(SettingsError, match=r"examples\.jsonl"):
        main.few_shot(path, 2)


# ---------------------------------------------------------------- the stage

PROVIDERS = [{"model": "openai/gpt-6-luna", "count": 60}, {"model": "gemini/gemini-3.8-flash", "count": 60}]


def test_examples_off_their_plan_are_rejected_and_asking_again_helps(standin: StandinLog, tmp_path: Path) -> None:
    kept = {}
    for tries in (1, 3):
        run = Run(tmp_path / str(tries), "patterns")
        result = run.stage("08_pattern", None, tries=tries, providers=PROVIDERS)
        assert result.returncode == 0, result.stderr
        rows, rejects = run.lines("08_pattern"), run.rejects("08_pattern")
        planned = {(row["model"], row["topic"]): row for row in run.lines("08_pattern", ".plans.jsonl")}
        assert len(planned) == 120 == len(rows) + len(rejects)
        for row in rows:
            plan = planned[row["generated_by"], row["topic"]]
            assert row["patterns"] == plan["patterns"]
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and 3 <= len(roles) // 2 <= 5
            assert 1 <= len(row["learning_notes"]) <= 3
        kept[tries] = len(rows)
        if tries == 1:
            details = [row["detail"] for row in rejects]
            assert {row["reason"] for row in rejects} == {"off_plan"}
            assert any(detail.startswith("patterns_applied lacks") for detail in details)
            assert any(detail.startswith("planned 3 to 5 exchanges") for detail in details)
    assert kept[1] < 116 <= kept[3]


def test_the_same_seed_gives_the_same_bytes_whatever_the_concurrency_and_each_model_its_own(
    standin: StandinLog, tmp_path: Path
) -> None:
    outputs = []
    for concurrency in (1, 8):
        run = Run(tmp_path / str(concurrency), "patterns")
        assert run.stage("08_pattern", None, concurrency=concurrency).returncode == 0
        outputs.append([run.path("08_pattern", suffix).read_bytes() for suffix in (".jsonl", ".plans.jsonl")])
        assert set(run.report("08_pattern")["summary"]["planned_patterns"].values()) == {5}
    assert outputs[0] == outputs[1]
    texts = ["".join(message["content"] for message in row["messages"]) for row in run.lines("08_pattern")]
    assert len(set(texts)) == len(texts) >= 18
