"""Answers questions about one text, from what :mod:`shared.standin.reading` reads in it and from nothing else.

An answer hangs on the statements read, so a text and its faithful compression are answered alike, while a lost
statement, a changed number and a lost negation show: the statement itself differs, and so do the shares. A statement's
share is how much of all that the text says (figures, exclusions, comparisons, names) it carries; every share hangs on
the whole text. Models of different names leave out different words, as people taking notes do; none leaves out a fact.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from shared.standin import reading
from shared.standin.reading import Kind, Statement

MAX_LINES = 60
"""Statements an answer lists. Texts of 2,500 characters, the longest kept by 02, have fewer."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a model phrases: ``seed`` of its name, and how many plain words in 256 it leaves out or overlooks."""

    seed: int
    terse: int
    careless: int


@lru_cache(maxsize=256)
def style_of(model: str) -> Style:
    """The style of a model, from its name."""
    seed = zlib.crc32(model.encode())
    return Style(seed, terse=8 + seed % 24, careless=2 + (seed >> 8) % 6)


@lru_cache(maxsize=1 << 16)
def _leaves_out(word: str, seed: int, in_256: int) -> bool:
    """Whether a model of this style leaves a plain word out, wherever it stands."""
    return zlib.crc32(word.encode("utf-8", "replace"), seed) & 255 < in_256


def phrase(statement: Statement, style: Style) -> str:
    """A statement in a model's words.

    Which words it leaves out hangs on the model and the word; now and then it overlooks one more, which hangs on the
    wording: so two wordings of one statement give nearly the same phrase.
    """
    terms = statement.terms
    chance = zlib.crc32(statement.source.encode("utf-8", "replace"), style.seed)
    overlooked = (chance >> 8) % len(terms) if chance % 256 < style.careless * len(terms) else -1
    said, negated = [], False
    for position, term in enumerate(terms):
        if not (negated or statement.facts[position]) and (
            position == overlooked or _leaves_out(term, style.seed, style.terse)
        ):
            continue
        negated = term in reading.NEGATED  # the word a negation is about is part of it
        said.append(term)
    return " ".join(said)


def sentence(statement: Statement, style: Style) -> str:
    """A statement in a model's words, as a sentence."""
    text = phrase(statement, style)
    return f"{text[:1].upper()}{text[1:]}."


def _shares(statements: Sequence[Statement], kind: Kind) -> list[str]:
    """For each statement, its share of what the text says, and with all before it, in percent."""
    weights = [reading.weight(statement, kind) for statement in statements]
    total, so_far, shares = sum(weights), 0, []
    for weight in weights:
        so_far += weight
        shares.append(f"{100 * weight / total:.2f}%, so far {100 * so_far / total:.2f}%")
    return shares


def key_points(statements: Sequence[Statement], style: Style) -> list[str]:
    """Every statement as one point."""
    return [f"states {phrase(s, style)}." for s in statements[:MAX_LINES]]


def implications(statements: Sequence[Statement], style: Style) -> list[str]:
    """What follows: what each statement rules out, demands, makes conditional, or lets expect, and its share."""
    lines = []
    for statement, share in zip(statements[:MAX_LINES], _shares(statements, "prose"), strict=False):
        terms = {term.lower() for term in statement.terms}
        if terms & reading.NEGATIONS:
            lead = "rules out"
        elif terms & reading.CONDITIONS:
            lead = "depends"
        elif terms & reading.MODALS:
            lead = "demands"
        else:
            lead = "lets expect"
        lines.append(f"{lead} ({share}): {_gist(statement, style)}.")
    return lines


def _gist(statement: Statement, style: Style) -> str:
    """The facts of a statement with the word after each, and its first word."""
    kept, after = [], True
    for position, term in enumerate(statement.terms):
        fact = statement.facts[position] or term.lower() in reading.CONDITIONS
        if fact or after:
            kept.append(term)
        after = fact
    return " ".join(kept)


def steps(statements: Sequence[Statement], style: Style) -> list[str]:
    """What a piece of code does, statement by statement, each with its share."""
    lines = []
    for statement, share in zip(statements[:MAX_LINES], _shares(statements, "code"), strict=False):
        lines.append(f"step ({share}): {phrase(statement, style)}.")
    return lines


def code(statements: Sequence[Statement], style: Style) -> str:
    """The code that was read, one statement a line, in the notation of no language in particular."""
    lines = []
    for statement in statements[: 2 * MAX_LINES]:
        first, *rest = statement.terms
        if first == "fn" and rest:
            lines.append(f"fn {rest[0]}({', '.join(rest[1:])})")
        else:
            lines.append(f"    {' '.join(statement.terms)}")
    return "\n".join(lines)


def summary(statements: Sequence[Statement], style: Style) -> str:
    """The first and the weightiest statements, in order, as one paragraph."""
    chosen = sorted(
        range(len(statements)), key=lambda i: (-reading.weight(statements[i], "prose") * (2 if i == 0 else 1), i)
    )[:3]
    return " ".join(sentence(statements[i], style) for i in sorted(chosen))


def relevant(question: str, statements: Sequence[Statement], most: int = 2) -> list[Statement]:
    """The statements that share most with a question, best first; the first statement when none shares anything."""
    asked = {term.lower() for term in reading.prose_terms(question)}
    scored = [(len(asked & {t.lower() for t in s.terms}) / (4 + len(s.terms)), -i) for i, s in enumerate(statements)]
    best = [(score, i) for score, i in sorted(scored, reverse=True) if score > 0][:most]
    return [statements[-i] for _, i in best] or list(statements[:1])


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two texts a and b.

    Attributes:
        recall: share of a's words that b has, 0 to 1.
        overlap: Dice overlap of their words, 0 to 1.
        lost: facts (numbers, names, negated words) of a that b has not.
        added: facts of b that a has not.
    """

    recall: float
    overlap: float
    lost: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def equivalent(self) -> bool:
        return not self.lost and not self.added and self.overlap >= 0.85

    @property
    def supported(self) -> bool:
        """b says nothing that a does not: for an answer b given to a text a."""
        return not self.added

    def reason(self) -> str:
        if self.lost or self.added:
            lost = f"only the first has {', '.join(self.lost[:4])}" if self.lost else ""
            added = f"only the second has {', '.join(self.added[:4])}" if self.added else ""
            return "; ".join(part for part in (lost, added) if part)
        return f"the facts agree, and {self.overlap:.0%} of the words"


def compare(a: str, b: str, kind: Kind = "prose") -> Comparison:
    """What two texts have in common, by content."""
    terms_a, facts_a = _content(a, kind)
    terms_b, facts_b = _content(b, kind)
    recall = len(terms_a & terms_b) / len(terms_a) if terms_a else 1.0
    return Comparison(
        recall,
        reading.overlap(terms_a, terms_b),
        tuple(sorted(facts_a - facts_b - terms_b)),
        tuple(sorted(facts_b - facts_a - terms_a)),
    )


def _content(text: str, kind: Kind) -> tuple[set[str], set[str]]:
    terms: set[str] = set()
    facts: set[str] = set()
    for statement in reading.read(text, kind):
        negated = False
        for position, term in enumerate(statement.terms):
            low = term.lower()
            terms.add(low)
            if negated:
                facts.add(f"not {low}")
            negated = term in reading.NEGATED
            if reading.is_number(term) or reading.is_name(term, position):
                facts.add(low)
    return terms, facts
