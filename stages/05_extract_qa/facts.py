"""Reading a facts file: its chunks, and the dates it speaks of."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

from shared.errors import SettingsError
from shared.stage import shown

CONTEXT_LINES = 3
MAX_FILE_BYTES = 5_000_000
"""A facts file is written by people; a larger one is something else."""


@dataclass(frozen=True)
class Chunk:
    """One bullet with what is needed to understand it; ``first`` and ``last`` are its lines in the file, from 1."""

    section: str
    text: str
    first: int
    last: int


# ---------------------------------------------------------------- the facts file


def read_facts(path: Path) -> str:
    """The file's text.

    Raises:
        SettingsError: missing, empty, binary or far too large.
    """
    mend = "make grounded FACTS=path/to/facts.md   (Markdown: # sections with - bullets)"
    if not path.is_file():
        raise SettingsError(f"no facts file at {shown(path)}", mend)
    data = path.read_bytes()
    if len(data) > MAX_FILE_BYTES or b"\0" in data:
        raise SettingsError(f"{shown(path)} is not a facts file: {len(data):,} bytes, binary or too large", mend)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{shown(path)} is not UTF-8 text: {error}", mend) from None
    if not text.strip():
        raise SettingsError(f"{shown(path)} is empty", mend)
    return text


def chunks_of(text: str) -> list[Chunk]:
    """The bullets of a Markdown text, each with its section and up to three lines of context before it.

    A line that belongs to no bullet (a paragraph) is a bullet of its own; continuation lines stay with their bullet.
    """
    section, before = "", list[str]()
    chunks: list[Chunk] = []
    bullet: list[str] = []
    first = 0

    def close(last: int) -> None:
        nonlocal bullet
        if bullet:
            body = "\n".join(bullet)
            title = [f"# {section}"] if section else []
            chunks.append(Chunk(section, "\n".join([*title, *before[-CONTEXT_LINES:], body]), first, last))
            before.extend(bullet)
            bullet = []

    lines = re.split(r"\r\n?|\n", text)  # as an editor counts them: U+2028 and the like are text
    for number, line in enumerate(lines, 1):
        heading = re.match(r"#{1,6}\s+(.*)", line)
        if heading:
            close(number - 1)
            section, before = heading[1].strip(), []
        elif not line.strip():
            close(number - 1)
        elif bullet and line[:1].isspace():
            bullet.append(line.rstrip())
        else:
            close(number - 1)
            bullet, first = [line.rstrip()], number
    close(len(lines))
    return chunks


def spread(chunks: list[Chunk], most: int) -> list[Chunk]:
    """At most ``most`` chunks, evenly over the file; all when ``most`` is 0."""
    if not most or most >= len(chunks):
        return chunks
    return [chunks[i * len(chunks) // most] for i in range(most)]


# ---------------------------------------------------------------- checks

_MONTHS = "january february march april may june july august september october november december".split()
_NAMES = "|".join(rf"{month[:3]}(?:{month[3:]})?" for month in _MONTHS if month != "september") + "|sept?(?:ember)?"
_DATE = re.compile(
    r"(?<![\w.,=/$€£#])(?P<year>(?:19|20)\d\d)(?:-(?P<month>\d\d)(?:-(?P<day>\d\d))?)?\b(?![.,]\d|\s*%)"
    rf"|\b(?P<name>{_NAMES})\b\.?\s+(?:(?P<dom>\d{{1,2}})(?:st|nd|rd|th)?,?\s+)?"
    r"(?P<year2>(?:19|20)\d\d)\b",
    re.IGNORECASE,
)
_COUNTED = re.compile(r"\s+[a-z]+s\b")
_YEAR_BEFORE = re.compile(r"\b(?:in|by|since|until|till|before|after|during|year|early|mid|late|of)\s+$", re.IGNORECASE)


def dates_after(text: str, as_of: datetime.date) -> list[str]:
    """The dates in a text that begin after ``as_of``: ``2031``, ``2031-05``, ``2031-05-02``, ``May 2031``.

    A number that counts something (``2048 tokens``) is no year, unless a word before it says so (``in 2031 prices``).
    """
    late = []
    for match in _DATE.finditer(text):
        year: str
        month: str | int
        day: str | int
        if match["name"]:
            starts = match["name"][:3].lower()
            month = next(number for number, name in enumerate(_MONTHS, 1) if name.startswith(starts))
            year, day = match["year2"], match["dom"] or 1
        else:
            counted = _COUNTED.match(text, match.end()) and not _YEAR_BEFORE.search(text[: match.start()])
            if counted and not match["month"]:
                continue
            year, month, day = match["year"], match["month"] or 1, match["day"] or 1
        try:
            begins = datetime.date(int(year), int(month), int(day))
        except ValueError:
            continue  # 2024-99 is no date
        if begins > as_of:
            late.append(match[0])
    return late
