"""Telegraphic compression by rule: the one task that the tiny model is trained on.

`squeeze` is pure and deterministic. It reads a text as whitespace-separated words and decides on each word
from that word and the next one alone, so the same input always gives the same output.

What it never drops or alters: negations (not, no, never, cannot), conditions (if, unless, only, when, then),
modal words (must, may, can, should, would), numbers, words in capitals, words joined to punctuation, and
Python's keywords other than `is` and `and`. `without` becomes `w/o` and `and` becomes `&`, which a reader of
prose or of code takes for the same thing.

    >>> squeeze("It does not write to the cache, because the key is unknown")
    'not write cache, ∵ key unknown'
    >>> squeeze("a = 1\\nif value is None:")
    'a = 1 if value is None:'
"""

from typing import Final

# Dropped. Lower case and, where the word opens sentences, in title case. Left out on purpose: prepositions
# that carry a direction or an agent (from, by, with, on, off), `so` (a cause), Python's keywords (in, for,
# as), `i` (a loop variable) and a lone "A" (a name more often than an article: "matrix A").
_ARTICLES = ("a", "an", "the", "of", "to")
_VERBS = ("is", "are", "was", "were", "be", "been", "being", "am", "will")
_AUXILIARIES = ("has", "have", "had", "do", "does", "did")
_POINTERS = ("that", "which", "this", "these", "those", "it", "its", "they", "them", "their", "there")
_PERSONS = ("you", "your", "we", "us", "our")
_FILLERS = ("also", "just", "very", "really", "quite", "rather", "simply", "basically", "actually", "such")
_OPENERS = ("An", "The", "This", "That", "These", "Those", "It", "Its", "They", "Their", "There", "You")
_OPENERS_TOO = ("Your", "We", "Our", "Also", "Such")
STOP: Final = frozenset(_ARTICLES + _VERBS + _AUXILIARIES + _POINTERS + _PERSONS + _FILLERS + _OPENERS + _OPENERS_TOO)

# Shortened. Words that are seldom bare identifiers, so that `return value` is left alone.
SHORT: Final[dict[str, str]] = {
    "and": "&",
    "because": "∵",
    "therefore": "∴",
    "without": "w/o",
    "approximately": "~",
    "additional": "extra",
    "additionally": "plus",
    "application": "app",
    "applications": "apps",
    "argument": "arg",
    "arguments": "args",
    "automatically": "auto",
    "character": "char",
    "characters": "chars",
    "configuration": "config",
    "corresponding": "matching",
    "currently": "now",
    "database": "db",
    "description": "desc",
    "development": "dev",
    "directories": "dirs",
    "directory": "dir",
    "documentation": "docs",
    "environment": "env",
    "execute": "run",
    "function": "fn",
    "functions": "fns",
    "however": "but",
    "implementation": "impl",
    "information": "info",
    "libraries": "libs",
    "library": "lib",
    "maximum": "max",
    "minimum": "min",
    "parameter": "param",
    "parameters": "params",
    "previously": "before",
    "provided": "given",
    "provides": "gives",
    "repository": "repo",
    "required": "needed",
    "requires": "needs",
    "returns": "→",
    "specification": "spec",
    "specified": "given",
    "temporary": "temp",
}

# A word before one of these is an operand, not a function word: `a = 1`, `x is None`, `for a in b`.
OPERATORS: Final = "=+-*/%<>!|&^,:.)]}{;"
OPERAND_BEFORE: Final = frozenset(("in", "and", "or", "if", "else", "None", "True", "False", "null", "true", "false"))


def _is_operand(following: str) -> bool:
    """True when the word before `following` stands where code puts an identifier; False at the end."""
    if not following:
        return False
    return following[0] in OPERATORS or following.rstrip(OPERATORS) in OPERAND_BEFORE


def squeeze(text: str) -> str:
    """Return `text` without function words and with some words shortened, joined by single spaces.

    Only words that are wholly alphabetic are touched. An empty or blank text gives "". A text whose every
    word is dropped is returned with its whitespace collapsed, so that a text with words never becomes empty.
    """
    words = text.split()
    kept: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if (word not in STOP and word not in SHORT) or _is_operand(following):
            kept.append(word)
        elif word in SHORT:
            kept.append(SHORT[word])
    return " ".join(kept or words)
