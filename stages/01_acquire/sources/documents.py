"""Markdown and plain text files of the user's own: paragraphs joined to size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from extract import spread, text_problem
from prose import Sizes, passages
from pydantic import Field

from shared.errors import SettingsError
from sources import ROOT, Acquire, Candidate, Candidates, Source


class Documents(Source):
    """``kind = "documents"``.

    Attributes:
        files: glob patterns, from the repository's root or absolute (``docs/**/*.md``); hidden files are not matched.
        sizes: how long a passage is.
        language: ISO 639-1 code of what the files are written in.
        licence: SPDX expression the user gives; there is nothing to read it from.
        category: what to call the passages.
        optional: no such file is noted in the report and not an error.
        max_file_bytes: a longer file is left out.
    """

    kind: Literal["documents"]
    domain: Literal["prose"] = "prose"
    files: tuple[str, ...] = Field(min_length=1)
    sizes: Sizes = Sizes()
    language: str = Field(default="en", pattern=r"^[a-z]{2,3}$")
    licence: str = Field(min_length=1)
    category: str = Field(default="document", min_length=1)
    optional: bool = False
    max_file_bytes: int = Field(default=5_000_000, ge=1)


def read(source: Documents, acquire: Acquire) -> Candidates:
    """The passages of every file, files in an order drawn by the seed.

    Raises:
        SettingsError: no file matches and the source is not optional, or a pattern is none.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for pattern in source.files:
        base, rest = _split(pattern)
        try:
            found |= {_shown(path): (path, base) for path in base.glob(rest) if _visible(path, base)}
        except ValueError as error:
            raise SettingsError(
                f"source {source.name!r}: {pattern!r} is no pattern: {error}", 'a pattern is like "docs/**/*.md"'
            ) from None
    if not found and not source.optional:
        raise SettingsError(
            f"source {source.name!r}: no file matches {', '.join(source.files)}",
            "put files there, correct files, or set optional = true",
        )
    acquire.note(source, files=len(found), **({} if found else {"absent": ", ".join(source.files)}))
    return _candidates(source, {origin: found[origin] for origin in spread(found, acquire.seed)})


def _candidates(source: Documents, files: dict[str, tuple[Path, Path]]) -> Candidates:
    for origin, (path, base) in files.items():
        text, reason, detail = _text(path, base, source.max_file_bytes)
        if reason:
            yield Candidate(origin, reason=reason, detail=detail)
            continue
        for piece in passages(text, source.sizes):
            yield Candidate(
                origin=f"{origin}#L{piece.first}-L{piece.last}",
                text=piece.text,
                language=source.language,
                category=source.category,
                licence=source.licence,
                reason=piece.reason,
                detail=piece.detail,
            )


def _split(pattern: str) -> tuple[Path, str]:
    """The directory that the fixed part of a pattern names, and the rest. Nothing outside the directory is read."""
    parts = Path(os.path.normpath(ROOT / pattern)).parts
    fixed = next((number for number, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    return Path(*parts[:fixed]), str(Path(*parts[fixed:]))


def _shown(path: Path) -> str:
    short = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return os.fsencode(short).decode("utf-8", "backslashreplace")


def _visible(path: Path, base: Path) -> bool:
    return (path.is_symlink() or path.is_file()) and not any(
        part.startswith(".") for part in path.relative_to(base).parts
    )


def _text(path: Path, base: Path, most: int) -> tuple[str, str, str]:
    """``(text, reason, detail)``; the reason is empty for a file that can be read."""
    steps = [path, *path.parents]
    if any(step.is_symlink() for step in steps[: steps.index(base)]):
        return "", "symlink", "a symbolic link is never followed"
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        return "", "unreadable", error.strerror or str(error)
    if len(data) > most:
        return "", "file_too_large", f"more than {most:,} bytes"
    if problem := text_problem(data):
        return "", *problem
    return data.decode("utf-8"), "", ""
