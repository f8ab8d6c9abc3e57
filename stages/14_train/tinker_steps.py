"""What Tinker is asked for, step by step, and what that costs: pure functions of settings, seed and rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from batches import rows_of_step
from pydantic import Field
from rendering import Row

from shared.errors import ProviderError
from shared.llm.catalogue import NANO, catalogue
from shared.llm.types import Usage
from shared.llm.volume import Calls
from shared.stage import Settings

PROMPT_TOKENS = 85
"""Of a conversation beside its text: 300 bytes of system prompt and the template's own marks; for the estimate."""
TRAIN_SHARE, VALID_SHARE = 0.9, 0.05
"""Of the examples, as 13 format splits them."""
MONTH_DAYS = 30


class TinkerTraining(Settings):
    """What trains at Tinker; see the comments in the TOML."""

    model: str = "Qwen/Qwen3-8B"
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    rank: int = Field(default=32, ge=1, le=256)
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=4.7e-4, gt=0, lt=1)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    valid_examples: int = Field(default=0, ge=0)
    save_every: int = Field(default=50, ge=1)
    keep_days: int = Field(default=7, ge=1, le=3650)

    def calls(self, records: float, tokens: float) -> list[Calls]:
        """What is expected to be paid for so many records with so many tokens in all, before they are there."""
        steps = self.epochs * TRAIN_SHARE * records / self.batch_size
        measured = min(VALID_SHARE * records, self.valid_examples or math.inf) * (steps / self.save_every + 2)
        each = tokens / records if records else 0.0
        return [
            Calls(
                f"tinker/{self.model}/train", math.ceil(steps), self.epochs * TRAIN_SHARE * tokens, low=0.8, high=1.25
            ),
            Calls(f"tinker/{self.model}", math.ceil(steps / self.save_every + 2), measured * each, low=0.8, high=1.25),
        ]


# ---------------------------------------------------------------- what a step is


def steps_of(settings: TinkerTraining, rows: int) -> int:
    """Steps of a training; the last may see fewer rows than the others."""
    return math.ceil(settings.epochs * rows / settings.batch_size)


def batch_of(step: int, settings: TinkerTraining, seed: int, rows: Sequence[Row]) -> list[Row]:
    """The rows of a step, counted from 1."""
    left = settings.epochs * len(rows) - (step - 1) * settings.batch_size
    return [rows[place] for place in rows_of_step(step, settings.batch_size, seed, len(rows))[:left]]


def learning_rate_of(step: int, settings: TinkerTraining, steps: int) -> float:
    """Rises evenly to its highest at the end of the warm-up, then falls evenly to 0 one step behind the last."""
    warm = max(1, math.ceil(settings.warmup * steps))
    return settings.learning_rate * min(step / warm, (steps + 1 - step) / (steps + 1 - warm))


def is_saved(step: int, settings: TinkerTraining, steps: int) -> bool:
    """Whether the state after a step is kept, and measured."""
    return step % settings.save_every == 0 or step == steps


def counted(rows: Sequence[Row]) -> int:
    """Assistant tokens, the end of each turn included."""
    return sum(end - start for row in rows for start, end in row.turns)


def sent(rows: Sequence[Row]) -> int:
    """Tokens a request with these rows holds, which is what is paid: the last of a row is only predicted."""
    return sum(len(row.tokens) - 1 for row in rows)


def data_of(rows: Sequence[Row]) -> list[Any]:
    """Rows as the service takes them: each token but the last, what follows it, and what that weighs in the loss."""
    from tinker import types

    weight, data = 1.0 / counted(rows), []
    for row in rows:
        tokens = list(row.tokens)
        weights = [0.0] * (len(tokens) - 1)
        for start, end in row.turns:
            weights[start - 1 : end - 1] = [weight] * (end - start)
        inputs: Any = {"target_tokens": tokens[1:], "weights": weights}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return data


def loss_of(rows: Sequence[Row], answer: Any) -> float:
    """Mean negative log-likelihood of the assistant tokens, in nats.

    Raises:
        ProviderError: the answer is about other rows.
    """
    found = [list(output["logprobs"].data) for output in answer.loss_fn_outputs]
    if [len(one) for one in found] != [len(row.tokens) - 1 for row in rows]:
        raise ProviderError(
            f"Tinker answered with log-probabilities of {[len(one) for one in found][:4]}... tokens where "
            f"{[len(row.tokens) - 1 for row in rows][:4]}... were asked about",
            "run the same command; if it stays, pin another version of the SDK in pyproject.toml",
        )
    likelihoods = (
        one[i] for row, one in zip(rows, found, strict=True) for s, e in row.turns for i in range(s - 1, e - 1)
    )
    return -math.fsum(likelihoods) / counted(rows)


# ---------------------------------------------------------------- what it costs


class Costs:
    """Nanodollars, by the prices in ``shared/llm/models.toml``.

    Args:
        weights: numbers in an adapter, for what its states weigh.

    Raises:
        BudgetError: a price is not known, and what has no price is not trained.
    """

    def __init__(self, model: str, weights: int) -> None:
        self.trained, self.asked = f"tinker/{model}/train", f"tinker/{model}"
        self.stored = f"tinker/{model}/storage"
        self._train, self._ask = catalogue().card(self.trained).price(), catalogue().card(self.asked).price()
        self._weights = weights

    def train(self, rows: Sequence[Row]) -> int:
        """Of a step: forward, backward and optimizer."""
        return self._train.nano(Usage(input=sent(rows)))

    def measure(self, rows: Sequence[Row]) -> int:
        """Of a forward pass, at the price of reading a prompt, which is one."""
        return self._ask.nano(Usage(input=sent(rows)))

    def store(self, bytes_each: int, days: int) -> int:
        """Of keeping an adapter."""
        gb_months = self._weights * bytes_each / 1e9 * days / MONTH_DAYS
        return math.ceil(gb_months * (self._train.storage or 0.0) * NANO)
