"""What the Tinker stand-in keeps: checkpoints and training runs, in a directory that outlives the process.

::

    <state>/tinker/<run>/run.json
    <state>/tinker/<run>/<kind>/<name>.safetensors     kind: weights, sampler_weights, external_weights

A checkpoint is one file, the numbers as tensors and all else in its header, so it is there whole or not at all. Several
stand-ins may share a directory: the ids of runs are random.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import orjson

from shared.stage import atomic
from shared.standin.wire import RefusedError

KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""Segment of a path, and what the service calls its kind."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_temporary: list[str] = []


class Place(NamedTuple):
    """Where a checkpoint lies: ``tinker://<run>/<kind>/<name>``."""

    run: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, path: str) -> Place:
        """Raises:
        RefusedError: 400, it is no such path.
        """
        parts = path.removeprefix("tinker://").split("/")
        if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in KINDS or not NAME.fullmatch(parts[2]):
            raise RefusedError(400, f"{path!r} is not tinker://<run>/<{'|'.join(KINDS)}>/<name>")
        return cls(*parts)


class Store:
    """Checkpoints and runs in a directory; ``""`` is a temporary one (:func:`forget` removes it)."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    @cached_property
    def root(self) -> Path:
        if not self._directory:
            _temporary.append(tempfile.mkdtemp(prefix="synthmill-standin-"))
        root = Path(self._directory or _temporary[-1]) / "tinker"
        root.mkdir(parents=True, exist_ok=True)
        return root

    # ------------------------------------------------------------ runs

    def keep_run(self, run: str, facts: Mapping[str, Any]) -> None:
        """Write down what a training run is."""
        path = self._run(run) / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(orjson.dumps(facts))

    def run(self, run: str) -> dict[str, Any]:
        """What :meth:`keep_run` wrote.

        Raises:
            RefusedError: 404, there is no such run.
        """
        try:
            found: dict[str, Any] = orjson.loads((self._run(run) / "run.json").read_bytes())
        except FileNotFoundError:
            raise RefusedError(404, f"there is no training run {run!r}") from None
        return found

    def runs(self) -> list[str]:
        """Ids of all runs, the newest first."""
        files = sorted(self.root.glob("*/run.json"), key=lambda path: (-path.stat().st_mtime_ns, path))
        return [unquote(path.parent.name) for path in files]

    def _run(self, run: str) -> Path:
        # All that is not plain is quoted, so nothing that a client sends leads out of the directory.
        return self.root / quote(run, safe="").replace(".", "%2E")

    # ------------------------------------------------------------ checkpoints

    def save(self, place: Place, arrays: Mapping[str, Any], facts: dict[str, Any], *, overwrite: bool = False) -> None:
        """Write a checkpoint; ``facts["expires"]`` is in seconds since 1970, or None.

        Raises:
            RefusedError: 400, it is there already.
        """
        from safetensors.numpy import save

        path = self._path(place)
        if path.exists() and not overwrite and not self._gone(self._header(path)):
            raise RefusedError(400, f"{place} is there already; save under another name, or with overwrite=True")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(save(dict(arrays), {"checkpoint": orjson.dumps(facts).decode()}))

    def facts(self, place: Place) -> dict[str, Any]:
        """What was said of a checkpoint when it was saved, and its ``size`` in bytes.

        Raises:
            RefusedError: 404, there is none, or it has expired.
        """
        path = self._path(place)
        facts = self._header(path) if path.exists() else None
        if facts is None or self._gone(facts):
            raise RefusedError(404, f"there is no checkpoint {place}; it was deleted, has expired, or never was")
        return {"size": path.stat().st_size} | facts

    def load(self, place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Facts and numpy arrays of a checkpoint.

        Raises:
            RefusedError: see :meth:`facts`.
        """
        from safetensors.numpy import load_file

        return self.facts(place), load_file(self._path(place))

    def delete(self, place: Place) -> None:
        """Remove a checkpoint.

        Raises:
            RefusedError: see :meth:`facts`.
        """
        self.facts(place)
        self._path(place).unlink()

    def expire(self, place: Place, when: float | None) -> None:
        """Set when a checkpoint expires.

        Raises:
            RefusedError: see :meth:`facts`.
        """
        facts, arrays = self.load(place)
        self.save(place, arrays, facts | {"expires": when}, overwrite=True)

    def checkpoints(self, run: str | None = None) -> Iterator[tuple[Place, dict[str, Any]]]:
        """All checkpoints of a run, or of all runs, by name."""
        for directory in [self._run(run)] if run else sorted(self.root.iterdir()):
            for path in sorted(directory.glob("*/*.safetensors")):
                place = Place(unquote(directory.name), path.parent.name, path.name.removesuffix(".safetensors"))
                facts = self._header(path)
                if not self._gone(facts):
                    yield place, {"size": path.stat().st_size} | facts

    def _path(self, place: Place) -> Path:
        return self._run(place.run) / place.kind / f"{place.name}.safetensors"

    @staticmethod
    def _header(path: Path) -> dict[str, Any]:
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:  # type: ignore[no-untyped-call, unused-ignore]
            found: dict[str, Any] = orjson.loads(file.metadata()["checkpoint"])
        return found

    @staticmethod
    def _gone(facts: Mapping[str, Any]) -> bool:
        return facts.get("expires") is not None and float(facts["expires"]) <= time.time()


def forget() -> None:
    """Remove the temporary directories of this process."""
    for directory in _temporary:
        shutil.rmtree(directory, ignore_errors=True)
