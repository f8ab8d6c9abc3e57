"""10 embed: any Item -> the same + embedding; the vectors lie in 10_embed.parquet beside the records.

Hosted: OpenAI text-embedding-3-small at 1,024 dimensions, texts packed to the API's limits (2,048 texts and 300,000
tokens a request); about $0.02 per million tokens, so $0.05 for 10,000 pairs. Local: hashed character n-grams, free
and lexical: finds copies and light edits, not paraphrases.

    python stages/10_embed/main.py --in data/trial/compression/04_validate.jsonl \\
        --out data/trial/compression/10_embed.jsonl --config stages/10_embed/trial.toml --track compression
"""

from __future__ import annotations

import itertools
import math
import zlib
from array import array
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeAlias

from pydantic import Field

from shared.llm.volume import Calls, Volume
from shared.records import AnyItem, Domain, Embedding, Item
from shared.stage import Settings, Stage, run

LOCAL = "local/hashed-ngrams"

Vectors: TypeAlias = "list[array[float] | None]"  # quoted: array takes a type argument from Python 3.12 on only


class Params(Settings):
    """Settings of 10; see trial.toml for the unit of each."""

    model: str
    dimensions: int = Field(1024, ge=8)
    batch: int = Field(256, ge=1, le=2048)
    concurrency: int = Field(4, ge=1)


def hashed_ngrams(text: str, dimensions: int) -> array[float]:
    """A unit vector of signed counts of hashed character 3- to 5-grams (feature hashing, Weinberger et al. 2009)."""
    vector = array("f", bytes(4 * dimensions))
    data = " ".join(text.lower().split()).encode()
    for size in (3, 4, 5):
        for start in range(len(data) - size + 1):
            code = zlib.crc32(data[start : start + size])
            vector[code % dimensions] += 1 if code & 0x8000_0000 else -1
    norm = math.sqrt(math.fsum(x * x for x in vector)) or 1.0
    return array("f", (x / norm for x in vector))


def batches(records: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """The records in lists of ``size``; the last may be shorter."""
    while batch := list(itertools.islice(records, size)):
        yield batch


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 10 asks for these records, from an empty store."""
    if params.model == LOCAL:
        return []
    records = sum(volume.records for volume in volumes.values())
    tokens = sum(volume.records * volume.tokens for volume in volumes.values())
    return [Calls(params.model, math.ceil(records / params.batch), tokens, low=0.8, high=1.25)]


def embedder(stage: Stage[Params]) -> Callable[[list[Item]], Coroutine[Any, Any, Vectors]]:
    """What turns a list of records into vectors, by the settings."""
    p = stage.params
    if p.model == LOCAL:

        async def local(batch: list[Item]) -> Vectors:
            vectors: Vectors = [hashed_ngrams(record.content(), p.dimensions) for record in batch]
            return vectors

        return local
    stage.models.require_embedder(p.model)

    async def hosted(batch: list[Item]) -> Vectors:
        return await stage.models.embed(p.model, [record.content() for record in batch], p.dimensions)

    return hosted


def main(stage: Stage[Params]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # -- load
    p = stage.params
    schema = pa.schema([("key", pa.string()), ("vector", pa.list_(pa.float32(), p.dimensions))])

    # -- process, and save as it comes
    with pq.ParquetWriter(stage.side_file(".parquet"), schema) as table:
        read = batches(stage.read(AnyItem), p.batch)
        for batch, vectors in stage.models.map(embedder(stage), read, p.concurrency):
            found = [(record, vector) for record, vector in zip(batch, vectors, strict=True) if vector is not None]
            data = pa.py_buffer(b"".join(vector.tobytes() for _, vector in found))
            flat = pa.Array.from_buffers(pa.float32(), len(found) * p.dimensions, [None, data])
            columns = [[record.id for record, _ in found], pa.FixedSizeListArray.from_arrays(flat, p.dimensions)]
            table.write_table(pa.table(columns, schema=schema))
            for record, vector in zip(batch, vectors, strict=True):
                if vector is None:
                    stage.reject(record, "bad_request", f"{p.model} refuses this text; it is too long for it, perhaps")
                else:
                    embedding = Embedding(key=record.id, model=p.model, dimensions=p.dimensions)
                    stage.keep(record.with_field(embedding=embedding))


if __name__ == "__main__":
    run(main, Params)
