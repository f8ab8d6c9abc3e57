"""The losses of a training run: logged line by line, and drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import orjson

from shared.stage import atomic

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 56, 52
TRAIN, VALID = "#4878a8", "#c44e52"


class Loss(NamedTuple):
    """One figure: mean negative log-likelihood of ``tokens`` assistant tokens, in nats, after ``step`` steps.

    ``split`` is ``train`` (the batch of that step, before it changed the weights) or ``valid``; step 0 is the base
    model.
    """

    step: int
    split: str
    loss: float
    tokens: int
    learning_rate: float | None = None

    def line(self) -> bytes:
        """One line of ``loss.jsonl``."""
        values = {name: value for name, value in self._asdict().items() if value is not None}
        return orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)


class LossLog:
    """``loss.jsonl`` and what is in it; a line is on disk when it is added."""

    def __init__(self, path: Path, known: Iterable[Loss] = ()) -> None:
        """Begin with the losses a resumed run knows; what a killed one logged beyond them will come again."""
        self.path, self.losses = path, list(known)
        with atomic(path) as file:
            file.writelines(loss.line() for loss in self.losses)

    def add(self, loss: Loss) -> None:
        """Append one."""
        self.losses.append(loss)
        with open(self.path, "ab") as file:
            file.write(loss.line())

    def of(self, split: str) -> list[Loss]:
        """Those of one split, in order."""
        return [loss for loss in self.losses if loss.split == split]


def recent(losses: Sequence[Loss]) -> float:
    """Mean of the last tenth of some losses, a token counting as a token."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(loss.loss * loss.tokens for loss in last) / sum(loss.tokens for loss in last)


# ---------------------------------------------------------------- the picture


def draw(losses: Sequence[Loss], title: str) -> str:
    """An SVG of both curves over the steps: axes with ticks, two lines, their last values in the legend.

    The training line is a running mean over a twentieth of the steps, at least 5: one batch says little.
    """
    train = [loss for loss in losses if loss.split == "train"]
    window = max(5, len(train) // 20)
    curves = {"train": _running_mean(train, window), "valid": [(v.step, v.loss) for v in losses if v.split == "valid"]}
    points = [point for curve in curves.values() for point in curve]
    steps = _ticks(0, max(step for step, _ in points))
    heights = _ticks(min(loss for _, loss in points), max(loss for _, loss in points))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - steps[0]) / (steps[-1] - steps[0])

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - heights[0]) / (heights[-1] - heights[0])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="14">{escape(title)}</text>',
    ]
    for tick in heights:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in steps:
        parts.append(f'<path d="M{x(tick):.1f} {HEIGHT - BOTTOM}v5" stroke="#333"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>')
    parts += [
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#333"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">step</text>',
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "loss (nats per token)</text>",
    ]
    labels = {"train": f"train, mean of {window} steps", "valid": "validation"}
    for place, (split, colour) in enumerate((("train", TRAIN), ("valid", VALID))):
        if not curves[split]:
            continue
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curves[split])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if split == "valid":
            parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for s, v in curves[split]]
        left, last = LEFT + 310 * place, curves[split][-1]
        parts.append(f'<path d="M{left} 40h20" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="{left + 26}" y="44">{labels[split]}: {last[1]:.4f} at step {last[0]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _running_mean(losses: Sequence[Loss], window: int) -> list[tuple[int, float]]:
    """Each step with the mean of the ``window`` losses up to it."""
    means = []
    for place, loss in enumerate(losses):
        last = [one.loss for one in losses[max(0, place + 1 - window) : place + 1]]
        means.append((loss.step, sum(last) / len(last)))
    return means


def _ticks(low: float, high: float) -> list[float]:
    """Some five round numbers from at most ``low`` to at least ``high``; at least two."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    width = next(power * m for m in (1, 2, 5, 10) if power * m >= span / 5)
    first, last = math.floor(low / width), math.ceil(high / width)
    return [round(n * width, 10) for n in range(first, max(last, first + 1) + 1)]
