"""05 extract_qa: chunks, quotes and dates by hand, what the stand-in gets wrong, and files that are no facts."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.errors import SettingsError
from shared.stage import load_settings
from tests.conftest import ROOT, StandinLog
from tests.conversations import CHUNK, Run, facts_text, stage_module

main = stage_module("05_extract_qa")
facts = stage_module("05_extract_qa", "facts")
PARAMS = load_settings(ROOT / "stages" / "05_extract_qa" / "trial.toml", main.Params, "grounded")
AS_OF = datetime.date(2026, 11, 20)


# ---------------------------------------------------------------- chunks


def test_a_chunk_is_a_bullet_with_its_section_and_three_lines_before_it() -> None:
    chunks = facts.chunks_of("# Pump\n\n- one\n- two\n- three\n- four\n  goes on\n- five\n\n# Valve\n- six\n")
    assert [chunk.text for chunk in chunks][-3:] == [
        "# Pump\n- one\n- two\n- three\n- four\n  goes on",
        "# Pump\n- three\n- four\n  goes on\n- five",
        "# Valve\n- six",
    ]
    assert [(chunk.section, chunk.first, chunk.last) for chunk in chunks][3:] == [
        ("Pump", 6, 7),
        ("Pump", 8, 8),
        ("Valve", 11, 11),
    ]


def test_text_without_sections_and_bullets_is_facts_as_well() -> None:
    assert [chunk.text for chunk in facts.chunks_of("The pump is red.\n\nThe valve is blue.")] == [
        "The pump is red.",
        "The pump is red.\nThe valve is blue.",
    ]


def test_chunks_are_spread_over_the_whole_file() -> None:
    chunks = facts.chunks_of(facts_text())
    some = facts.spread(chunks, 12)
    assert len({chunk.section for chunk in some}) == 12
    assert facts.spread(chunks, 0) == facts.spread(chunks, len(chunks) + 1) == chunks


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "text",
    [
        "by 2031", "in March 2031", "on 2031-05-02", "2027-01", "Dec 2026", "Sept. 30th, 2027", "31 December 2026",
        "from 2027-2031", "the 2031 release", "in 2031 prices will rise", "November 21, 2026",
    ],
)  # fmt: skip
def test_a_date_after_as_of_is_found(text: str) -> None:
    assert facts.dates_after(f"It changes {text}.", AS_OF)


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-20", "November 2026", "since 2019", "2048 tokens", "up to 2048 texts", "batch=2048", "0.2031", "2,048",
        "20311", "2024-99-99", "$2048", "version 3.2040", "port 8080",
    ],
)  # fmt: skip
def test_what_is_not_a_later_date_is_not_one(text: str) -> None:
    assert facts.dates_after(f"It is {text} now.", AS_OF) == []


def extracted(**changes: Any) -> Any:
    values = {
        "question": "When does the pump stop?",
        "answer": "The pump stops when its casing reaches 41 degrees.",
        "quote": "stops when its casing\n reaches 41 degrees",
        "difficulty": "basic",
        "categories": ["operations", "weather"],
    }
    return main.ExtractedPair.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"quote": "stops when the casing reaches 41 degrees"}, "quote_not_in_chunk"),
        ({"quote": "  "}, "quote_not_in_chunk"),
        ({"answer": "It stops until March 2031."}, "future_date"),
        ({"question": "What holds from 2030 on?"}, "future_date"),
        ({"categories": ["weather"]}, "no_known_category"),
        ({"answer": " \n"}, "empty"),
    ],
)
def test_a_pair_is_checked_against_its_chunk(changes: dict[str, Any], reason: str | None) -> None:
    chunk = facts.Chunk("Pump", CHUNK, 1, 3)
    fault = main.fault_of(extracted(**changes), chunk, PARAMS)
    assert (fault and fault[0]) == reason


# ---------------------------------------------------------------- the stage


def test_every_kind_of_bad_pair_is_rejected_and_the_others_are_whole(standin: StandinLog, tmp_path: Path) -> None:
    run, source = Run(tmp_path, "grounded"), tmp_path / "facts.md"
    source.write_text(facts_text(), "utf-8")
    result = run.stage("05_extract_qa", source, max_chunks=0)
    assert result.returncode == 0, result.stderr
    kept, counts = run.lines("05_extract_qa"), run.report("05_extract_qa")["counts"]
    assert counts["planned"] == 3 * 120 == len(kept) + counts["rejected"]
    assert {"quote_not_in_chunk", "future_date", "no_known_category"} <= set(counts["reasons"])
    assert 0.8 < len(kept) / counts["planned"] < 0.95
    for row in kept:
        assert " ".join(row["quote"].split()) in " ".join(row["chunk"].split())
        assert not facts.dates_after(f"{row['question']} {row['answer']}", AS_OF)
        assert set(row["categories"]) <= set(PARAMS.categories) and 1 <= len(row["categories"]) <= 3
        first, last = row["origin"].rpartition("#L")[2].split("-L")
        lines = source.read_text("utf-8").splitlines()[int(first) - 1 : int(last)]
        assert row["chunk"].endswith("\n".join(lines))
    assert len({(row["chunk"], row["question"]) for row in kept}) > 0.98 * len(kept)
    assert len({row["question"] for row in kept}) > 0.75 * len(kept)
    assert {row["difficulty"] for row in kept} == {"basic", "intermediate", "advanced"}
    assert Counter(row["generated_by"] for row in kept) == {PARAMS.model: len(kept)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"# Pump\n\0\0\0", "binary"),
        ("# Pump\n- ein Ventil".encode("utf-16"), "binary"),
        (b"# Pump\n- caf\xe9\n", "not UTF-8"),
        (b"# Pump\n\n## Valve\n", "has no facts"),
    ],
)
def test_a_file_that_is_no_facts_file_is_refused_before_anything_is_asked(
    standin: StandinLog, tmp_path: Path, content: bytes, message: str
) -> None:
    run, source = Run(tmp_path, "grounded"), tmp_path / "facts.md"
    source.write_bytes(content)
    result = run.stage("05_extract_qa", source)
    assert result.returncode == 2
    assert message in result.stderr and "next:" in result.stderr and "Traceback" not in result.stderr
    assert not run.path("05_extract_qa").exists()
    assert standin.requests() == []


def test_a_missing_facts_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no facts file at .*gone\.md"):
        facts.read_facts(tmp_path / "gone.md")


def test_a_byte_order_mark_is_not_part_of_the_facts(tmp_path: Path) -> None:
    path = tmp_path / "facts.md"
    path.write_bytes(b"\xef\xbb\xbf# Pump\n- The pump is red.\n")
    assert facts.chunks_of(facts.read_facts(path))[0].section == "Pump"
