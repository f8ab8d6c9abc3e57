"""Writes conversations between an engineer and a coding assistant about a topic, with given patterns in the answers.

What there is to say comes from ``lessons.toml``, chosen by the words of the topic; how it is said, from the patterns
asked for. A pattern that is not known is shown in the words the prompt describes it with.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from shared.standin.dialogues import Dice, Turns
from shared.standin.grammar import capital
from shared.standin.rewriting import fault_of

FAULTS = {
    "length": 0.05,  # an exchange too many or too few
    "unlisted": 0.05,  # patterns_applied lacks one of those asked for
    "unshown": 0.05,  # a pattern is claimed, and no answer shows it
    "placeholder": 0.04,  # the code is not finished
    "filler": 0.03,  # praise, which the profile rules out
    "echo": 0.015,  # an answer is given a second time
}
"""Shares of the conversations, by what is wrong with them; each has one fault at most."""

Matter = Mapping[str, Any]


@dataclass(frozen=True)
class Order:
    """What a conversation is to be, as read from the prompt; ``patterns``: names, and what each looks like."""

    topic: str
    least: int
    most: int
    patterns: tuple[tuple[str, str], ...]


def order_of(user: str) -> Order:
    """The topic, the length and the patterns that a prompt asks for."""
    topic = re.search(r"\babout:\s*([^\n]+)", user)
    length = re.search(r"\b(\d+)\s+(?:to|-|–)\s+(\d+)\s+exchanges", user)
    least, most = (int(length[1]), int(length[2])) if length else (3, 3)
    listed = re.search(r"\bpatterns:\s*\n((?:[-*] [^\n]+\n?)+)", user)
    patterns = []
    for match in re.finditer(r"^[-*] ([^:\n]+):\s*([^\n]*)$", listed[1] if listed else "", re.M):
        patterns.append((match[1].strip(), match[2].partition("looks like this:")[2].strip() or match[2].strip()))
    return Order(topic[1].strip() if topic else "a small library", least, max(least, most), tuple(patterns))


def write(user: str, model: str, attempt: str = "") -> dict[str, Any]:
    """The conversation that a prompt asks for, with its topic, its patterns and its learning notes."""
    order, dice = order_of(user), Dice(user, model, attempt)
    fault = fault_of(FAULTS, user, model, attempt)
    exchanges = order.least + int(dice.share() * (order.most - order.least + 1))
    if fault == "length":
        exchanges = order.least - 1 if order.least > 1 and dice.share() < 0.5 else order.most + 1
    shown = list(order.patterns)
    if fault == "unshown" and shown:
        shown.remove(dice.pick(shown))
    turns = Lesson(order, dice).write(exchanges, shown)
    names = [name for name, _ in order.patterns]
    if fault == "placeholder":
        turns = _unfinished(turns, dice)
    elif fault == "filler":
        place = dice.pick(range(1, len(turns), 2))
        turns[place]["content"] = f"{dice.pick(_PRAISE)} {turns[place]['content']}"
    elif fault == "echo":
        turns[-1]["content"] = turns[1]["content"]
    elif fault == "unlisted" and names:
        names.remove(dice.pick(names))
    return {
        "topic": order.topic,
        "patterns_applied": names,
        "conversation": turns,
        "learning_notes": _notes(order, dice),
    }


# ---------------------------------------------------------------- matter


@lru_cache(maxsize=1)
def matter() -> dict[str, list[Matter]]:
    """What there is to say: families of topics, and snippets of code."""
    return tomllib.loads(Path(__file__).with_name("lessons.toml").read_text("utf-8"))


def _closest(rows: Sequence[Matter], topic: str, dice: Dice) -> Matter:
    """The row that shares most words with the topic; one of them all when none shares any."""
    words = set(re.findall(r"[a-z+]+(?:-[a-z]+)*", topic.lower()))
    scores = [len(words & set(row["words"])) for row in rows]
    best = max(scores)
    return dice.pick([row for row, score in zip(rows, scores, strict=True) if score == best])


def _snippets(topic: str) -> list[Matter]:
    """Code in the language that a topic names, in Python when it names none."""
    named = set(re.findall(r"[a-z+]+", topic.lower()))
    rows = matter()["snippets"]
    return [row for row in rows if "language" in row and named & set(row["words"][:1])] or [
        row for row in rows if "language" not in row
    ]


_BREAK = re.compile(
    r"\s+\b(?:for|in|with|at|that|when|under|against|instead|to|without|inside|of|and|whether|from|over|behind)\b"
)
_ARTICLE = re.compile(r"^(?:a|an|the)\s+", re.I)


def _thing(topic: str) -> str:
    """The first noun phrase of a topic."""
    return _ARTICLE.sub("", _BREAK.split(topic)[0]).strip() or topic


def _identifier(topic: str) -> str:
    words = re.findall(r"[a-z][a-z0-9]*", _thing(topic).lower()) or ["work"]
    return "_".join(words[:3])


# ---------------------------------------------------------------- writing one

_CODE_ASKED = (
    "Show me how you would write it.", "What does that look like in code?", "I would rather read code than prose.",
    "Can you put that into code I could merge?", "Give me the smallest version that I could release.",
    "Let me see the code for that, errors included.",
)  # fmt: skip
_CODE_GIVEN = (
    "This is the part that carries the weight:", "Typed, with its errors handled:",
    "The smallest version I would merge:",
    "In code:", "Here it is, without the parts that do not matter:", "The core of it:",
)  # fmt: skip
_CODE_DONE = (
    "What can fail has a name, and the caller decides.", "Nothing in it needs a comment to be read.",
    "The bounds are arguments, so a test can make them small.", "It raises early and says what it got.",
    "Every name says what it holds.", "It has one way in and one way out.",
)  # fmt: skip
_LAST_ASKED = (
    "What would you do first on Monday?", "What is the one thing I must not forget?",
    "How will I notice that it works?",
    "When should I look at this again?", "What would make you change your mind?", "What do I tell the team?",
)  # fmt: skip
_LAST_SAID = (
    "Measure first: one number before the change and the same one after it.",
    "Start with the smallest step that can be undone, and write down what you expect of it.",
    "Put the rule into a test, so that nobody has to remember it.",
    "I do not know your traffic; a day of logs would settle it.",
    "Tell the team the reason and not the rule: the rule follows.",
    "Look again when the load has doubled, or after the next incident, whichever comes first.",
    "One week with the counter on a screen everybody sees; after that you will know.",
    "Undo it when the number gets worse; that is why you wrote it down.",
)  # fmt: skip
_PRAISE = ("Great question!", "Certainly! I am happy to help with that.", "Excellent question, well spotted!")


class Lesson:
    """One conversation."""

    def __init__(self, order: Order, dice: Dice) -> None:
        self.order, self.dice = order, dice
        self.family = _closest(matter()["families"], order.topic, dice)
        self.snippet = _closest(_snippets(order.topic), order.topic, dice)
        self.later = dice.order(self.family["later"])
        self.verdicts = dice.order(list(zip(self.family["verdict"], self.family["reason"], strict=True)))
        self.asides = dice.order(_LAST_SAID)

    def write(self, exchanges: int, shown: Sequence[tuple[str, str]]) -> Turns:
        """All turns; each of the patterns shown is in at least one answer, the code in the second."""
        code_at = min(1, exchanges - 1)
        # A hint after the code would be no hint.
        patterns = sorted(self.dice.order(shown), key=lambda pattern: pattern[0] != "Hint-Based Learning")
        turns = Turns()
        for place in range(exchanges):
            here = [pattern for i, pattern in enumerate(patterns) if i % exchanges == place]
            user, said = self._exchange(place, exchanges, code_at, here)
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
        return turns

    def _exchange(self, place: int, exchanges: int, code_at: int, patterns: list[tuple[str, str]]) -> tuple[str, str]:
        parts = []
        if place == 0:
            user = self._filled(self.dice.pick(self.family["opening"]))
            parts.append(self._next())
        elif place == exchanges - 1 and place > code_at:
            user = self.dice.pick(_LAST_ASKED)
            parts.append(self.asides.pop())
        else:
            user = self.later.pop() if self.later else self.dice.pick(_LAST_ASKED)
            parts.append(self._next())
        parts += [self._shown(name, looks_like) for name, looks_like in patterns]
        if place == code_at:
            user = f"{user} {self.dice.pick(_CODE_ASKED)}"
            language = self.snippet.get("language", "python")
            code = self._filled(self.snippet["code"]).strip()
            parts.append(f"{self.dice.pick(_CODE_GIVEN)}\n\n```{language}\n{code}\n```\n\n{self.dice.pick(_CODE_DONE)}")
        return user, "\n\n".join(parts)

    def _next(self) -> str:
        """What has not been said yet."""
        return capital(self._filled(" ".join(self.verdicts.pop()))) if self.verdicts else self.asides.pop()

    def _filled(self, text: str) -> str:
        topic = self.order.topic
        name = _identifier(topic)
        values = {"topic": topic, "thing": _thing(topic), "name": name, "Class": name.title().replace("_", "")}
        return re.sub(r"@(topic|thing|name|Class)@", lambda match: values[match[1]], text)

    # ------------------------------------------------------------ patterns

    def _shown(self, name: str, looks_like: str) -> str:
        """An answer's part that applies a pattern."""
        if name not in _PHRASING:
            return f"{name}, applied to {_thing(self.order.topic)}: {looks_like}"
        field, wordings = _PHRASING[name]
        parts = self._filled(self.dice.pick(self.family[field])).split(" | ")
        if name == "Multi-Dimensional Evaluation":
            lines = "\n".join(f"- {capital(part)}" for part in parts)
            return f"{self.dice.pick(wordings)}\n{lines}\n\nOverall: {self.dice.pick(_OVERALL)}"
        wording = self.dice.pick(wordings)
        return wording.format(*parts, *(capital(part) for part in parts))


_OVERALL = (
    "good enough to merge, with the last line as a follow-up.", "I would release it this week.",
    "sound; the weakest line decides what comes next.", "yes, with the second line watched.",
)  # fmt: skip
_PHRASING: dict[str, tuple[str, tuple[str, ...]]] = {
    # pattern: field of a family, wordings; {0} is the field's first part, and after the last the capitalised ones come
    "Gap Analysis": (
        "gap",
        (
            "You have {0}. You still need {1}. The gap between the two shows as {2}.",
            "What is missing is {1}: you have {0}, and the consequence is {2}.",
            "Before any proposal, the gaps: there is {0}; {1} is not covered; hence {2}.",
        ),
    ),
    "Tradeoff Analysis": (
        "options",
        (
            "The trade-off is between {0}, at the cost of {1}, and {2}, at the cost of {3}. If {4}, I take {0}.",
            "{5} costs you {1}; {2} costs you {3}. I would take {0} as long as {4}.",
            "You get {0} in exchange for {1}, or {2} in exchange for {3}. My choice, because {4}: {0}.",
        ),
    ),
    "Production Readiness": (
        "fails",
        (
            "In production {0}.",
            "Before it ships, settle one thing: {0}.",
            "What happens in production when it fails? There {0}. Log it with the request it belongs to.",
        ),
    ),
    "Brutal Accuracy": (
        "wrong",
        (
            "You assume {0}. This is wrong: {1}. Instead, {2}.",
            "The idea {0} is plainly wrong: {1}. {5}.",
            "Building on the belief {0} will not work. The evidence: {1}. What to do: {2}.",
        ),
    ),
    "Multi-Dimensional Evaluation": (
        "dims",
        ("One dimension at a time:", "Graded separately:", "Along the dimensions that count here:"),
    ),
    "Hint-Based Learning": (
        "hints",
        (
            "A hint first: look at {0}. If that does not do it, a stronger one: {1}.",
            "Before I show the answer, think about {0}. And if you are still stuck: {1}.",
            "Two hints, the second stronger than the first. Ask yourself {0}; then {1}.",
        ),
    ),
    "Diminishing Returns": (
        "gain",
        (
            "{2}; {1}. The first is most of the gain, so stop here.",
            "{2}. After that the returns are diminishing: {1}.",
            "{2}, while {1}: not worth the week it takes.",
        ),
    ),
    "Mechanistic Understanding": (
        "mechanism",
        (
            "Under the hood this is what happens. {0}",
            "The mechanism explains the symptom. {0}",
            "Internally it goes in this order. {0}",
        ),
    ),
    "Context-Dependent Recommendations": (
        "conditions",
        (
            "This depends on {2}. {3}; {1}.",
            "The fact that decides is {2}: {0}; {1}.",
            "In your case ask for {2} first. {3}; {1}.",
        ),
    ),
    "Precision Policing": (
        "loose",
        (
            "Strictly speaking, {0} says nothing yet. Say: {1}.",
            "{0} needs a figure. What you want to know: {1}.",
            "{0} is not the same as what you mean, which is {1}. Put it that way in the ticket.",
        ),
    ),
}


def _notes(order: Order, dice: Dice) -> list[str]:
    """One to three sentences on what the conversation teaches."""
    thing = _thing(order.topic)
    notes = [f"{name}: how it is applied to {thing}." for name, _ in order.patterns]
    notes.append(f"An answer about {thing} begins with the verdict and gives the reason next.")
    return dice.order(notes)[: 1 + int(dice.share() * 3)]


def _unfinished(turns: Turns, dice: Dice) -> Turns:
    """The conversation with code that is not finished."""
    for turn in turns:
        head, fence, rest = turn["content"].partition("\n```\n")
        if fence:
            mark = "//" if re.search(r"```(?:rust|go|typescript|javascript|cpp)\n", head) else "#"
            gap = dice.pick(
                ("TODO: handle the remaining cases", "placeholder for the error path", "FIXME: not done yet")
            )
            turn["content"] = f"{head}\n\n{mark} {gap}{fence}{rest}"
    return turns
