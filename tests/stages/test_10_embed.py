"""10 embed: one vector for every record, in a file beside them, paid once."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from shared.records import Pair, Reject
from shared.stage import read_records
from tests.conftest import ROOT, StandinLog, StandinWith, run_stage
from tests.stages.test_04_validate import pair, texts

STAGE = ROOT / "stages" / "10_embed"
_spec = importlib.util.spec_from_file_location("embed_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["embed_main"] = main
_spec.loader.exec_module(main)


def embed(data: Path, settings: str, pairs: list[Pair]) -> subprocess.CompletedProcess[str]:
    (data / "04_validate.jsonl").write_bytes(b"".join(p.line() for p in pairs))
    (data / "trial.toml").write_text(settings)
    files = ("--in", data / "04_validate.jsonl", "--out", data / "10_embed.jsonl", "--config", data / "trial.toml")
    return run_stage(STAGE / "main.py", *files, "--track", "compression")


def vectors(data: Path) -> dict[str, list[float]]:
    rows = pq.read_table(data / "10_embed.parquet").to_pylist()
    return {row["key"]: row["vector"] for row in rows}


HOSTED = 'model = "openai/text-embedding-3-small"\ndimensions = 64\nbatch = 4\n'
LOCAL = 'model = "local/hashed-ngrams"\ndimensions = 256\nbatch = 4\n'


@pytest.mark.parametrize(("settings", "dimensions"), [(HOSTED, 64), (LOCAL, 256)])
def test_every_record_gets_a_vector_in_the_file_beside_it(
    standin: StandinLog, data: Path, settings: str, dimensions: int
) -> None:
    pairs = [pair(text) for text in texts(10)]
    done = embed(data, settings, pairs)
    assert done.returncode == 0, done.stderr
    records = list(read_records(data / "10_embed.jsonl", Pair))
    assert [r.model_copy(update={"embedding": None}) for r in records] == pairs, "in order, nothing else changed"
    found = vectors(data)
    assert list(found) == [p.id for p in pairs]
    for record in records:
        assert record.embedding is not None and record.embedding.key == record.id
        assert record.embedding.dimensions == len(found[record.id]) == dimensions
        assert math.isclose(math.hypot(*found[record.id]), 1.0, rel_tol=1e-5)


def test_a_second_run_pays_nothing_and_writes_the_same_bytes(standin: StandinLog, data: Path) -> None:
    pairs = [pair(text) for text in texts(10)]
    embed(data, HOSTED, pairs)
    assert len(standin.requests()) == 3, "10 texts, 4 a request"
    first = [(data / name).read_bytes() for name in ("10_embed.jsonl", "10_embed.parquet")]
    standin.mark()
    embed(data, HOSTED.replace("batch = 4", "batch = 7\nconcurrency = 1"), pairs)
    assert standin.requests() == []
    assert (data / "10_embed.jsonl").read_bytes() == first[0]
    assert vectors(data) == {p.id: v for p, v in zip(pairs, vectors(data).values(), strict=True)}
    embed(data, HOSTED, pairs)
    assert [(data / name).read_bytes() for name in ("10_embed.jsonl", "10_embed.parquet")] == first


def test_the_local_embedder_asks_nobody(standin: StandinLog, data: Path) -> None:
    assert embed(data, LOCAL, [pair(text) for text in texts(3)]).returncode == 0
    assert standin.requests() == []
    assert orjson.loads((data / "10_embed.report.json").read_bytes())["spending"]["calls"] == 0


def test_the_local_embedder_finds_copies_and_light_edits() -> None:
    def cosine(a: str, b: str) -> float:
        one, two = (main.hashed_ngrams(text, 1024) for text in (a, b))
        return math.fsum(x * y for x, y in zip(one, two, strict=True))

    a = "The pump runs at 40 bar and must not be opened before noon."
    assert cosine(a, a) == pytest.approx(1.0)
    assert cosine(a, "  The PUMP runs at 40 bar\nand must not be opened before noon.") == pytest.approx(1.0)
    assert cosine(a, a.replace("40", "41")) > 0.9
    assert cosine(a, "An entirely different sentence about bread and butter.") < 0.3
    assert math.hypot(*main.hashed_ngrams("", 64)) == 0.0


def test_a_text_too_long_for_the_model_is_set_aside(standin: StandinLog, data: Path) -> None:
    long = pair("word " * 9000)
    short = pair("The short one.")
    done = embed(data, HOSTED, [long, short])
    assert done.returncode == 0, done.stderr
    assert list(vectors(data)) == [short.id]
    (reject,) = (
        Reject.model_validate_json(line) for line in (data / "10_embed.rejects.jsonl").read_bytes().splitlines()
    )
    assert reject.reason == "bad_request" and "refuses this text" in reject.detail


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        (HOSTED.replace("openai/text", "openai/next"), 5, "the price of openai/next-embedding-3-small is unknown"),
        (HOSTED.replace("openai/text-embedding-3-small", "anthropic/claude-haiku-5-5"), 2, "embeddings come from"),
        (HOSTED.replace("batch = 4", "batch = 5000"), 2, "batch"),
    ],
)
def test_wrong_settings_stop_it_before_anything_is_asked(
    standin: StandinLog, data: Path, settings: str, code: int, says: str
) -> None:
    done = embed(data, settings, [pair(text) for text in texts(2)])
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr
    assert standin.requests() == []


def test_what_the_service_refuses_is_told_to_a_person(standin_with: StandinWith, data: Path) -> None:
    standin_with(faults="400=1")
    done = embed(data, HOSTED, [pair(text) for text in texts(2)])
    assert done.returncode == 4
    assert "bad_request 2" in done.stderr and "next:" in done.stderr and "Traceback" not in done.stderr


def test_one_text_the_service_refuses_does_not_spoil_the_others(standin: StandinLog, data: Path) -> None:
    records = [pair(text) for text in texts(5)] + [pair("word " * 9000)] + [pair(f"and {text}") for text in texts(5)]
    done = embed(data, HOSTED.replace("batch = 4", "batch = 16"), records)
    assert done.returncode == 0, done.stderr
    assert list(vectors(data)) == [record.id for n, record in enumerate(records) if n != 5]
    assert embed(data, HOSTED.replace("batch = 4", "batch = 16"), records).returncode == 0
