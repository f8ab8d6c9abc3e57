"""Is a conversation good? A judge answers a boolean rubric, is asked again where it leaves criteria out, is checked.

The rubric is the settings' criteria and, for a conversation that was to show patterns, one criterion for each of them.
That of a pattern holds only where the quote given for it occurs in the assistant's turns: checked, not trusted.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel

from shared.llm import Models, Request, chat, fill
from shared.records import Conversation, Criterion, Judgement, Part
from shared.stage import ROOT
from shared.text import squeezed

TRIES = 3
"""Times a judge that leaves criteria out is asked."""


class JudgedCriterion(BaseModel):
    """One criterion as the judge answers it."""

    name: str
    passed: bool
    quote: str


# Both docstrings are in the schema that the judge is sent: another word here, and every judgement is paid again.
class Judged(BaseModel):
    """The answer to ``judge.txt``."""

    criteria: list[JudgedCriterion]
    feedback: str
    issues: list[str]


class Unjudged(Part):
    """No judgement: why the judge's answer could not be used. ``reason`` is the reply's problem."""

    reason: str
    detail: str


class Judge:
    """The judge of one stage.

    Args:
        models: where to ask.
        model: who judges, ``provider/name``.
        criteria: what must hold, and what it means, by name.
        prompts: prompt text by name: ``system`` and ``judge``.
        patterns: the file that defines the patterns a conversation may have to show; None = there are none.
        profile: a file that says how answers should be given; None = any way.
        max_tokens: of an answer.

    Attributes:
        definitions: of the patterns, by name.
    """

    def __init__(
        self,
        models: Models,
        model: str,
        criteria: Mapping[str, str],
        prompts: Mapping[str, str],
        *,
        patterns: Path | None = None,
        profile: Path | None = None,
        max_tokens: int = 1500,
    ) -> None:
        self.models, self.model, self.criteria, self.prompts = models, model, criteria, prompts
        self.max_tokens = max_tokens
        rows = tomllib.loads((ROOT / patterns).read_text("utf-8"))["patterns"] if patterns else []
        self.definitions: dict[str, str] = {row["name"]: row["definition"] for row in rows}
        self.profile = (ROOT / profile).read_text("utf-8").strip() if profile else ""
        models.require(model)

    def undefined(self, record: Conversation) -> str:
        """The conversation's patterns that nobody defined, comma-separated; ``""`` when there are none."""
        return ", ".join(sorted(set(record.patterns) - set(self.definitions)))

    async def judge(self, record: Conversation) -> Judgement | Unjudged:
        """The judgement on a conversation whose patterns are defined, or why there is none."""
        request = Request(
            model=self.model,
            messages=chat(
                self.prompts["system"],
                prompt_for(self.prompts["judge"], record, self.criteria, self.definitions, self.profile),
            ),
            max_tokens=self.max_tokens,
            response=Judged,
        )
        missing = ""
        for attempt in range(TRIES):
            reply = await self.models.ask(request.model_copy(update={"repeat": attempt}))
            if reply.problem:
                return Unjudged(reason=reply.problem, detail=reply.detail)
            left_out = {*self.criteria, *record.patterns} - {row.name for row in reply.parsed.criteria}
            if not left_out:
                return judgement(reply.parsed, record, self.model, self.criteria)
            missing = ", ".join(sorted(left_out))
        return Unjudged(reason="incomplete_rubric", detail=f"not judged: {missing}")


def prompt_for(
    template: str, record: Conversation, criteria: Mapping[str, str], definitions: Mapping[str, str], profile: str
) -> str:
    """The request for one conversation, in words."""
    rubric = [f"- {name}: {meaning}" for name, meaning in criteria.items()]
    rubric += [f"- {name}: the assistant applies this pattern: {definitions[name]}" for name in record.patterns]
    known = "\n\n".join(f"{g.chunk}\nQ: {g.question}\nA: {g.answer}" for g in record.grounding)
    turns = "\n\n".join(f"{m.role}: {m.content}" for m in record.messages)
    context = f"<facts>\n{known}\n</facts>\n" if known else ""
    context += f"<profile>\n{profile}\n</profile>\n" if profile else ""
    values = {"rubric": "\n".join(rubric), "context": context, "conversation": turns}
    # In one pass, so that facts may say {conversation} themselves.
    return fill(template, **values)


def judgement(judged: Judged, record: Conversation, model: str, criteria: Iterable[str]) -> Judgement:
    """The judge's answer, which leaves no criterion out, with every quote checked against the assistant's turns."""
    said = squeezed(" ".join(m.content for m in record.messages if m.role == "assistant"))
    answers = {row.name: row for row in judged.criteria}
    checked, issues = [], list(judged.issues)
    for name in (*criteria, *record.patterns):
        row = answers[name]
        held = row.passed
        if held and name in record.patterns and (not row.quote.strip() or squeezed(row.quote) not in said):
            held = False
            issues.append(f"{name}: the quote {row.quote!r} does not occur in the conversation")
        checked.append(Criterion(name=name, passed=held, quote=row.quote))
    return Judgement(
        model=model,
        criteria=tuple(checked),
        feedback=judged.feedback,
        issues=tuple(issues),
        passed=all(criterion.passed for criterion in checked),
    )
