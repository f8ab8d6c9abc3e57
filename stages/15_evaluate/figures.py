"""From the scores of single cases to the figures of contestants, their differences, and the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from intervals import interval, paired
from pydantic import model_validator
from scoring import Score

from shared.errors import SettingsError
from shared.receipts import Gate, Metrics
from shared.stage import Settings


class Bounds(Settings):
    """``low <= figure <= high``; one of them at least."""

    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Bounds:
        if self.low is None and self.high is None:
            raise ValueError("low or high must be given")
        return self


def known(names: Sequence[str], metrics: Sequence[str], others: Sequence[str]) -> None:
    """Check that every gate and target is on a figure there is.

    Args:
        metrics: of the task; ``others``: the contestants the candidate is compared with.

    Raises:
        SettingsError: one is not.
    """
    there = {*metrics, *(f"{metric}_minus_{other}" for other in others for metric in metrics)}
    if unknown := [name for name in names if name not in there]:
        said = f"{', '.join(metrics)}; each of them also with _minus_ and one of {', '.join(others) or 'no other'}"
        raise SettingsError(f"no figure is called {', '.join(unknown)}; there are {said}", "edit gates and targets")


def figures(scores: Sequence[Score], resamples: int, seed: int) -> tuple[Metrics, dict[str, Metrics]]:
    """The figures of one contestant over all its cases, and by group."""
    overall: dict[str, list[float]] = {}
    groups: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        _add(overall, score.values)
        for group, values in score.groups.items():
            _add(groups.setdefault(group, {}), values)
    by_group = {group: _intervals(groups[group], resamples, seed) for group in sorted(groups)}
    return _intervals(overall, resamples, seed), by_group


def _add(columns: dict[str, list[float]], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        columns.setdefault(name, []).append(value)


def _intervals(columns: Mapping[str, Sequence[float]], resamples: int, seed: int) -> Metrics:
    return {name: interval(values, resamples, seed) for name, values in columns.items()}


def differences(rows: Mapping[str, Sequence[Score]], resamples: int, seed: int) -> dict[str, Metrics]:
    """The first contestant minus each other, case by case; which figures a case has hangs on the case alone."""
    (_, ours), *others = rows.items()
    names = {name: None for score in ours for name in score.values}
    return {
        other: {name: paired(_column(ours, name), _column(theirs, name), resamples, seed) for name in names}
        for other, theirs in others
    }


def _column(scores: Sequence[Score], name: str) -> list[float]:
    return [score.values[name] for score in scores if name in score.values]


def gates_of(bounds: Mapping[str, Bounds], candidate: Metrics, changes: Mapping[str, Metrics]) -> tuple[Gate, ...]:
    """The gates with what came of them. A figure that no test example has is 0 and not passed."""
    got = candidate | {f"{name}_minus_{other}": i for other, metrics in changes.items() for name, i in metrics.items()}
    gates = []
    for name, b in bounds.items():
        value = got[name].value if name in got else 0.0
        passed = name in got and (b.low is None or value >= b.low) and (b.high is None or value <= b.high)
        gates.append(Gate(metric=name, low=b.low, high=b.high, value=value, passed=passed))
    return tuple(gates)
