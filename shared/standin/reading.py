"""Reads a text, in full or in shorthand, as the same list of statements.

The text engine answers questions from what is read here, so a text and its faithful compression must read alike:
function words are skipped, abbreviations are expanded to one form, symbols are read as the words they stand for, number
words become digits. What carries facts stays: numbers, names, negations, conditions, comparisons, identifiers.
:mod:`shared.standin.rewriting` writes shorthand and knows, from here, what may go.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["prose", "code"]

# ---------------------------------------------------------------- what words stand for

SKIPPED = frozenset(
    "a an the of to in on at into onto upon as for with by is are was were be been being am has have had having do "
    "does did done will that which who whom whose this these those it its he she him they them their there his her you "
    "your we us our my me also just very really quite rather simply basically actually so such and plus additionally "
    "both therefore thus hence however but return returns returned ret already then than i i'm i've i'd".split()
)  # fmt: skip
"""Function words: a telegram leaves them out. Prepositions of direction (from, between, under) are not among them."""

SHORT = {
    "n't": "not", "¬": "not", "can't": "cannot", "won't": "not", "w/o": "without", "∵": "because",
    "approximately": "~", "additional": "extra", "application": "app", "applications": "apps", "argument": "arg",
    "arguments": "args", "automatically": "auto", "character": "char", "characters": "chars",
    "configuration": "config", "corresponding": "matching", "currently": "now", "database": "db",
    "description": "desc", "development": "dev", "directories": "dirs", "directory": "dir", "documentation": "docs",
    "environment": "env", "execute": "run", "function": "fn", "functions": "fn", "fns": "fn",
    "implementation": "impl", "information": "info", "libraries": "libs", "library": "lib", "maximum": "max",
    "minimum": "min", "parameter": "param", "parameters": "params", "previously": "before", "provided": "given",
    "provides": "gives", "repository": "repo", "required": "needed", "requires": "needs", "specification": "spec",
    "specified": "given", "temporary": "temp",
}  # fmt: skip
"""One form of each, in prose and in code (whose comments and messages are prose)."""

SHORT_IN_PROSE = SHORT | {
    **{word: str(n) for n, word in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)},
    "twenty": "20", "thirty": "30", "forty": "40", "fifty": "50",
    "percent": "%", "roughly": "~", "≈": "~", "degrees": "°", "degree": "°", "euros": "€", "euro": "€",
    "kilometres": "km", "kilometre": "km", "centimetres": "cm", "centimetre": "cm", "millimetres": "mm",
    "millimetre": "mm", "metres": "m", "metre": "m", "kilograms": "kg", "kilogram": "kg", "grams": "g", "gram": "g",
    "litres": "l", "litre": "l", "millilitres": "ml", "millilitre": "ml", "milligrams": "mg", "milligram": "mg",
    "kilobytes": "KB", "megabytes": "MB", "gigabytes": "GB", "terabytes": "TB", "hours": "h", "hour": "h",
    "minutes": "min", "minute": "min", "seconds": "s", "milliseconds": "ms", "millisecond": "ms", "weeks": "wk",
    "week": "wk", "months": "mo", "month": "mo", "years": "yr", "year": "yr", "january": "Jan", "february": "Feb",
    "august": "Aug", "september": "Sep", "october": "Oct", "november": "Nov", "december": "Dec",
    "monday": "Mon", "tuesday": "Tue", "wednesday": "Wed", "thursday": "Thu", "friday": "Fri", "saturday": "Sat",
    "sunday": "Sun", "mondays": "Mon", "tuesdays": "Tue", "wednesdays": "Wed", "thursdays": "Thu", "fridays": "Fri",
    "saturdays": "Sat", "sundays": "Sun", "e.g": "eg", "example": "eg", "people": "ppl", "although": "though",
    "temperature": "temp", "average": "avg", "company": "co", "department": "dept", "document": "doc",
    "documents": "docs", "international": "intl", "necessary": "needed", "original": "orig", "question": "Q",
    "questions": "Qs", "reference": "ref", "section": "sec", "software": "sw", "hardware": "hw", "something": "sth",
    "university": "uni",
}  # fmt: skip

NEGATIONS = frozenset(("not", "no", "never", "none", "cannot", "without", "neither", "nor", "nobody", "nothing"))
MODALS = frozenset(("must", "may", "can", "should", "could", "would", "need", "needs", "needed"))
CONDITIONS = frozenset(("if", "unless", "when", "while", "until", "except", "only", "after", "before", "because"))
COMPARISONS = frozenset(("==", "!=", "<", ">", "<=", ">=", "≤", "≥"))
NEGATED = NEGATIONS | {"!="}

PHRASES = {
    "in order to": "", "in order": "", "as well as": "and", "more than": ">", "less than": "<", "fewer than": "<",
    "at least": "≥", "no more than": "≤", "not more than": "≤", "at most": "≤", "per cent": "%",
    "in any case": "always", "at once": "immediately", "as long as": "while",
}  # fmt: skip
"""Read before words are, because the words alone would be read as something else."""

_PHRASE = re.compile(r"\b(?:" + "|".join(sorted(PHRASES, key=len, reverse=True)) + r")\b", re.I)

# ---------------------------------------------------------------- prose

_PROSE_TOKEN = re.compile(
    r"\d+(?:[.,:/]\d+)*"
    r"|w/o?(?![\w/])"
    r"|[^\W\d_][\w$]*(?:['’][^\W\d_]+)?(?:\.[^\W\d]\w*)*|_\w+"
    r"|[%°~≈¬∵€$£]|(?<![\w.])[-−](?=\d)|[<>]=?|[≤≥]"
)
_SENTENCE_END = re.compile(r"(?:(?<=[.!?;])|(?<=[.!?;][\"'”’)\]]))\s+|\s*\|\s*|(?:^|(?<=\s))[-*•]\s+")
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")


class Statement(NamedTuple):
    """One statement as it was read.

    Attributes:
        terms: content words, numbers, negations and comparisons, in order.
        facts: of each term, whether it is a number, a name, a negation or a comparison.
        source: the wording it was read from; for code, a hash of it.
    """

    terms: tuple[str, ...]
    facts: tuple[bool, ...]
    source: str

    @classmethod
    def of(cls, terms: tuple[str, ...], source: str) -> Statement:
        return cls(terms, tuple(_is_fact(term, position) for position, term in enumerate(terms)), source)


def sentences(text: str) -> list[str]:
    """A prose text cut after sentences, at ``|`` and at bullets; line breaks inside a sentence do not count."""
    return [piece for piece in (part.strip() for part in _SENTENCE_END.split(text)) if piece]


def without_phrases(sentence: str) -> str:
    """The sentence with every one of :data:`PHRASES` as its sign."""
    low = sentence.lower()
    if not any(phrase in low for phrase in PHRASES):  # a tenth of the price of the pattern, and mostly enough
        return sentence
    return _PHRASE.sub(lambda match: f" {PHRASES[match[0].lower()]} ", sentence)


def prose_terms(sentence: str) -> tuple[str, ...]:
    """What one sentence says, in order: content words, numbers, negations, comparisons."""
    terms: list[str] = []
    for token in _PROSE_TOKEN.findall(without_phrases(sentence)):
        low = token.lower()
        if low in SKIPPED or low == "w/":
            continue
        one = SHORT_IN_PROSE.get(low)
        if one is None:
            one = _contraction(token, low) if "'" in low or "’" in low else token
        if one:
            terms.append(one)
    if terms and terms[0][1:] == terms[0][1:].lower():
        terms[0] = terms[0].lower()  # a capital at the start of a sentence is not a name's
    return tuple(terms)


def _contraction(token: str, low: str) -> str:
    """``don't`` is a negation, ``it's`` says nothing, ``Ilse's`` is Ilse."""
    low = low.replace("’", "'")
    if low.endswith("n't"):
        return SHORT_IN_PROSE.get(low, "not")
    stem = token[: low.index("'")]
    return "" if stem.lower() in SKIPPED or stem.lower() == "i" else stem


def read_prose(text: str) -> list[Statement]:
    """The statements of a prose text; a sentence that says nothing (``It is.``) is left out."""
    read = ((prose_terms(sentence), sentence) for sentence in sentences(text))
    return [Statement.of(terms, sentence) for terms, sentence in read if terms]


# ---------------------------------------------------------------- code

_CODE_TOKEN = re.compile(
    r"w/o?(?![\w/])|\d+(?:\.\d+)*(?=\D|$)|[^\W\d]\w*(?:n't\b)?|[!=]==?|[<>]=?(?![<>])|[-+*/%|&]?=|:=|&&|\|\||(?<![\w)\]])!(?=[\w(])|&|∵|¬"
)
SKIPPED_IN_CODE = SKIPPED - {"return", "ret", "returned", "i"} | {
    "self", "cls", "const", "let", "var", "new", "pub", "public", "private", "export", "static", "readonly", "final",
    "int", "str", "bool", "float", "bytes", "string", "number", "boolean", "void", "mut",
}  # fmt: skip
"""Also words of syntax that a reader of shorthand fills in by habit."""
SHORT_IN_CODE = SHORT | {
    **dict.fromkeys((":=", "+=", "-=", "*=", "/=", "%=", "|=", "&="), "="),
    "===": "==", "!==": "!=", "!": "not", "&&": "", "&": "", "||": "or", "ret": "return", "def": "fn",
    "func": "fn", "throw": "raise", "throws": "raise", "catch": "except",
}  # fmt: skip
_STARTS = frozenset(
    "fn class if else elif for while return raise try except finally with import from case match switch yield assert "
    "del select insert update delete create where group order join left having limit union set values begin end when "
    "break continue loop type struct enum impl interface package defer".split()
)  # fmt: skip


def code_terms(text: str) -> list[str]:
    """What code says, in order: identifiers, numbers, comparisons, negations, words of strings and comments.

    Layout, punctuation and arithmetic are not read: shorthand joins lines, and comments must not end differently.
    """
    terms: list[str] = []
    for token in _CODE_TOKEN.findall(text):
        low = token.lower()
        if low in SKIPPED_IN_CODE or low == "w/":
            continue
        one = SHORT_IN_CODE.get(low if token == low else token)
        if one is None:
            one = "not" if low.endswith("n't") else token
        if one:
            terms.append(one)
    return terms


def read_code(text: str) -> list[Statement]:
    """The statements of a piece of code: a new one begins at a keyword, and with what is assigned to."""
    groups: list[list[str]] = []
    for term in code_terms(text):
        if term == "=" and groups:
            if len(groups[-1]) > 1:
                groups.append([groups[-1].pop()])
        elif not groups or (term.lower() in _STARTS and groups[-1][-1] != "else"):
            groups.append([term])
        else:
            groups[-1].append(term)
    wording = f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}"
    return [Statement.of(tuple(group), f"{wording} {i}") for i, group in enumerate(groups)]


@lru_cache(maxsize=1024)  # a panel asks several questions of each text
def read(text: str, kind: Kind) -> tuple[Statement, ...]:
    """The statements of a text."""
    return tuple(read_code(text) if kind == "code" else read_prose(text))


_MARKS = re.compile(r"[(){}\[\]=<>;_]|\b(?:SELECT|FROM|WHERE|JOIN|UPDATE|INSERT|CREATE|GROUP|ORDER|NULL)\b")


def kind_of(text: str) -> Kind:
    """``code`` when one character in 40 is a mark of code or more; prose has about one in 200."""
    return "code" if len(_MARKS.findall(text)) * 40 >= len(text) else "prose"


# ---------------------------------------------------------------- facts


def is_number(term: str) -> bool:
    return term[0].isdigit()


def is_name(term: str, position: int) -> bool:
    """A name, an acronym or an identifier. A capital alone says nothing in the first place of a statement."""
    if not term[0].isalpha() and term[0] != "_":
        return False
    if "_" in term or "." in term or term[1:] != term[1:].lower():
        return True
    return position > 0 and len(term) > 1 and term[0].isupper()


def _is_fact(term: str, position: int) -> bool:
    first = term[0]
    if first.isdigit() or term in NEGATED or term in COMPARISONS:
        return True
    return (not term.islower() or "_" in term or "." in term) and is_name(term, position)


def weight(statement: Statement, kind: Kind) -> int:
    """How much a statement says in figures, exclusions and comparisons; at least 10, whatever it says.

    In code, where every identifier counts, also by its length; in prose a lost plain word must not change it.
    """
    total = 10 + (len(statement.terms) // 3 if kind == "code" else 0)
    for position, term in enumerate(statement.terms):
        if is_number(term):
            total += 3 + int("".join(filter(str.isdigit, term))) % 89
        elif term in NEGATED:
            total += 11
        elif term in COMPARISONS:
            total += 7
        elif is_name(term, position):
            total += 2
    return total


def overlap(a: Iterable[str], b: Iterable[str]) -> float:
    """Dice overlap of two sets of terms, lower case; 1 when both are empty."""
    one, two = {t.lower() for t in a}, {t.lower() for t in b}
    return 2 * len(one & two) / (len(one) + len(two)) if one or two else 1.0
