"""What each model costs and takes: ``models.toml``, dated, read once."""

from __future__ import annotations

import datetime
import functools
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from shared.errors import BudgetError, SettingsError
from shared.llm.types import Request, Usage
from shared.records import Part

PATH = Path(__file__).with_name("models.toml")
PROVIDERS = ("anthropic", "openai", "gemini", "endpoint", "tinker")
NANO = 1_000_000_000
"""Money is counted in whole nanodollars, so that sums are exact: 0.10 USD per million tokens is 100 a token."""


class Price(Part):
    """USD per one million tokens, valid until the end of the day ``until`` (UTC); ``storage``: per GB and month."""

    input: float
    output: float
    cached: float | None = None
    write: float | None = None
    storage: float | None = None
    until: datetime.date | None = None

    def nano(self, usage: Usage, batch: bool = False) -> int:
        """The price of a call in nanodollars; half for a batch."""
        cached = self.input if self.cached is None else self.cached
        write = self.input if self.write is None else self.write
        fresh = usage.input - usage.cached - usage.written
        total = fresh * _nano(self.input) + usage.cached * _nano(cached) + usage.written * _nano(write)
        total += usage.output * _nano(self.output)
        return total // 2 if batch else total


def _nano(usd_per_million: float) -> int:
    return round(usd_per_million * NANO / 1_000_000)


class ModelCard(Part):
    """One row of ``models.toml``."""

    prices: tuple[Price, ...] = Field(min_length=1)
    max_input: int | None = None
    sampling: bool = False
    thinking: dict[str, Any] = Field(default={})
    source: str

    def price(self, today: datetime.date | None = None) -> Price:
        """The price of the day.

        Raises:
            BudgetError: all that are known have run out.
        """
        today = today or datetime.datetime.now(datetime.UTC).date()
        for price in self.prices:
            if price.until is None or price.until >= today:
                return price
        raise BudgetError(
            f"the last price known was valid until {self.prices[-1].until} ({self.source})",
            "look up the vendor's price, then edit shared/llm/models.toml",
        )


FREE = ModelCard(prices=(Price(input=0, output=0),), sampling=True, source="your own server")


class Catalogue:
    """All models we know the price of.

    Raises:
        SettingsError: ``models.toml`` is not as it should be, or a model name has no known provider.
        BudgetError: a model's price is unknown.
    """

    def __init__(self, path: Path = PATH) -> None:
        try:
            rows = tomllib.loads(path.read_text("utf-8"))
            self.checked = str(rows.pop("checked"))
            self.cards = {name: ModelCard.model_validate(row) for name, row in rows.items()}
        except (KeyError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise SettingsError(f"shared/llm/models.toml: {error}", "edit shared/llm/models.toml") from None

    def card(self, model: str) -> ModelCard:
        """The model's row; a free one for an ``endpoint/`` that has none."""
        provider, _, name = model.partition("/")
        if provider not in PROVIDERS or not name:
            raise SettingsError(
                f"a model is provider/name with provider one of {', '.join(PROVIDERS)}; got {model!r}",
                "edit the stage's settings",
            )
        if model in self.cards:
            return self.cards[model]
        if provider == "endpoint":
            return FREE
        raise BudgetError(
            f"the price of {model} is unknown, and what has no price is never called",
            f'add a row ["{model}"] with the vendor\'s price to shared/llm/models.toml, or choose one of '
            + ", ".join(sorted(self.cards)),
        )

    def worst_nano(self, request: Request, bound: int = 0) -> int:
        """The most one call can cost, in nanodollars: the bound on its input and all of its ``max_tokens``.

        ``bound``: what ``request.input_tokens_bound()`` said, when it was asked already.
        """
        card = self.card(request.model)
        tokens = bound or request.input_tokens_bound()
        if card.max_input is not None and tokens > card.max_input:
            raise BudgetError(
                f"{request.model}: up to {tokens:,} tokens asked; the price above {card.max_input:,} is not known",
                "shorten the texts, or add the price to shared/llm/models.toml",
            )
        price = card.price()
        written = tokens if price.write else 0  # the dearest an input token can be
        return price.nano(Usage(input=tokens, written=written, output=request.max_tokens))


@functools.cache
def catalogue() -> Catalogue:
    """The catalogue of this process."""
    return Catalogue()
