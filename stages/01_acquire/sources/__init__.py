"""Where texts come from: one module per ``kind`` of ``[[sources]]`` table.

Each module has a settings model and ``read(source, acquire)``. ``read`` checks everything it can before it returns,
so that a wrong setting stops the stage before any text is read, and returns an iterator of :class:`Candidate`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extract import CodeLimits, definitions, file_problem, language_of, path_problem, spread
from pydantic import Field

from shared.stage import Settings

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Candidate:
    """One piece a source offers. ``reason`` is empty when it may go on.

    Attributes:
        text: empty when the candidate is a whole file or is too long: then the origin alone says what it was, so that
            the rejects stay bounded.
    """

    origin: str
    text: str = ""
    language: str = ""
    category: str = ""
    licence: str = "unknown"
    reason: str = ""
    detail: str = ""


Candidates = Generator[Candidate, None, None]
"""Closed by the reader as soon as a source's limit is reached, which ends the processes and streams behind it."""


class Source(Settings):
    """What every source has.

    Attributes:
        name: unique; the ``source`` field of its records.
        limit: records kept at most; reading stops there, and what lies beyond is not enumerated.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    limit: int = Field(ge=1)


class CodeSource(Source):
    """A source of files to extract from.

    Attributes:
        per_file: pieces kept of one file at most, so that a limit is not used up by a few files; 0 = all.
        include: path prefixes to read; empty = everything.
    """

    per_file: int = Field(default=0, ge=0)
    include: tuple[str, ...] = ()


@dataclass
class Acquire:
    """What the sources share: limits, seed, the place to cache clones, and a place to leave notes for the report."""

    limits: CodeLimits
    seed: int
    cache: Path
    services: Callable[[], None]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, source: Source, **facts: Any) -> None:
        self.notes.setdefault(source.name, {}).update(facts)


def from_file(
    path: str, data: bytes, language: str, origin: str, licence: str, source: CodeSource, acquire: Acquire
) -> Candidates:
    """The candidates of one source file; the file itself, rejected, when it is left out as a whole."""
    if problem := path_problem(path) or file_problem(data, acquire.limits):
        yield Candidate(origin, reason=problem[0], detail=problem[1])
        return
    pieces = list(definitions(data.removeprefix(b"\xef\xbb\xbf"), language, acquire.limits))
    drawn = None
    if source.per_file:
        # Drawn by hash, not the first ones: what stands first in a file is mostly of one sort.
        good = {piece.text for piece in pieces if not piece.reason}
        drawn = set(spread(good, acquire.seed)[: source.per_file])
    for piece in pieces:
        if not piece.reason and drawn is not None:
            if piece.text not in drawn:
                continue
            drawn.remove(piece.text)
        yield Candidate(
            origin=f"{origin}#L{piece.first}-L{piece.last}",
            text=piece.text,
            language=language,
            category=piece.category,
            licence=licence,
            reason=piece.reason,
            detail=piece.detail,
        )


def is_wanted(path: str, include: tuple[str, ...]) -> bool:
    """Whether a path is a source file of ours under one of the prefixes."""
    return language_of(path) is not None and (not include or path.startswith(include))
