"""Running totals of a rubric, for the report: pass rates and examples of each criterion, both ways."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from shared.records import Conversation

EXAMPLES = 3
"""Examples kept of each criterion's passes and failures: enough to see what the judge means by it."""


class Tally:
    """What was judged so far.

    Attributes:
        by_provider: judged conversations by the model that wrote them.
        patterns: how often each pattern was planned among the judged.
        shown: judged conversations that show all their patterns.
        exchanges: how many conversations have how many exchanges.
    """

    def __init__(self) -> None:
        self.judged = self.passed = self.shown = 0
        self.by_provider: Counter[str] = Counter()
        self.patterns: Counter[str] = Counter()
        self.exchanges: Counter[int] = Counter()
        self._held: dict[str, list[bool]] = defaultdict(list)
        self._examples: dict[tuple[str, bool], list[dict[str, str]]] = defaultdict(list)

    def add(self, record: Conversation) -> None:
        """Count one judged conversation."""
        assert record.judgement is not None
        self.judged += 1
        self.passed += record.judgement.passed
        self.by_provider[record.generated_by] += 1
        self.patterns.update(record.patterns)
        self.exchanges[sum(message.role == "user" for message in record.messages)] += 1
        held = {criterion.name: criterion.passed for criterion in record.judgement.criteria}
        self.shown += all(held[name] for name in record.patterns)
        for criterion in record.judgement.criteria:
            self._held[criterion.name].append(criterion.passed)
            examples = self._examples[criterion.name, criterion.passed]
            if len(examples) < EXAMPLES:
                issues = "; ".join(record.judgement.issues)
                examples.append({"id": record.id, "quote": criterion.quote, "issues": issues, **_excerpt(record)})

    def summary(self) -> dict[str, Any]:
        """By criterion: how many were judged, the pass rate, examples of passes and failures."""
        return {
            name: {
                "judged": len(held),
                "pass_rate": round(sum(held) / len(held), 4),
                "passes": self._examples[name, True],
                "failures": self._examples[name, False],
            }
            for name, held in sorted(self._held.items())
        }

    def table(self) -> str:
        """Pass rates for a terminal."""
        rows = [f"  {name:32} {sum(held):4} of {len(held):4}  {sum(held) / len(held):6.1%}" for name, held in
                sorted(self._held.items())]  # fmt: skip
        whole = f"  {'all criteria':32} {self.passed:4} of {self.judged:4}  {self.passed / max(1, self.judged):6.1%}"
        return "\n".join([f"  {'criterion':32} {'passed':>12}", *rows, whole])


def _excerpt(record: Conversation) -> dict[str, str]:
    return {"user": record.messages[-2].content[:200], "assistant": record.messages[-1].content[:200]}
