"""Conversations: how good is the next answer, by the rubric and the judge that chose the data?

A contestant is given all turns before the last answer of a held-out conversation and writes that answer. The judge of
09 sees the user's last turn and this answer, with the same facts, profile and patterns: the earlier answers are the
data's, and would earn a contestant what it did not write. Of every case and contestant, 0 or 1 unless said:

- ``usable``: there is an answer, and it was not cut off; what is not usable is not dropped: it fails everything;
- ``pass_rate``: it holds every criterion; ``criteria_held``: the share it holds, 0 to 1;
- every criterion by its name;
- ``adherence``: the share of the conversation's patterns that it shows, 0 to 1; in ``by_group`` by pattern, 0 or 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from scoring import Case, Score, Unmeasured, Values, judging

from shared.generate import Outcome, answer
from shared.judge import Judge, Unjudged
from shared.llm import Models
from shared.llm.volume import Calls, Volume
from shared.records import Conversation as Record
from shared.records import Domain, Message
from shared.stage import Settings, Stage

JUDGE = "09_judge"
FIRST = ("usable", "pass_rate", "criteria_held")
ADHERENCE = "adherence"


class ConversationSettings(Settings):
    """See the comments in the TOML."""

    kind: Literal["conversation"]
    judged_by: Path
    track: str

    def task(self, stage: Stage[Any], cases: Sequence[Case]) -> Conversation:
        """What measures these cases."""
        return Conversation(self, stage.models)

    def calls(self, models: int, volumes: Mapping[Domain, Volume]) -> list[Calls]:
        """What the judge is asked for these test examples, at most: as 09 for whole ones, once for each contestant."""
        module, params, _ = judging(JUDGE, self.judged_by, self.track)
        return [
            Calls(c.model, c.calls * models, c.input_tokens * models, c.output_tokens * models, c.low, c.high)
            for c in module.calls(params, volumes)
        ]


class Conversation:
    """See the module."""

    def __init__(self, settings: ConversationSettings, models: Models) -> None:
        _, params, prompts = judging(JUDGE, settings.judged_by, settings.track)
        self.concurrency = params.concurrency
        self.judge = Judge(
            models,
            params.judge,
            params.criteria,
            prompts,
            patterns=params.patterns,
            profile=params.profile,
            max_tokens=params.max_tokens,
        )
        self.metrics: tuple[str, ...] = (*FIRST, *([ADHERENCE] if params.patterns else []), *params.criteria)

    def fault(self, case: Case) -> Unmeasured | None:
        if not isinstance(case.item, Record):
            return Unmeasured("no_conversation", f"the example was made from a {type(case.item).__name__}")
        if undefined := self.judge.undefined(case.item):
            return Unmeasured("unknown_pattern", f"no definition of {undefined}")
        return None

    def usable(self, case: Case, outcome: Outcome) -> Outcome:
        if outcome.problem:
            return outcome
        said = answer(outcome.text, "\n".join(message.content for message in case.example.messages[:-1]))
        return Outcome(said) if said else Outcome("", "empty", f"nothing is left of {outcome.text[:200]!r}")

    def rules(self, cases: Sequence[Case], candidate: Sequence[Outcome]) -> dict[str, list[Outcome]]:
        """There is no rule that answers."""
        return {}

    async def scores(self, case: Case, outcomes: Sequence[Outcome]) -> list[Score] | Unmeasured:
        scores = await asyncio.gather(*(self._score(case, outcome) for outcome in outcomes))
        if unmeasured := [score for score in scores if isinstance(score, Unmeasured)]:
            return unmeasured[0]
        return [score for score in scores if isinstance(score, Score)]

    async def _score(self, case: Case, outcome: Outcome) -> Score | Unmeasured:
        assert isinstance(case.item, Record)
        if outcome.problem:
            names = (*self.judge.criteria, *case.item.patterns)
            return self._as_score(case.item, dict.fromkeys(names, False), outcome)
        said = Message(role="assistant", content=outcome.text)
        exchange = case.item.model_copy(update={"messages": (case.example.messages[-2], said)})
        judged = await self.judge.judge(exchange)
        if isinstance(judged, Unjudged):
            return Unmeasured(judged.reason, f"judge {self.judge.model}: {judged.detail}")
        return self._as_score(case.item, {c.name: c.passed for c in judged.criteria}, outcome)

    def _as_score(self, record: Record, held: Mapping[str, bool], outcome: Outcome) -> Score:
        passed = {name: float(value) for name, value in held.items()}
        values: Values = {
            "usable": float(not outcome.problem),
            "pass_rate": float(all(held.values())),
            "criteria_held": fmean(passed.values()),
            **{name: passed[name] for name in self.judge.criteria},
        }
        shown = {name: passed[name] for name in record.patterns}
        groups: dict[str, Values] = {name: {ADHERENCE: value} for name, value in shown.items()}
        if shown:
            values[ADHERENCE] = fmean(shown.values())
        return Score(values, groups or {record.domain: values}, outcome.problem, outcome.detail)
