"""09 judge: every criterion by hand in both tracks, quotes checked, nobody judges itself, go or no go."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from shared.judge import Judged, judgement, prompt_for
from shared.records import Conversation, Criterion, Judgement
from shared.stage import load_settings
from tests.conftest import ROOT, StandinLog
from tests.conversations import GENERATOR, OTHER, QUESTION, Run, conversation, stage_module

STAGE = ROOT / "stages" / "09_judge"
main = stage_module("09_judge")

# ---------------------------------------------------------------- grounded

GOOD = conversation(
    QUESTION, "It stops when its casing reaches 41 degrees.",
    "And who inspects the pump?", "The shift supervisor, every 3 weeks.",
    "Which colour does the pump have?", "That I do not know: the source says nothing about it.",
)  # fmt: skip
GROUNDED = {
    "judged_factually_accurate": [
        conversation(QUESTION, "It stops at 41 degrees. It also keeps a copy for 90 days."),
        conversation(QUESTION, "It stops when its casing reaches 55 degrees."),
        conversation(QUESTION, "The pump does not stop when its casing reaches 41 degrees."),
        conversation(QUESTION, "It stops at 41 degrees and sends a weekly summary to the billing department."),
    ],
    "judged_natural": [
        conversation(
            QUESTION, "The pump stops when its casing reaches 41 degrees.",
            "And who inspects the pump?", "The pump stops when its casing reaches 41 degrees.",
        ),
    ],
    "judged_on_topic": [
        conversation(
            QUESTION, "It stops when its casing reaches 41 degrees.",
            "Do penguins sleep standing up during winter storms?", "I cannot say.",
        ),
    ],
    "judged_adds_value": [conversation("Does the pump stop at 41 degrees?", "Yes.")],
}  # fmt: skip


def test_each_kind_of_bad_dialogue_fails_its_criterion_and_a_good_one_passes(
    standin: StandinLog, tmp_path: Path
) -> None:
    run = Run(tmp_path, "grounded")
    bad = [record for records in GROUNDED.values() for record in records]
    result = run.stage("09_judge", run.write("07_converse", [GOOD, *bad]))
    assert result.returncode == 0, result.stderr
    assert [row["id"] for row in run.lines("09_judge")] == [GOOD.id]
    reasons = {row["record"]["id"]: row["reason"] for row in run.rejects("09_judge")}
    assert reasons == {record.id: reason for reason, records in GROUNDED.items() for record in records}
    for row in run.rejects("09_judge"):
        judged = row["record"]["judgement"]
        assert judged["issues"] and judged["feedback"] and judged["model"] == OTHER and not judged["passed"]


def test_the_report_has_rates_and_examples_both_ways(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "grounded")
    records = [GOOD, *(record for records in GROUNDED.values() for record in records)]
    result = run.stage("09_judge", run.write("07_converse", records))
    criteria = run.report("09_judge")["summary"]["criteria"]
    assert {name: (row["judged"], row["pass_rate"]) for name, row in criteria.items()} == {
        "factually accurate": (8, 0.5),
        "natural": (8, 0.875),
        "on topic": (8, 0.875),
        "adds value": (8, 0.875),
    }
    for row in criteria.values():
        assert row["passes"] and row["failures"] and all(e["user"] and e["assistant"] for e in row["failures"])
    assert "factually accurate" in result.stderr and "50.0%" in result.stderr


# ---------------------------------------------------------------- patterns

CODE = """```python
def load(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
```"""
UNFINISHED = CODE.replace("        return", "        # TODO: check the size\n        return")
TOPIC, PATTERN = "indexes for a query with a range and an equality", "Gap Analysis"
SHOWN = "You have an index on each column. You still need one that serves the whole predicate."


def lesson(*answers: str, pattern: str = PATTERN) -> Conversation:
    """Three exchanges; the first answer says what is given, the others are sound."""
    questions = ("The page takes 2.4 s. What do I change first?", "Show me the code.", "What would you do on Monday?")
    sound = (SHOWN, f"Read it in one go:\n\n{CODE}", "Measure before and after the change.")
    said = [*answers, *sound[len(answers) :]]
    turns = [turn for exchange in zip(questions, said, strict=True) for turn in exchange]
    return conversation(*turns, topic=TOPIC, patterns=(pattern,))


PATTERNS = {
    "judged_gap_analysis": [lesson("Put the equality first.")],
    "judged_production_quality": [
        lesson(SHOWN, f"The code:\n\n{UNFINISHED}"),
        lesson(SHOWN, "The code:\n\n```python\ntry:\n    load()\nexcept:\n    pass\n```"),
        lesson(SHOWN, "The code:\n\n```python\ndef load(path):\n    return path\n```"),
        lesson(SHOWN, "The code:\n\n```python\ndef load(path: str -> str:\n    return path\n```"),
        lesson(SHOWN, "I would rather not write it down."),
    ],
    "judged_natural": [lesson(SHOWN, f"Read it in one go:\n\n{CODE}", SHOWN)],
    "judged_consistent_with_the_profile": [lesson(f"Great question! {SHOWN}")],
}  # fmt: skip


def generated(run: Run, records: list[Conversation], **counts: Any) -> Path:
    """Records with the report that 08 leaves beside them."""
    path = run.write("08_pattern", records)
    report = {"counts": {"planned": len(records), "kept": len(records), "rejected": 0, "reasons": {}} | counts}
    path.with_suffix(".report.json").write_bytes(orjson.dumps(report))
    return path


def test_each_kind_of_bad_example_fails_its_criterion(standin: StandinLog, tmp_path: Path) -> None:
    run, good = Run(tmp_path, "patterns"), lesson(SHOWN)
    bad = [record for records in PATTERNS.values() for record in records]
    result = run.stage("09_judge", generated(run, [good, *bad]))
    assert result.returncode == 0, result.stderr
    assert [row["id"] for row in run.lines("09_judge")] == [good.id]
    reasons = {row["record"]["id"]: row["reason"] for row in run.rejects("09_judge")}
    assert reasons == {record.id: reason for reason, records in PATTERNS.items() for record in records}
    criteria = {row["name"]: row for row in run.lines("09_judge")[0]["judgement"]["criteria"]}
    assert criteria[PATTERN]["quote"] in SHOWN


SHOWS = {
    "Gap Analysis": "What is missing is an index over both columns.",
    "Tradeoff Analysis": "A second index makes reads fast at the cost of every write.",
    "Production Readiness": "In production the pool has to answer within 2 s.",
    "Brutal Accuracy": "You assume that it is cached. This is wrong: it is read each time.",
    "Multi-Dimensional Evaluation": "- Correctness: all paths\n- Speed: 12 ms\n- Readability: one statement",
    "Hint-Based Learning": "A hint first: look at the second column.",
    "Diminishing Returns": "That is most of the gain; stop here.",
    "Mechanistic Understanding": "Under the hood the server walks one stretch of the index.",
    "Context-Dependent Recommendations": "This depends on the ratio of reads to writes.",
    "Precision Policing": "Strictly speaking, 'slow' says nothing yet. Say: 2.4 s at the 95th percentile.",
}


def test_every_pattern_is_found_where_it_is_shown_and_only_there(standin: StandinLog, tmp_path: Path) -> None:
    run, records, expected = Run(tmp_path, "patterns"), [], {}
    for pattern in SHOWS:
        for name, text in SHOWS.items():
            record = lesson(f"Put the equality first. {text}", pattern=pattern)
            record = record.model_copy(update={"id": conversation(pattern, text).id})
            records.append(record)
            expected[record.id] = name == pattern
    assert run.stage("09_judge", generated(run, records)).returncode == 0
    found = {row["id"]: True for row in run.lines("09_judge")}
    found |= {row["record"]["id"]: False for row in run.rejects("09_judge")}
    assert len(records) == 100 and found.keys() == expected.keys()
    # The judge misquotes now and then; then the stage fails what is shown. It never passes what is not.
    assert [i for i in found if found[i] and not expected[i]] == []
    missed = [i for i in found if expected[i] and not found[i]]
    assert len(missed) <= 2


# ---------------------------------------------------------------- quotes


def judged(quote: str, passed: bool = True, name: str = PATTERN) -> Judgement:
    """The judgement on :data:`lesson` when the judge answers so about the pattern."""
    settings = load_settings(STAGE / "trial.toml", main.Params, "patterns")
    rows = [{"name": criterion, "passed": True, "quote": ""} for criterion in settings.criteria]
    rows.append({"name": name, "passed": passed, "quote": quote})
    answer = Judged.model_validate({"criteria": rows, "feedback": "Fine.", "issues": []})
    return judgement(answer, lesson(SHOWN), settings.judge, settings.criteria)


@pytest.mark.parametrize(
    ("quote", "passed"),
    [
        ("You still need one", True),
        ("You have an\n  index on each column.", True),
        ("You still require one", False),
        ("", False),
        ("What do I change first?", False),
    ],
)
def test_a_pattern_holds_only_with_a_quote_of_the_assistant(quote: str, passed: bool) -> None:
    found = judged(quote)
    assert found.passed is passed
    assert any("does not occur" in issue for issue in found.issues) is not passed


def test_a_quote_does_not_make_up_for_a_failed_criterion() -> None:
    assert not judged("You still need one", passed=False).passed


def test_what_the_judge_misquotes_is_not_kept(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "patterns")
    providers = [{"model": GENERATOR, "count": 100}, {"model": "gemini/gemini-3.8-flash", "count": 100}]
    assert run.stage("08_pattern", None, providers=providers, concurrency=16).returncode == 0
    assert run.stage("09_judge", run.path("08_pattern"), concurrency=16).returncode == 0
    for row in run.lines("09_judge"):
        said = " ".join(" ".join(m["content"] for m in row["messages"] if m["role"] == "assistant").split())
        quotes = {c["name"]: c["quote"] for c in row["judgement"]["criteria"]}
        assert all(" ".join(quotes[pattern].split()) in said for pattern in row["patterns"])
        assert "TODO" not in said and "FIXME" not in said and "placeholder" not in said
    reasons = run.report("09_judge")["counts"]["reasons"]
    misquoted = [
        r for r in run.rejects("09_judge") if any("does not occur" in i for i in r["record"]["judgement"]["issues"])
    ]
    assert misquoted and reasons["judged_production_quality"] >= 2
    # What 08 claims and does not show is what most pattern criteria fail on.
    shown = run.report("09_judge")["summary"]["criteria"]
    rates = [row["pass_rate"] for name, row in shown.items() if name in SHOWS]
    assert len(rates) == 10 and 0.85 < sum(rates) / 10 < 1


# ---------------------------------------------------------------- what stops the stage


def test_a_judge_that_wrote_the_conversations_is_refused(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "grounded")
    result = run.stage("09_judge", run.write("07_converse", [conversation(QUESTION, "At 41 degrees.", model=OTHER)]))
    assert result.returncode == 2
    assert f"{OTHER} wrote these conversations and cannot judge them" in result.stderr and "next:" in result.stderr
    assert not any(request["path"].startswith("/v1/") for request in standin.requests())


def test_a_pattern_without_a_definition_is_a_message(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "patterns")
    result = run.stage("09_judge", generated(run, [lesson(SHOWN, pattern="Telepathy")]))
    assert result.returncode == 2 and "no definition of Telepathy" in result.stderr


def test_facts_may_contain_the_prompt_s_own_placeholders() -> None:
    settings = load_settings(STAGE / "trial.toml", main.Params, "grounded")
    record = conversation(QUESTION, "It stops at 41 degrees.")
    grounding = record.grounding[0].model_copy(update={"chunk": "- The prompt has {conversation} and {rubric} in it."})
    record = record.model_copy(update={"grounding": (grounding,)})
    template = (STAGE / "prompts" / "judge.txt").read_text("utf-8")
    prompt = prompt_for(template, record, settings.criteria, {}, "")
    assert "has {conversation} and {rubric} in it" in prompt and prompt.count("It stops at 41 degrees.") == 1


# ---------------------------------------------------------------- go or no go

gates = stage_module("09_judge", "gates")
rubric = stage_module("09_judge", "rubric")
GATES = {
    "enforce": True, "per_provider": 3, "per_pattern": 25, "most_over_least": 2.0, "least_exchanges": 3,
    "most_exchanges": 5, "parsed": 1.0, "shown": 0.75, "usable": 3,
}  # fmt: skip


def passed(record: Conversation, holds: bool) -> Conversation:
    """A record with a judgement in which every criterion holds, or only its patterns do not."""
    criteria = (
        Criterion(name="natural", passed=True),
        *(Criterion(name=name, passed=holds, quote=SHOWN) for name in record.patterns),
    )
    return record.with_field(judgement=Judgement(model=OTHER, criteria=criteria, feedback="", issues=(), passed=holds))


SET = (
    passed(lesson(SHOWN), True),
    passed(lesson(f"{SHOWN} Short."), True),
    passed(lesson(SHOWS["Brutal Accuracy"], pattern="Brutal Accuracy"), True),
    passed(lesson("Put the equality first.", pattern="Brutal Accuracy"), False),
)


@pytest.mark.parametrize(
    ("changes", "counts", "failed"),
    [
        ({}, {}, ""),
        ({"per_provider": 5}, {}, "examples per provider, the fewest: got 4"),
        ({"usable": 4}, {}, "usable examples: got 3"),
        ({"shown": 0.9}, {}, "conversations that show their patterns: got 75.0%"),
        ({"most_exchanges": 2, "least_exchanges": 1}, {}, "outside 1 to 2 exchanges: got 4"),
        ({"per_pattern": 51}, {}, "rarest pattern per 100 examples: got 50.0"),
        ({}, {"planned": 5, "rejected": 1, "reasons": {"invalid_json": 1}}, "answers that parse: got 80.0%"),
        ({}, {"planned": 5, "rejected": 1, "reasons": {"off_plan": 1}}, ""),
    ],
)
def test_each_gate_fails_by_its_own_figure(
    tmp_path: Path, changes: dict[str, Any], counts: dict[str, Any], failed: str
) -> None:
    tally = rubric.Tally()
    for record in SET:
        tally.add(record)
    stage = SimpleNamespace(input=generated(Run(tmp_path, "patterns"), list(SET), **counts))
    rows = gates.measured(stage, gates.Gates(**GATES | changes), tally)
    assert len(rows) == 7
    assert "".join(f"{row['gate']}: got {row['got']}" for row in rows if not row["go"]) == failed


def test_patterns_that_occur_unequally_are_no_go(tmp_path: Path) -> None:
    tally = rubric.Tally()
    for record in (*SET[:2], passed(lesson(f"{SHOWN} Plain."), True), SET[2]):
        tally.add(record)
    stage = SimpleNamespace(input=generated(Run(tmp_path, "patterns"), list(SET)))
    rows = {row["gate"]: row for row in gates.measured(stage, gates.Gates(**GATES), tally)}
    row = rows["most frequent pattern / least frequent"]
    assert (row["got"], row["go"]) == (3.0, False)


def test_a_failed_gate_fails_the_stage_where_it_is_enforced(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "patterns")
    own = load_settings(STAGE / "trial.toml", main.Params, "patterns")
    settings = {"criteria": own.criteria, "patterns": str(own.patterns), "profile": str(own.profile), "tracks": {}}
    source = generated(run, [record.model_copy(update={"judgement": None}) for record in SET[:3]])
    result = run.stage("09_judge", source, **settings, gates=GATES | {"usable": 9})
    assert result.returncode == 4
    assert "no go: usable examples: wanted >= 9, got 3" in result.stderr and "next:" in result.stderr
    assert run.path("09_judge", ".rejects.jsonl").exists() and not run.path("09_judge").exists()
    assert {row["gate"]: row["go"] for row in run.report("09_judge")["summary"]["gates"]}["usable examples"] is False
    result = run.stage("09_judge", source, **settings, gates=GATES | {"usable": 9, "enforce": False})
    assert result.returncode == 0 and "NO GO  usable examples" in result.stderr
    assert len(run.lines("09_judge")) == 3


def test_the_gates_need_the_report_of_08(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "patterns")
    result = run.stage("09_judge", run.write("08_pattern", [lesson(SHOWN)]))
    assert result.returncode == 2 and "no report at" in result.stderr
