"""09 judge: Conversation -> Conversation + judgement: a boolean rubric, passed only when every criterion holds.

The criteria are the settings' and, for a conversation that was to show patterns, one for each of them. A criterion
that asks for a quote holds only when the quote occurs in the assistant's turns: checked, not trusted. The judge is
never the model that wrote the conversation. With gates in the settings, the stage ends in go or no go.

Cost: one call a conversation; about $0.0004 at claude-haiku-5-5.

    python stages/09_judge/main.py --in data/trial/grounded/07_converse.jsonl \\
        --out data/trial/grounded/09_judge.jsonl --config stages/09_judge/trial.toml --track grounded
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from gates import Gates, go_no_go
from pydantic import BaseModel, Field
from rubric import Tally

from shared.errors import SettingsError
from shared.llm import Reply, Request, chat, fill
from shared.llm.types import strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.records import Conversation, Criterion, Domain, Judgement
from shared.stage import ROOT, Settings, Stage, run
from shared.text import squeezed

CRITERION_TOKENS, FEEDBACK_TOKENS, CONTEXT_TOKENS = 45, 60, 120
"""Of one criterion judged with its quote, of feedback and issues, and of the facts or profile; for the estimate."""
TRIES = 3
"""Times a judge that leaves criteria out is asked."""


class Params(Settings):
    """Settings of 09; see trial.toml for the unit of each."""

    judge: str
    criteria: dict[str, str] = Field(min_length=1)
    patterns: Path | None = None
    profile: Path | None = None
    gates: Gates | None = None
    concurrency: int = Field(4, ge=1)
    max_tokens: int = Field(1500, ge=256)


class JudgedCriterion(BaseModel):
    """One criterion as the judge answers it."""

    name: str
    passed: bool
    quote: str


class Judged(BaseModel):
    """The answer to ``judge.txt``."""

    criteria: list[JudgedCriterion]
    feedback: str
    issues: list[str]


def judgement(judged: Judged, record: Conversation, params: Params) -> Judgement:
    """The judge's answer with every quote checked against the assistant's turns."""
    said = squeezed(" ".join(m.content for m in record.messages if m.role == "assistant"))
    answers = {row.name: row for row in judged.criteria}
    criteria, issues = [], list(judged.issues)
    for name in (*params.criteria, *record.patterns):
        row = answers[name]
        held = row.passed
        if held and name in record.patterns and (not row.quote.strip() or squeezed(row.quote) not in said):
            held = False
            issues.append(f"{name}: the quote {row.quote!r} does not occur in the conversation")
        criteria.append(Criterion(name=name, passed=held, quote=row.quote))
    return Judgement(
        model=params.judge,
        criteria=tuple(criteria),
        feedback=judged.feedback,
        issues=tuple(issues),
        passed=all(criterion.passed for criterion in criteria),
    )


def prompt_for(template: str, record: Conversation, params: Params, definitions: dict[str, str], profile: str) -> str:
    """The request for one conversation, in words."""
    rubric = [f"- {name}: {meaning}" for name, meaning in params.criteria.items()]
    rubric += [f"- {name}: the assistant applies this pattern: {definitions[name]}" for name in record.patterns]
    known = "\n\n".join(f"{g.chunk}\nQ: {g.question}\nA: {g.answer}" for g in record.grounding)
    turns = "\n\n".join(f"{m.role}: {m.content}" for m in record.messages)
    context = f"<facts>\n{known}\n</facts>\n" if known else ""
    context += f"<profile>\n{profile}\n</profile>\n" if profile else ""
    values = {"rubric": "\n".join(rubric), "context": context, "conversation": turns}
    # In one pass, so that facts may say {conversation} themselves.
    return fill(template, **values)


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 09 asks for these conversations, from an empty store; with patterns, two or three criteria more each."""
    here = Path(__file__).parent / "prompts"
    prompt = sum(tokens_of((here / f"{name}.txt").read_text("utf-8")) for name in ("system", "judge"))
    criteria = len(params.criteria) + (2.5 if params.patterns else 0)
    rubric = criteria * sum(tokens_of(meaning) + 8 for meaning in params.criteria.values()) / len(params.criteria)
    count = sum(volume.records for volume in volumes.values())
    tokens = sum(volume.records * volume.tokens for volume in volumes.values())
    asked = count * (prompt + tokens_of(str(strict_schema(Judged))) + rubric + CONTEXT_TOKENS) + tokens
    return [Calls(params.judge, count, asked, count * (criteria * CRITERION_TOKENS + FEEDBACK_TOKENS))]


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    stage.models.require(p.judge)
    system, template = stage.prompt("system.txt"), stage.prompt("judge.txt")
    rows = tomllib.loads((ROOT / p.patterns).read_text("utf-8"))["patterns"] if p.patterns else []
    definitions = {row["name"]: row["definition"] for row in rows}
    profile = (ROOT / p.profile).read_text("utf-8").strip() if p.profile else ""

    for record in stage.peek(Conversation):
        if record.generated_by == p.judge:
            raise SettingsError(
                f"{p.judge} wrote these conversations and cannot judge them",
                "set another judge in stages/09_judge/<run>.toml",
            )
        if unknown := set(record.patterns) - set(definitions):
            raise SettingsError(
                f"no definition of {', '.join(sorted(unknown))}, which a conversation was to show",
                "set `patterns` for this track in stages/09_judge/<run>.toml",
            )

    # -- process
    async def judge(record: Conversation) -> tuple[Reply, str]:
        request = Request(
            model=p.judge,
            messages=chat(system, prompt_for(template, record, p, definitions, profile)),
            max_tokens=p.max_tokens,
            response=Judged,
        )
        missing = ""
        for attempt in range(TRIES):
            reply = await stage.models.ask(request.model_copy(update={"repeat": attempt}))
            if reply.problem:
                break
            left_out = {*p.criteria, *record.patterns} - {row.name for row in reply.parsed.criteria}
            if not (missing := ", ".join(sorted(left_out))):
                break
        return reply, missing

    # -- save
    tally = Tally()
    for record, (reply, missing) in stage.models.map(judge, stage.read(Conversation), p.concurrency):
        if reply.problem or missing:
            stage.reject(record, reply.problem or "incomplete_rubric", reply.detail or f"not judged: {missing}")
            continue
        judged = record.with_field(judgement=judgement(reply.parsed, record, p))
        tally.add(judged)
        if judged.judgement.passed:
            stage.keep(judged)
        else:
            failed = [c.name for c in judged.judgement.criteria if not c.passed]
            stage.reject(judged, "judged_" + failed[0].lower().replace(" ", "_").replace("-", "_"), ", ".join(failed))
    stage.summary["criteria"] = tally.summary()
    stage.tables.append(tally.table())
    if p.gates is not None:
        go_no_go(stage, p.gates, tally)


if __name__ == "__main__":
    run(main, Params)
