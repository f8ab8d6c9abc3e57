"""Compression: is the shorter text as good as the text, by the same panel that made the data, and how much shorter?

Of every case and contestant, 0 or 1 for the first two:

- ``usable``: there is an output, not cut off, no refusal, and shorter in tokens than the text;
- ``pass_rate``: every member of the panel finds it equivalent, as 04 does (lowest equivalence >= its threshold);
- ``compression_ratio``: tokens of the output / tokens of the text, by the tokenizer the data was counted with;
- ``mean_equivalence``: the mean of the members' equivalence; ``min_equivalence``: the lowest member's.

What is not usable is not dropped: it does not pass, its equivalence is 0, and its ratio is 1, because whoever gets no
compression sends the text as it is. The figures of a contestant are the means over all cases. The texts are those
whose compression in the data passed 04, so they are somewhat easier than any text, above all for whoever wrote that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rules import RULES
from scoring import Case, Score, Unmeasured, Values, judging

from shared.errors import SettingsError
from shared.generate import Outcome, compressed_or_reason, in_fewer_tokens
from shared.llm import Models
from shared.llm.volume import Calls, Volume
from shared.local_models import on_hub
from shared.panel import Panel, Unjudged
from shared.records import Domain, Pair
from shared.stage import Settings, Stage
from shared.text import Tokenizer

PANEL = "04_validate"
METRICS = ("usable", "pass_rate", "compression_ratio", "mean_equivalence", "min_equivalence")
FAILED: Values = {"usable": 0, "pass_rate": 0, "compression_ratio": 1, "mean_equivalence": 0, "min_equivalence": 0}
NO_RATIO = 0.55
"""The ratio of the rules where the candidate has no usable output at all: the middle of what production wants."""


class CompressionSettings(Settings):
    """See the comments in the TOML."""

    kind: Literal["compression"]
    judged_by: Path
    track: str
    rules: tuple[Literal["truncation", "stop_words"], ...] = ("truncation", "stop_words")

    def task(self, stage: Stage[Any], cases: Sequence[Case]) -> Compression:
        """What measures these cases.

        Raises:
            SettingsError: they were not all counted with the same tokenizer, or it cannot be loaded.
        """
        specs = {case.item.generation.tokenizer for case in cases if isinstance(case.item, Pair)}
        if not specs:
            raise SettingsError("there is no pair behind any test example", "make stage13, then make stage14")
        if len(specs) > 1:
            raise SettingsError(
                f"the pairs were counted by several tokenizers: {', '.join(sorted(specs))}", "make stage3"
            )
        (spec,) = specs
        if on_hub(spec):
            stage.services()
        tokenizer = Tokenizer(spec)
        tokenizer.count("")  # one that cannot be loaded stops us before anything is generated
        return Compression(self, stage.models, tokenizer)

    def calls(self, models: int, volumes: Mapping[Domain, Volume]) -> list[Calls]:
        """What the panel is asked for these test examples, from a store that has 04's answers: half of what 04 asks,
        the compressed texts' half, for every contestant."""
        module, params, _ = judging(PANEL, self.judged_by, self.track)
        factor = (models + len(self.rules)) / 2
        asked = module.calls(params.model_copy(update={"limit": 0, "exhaustive": True}), volumes)
        return [
            Calls(c.model, c.calls * factor, c.input_tokens * factor, c.output_tokens * factor, c.low, c.high)
            for c in asked
        ]


class Compression:
    """See the module."""

    metrics: tuple[str, ...] = METRICS

    def __init__(self, settings: CompressionSettings, models: Models, tokenizer: Tokenizer) -> None:
        _, params, prompts = judging(PANEL, settings.judged_by, settings.track)
        self.settings, self.tokenizer, self.concurrency = settings, tokenizer, params.concurrency
        self.panel = Panel(
            models,
            params.panel,
            params.tasks,
            prompts,
            embedder=params.embedder,
            dimensions=params.dimensions,
            max_tokens=params.max_tokens,
            threshold=params.threshold,
            judge=params.judge,
        )

    def fault(self, case: Case) -> Unmeasured | None:
        if not isinstance(case.item, Pair):
            return Unmeasured("no_pair", f"a compression is measured on a pair, this is a {type(case.item).__name__}")
        if case.item.verbose not in case.example.messages[-2].content:
            return Unmeasured("another_text", "the example does not ask for the text of the pair it was made from")
        return None

    def usable(self, case: Case, outcome: Outcome) -> Outcome:
        outcome = compressed_or_reason(verbose(case), outcome, by_phrase=True)
        return in_fewer_tokens(outcome, *self.tokenizer.counts([verbose(case), outcome.text]))

    def rules(self, cases: Sequence[Case], candidate: Sequence[Outcome]) -> dict[str, list[Outcome]]:
        """Where the candidate has nothing usable, the rules keep to its mean ratio: its failures are not theirs."""
        count = self.tokenizer.count
        sizes = [count(verbose(case)) for case in cases]
        taken = [None if outcome.problem else count(outcome.text) for outcome in candidate]
        ratios = [tokens / size for tokens, size in zip(taken, sizes, strict=True) if tokens is not None]
        ratio = fmean(ratios) if ratios else NO_RATIO
        budgets = [round(ratio * size) if tokens is None else tokens for tokens, size in zip(taken, sizes, strict=True)]
        return {
            name: [
                self.usable(case, Outcome(RULES[name](verbose(case), budget, count)))
                for case, budget in zip(cases, budgets, strict=True)
            ]
            for name in self.settings.rules
        }

    async def scores(self, case: Case, outcomes: Sequence[Outcome]) -> list[Score] | Unmeasured:
        text, domain = verbose(case), case.item.domain
        # Against itself: only the answers from the text are asked for, which 04 has stored.
        itself = await self.panel.compare(domain, text, text)
        if isinstance(itself, Unjudged):
            return Unmeasured(itself.reason, itself.detail)
        scores = await asyncio.gather(*(self._score(domain, text, outcome) for outcome in outcomes))
        if unmeasured := [score for score in scores if isinstance(score, Unmeasured)]:
            return unmeasured[0]
        return [score for score in scores if isinstance(score, Score)]

    async def _score(self, domain: Domain, text: str, outcome: Outcome) -> Score | Unmeasured:
        if outcome.problem:
            return Score(FAILED, {domain: FAILED}, outcome.problem, outcome.detail)
        verbose_tokens, tokens = self.tokenizer.counts([text, outcome.text])
        ratio = tokens / verbose_tokens
        verdicts = await self.panel.compare(domain, text, outcome.text)
        if isinstance(verdicts, Unjudged):
            if verdicts.reason == "unavailable":
                return Unmeasured(verdicts.reason, verdicts.detail)
            # From the text it could be answered: what the members made of this output is its own failure.
            values = FAILED | {"usable": 1, "compression_ratio": ratio}
            return Score(values, {domain: values}, verdicts.reason, verdicts.detail)
        values = {
            "usable": 1,
            "pass_rate": float(verdicts.passed),
            "compression_ratio": ratio,
            "mean_equivalence": verdicts.mean_equivalence,
            "min_equivalence": verdicts.min_equivalence,
        }
        return Score(values, {domain: values})


def verbose(case: Case) -> str:
    """The text to compress."""
    assert isinstance(case.item, Pair)
    return case.item.verbose
