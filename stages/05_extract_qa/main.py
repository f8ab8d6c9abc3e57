"""05 extract_qa: a Markdown facts file -> QAPair: grounded questions and answers, each with the quote that supports it.

The file is cut by section and bullet; each bullet comes with its section's title and the three lines before it. The
quote is checked to occur in that chunk, not trusted. Pairs that speak of dates after ``as_of`` are rejected.

Cost: one call a chunk; about $0.0005 at claude-haiku-5-5. `make estimate` says it for your file.

    python stages/05_extract_qa/main.py --in data/inputs/facts.md --out data/trial/grounded/05_extract_qa.jsonl \\
        --config stages/05_extract_qa/trial.toml --track grounded
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from facts import Chunk, chunks_of, dates_after, read_facts, spread
from pydantic import BaseModel, Field

from shared.errors import SettingsError
from shared.llm import Reply, Request, chat, fill
from shared.llm.types import strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.records import Domain, QAPair, content_id
from shared.stage import ROOT, Settings, Stage, run, shown
from shared.text import squeezed

FACTS = ROOT / (os.environ.get("FACTS") or "data/inputs/facts.md")
"""The file that `make` was given; what is estimated and checked before the stage runs must be the same."""
PAIR_TOKENS, QUESTION_AND_ANSWER_TOKENS = 90, 45
"""Of one pair as the model writes it, JSON and quote included, and of its question and answer; for the estimate."""


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


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 05 asks about the facts file, from an empty store."""
    chunks = spread(chunks_of(read_facts(FACTS)), params.max_chunks)
    here = Path(__file__).parent / "prompts"
    prompt = sum(tokens_of((here / f"{name}.txt").read_text("utf-8")) for name in ("system", "extract"))
    tokens = sum(tokens_of(chunk.text) for chunk in chunks)
    asked = len(chunks) * (prompt + tokens_of(str(strict_schema(Extracted)))) + tokens
    return [Calls(params.model, len(chunks), asked, len(chunks) * params.pairs_per_chunk * PAIR_TOKENS)]


def yields(params: Params, volumes: Mapping[Domain, Volume]) -> dict[Domain, Volume]:
    """The pairs 05 will make of the facts file."""
    chunks = spread(chunks_of(read_facts(FACTS)), params.max_chunks)
    tokens = sum(tokens_of(chunk.text) for chunk in chunks) / max(1, len(chunks))
    return {"prose": Volume(len(chunks) * params.pairs_per_chunk, tokens + QUESTION_AND_ANSWER_TOKENS)}


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    path = stage.input or FACTS
    chunks = spread(chunks_of(read_facts(path)), p.max_chunks)[: stage.limit or None]
    if not chunks:
        raise SettingsError(f"{shown(path)} has no facts", "write # sections with - bullets into it")
    stage.models.require(p.model)
    system = stage.prompt("system.txt")
    template = fill(stage.prompt("extract.txt"), n=str(p.pairs_per_chunk), categories=", ".join(p.categories))

    # -- process
    async def extract(chunk: Chunk) -> Reply:
        messages = chat(system, fill(template, chunk=chunk.text))
        request = Request(model=p.model, messages=messages, max_tokens=p.max_tokens, response=Extracted)
        return await stage.models.ask(request)

    # -- save, in the order of the file
    seen: set[str] = set()
    for chunk, reply in stage.models.map(extract, chunks, p.concurrency):
        if reply.problem:
            stage.plan()
            stage.reject_raw(chunk.text, reply.problem, f"lines {chunk.first}-{chunk.last}: {reply.detail}")
            continue
        if not reply.parsed.pairs:
            stage.plan()
            stage.reject_raw(chunk.text, "no_pairs", f"lines {chunk.first}-{chunk.last}: the answer has no pairs")
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
