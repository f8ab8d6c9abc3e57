"""The result for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.receipts import Contestant, Gate, Interval, Metrics
from shared.stats import grid

FEW = 30
"""Examples below which the table says that they are few."""


def outcome_tables(
    contestants: Sequence[Contestant],
    differences: Mapping[str, Metrics],
    gates: Sequence[Gate],
    targets: Mapping[str, tuple[float | None, float | None]],
    metrics: Sequence[str],
    problems: Mapping[str, Mapping[str, int]],
) -> list[str]:
    """Figures, paired differences, why answers failed, figures by group, and the gates with what came of them."""
    first = contestants[0]
    names = [name for name in metrics if name in first.metrics]
    head = ["", *(name.replace("_", " ") for name in names)]
    rows = [[c.name, *(_cell(c.metrics.get(name)) for name in names)] for c in contestants]
    rows += [
        [f"{first.name} - {other}", *(_cell(changes.get(name), signed=True) for name in names)]
        for other, changes in differences.items()
    ]
    n = max(interval.n for interval in first.metrics.values())
    few = f"; {n} examples are few, so the intervals are wide" if n < FEW else ""
    return [
        "\n".join([f"\nmean [95 % interval] over {n} test examples{few}", *grid([head, *rows], "<" * len(head))]),
        *(_problems(name, reasons) for name, reasons in problems.items() if reasons),
        "\n".join(["\nby group", *_groups(contestants, metrics)]),
        "\n".join(["\ngates of the candidate", *_gates(gates, targets)]),
        _verdict(gates),
    ]


def _cell(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return ""
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"


def _problems(name: str, reasons: Mapping[str, int]) -> str:
    return f"  {name} failed: {', '.join(f'{reason} {n}' for reason, n in reasons.items())}"


def _groups(contestants: Sequence[Contestant], metrics: Sequence[str]) -> list[str]:
    groups = {name: group for c in contestants for name, group in c.by_group.items()}
    names = [name for name in metrics if any(name in group for group in groups.values())]
    rows = [["", "examples", "", *(name.replace("_", " ") for name in names)]]
    for group in sorted(groups):
        for contestant in contestants:
            figures = contestant.by_group.get(group, {})
            n = max((interval.n for interval in figures.values()), default=0)
            rows.append([group, str(n), contestant.name, *(_value(figures.get(name)) for name in names)])
    return grid(rows, "<><" + ">" * len(names))


def _value(interval: Interval | None) -> str:
    return f"{interval.value:.3f}" if interval else ""


def wanted(bounds: tuple[float | None, float | None]) -> str:
    """``>= 0.90``, ``<= 0.60``, ``0.50 to 0.60``"""
    low, high = bounds
    if low is not None and high is not None:
        return f"{low:.2f} to {high:.2f}"
    return f">= {low:.2f}" if low is not None else f"<= {high:.2f}"


def _gates(gates: Sequence[Gate], targets: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    rows = [["", "metric", "got", "wanted", *(["in production"] if targets else [])]]
    for gate in gates:
        bounds = wanted((gate.low, gate.high))
        target = [wanted(targets[gate.metric]) if gate.metric in targets else ""] if targets else []
        rows.append(["passed" if gate.passed else "FAILED", gate.metric, f"{gate.value:.3f}", bounds, *target])
    return grid(rows, "<" * len(rows[0]))


def _verdict(gates: Sequence[Gate]) -> str:
    failed = [f"{g.metric} is {g.value:.3f}, wanted {wanted((g.low, g.high))}" for g in gates if not g.passed]
    if failed:
        return f"\nNOT fit for release: {'; '.join(failed)}. Stage 16 refuses it with these reasons."
    return "\nfit for release: every gate is passed" if gates else "\nno gates are set, so nothing keeps it back"
