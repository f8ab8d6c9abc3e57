"""The contract between stages: what goes into a line comes out of it, and nothing else gets in."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from pydantic import TypeAdapter, ValidationError

from shared.errors import SettingsError
from shared.records import (
    AnyItem,
    Choice,
    Cluster,
    Embedding,
    Example,
    Generation,
    Merged,
    Message,
    Pair,
    RawText,
    Record,
    Reject,
    TaskScore,
    Verdict,
    Verdicts,
    content_id,
)
from shared.stage import parse_line, read_records

ID = content_id("a text")
SOURCED: dict[str, Any] = {
    "id": ID,
    "domain": "code",
    "source": "a repository",
    "origin": "repo@abc:path.py#L1-L9",
    "language": "python",
    "category": "function",
    "licence": "MIT",
}
GENERATION = Generation(
    generator="endpoint",
    model="m",
    prompt="0" * 16,
    tokenizer="t",
    verbose_tokens=10,
    compressed_tokens=4,
    compression_ratio=0.4,
)
PAIR = Pair(**SOURCED, verbose="def f():\n    return 1", compressed="fn f: ret 1", generation=GENERATION)
SCORE = TaskScore(task="explain", similarity=0.9, verbose_reply="a" * 64, compressed_reply="b" * 64)
VERDICTS = Verdicts(
    panel=(Verdict(model="openai/gpt", equivalence=0.9, tasks=(SCORE,), judged=True),),
    min_equivalence=0.9,
    mean_equivalence=0.9,
    threshold=0.8,
    passed=True,
)
RECORDS = [
    RawText(**SOURCED, text='naïve → 文\u2028 "quoted"\n\t😀 \x00 end'),
    RawText(**SOURCED, text="x", merged=Merged(text="x", edits=("nfc", "email"))),
    PAIR,
    PAIR.with_field(
        verdicts=VERDICTS,
        embedding=Embedding(key=ID, model="m", dimensions=8),
        cluster=Cluster(id=ID, size=2),
        choice=Choice(rank=1, score=0.9),
    ),
    Example(
        **SOURCED,
        parents=(content_id("parent"),),
        messages=(Message(role="user", content="hi"), Message(role="assistant", content="ho")),
        split="train",
        group=ID,
        quality=1.0,
    ),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_comes_back_from_its_line_as_it_was(record: Record) -> None:
    line = record.line()
    assert line.count(b"\n") == 1 and line.endswith(b"\n"), "one record, one line, whatever its text holds"
    reason, detail, back = parse_line(line, TypeAdapter(type(record)))
    assert (reason, detail) == ("", "")
    assert back == record
    assert back.line() == line


def test_an_item_of_any_kind_is_read_as_the_kind_it_says() -> None:
    back = parse_line(PAIR.line(), TypeAdapter(AnyItem))[2]
    assert back == PAIR and type(back) is Pair


@pytest.mark.parametrize(
    "reject",
    [
        Reject(stage="02_merge", reason="near_duplicate", detail="0.91", match=ID, record=PAIR.model_dump(mode="json")),
        Reject(stage="02_merge", reason="not_json", raw="{\x00"),
        Reject(stage="02_merge", reason="not_json", raw_base64="/w=="),
    ],
    ids=["record", "raw", "base64"],
)
def test_a_reject_comes_back_from_its_line_as_it_was(reject: Reject) -> None:
    assert Reject.model_validate_json(reject.line()) == reject


def test_the_id_of_a_content_never_changes() -> None:
    # Literal: ids are in every file and in every released data set, on every machine and Python.
    assert content_id("def f():\n    return 1\n") == "5182fbb265777a516c0d5468fd6c09b1"
    assert content_id("naïve", "文") == "7a79b89086dca374c18dd09cacb3f294"
    assert content_id() == "e3b0c44298fc1c149afbf4c8996fb924"


def test_where_one_part_ends_is_part_of_the_id() -> None:
    assert len({content_id("ab", "c"), content_id("a", "bc"), content_id("abc"), content_id("abc", "")}) == 4


def test_unknown_fields_are_refused_at_every_depth() -> None:
    for place in ((), ("generation",)):
        value: dict[str, Any] = orjson.loads(PAIR.line())
        target = value
        for key in place:
            target = target[key]
        target["compresed"] = "typo"
        reason, detail, record = parse_line(orjson.dumps(value), TypeAdapter(Pair))
        assert record is None and reason == "not_a_record"
        assert "compresed" in detail and "not permitted" in detail


def test_a_record_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PAIR.compressed = "other"


def test_a_stage_adds_fields_and_never_rewrites_one() -> None:
    judged = PAIR.with_field(verdicts=VERDICTS)
    assert judged.verdicts == VERDICTS and PAIR.verdicts is None
    assert judged.with_field(verdicts=VERDICTS) == judged, "writing the same again changes nothing"
    worse = VERDICTS.model_copy(update={"passed": False})
    with pytest.raises(ValueError, match=f"Pair {ID}: verdicts is written already"):
        judged.with_field(verdicts=worse)
    with pytest.raises(ValueError, match="compressed is written already"):
        judged.with_field(compressed="shorter")
    with pytest.raises(ValueError, match="id is written already"):
        judged.with_field(id=content_id("other"))


def test_a_field_the_record_does_not_have_is_refused_when_it_is_added() -> None:
    with pytest.raises(AttributeError, match="verdict"):
        PAIR.with_field(verdict=VERDICTS)


@pytest.mark.parametrize("bad", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32])
def test_an_id_is_32_hex_digits(bad: str) -> None:
    with pytest.raises(ValidationError):
        PAIR.model_validate(PAIR.model_dump() | {"id": bad})


@pytest.mark.parametrize("version", [0, 2, 99])
def test_a_record_of_another_schema_version_stops_the_run_with_what_to_do(version: int, tmp_path: Any) -> None:
    path = tmp_path / "03_compress.jsonl"
    path.write_bytes(PAIR.line() + orjson.dumps(orjson.loads(PAIR.line()) | {"schema_version": version}) + b"\n")
    with pytest.raises(SettingsError) as refused:
        list(read_records(path, Pair))
    assert f"schema version {version}" in str(refused.value) and "version 1" in str(refused.value)
    assert "make clean" in refused.value.mend


@pytest.mark.parametrize("version", ["1", "2", 1.5, None, True, [1]])
def test_a_record_without_a_proper_schema_version_is_never_taken_for_one_of_ours(version: Any) -> None:
    value = orjson.loads(PAIR.line()) | {"schema_version": version}
    if version is None:
        del value["schema_version"]
    reason, detail, record = parse_line(orjson.dumps(value), TypeAdapter(Pair))
    assert record is None and reason == "not_a_record"
    assert "schema_version" in detail
