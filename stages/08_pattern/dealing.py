"""Which example gets which topic and which patterns: drawn from the seed alone, before anything is asked."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from shared.errors import SettingsError
from shared.records import Part
from shared.stage import Settings, shown


class Source(Settings):
    """One provider and how many examples it makes."""

    model: str
    count: int = Field(ge=1)


class Pattern(Part):
    """One row of ``patterns.toml``."""

    name: str
    definition: str
    looks_like: str
    cues: tuple[str, ...]


class Planned(Part):
    """One example to make; ``number`` is its place in its provider's plan."""

    model: str
    number: int
    topic: str
    patterns: tuple[str, ...]


class Cards:
    """Patterns dealt by cycling: every round is all of them once, in an order drawn from the seed."""

    def __init__(self, patterns: Sequence[str], seed: str) -> None:
        self._patterns, self._seed, self._round = list(patterns), seed, 0
        self._left: list[str] = []

    def deal(self, count: int, without: Sequence[str] = ()) -> list[str]:
        """The next ``count`` different cards that are not among ``without``; those passed over stay next in line."""
        hand: list[str] = []
        passed_over: list[str] = []
        while len(hand) < count:
            if not self._left:
                order = random.Random(f"{self._seed} {self._round}")
                self._left, self._round = order.sample(self._patterns, len(self._patterns)), self._round + 1
            card = self._left.pop(0)
            (passed_over if card in hand or card in without else hand).append(card)
        self._left = passed_over + self._left
        return hand


def plan(sources: Sequence[Source], topics: Sequence[str], patterns: Sequence[str], seed: int) -> list[Planned]:
    """The examples to make; the same seed gives the same plan, byte for byte.

    A conversation gets two patterns, the next one three, and so on. Each provider is dealt whole rounds of its own and
    its last cards from a round all providers share, so every pattern occurs equally often, within one, for each
    provider and over all of them.
    """
    shared = Cards(patterns, f"{seed} shared")
    planned = []
    for source in sources:
        sizes = [2 + number % 2 for number in range(source.count)]
        whole = sum(sizes) // len(patterns) * len(patterns)
        own = Cards(patterns, f"{seed} {source.model}")
        deck = [card for _ in range(whole // len(patterns)) for card in own.deal(len(patterns))]
        deck += shared.deal(sum(sizes) - whole)
        order = random.Random(f"{seed} {source.model} topics").sample(list(topics), len(topics))
        for number, size in enumerate(sizes):
            hand = _hand(deck, size)
            topic = order[number % len(order)]
            planned.append(Planned(model=source.model, number=number, topic=topic, patterns=tuple(hand)))
    return planned


def _hand(deck: list[str], size: int) -> list[str]:
    """Take the first ``size`` different cards off the deck; only its last cards can lack so many different ones."""
    hand = list(dict.fromkeys(deck))[:size]
    for card in hand:
        deck.remove(card)
    return hand


def load_patterns(path: Path) -> dict[str, Pattern]:
    """The patterns by name.

    Raises:
        SettingsError: the file is not as it should be.
    """
    try:
        rows = tomllib.loads(path.read_text("utf-8"))["patterns"]
        return {row["name"]: Pattern.model_validate(row) for row in rows}
    except (OSError, KeyError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise SettingsError(f"{shown(path)}: {error}", f"git checkout -- {shown(path)}") from None


def load_topics(path: Path) -> list[str]:
    """The topics, in the order of the file.

    Raises:
        SettingsError: not TOML, or a topic occurs twice.
    """
    areas = tomllib.loads(path.read_text("utf-8"))
    topics = [topic for rows in areas.values() for topic in rows]
    if len(set(topics)) != len(topics):
        raise SettingsError(f"{shown(path)}: a topic occurs twice", f"edit {shown(path)}")
    return topics
