"""Data frames for the data-parallel stages: Daft, embedded by default, the same plans on a Ray cluster on request.

``ENGINE=embedded`` (the default) runs in this process, on all its cores. ``ENGINE=ray`` runs on the cluster at
``RAY_ADDRESS`` (``ray://host:10001``; none starts a local one), to the same bytes; it needs the ``ray`` package here,
and on every worker the same packages, this repository on ``PYTHONPATH``, and ``data/`` at the same path.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from shared.errors import SettingsError

if TYPE_CHECKING:
    import daft

ENGINES = ("embedded", "ray")


def start() -> None:
    """Import Daft and choose where it runs; the first call of a process decides. No telemetry, no progress bars.

    Raises:
        SettingsError: ``ENGINE`` is neither, or ``ray`` is asked for and not installed.
    """
    engine = os.environ.get("ENGINE", "").strip() or "embedded"
    if engine not in ENGINES:
        raise SettingsError(f"ENGINE must be one of {', '.join(ENGINES)}, got {engine!r}", "ENGINE=embedded make trial")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise SettingsError("ENGINE=ray needs the ray package: it is not installed", "install ray, or ENGINE=embedded")
    # Daft reads these at its import and again at every query.
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["DAFT_PROGRESS_BAR"] = "0"
    _run_on(engine)


@lru_cache(maxsize=1)
def _run_on(engine: str) -> None:
    import daft

    if engine == "ray":
        daft.set_runner_ray(address=os.environ.get("RAY_ADDRESS") or None, noop_if_initialized=True)
    else:
        daft.set_runner_native()


def frame(rows: Iterable[Mapping[str, Any]], schema: Mapping[str, daft.DataType], chunk: int = 8_192) -> daft.DataFrame:
    """A frame of ``rows``; every row has the keys of ``schema``.

    Args:
        rows: read once, ``chunk`` at a time; only these are Python objects, the rest is already in Arrow buffers.
        schema: column names and types.
        chunk: rows a partition: what one Ray worker gets; embedded, what is read at one time.
    """
    rows = iter(rows)
    whole: daft.DataFrame | None = None
    while some := list(islice(rows, chunk)):
        part = _chunk(some, schema)
        whole = part if whole is None else whole.concat(part)
    return _chunk([], schema) if whole is None else whole


def _chunk(rows: list[Mapping[str, Any]], schema: Mapping[str, daft.DataType]) -> daft.DataFrame:
    import daft

    # Typed Series, not Arrow arrays: pyarrow imports pandas to make an array, which takes longer than most stages.
    return daft.from_pydict(
        {name: daft.Series.from_pylist([row[name] for row in rows], name, kind) for name, kind in schema.items()}
    )
