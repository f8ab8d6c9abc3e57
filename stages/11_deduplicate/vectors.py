"""Unit vectors in a memory-mapped file: read from the parquet of 10 embed, flat in memory, shared by all workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import SettingsError
from shared.stage import shown

if TYPE_CHECKING:
    import numpy as np

Problem = tuple[str, str]
"""Reason and detail of a reject."""
BATCH = 1_024
"""Rows read at one time."""


def write_unit_vectors(parquet: Path, keys: Sequence[str | None], file: Path) -> tuple[int, list[Problem | None]]:
    """Write the unit vector of every key to ``file``, a float32 ``.npy`` of shape (keys, dimensions).

    Args:
        parquet: columns ``key`` (string) and ``vector`` (fixed-size list of float32); of equal keys the first counts.
        keys: one a record, in input order; ``None`` for a record that has none.
        file: is overwritten.

    Returns:
        The dimensions, and for every key what is wrong with its vector, ``None`` when nothing is. Its row is then
        zero and so similar to no other.

    Raises:
        SettingsError: the parquet is missing, unreadable, or has other columns.
        OSError: there is no room for the file.
    """
    import numpy as np

    table, dimensions = _open(parquet)
    wanted: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            wanted.setdefault(key, []).append(row)
    problems: list[Problem | None] = [
        ("no_vector", "the record has no embedding" if key is None else f"{shown(parquet)} has no vector {key!r}")
        for key in keys
    ]
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(len(keys), dimensions))
    _take_room(file, out.offset)
    for batch in _batches(table, parquet):
        for at, key in enumerate(batch.column("key").to_pylist()):
            rows = wanted.pop(key, [])
            if rows:
                unit, problem = _unit(batch.column("vector"), at, dimensions)
                for row in rows:
                    out[row] = unit
                    problems[row] = problem
    out.flush()
    return dimensions, problems


def _take_room(file: Path, offset: int) -> None:
    """Have all of a new file's blocks: writing to a mapped page that no block is left for kills the process."""
    with open(file, "r+b") as stream:
        size = os.fstat(stream.fileno()).st_size
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
            return
        for start in range(stream.seek(offset), size, 1 << 20):  # macOS has none
            stream.write(bytes(min(1 << 20, size - start)))


def _batches(table: Any, parquet: Path) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from table.iter_batches(BATCH, columns=["key", "vector"])
    except (pa.ArrowException, OSError) as error:
        raise SettingsError(f"{shown(parquet)} cannot be read: {error}", _mend(parquet)) from None


def _mend(parquet: Path) -> str:
    records = shown(parquet.with_suffix(".jsonl"))
    return f"rm {records}; make {records}"


def _unit(column: Any, at: int, dimensions: int) -> tuple[Any, Problem | None]:
    """Row ``at`` of an Arrow list column as a unit vector, or zeros and the problem with it."""
    import numpy as np

    zeros = np.zeros(dimensions, np.float32)
    if not column[at].is_valid or column[at].values.null_count:
        return zeros, ("bad_vector", "the vector is null or holds a null")
    # Not to_numpy: it imports pandas, which takes longer than the rest of the trial's stage.
    vector: np.ndarray[Any, Any] = np.from_dlpack(column[at].values).astype(np.float64)
    if not np.isfinite(vector).all():
        return zeros, ("bad_vector", "the vector holds a NaN or an infinity")
    largest = np.abs(vector).max(initial=0.0)
    if largest == 0:
        return zeros, ("bad_vector", "the vector is zero")
    vector /= largest  # so that the squares neither overflow nor vanish
    return (vector / np.sqrt((vector * vector).sum())).astype(np.float32), None


def _open(parquet: Path) -> tuple[Any, int]:
    """The parquet file and the dimensions of its vectors."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    mend = _mend(parquet)
    if not parquet.exists():
        raise SettingsError(f"no vectors at {shown(parquet)}: 10 embed writes them beside its records", mend)
    try:
        table = pq.ParquetFile(parquet)
        schema: Mapping[str, Any] = {field.name: field.type for field in table.schema_arrow}
    except (pa.ArrowException, OSError) as error:
        raise SettingsError(f"{shown(parquet)} is not a parquet file: {error}", mend) from None
    kind: Any = schema.get("vector", pa.null())
    if "key" not in schema or not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
        columns = ", ".join(f"{name}: {kind}" for name, kind in schema.items())
        raise SettingsError(f"{shown(parquet)}: expected key: string, vector: list of n floats; got {columns}", mend)
    return table, kind.list_size
