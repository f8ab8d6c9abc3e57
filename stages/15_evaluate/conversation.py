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
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from scoring import Case, Score, Unmeasured, Values

from shared.estimate import load_stage
from shared.generate import Outcome, answer
from shared.llm import Models, Request, chat
from shared.llm.volume import Calls, Volume
from shared.records import Conversation as Record
from shared.records import Domain, Judgement, Message
from shared.stage import ROOT, Settings, Stage, load_settings

JUDGE = "09_judge"
FIRST = ("usable", "pass_rate", "criteria_held")
ADHERENCE = "adherence"


class ConversationSettings(Settings):
    """See the comments in the TOML."""

    kind: Literal["conversation"]
    judged_by: Path
    track: str

    def load(self) -> tuple[Any, Any]:
        """The stage whose judge is asked, and its settings."""
        module = load_stage(JUDGE)
        return module, load_settings(ROOT / self.judged_by, module.Params, self.track)

    def task(self, stage: Stage[Any], cases: Sequence[Case]) -> Conversation:
        """What measures these cases."""
        return Conversation(self, stage.models)

    def calls(self, models: int, volumes: Mapping[Domain, Volume]) -> list[Calls]:
        """What the judge is asked for these test examples, at most: as 09 for whole ones, once for each contestant."""
        module, params = self.load()
        return [
            Calls(c.model, c.calls * models, c.input_tokens * models, c.output_tokens * models, c.low, c.high)
            for c in module.calls(params, volumes)
        ]


class Conversation:
    """See the module."""

    def __init__(self, settings: ConversationSettings, models: Models) -> None:
        self.module, self.params = settings.load()
        self.models, self.concurrency = models, self.params.concurrency
        prompts = ROOT / "stages" / JUDGE / "prompts"
        self.system, self.template = ((prompts / f"{n}.txt").read_text("utf-8") for n in ("system", "judge"))
        patterns, profile = self.params.patterns, self.params.profile
        rows = tomllib.loads((ROOT / patterns).read_text("utf-8"))["patterns"] if patterns else []
        self.definitions = {row["name"]: row["definition"] for row in rows}
        self.profile = (ROOT / profile).read_text("utf-8").strip() if profile else ""
        self.metrics: tuple[str, ...] = (*FIRST, *([ADHERENCE] if patterns else []), *self.params.criteria)
        models.require(self.params.judge)

    def fault(self, case: Case) -> Unmeasured | None:
        if not isinstance(case.item, Record):
            return Unmeasured("no_conversation", f"the example was made from a {type(case.item).__name__}")
        if unknown := set(case.item.patterns) - set(self.definitions):
            return Unmeasured("unknown_pattern", f"no definition of {', '.join(sorted(unknown))}")
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
        names = (*self.params.criteria, *case.item.patterns)
        if outcome.problem:
            return self._as_score(case.item, dict.fromkeys(names, False), outcome)
        said = Message(role="assistant", content=outcome.text)
        exchange = case.item.model_copy(update={"messages": (case.example.messages[-2], said)})
        judged = await self._judge(exchange, names)
        if isinstance(judged, Unmeasured):
            return judged
        return self._as_score(case.item, {c.name: c.passed for c in judged.criteria}, outcome)

    async def _judge(self, exchange: Record, names: Sequence[str]) -> Judgement | Unmeasured:
        """As 09 does: a judge that leaves criteria out is asked again, quotes are checked."""
        prompt = self.module.prompt_for(self.template, exchange, self.params, self.definitions, self.profile)
        request = Request(
            model=self.params.judge,
            messages=chat(self.system, prompt),
            max_tokens=self.params.max_tokens,
            response=self.module.Judged,
        )
        missing = ""
        for attempt in range(self.module.TRIES):
            reply = await self.models.ask(request.model_copy(update={"repeat": attempt}))
            if reply.problem:
                return Unmeasured(reply.problem, f"judge {self.params.judge}: {reply.detail}")
            missing = ", ".join(sorted(set(names) - {row.name for row in reply.parsed.criteria}))
            if not missing:
                judgement: Judgement = self.module.judgement(reply.parsed, exchange, self.params)
                return judgement
        return Unmeasured("incomplete_rubric", f"not judged: {missing}")

    def _as_score(self, record: Record, held: Mapping[str, bool], outcome: Outcome) -> Score:
        passed = {name: float(value) for name, value in held.items()}
        values: Values = {
            "usable": float(not outcome.problem),
            "pass_rate": float(all(held.values())),
            "criteria_held": fmean(passed.values()),
            **{name: passed[name] for name in self.params.criteria},
        }
        shown = {name: passed[name] for name in record.patterns}
        groups: dict[str, Values] = {name: {ADHERENCE: value} for name, value in shown.items()}
        if shown:
            values[ADHERENCE] = fmean(shown.values())
        return Score(values, groups or {record.domain: values}, outcome.problem, outcome.detail)
