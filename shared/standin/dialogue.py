"""Writes conversations about a text: the user asks, the assistant answers with what the text says."""

from __future__ import annotations

from collections.abc import Sequence

from shared.standin.reading import Statement, read_prose
from shared.standin.rewriting import draw

_FOLLOW_UPS = (
    "And what about {about}?",
    "How does that fit with {about}?",
    "What should I know about {about}, then?",
    "Could you say more about {about}?",
    "Where does {about} come in?",
    "Why does {about} matter here?",
)
_LEADS = ("", "In short: ", "As far as that goes: ", "Here is what counts: ", "To be exact: ")
_OPENINGS = (
    "How would you approach {topic} in a service that gets {n} requests a second?",
    "We have {n} users and run into trouble with {topic}. Where should we start?",
    "I have to explain {topic} to {n} colleagues next week. What matters most?",
    "Our code review got stuck on {topic} after {n} comments. What would you do?",
)


def keyword(statement: Statement, place: int = 0) -> str:
    """The longest word of a statement; with ``place`` the next shorter one, round and round."""
    words = sorted({t for t in statement.terms if t[0].isalpha()}, key=lambda word: (-len(word), word))
    return words[place % len(words)] if words else "the text"


def clean(text: str) -> str:
    """A statement's wording as a sentence of its own: no bullet, no heading mark, a full stop."""
    text = " ".join(text.lstrip("#-* ").split())
    return text if text[-1:] in ".!?" else f"{text}."


def conversation(
    count: int,
    statements: Sequence[Statement],
    *,
    question: str = "",
    answer: str = "",
    topic: str = "",
    apply: Sequence[tuple[str, str]] = (),
    seed: str = "",
) -> list[str]:
    """``count`` turns, the user's first, none twice.

    Args:
        count: even.
        statements: what the text says; the later turns go through them in an order drawn from the seed.
        question: the user's first question; else one about the topic or the first statement.
        answer: the assistant's first answer; else a statement.
        topic: what it is about, when no text says.
        apply: names and meanings of what the assistant's answers are to apply, one after the other.
        seed: of every choice.
    """
    material = [clean(statement.source) for statement in statements]
    order = sorted(range(len(statements)), key=lambda i: draw(seed, "order", str(i)))
    turns: list[str] = []
    for i in range(count // 2):
        statement = statements[order[i % len(order)]] if order else None
        about = keyword(statement, i // max(1, len(order))) if statement else topic or "this"
        if i:
            asked = _pick(_FOLLOW_UPS, seed, f"user {i}").format(about=about)
        elif question:
            asked = question
        elif topic:
            n = str(10 + int(draw(seed, "n") * 4990))
            asked = _pick(_OPENINGS, seed, "opening").format(topic=topic, n=n)
        else:
            asked = f"What can you tell me about {about}?"
        said = material[order[i % len(order)]] if order else f"There is little to add about {topic or 'this'}."
        if apply:
            name, meaning = apply[i % len(apply)]
            said = f"{' '.join(clean(s.source) for s in read_prose(meaning))} Applied to {topic or about}: {said}"
        if not i and answer:
            said = answer
        turns += [_fresh(asked, turns, i), _fresh(_pick(_LEADS, seed, f"lead {i}") + said if i else said, turns, i)]
    return turns


def _pick(options: Sequence[str], seed: str, salt: str) -> str:
    return options[int(draw(seed, salt) * len(options))]


def _fresh(text: str, turns: Sequence[str], i: int) -> str:
    """The text, told apart from a turn that said the same."""
    return f"{text} (Part {i + 1})" if text in turns else text
