"""05 extract_qa: a Markdown facts file -> QAPair: grounded questions and answers, each with the quote that supports it.

The file is cut by section and bullet; each bullet comes with its section's title and the three lines before it. The
quote is checked to occur in that chunk, not trusted. Pairs that speak of dates after ``as_of`` are rejected.

Cost: one call a chunk; about $0.0005 at claude-haiku-5-5. `make estimate` says it for your file.

    python stages/05_extract_qa/main.py --in data/inputs/facts.md --out data/trial/grounded/05_extract_qa.jsonl \\
        --config stages/05_extract_qa/trial.toml --track grounded
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from shared.errors import SettingsError
from shared.llm import Reply, Request, chat
from shared.records import QAPair, content_id
from shared.stage import ROOT, Settings, Stage, run, shown

CONTEXT_LINES = 3
MAX_FILE_BYTES = 5_000_000
"""A facts file is written by people; a larger one is something else."""


class Params(Settings):
    """Settings of 05; see trial.toml for the unit of each."""

    model: str
    pairs_per_chunk: int = Field(3, ge=1, le=10)
    max_chunks: int = Field(0, ge=0)
    categories: tuple[str, ...] = Field(min_length=1)
    as_of: datetime.date
    licence: str
    language: str = "en"
    concurrency: int = Field(4, ge=1)
    max_tokens: int = Field(1500, ge=256)


class ExtractedPair(BaseModel):
    """One pair as the model writes it."""

    question: str
    answer: str
    quote: str
    difficulty: Literal["basic", "intermediate", "advanced"]
    categories: list[str]


class Extracted(BaseModel):
    """The answer to ``extract.txt``."""

    pairs: list[ExtractedPair]


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

    lines = text.splitlines()
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
_DATE = re.compile(
    r"\b(?P<year>(?:19|20)\d\d)(?:-(?P<month>\d\d)(?:-(?P<day>\d\d))?)?\b"
    rf"|\b(?P<name>{'|'.join(_MONTHS)})\s+(?:(?P<dom>\d{{1,2}}),?\s+)?(?P<year2>(?:19|20)\d\d)\b",
    re.IGNORECASE,
)


def dates_after(text: str, as_of: datetime.date) -> list[str]:
    """The dates in a text that begin after ``as_of``: ``2031``, ``2031-05``, ``2031-05-02``, ``May 2031``."""
    late = []
    for match in _DATE.finditer(text):
        year: str
        month: str | int
        day: str | int
        if match["name"]:
            year, month, day = match["year2"], _MONTHS.index(match["name"].lower()) + 1, match["dom"] or 1
        else:
            year, month, day = match["year"], match["month"] or 1, match["day"] or 1
        try:
            begins = datetime.date(int(year), int(month), int(day))
        except ValueError:
            continue  # 2024-99 is no date
        if begins > as_of:
            late.append(match[0])
    return late


def squeezed(text: str) -> str:
    """The text with every run of white space as one space: how quotes are compared."""
    return " ".join(text.split())


def fault_of(pair: ExtractedPair, chunk: Chunk, params: Params) -> tuple[str, str] | None:
    """The reason and detail why a pair cannot be used, or None."""
    if not pair.question.strip() or not pair.answer.strip():
        return "empty", "question or answer is empty"
    if not pair.quote.strip() or squeezed(pair.quote) not in squeezed(chunk.text):
        return "quote_not_in_chunk", f"lines {chunk.first}-{chunk.last} do not contain {pair.quote!r}"
    if late := dates_after(f"{pair.question} {pair.answer}", params.as_of):
        return "future_date", f"{', '.join(late)} is after {params.as_of}"
    if not set(pair.categories) & set(params.categories):
        return "no_known_category", f"{pair.categories} are not among the settings' categories"
    return None


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    path = stage.input or ROOT / "data" / "inputs" / "facts.md"
    chunks = spread(chunks_of(read_facts(path)), p.max_chunks)[: stage.limit or None]
    if not chunks:
        raise SettingsError(f"{shown(path)} has no facts", "write # sections with - bullets into it")
    stage.models.require(p.model)
    system = stage.prompt("system.txt")
    template = stage.prompt("extract.txt").replace("{n}", str(p.pairs_per_chunk))
    template = template.replace("{categories}", ", ".join(p.categories))

    # -- process
    async def extract(chunk: Chunk) -> Reply:
        messages = chat(system, template.replace("{chunk}", chunk.text))
        request = Request(model=p.model, messages=messages, max_tokens=p.max_tokens, response=Extracted)
        return await stage.models.ask(request)

    # -- save, in the order of the file
    seen: set[str] = set()
    for chunk, reply in stage.models.map(extract, chunks, p.concurrency):
        if reply.problem:
            stage.plan()
            stage.reject_raw(chunk.text, reply.problem, f"lines {chunk.first}-{chunk.last}: {reply.detail}")
            continue
        for pair in reply.parsed.pairs[: p.pairs_per_chunk]:
            stage.plan()
            record = QAPair(
                id=content_id("qa_pair", chunk.text, pair.question, pair.answer),
                parents=(content_id("chunk", chunk.text),),
                domain="prose",
                source=path.name,
                origin=f"{shown(path)}#L{chunk.first}-L{chunk.last}",
                language=p.language,
                category=chunk.section or "facts",
                licence=p.licence,
                section=chunk.section,
                chunk=chunk.text,
                question=pair.question,
                answer=pair.answer,
                quote=pair.quote,
                difficulty=pair.difficulty,
                categories=tuple(sorted(set(pair.categories) & set(p.categories)))[:3],
                generated_by=p.model,
            )
            if fault := fault_of(pair, chunk, p):
                stage.reject(record, *fault)
            elif record.id in seen:
                stage.reject(record, "duplicate", "the same question and answer again")
            else:
                seen.add(record.id)
                stage.keep(record)
    stage.summary |= {"chunks": len(chunks), "as_of": p.as_of.isoformat()}


if __name__ == "__main__":
    run(main, Params)
