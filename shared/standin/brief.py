"""What an instruction says about the answer it wants: field by field, how many, about what, chosen from what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_COUNT_WORDS = "zero one two three four five six seven eight nine ten".split()
_N = r"(\d{1,3}|" + "|".join(_COUNT_WORDS[1:]) + ")"
_COUNT = re.compile(
    rf"\b{_N}\s+(?:[\w-]+\s+){{0,3}}?(?:questions?|pairs?|items?|turns?|examples?|points?|messages?)\b", re.I
)
_EXCHANGES = re.compile(rf"\b{_N}(?: (?:to|or) {_N})? exchanges?\b", re.I)
_MESSAGES = re.compile(rf"\b{_N} messages\b", re.I)
_BULLET = re.compile(r"^\s*[-*] ([^:\n]{1,60}): (.+)$", re.M)
_LIST = re.compile(r":[ \t]*\n((?:\s*[-*] .+\n?)+)")
_RANGE = re.compile(rf"\b{_N} to {_N}\b", re.I)
_TOPIC = re.compile(r"\babout: *(.+)$", re.M)


def number(word: str) -> int:
    """``7`` and ``seven`` are 7."""
    return int(word) if word.isdigit() else _COUNT_WORDS.index(word.lower())


class Brief(NamedTuple):
    """An instruction, read.

    Attributes:
        guides: what it says about a field of the answer, by the field's name.
        listed: names with their meanings that it lists: criteria of a rubric, things to apply.
        topic: what the answer is to be about; ``""`` when it does not say.
        messages: least and most messages of a conversation; 0 and 0 when it does not say.
        wanted: how many things it asks for; 0 when it does not say.
    """

    guides: Mapping[str, str]
    listed: tuple[tuple[str, str], ...]
    topic: str
    messages: tuple[int, int]
    wanted: int

    def options(self, field: str) -> tuple[list[str], int, int]:
        """The choices for a list field (``one to three of: a, b, c``), and how many of them; none when it says none."""
        match = re.search(r"\bof: (.+?)\.?$", self.guides.get(field, ""))
        if match is None:
            return [], 0, 0
        names = [name.strip() for name in re.split(r", (?:and |or )?| (?:and|or) ", match[1])]
        return names, *self.bounds(field)

    def bounds(self, field: str) -> tuple[int, int]:
        """``one to three`` in a field's guide; 0 and 0 when there is nothing like it."""
        match = _RANGE.search(self.guides.get(field, ""))
        return (number(match[1]), number(match[2])) if match else (0, 0)


def read_brief(instruction: str, sections: Mapping[str, str], fields: Iterable[str]) -> Brief:
    """Read an instruction; ``sections`` are the texts in its tags, ``fields`` the names of the answer's fields."""
    names = set(fields)
    bullets = {match[1].strip(): match[2].strip() for match in _BULLET.finditer(instruction)}
    guides = {name: text for name, text in bullets.items() if name in names}
    for name in names - guides.keys():
        if match := re.search(rf"\b{re.escape(name)}: ([^.:]+)", instruction):
            guides[name] = match[1].strip()
    blocks = [match[1] for match in _LIST.finditer(instruction)]
    blocks += [text for tag, text in sections.items() if tag in ("rubric", "criteria", "patterns", "rules")]
    listed = [(m[1].strip(), m[2].strip()) for block in blocks for m in _BULLET.finditer(block) if m[1] not in names]
    topic = _TOPIC.search(instruction)
    count = _COUNT.search(instruction)
    return Brief(
        guides,
        tuple(dict.fromkeys(listed)),
        topic[1].strip() if topic else "",
        _messages(instruction),
        number(count[1]) if count else 0,
    )


def _messages(instruction: str) -> tuple[int, int]:
    if match := _MESSAGES.search(instruction):
        return number(match[1]), number(match[1])
    if match := _EXCHANGES.search(instruction):
        least = number(match[1])
        return 2 * least, 2 * (number(match[2]) if match[2] else least)
    return 0, 0
