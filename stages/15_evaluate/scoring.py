"""What is measured: a case, what a contestant made of it, and what a task has to say about both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shared.estimate import load_stage
from shared.generate import Outcome
from shared.records import Example, Item
from shared.stage import ROOT, load_settings

Values = dict[str, float]
"""Figures of one contestant on one case, by metric."""


class Case(NamedTuple):
    """A held-out example, and the record it was made from, which knows more: the text, the facts, the patterns."""

    example: Example
    item: Item


class Unmeasured(NamedTuple):
    """Why a case says nothing about anyone: not the contestants' fault, so it counts for none of them."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Score:
    """One contestant on one case.

    Attributes:
        values: over all cases.
        groups: the same or other figures by group: domain, or pattern.
        problem: why the answer could not be used, or not be judged; ``""`` when it was.
    """

    values: Values
    groups: Mapping[str, Values]
    problem: str = ""
    detail: str = ""


class Task(Protocol):
    """What 15 measures; made by its settings.

    Attributes:
        metrics: names of all figures, in the order of the tables.
        concurrency: cases under way.
    """

    metrics: tuple[str, ...]
    concurrency: int

    def fault(self, case: Case) -> Unmeasured | None:
        """Why a case cannot be measured, before anything is generated."""

    def usable(self, case: Case, outcome: Outcome) -> Outcome:
        """An outcome with what is no answer taken off, or with the reason why there is none."""

    def rules(self, cases: Sequence[Case], candidate: Sequence[Outcome]) -> dict[str, list[Outcome]]:
        """Contestants that need no model, by name: what they make of each case, given what the candidate made."""

    async def scores(self, case: Case, outcomes: Sequence[Outcome]) -> list[Score] | Unmeasured:
        """The score of each contestant's usable outcome."""


def judging(stage: str, settings: Path, track: str) -> tuple[Any, Any, dict[str, str]]:
    """The stage whose panel or judge is asked: its module, its settings for a track, and its prompts by name."""
    module, prompts = load_stage(stage), ROOT / "stages" / stage / "prompts"
    texts = {name: (prompts / f"{name}.txt").read_text("utf-8") for name in module.PROMPTS}
    return module, load_settings(ROOT / settings, module.Params, track), texts
