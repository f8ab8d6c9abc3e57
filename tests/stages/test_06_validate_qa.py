"""06 validate_qa: each criterion by hand, what the stand-in invents in 05, the rule that nobody validates itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.records import QAPair
from tests.conftest import StandinLog
from tests.conversations import ANSWER, CHUNK, GENERATOR, QUESTION, Run, facts_text, good_pairs, qa_pair

BAD = {
    "not_supported": [
        qa_pair(answer=f"{ANSWER} It was certified by Lloyd's in Rotterdam."),
        qa_pair(answer="The pump stops when its casing reaches 45 degrees."),
        qa_pair(answer="The pump stops at noon and sends an invoice to the canteen upstairs."),
        qa_pair(answer="The pump does not stop when its casing reaches 41 degrees."),
    ],
    "not_complete": [qa_pair(answer="Yes."), qa_pair(answer="That is the case.")],
    "not_self_contained": [
        qa_pair("What does the text say here?"),
        qa_pair("According to the passage, when does the pump stop?"),
        qa_pair("Why is that so?"),
    ],
}


def test_a_pair_passes_when_all_four_hold_and_else_is_rejected_by_the_first_that_does_not(
    standin: StandinLog, tmp_path: Path
) -> None:
    run, good = Run(tmp_path, "grounded"), [qa_pair(), *good_pairs(30)]
    bad = [pair for pairs in BAD.values() for pair in pairs]
    result = run.stage("06_validate_qa", run.write("05_extract_qa", [*good, *bad]))
    assert result.returncode == 0, result.stderr
    assert [row["id"] for row in run.lines("06_validate_qa")] == [pair.id for pair in good]
    reasons = {row["record"]["id"]: row["reason"] for row in run.rejects("06_validate_qa")}
    assert reasons == {pair.id: reason for reason, pairs in BAD.items() for pair in pairs}
    assert all(row["detail"].count(":") >= 1 for row in run.rejects("06_validate_qa"))


def test_all_pairs_with_their_validation_lie_in_the_scores_and_the_rates_in_the_report(
    standin: StandinLog, tmp_path: Path
) -> None:
    run = Run(tmp_path, "grounded")
    pairs = [qa_pair(), BAD["not_supported"][0], BAD["not_complete"][0], BAD["not_self_contained"][0]]
    assert run.stage("06_validate_qa", run.write("05_extract_qa", pairs)).returncode == 0
    scores = [QAPair.model_validate(row) for row in run.lines("06_validate_qa", ".scores.jsonl")]
    assert [pair.id for pair in scores] == [pair.id for pair in pairs]
    assert [bool(pair.validation and pair.validation.passed) for pair in scores] == [True, False, False, False]
    assert all(pair.validation and pair.validation.reason for pair in scores)
    rates = run.report("06_validate_qa")["summary"]["pass_rates"]
    assert rates == {"supported": 0.75, "complete": 0.75, "self_contained": 0.75, "no_invention": 0.75}


def test_what_05_invents_does_not_pass(standin: StandinLog, tmp_path: Path) -> None:
    from shared.standin.dialogues import INVENTED

    run, source = Run(tmp_path, "grounded"), tmp_path / "facts.md"
    source.write_text(facts_text(), "utf-8")
    assert run.stage("05_extract_qa", source, max_chunks=0).returncode == 0
    assert run.stage("06_validate_qa", run.path("05_extract_qa")).returncode == 0
    starts = tuple(sentence.partition("{")[0][:20] for sentence in INVENTED)
    invented = {row["id"] for row in run.lines("05_extract_qa") if any(s in row["answer"] for s in starts)}
    assert len(invented) >= 5
    passed = {row["id"] for row in run.lines("06_validate_qa")}
    assert not invented & passed
    others = len(run.lines("05_extract_qa")) - len(invented)
    assert len(passed) > 0.9 * others


def test_the_model_that_wrote_the_pairs_is_refused(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "grounded")
    result = run.stage("06_validate_qa", run.write("05_extract_qa", [qa_pair(generated_by=GENERATOR)]))
    assert result.returncode == 2
    assert f"{GENERATOR} wrote the pairs and cannot validate them" in result.stderr and "next:" in result.stderr
    assert not any(request["path"].startswith("/v1/") for request in standin.requests())


def test_no_validated_pair_is_a_message_and_exit_4(standin: StandinLog, tmp_path: Path) -> None:
    run = Run(tmp_path, "grounded")
    result = run.stage("06_validate_qa", run.write("05_extract_qa", BAD["not_supported"]))
    assert result.returncode == 4
    assert "0 of 4 records go on (not_supported 4)" in result.stderr and "next:" in result.stderr
    assert len(run.rejects("06_validate_qa")) == 4 and not run.path("06_validate_qa").exists()


@pytest.mark.parametrize("placeholder", ["{question}", "{answer}", "{chunk}"])
def test_a_chunk_may_contain_the_prompt_s_own_placeholders(
    standin: StandinLog, tmp_path: Path, placeholder: str
) -> None:
    run = Run(tmp_path, "grounded")
    pair = qa_pair(QUESTION, ANSWER, f"{CHUNK[: len(CHUNK)]}\n- The template has {placeholder} in it.")
    wrong = qa_pair(QUESTION, f"{ANSWER} It also needs 77 litres.", pair.chunk)
    assert run.stage("06_validate_qa", run.write("05_extract_qa", [pair, wrong])).returncode == 0
    assert [row["id"] for row in run.lines("06_validate_qa")] == [pair.id]
