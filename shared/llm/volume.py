"""How much a stage will ask: the two ends of the arithmetic behind ``make estimate``.

A stage that asks models has a pure function ``calls(params, volumes) -> list[Calls]`` in its ``main.py``: what it would
ask for that much input. :mod:`shared.estimate` brings the volumes and the prices.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes a token, over prose and code alike; vendors' tokenizers lie between 3.3 (dense code) and 4.6 (prose)."""


def tokens_of(text: str) -> float:
    """Tokens of a text in a tokenizer nobody lets us run: its bytes / 4."""
    return len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN


@dataclass(frozen=True)
class Volume:
    """The records of one domain that reach a stage.

    Attributes:
        records: how many; an expectation need not be whole.
        tokens: mean tokens of a record's text.
        compressed: mean tokens of its compression; 0 where there is none.
        evenness: harmonic mean / mean of the texts' tokens, above 0 to 1; 1 when all are of one length.
    """

    records: float
    tokens: float
    compressed: float = 0.0
    evenness: float = 1.0


@dataclass(frozen=True)
class Calls:
    """What a stage asks one model, as expected; ``low`` and ``high`` times these tokens bound what is not known.

    Attributes:
        model: ``provider/name``.
        calls: requests.
        input_tokens: of all requests together.
        output_tokens: of all answers together.
        base_url: of an ``endpoint/`` model; ``""`` = the OpenAI client's own default.
    """

    model: str
    calls: float
    input_tokens: float
    output_tokens: float = 0.0
    low: float = 0.7
    high: float = 1.6
    base_url: str = ""
