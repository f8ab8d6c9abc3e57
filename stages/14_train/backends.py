"""What a backend is to 14: something that turns rows into an adapter, in a directory it can go on in after a kill."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from losses import Loss
from rendering import Renderer, Row
from run_directory import STATE

from shared.adapters import Adapter
from shared.receipts import BaseModelUsed, Checkpoint
from shared.stage import Progress


@dataclass(frozen=True)
class Work:
    """What there is to do, and where.

    Attributes:
        train: rows to learn from, in the order of their examples.
        valid: rows to measure on; may be empty.
        directory: where the results go; made by the backend when there is something to write. What lies there already
            is from a killed process with the same rows and settings.
        state: a directory inside it for what a backend needs to go on; gone when the run is finished.
        progress: a bar for so many steps.
    """

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    directory: Path
    progress: Callable[[int], AbstractContextManager[Progress]]

    @property
    def state(self) -> Path:
        return self.directory / STATE

    def measured(self, most: int) -> list[Row]:
        """The rows the validation loss is measured on, the same each time: ``most`` of them, or all where that is 0."""
        rows = sorted(self.valid, key=lambda row: row.example)  # ids are hashes: the first are a fair sample
        return rows[: most or None]


def say(line: str) -> None:
    """A line on stderr, above the bar when there is one."""
    from tqdm import tqdm

    with suppress(OSError):  # `make full 2>&1 | tee log`: Ctrl-C ends tee first
        tqdm.write(f"14_train  {line}", file=sys.stderr)


class Trained(NamedTuple):
    """What came of it.

    Attributes:
        adapter: the checkpoint with the lowest validation loss; the last where nothing was measured. It lies in
            ``adapter/`` (PEFT) and ``adapter_mlx/``, and the checkpoints where they say, when ``train`` returns.
        losses: all of them, as in ``loss.jsonl``.
        seconds: of training, over all the processes it took.
    """

    adapter: Adapter
    checkpoints: tuple[Checkpoint, ...]
    losses: list[Loss]
    steps: int
    trained_tokens: int
    cost_usd: float
    seconds: float


class Backend(Protocol):
    """Made from its table of the settings, which it checks at once; loads and asks nothing before it is used."""

    @property
    def base(self) -> BaseModelUsed:
        """The model that is trained."""

    def renderer(self) -> Renderer:
        """Its tokenizer and chat template."""

    def train(self, work: Work) -> Trained:
        """Train, or go on training, to the end."""
