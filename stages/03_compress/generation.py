"""What the generators have in common: the prompt they are given and the outcome they give back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from shared.errors import SettingsError
from shared.records import Message, RawText

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""ChatML's. In a text they would end the user's turn, here and again in the training data made from it."""


class Outcome(NamedTuple):
    """What came of one record: ``problem`` is ``""`` and ``text`` the raw output, or ``problem`` is a reject reason."""

    text: str
    problem: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Prompt:
    """The two prompt files: ``system`` as it is, ``user`` with ``{text}`` where the text goes.

    Raises:
        SettingsError: ``user`` does not hold ``{text}`` exactly once.
    """

    system: str
    user: str

    def __post_init__(self) -> None:
        if self.user.count("{text}") != 1:
            raise SettingsError(
                f"prompts/user.txt must hold {{text}} exactly once, it holds it {self.user.count('{text}')} times",
                "edit stages/03_compress/prompts/user.txt",
            )

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of both prompts."""
        return hashlib.sha256(f"{self.system}\0{self.user}".encode()).hexdigest()[:16]

    def messages(self, text: str) -> tuple[Message, ...]:
        """The conversation whose answer is the compression of ``text``."""
        user = Message(role="user", content=self.user.replace("{text}", text))
        return (Message(role="system", content=self.system), user) if self.system else (user,)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: ``temperature`` 0 is greedy; ``max_tokens`` is the limit of one output."""

    temperature: float
    max_tokens: int
    seed: int


def source_text(record: RawText) -> str:
    """The text to compress: as 02 merge left it, else as its source had it."""
    return record.merged.text if record.merged else record.text


def unfit(text: str) -> Outcome | None:
    """Why no model should be asked about a text; None when one should."""
    for token in CONTROL_TOKENS:
        if token in text:
            return Outcome("", "control_token", f"the text holds {token}, which ends a turn of the chat")
    return None
