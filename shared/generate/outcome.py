"""What a generator is asked and what comes of it, whoever writes: this machine, a server or a hosted model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shared.generate.cleaning import clean, refusal
from shared.records import Message

if TYPE_CHECKING:
    from shared.llm import Models, Reply

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""ChatML's. In a text they would end its turn, here and again in the training data made from it."""


class Ask(NamedTuple):
    """One question: ``messages`` end with the user's; ``id`` is what the sampler of its answer is keyed by."""

    id: str
    messages: tuple[Message, ...]


class Outcome(NamedTuple):
    """What came of one question: ``problem`` is ``""`` and ``text`` the raw output, or ``problem`` is a reason."""

    text: str
    problem: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: ``temperature`` 0 is greedy; ``max_tokens`` is the limit of one output."""

    temperature: float
    max_tokens: int
    seed: int


def unfit(messages: tuple[Message, ...]) -> Outcome | None:
    """Why no model should be asked this; None when one should."""
    for token in CONTROL_TOKENS:
        if any(token in message.content for message in messages):
            return Outcome("", "control_token", f"the text holds {token}, which ends a turn of the chat")
    return None


def from_reply(reply: Reply) -> Outcome:
    """A reply as an outcome; its problem, when it has one, is the reason."""
    return Outcome(reply.text, reply.problem, reply.detail)


async def served(models: Models, model: str, base_url: str, messages: tuple[Message, ...], how: Sampling) -> Outcome:
    """What a server or a hosted model makes of a question; the seed is this machine's alone."""
    from shared.llm import Request

    if problem := unfit(messages):
        return problem
    request = Request(
        model=model, base_url=base_url, messages=messages, max_tokens=how.max_tokens, temperature=how.temperature
    )
    return from_reply(await models.ask(request))


# ---------------------------------------------------------------- is it a compression?


def compressed_or_reason(text: str, outcome: Outcome, by_phrase: bool) -> Outcome:
    """The outcome with its text cleaned, or with the reason why there is no usable text in it.

    ``by_phrase``: look for refusals in the words; hosted models say it themselves.
    """
    if outcome.problem:
        return outcome
    compressed = clean(outcome.text, text)
    if not compressed:
        return Outcome("", "empty", f"nothing is left of {outcome.text[:200]!r}" if outcome.text else "no output")
    if by_phrase and (phrase := refusal(compressed, text)):
        return Outcome("", "refused", f"begins with {phrase!r}")
    return Outcome(compressed)


def in_fewer_tokens(outcome: Outcome, verbose_tokens: int, compressed_tokens: int) -> Outcome:
    """The outcome, or ``not_shorter`` with the figures."""
    if outcome.problem or compressed_tokens < verbose_tokens:
        return outcome
    return Outcome("", "not_shorter", f"compressed {compressed_tokens} tokens, verbose {verbose_tokens} tokens")
