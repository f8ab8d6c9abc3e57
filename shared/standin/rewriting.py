"""Writes shorthand: a text's telegraphic rewrite, and for a share of texts a bad one.

A good rewrite reads as its source does (:func:`shared.standin.reading.read`), which is checked before it is given:
where a rule would change what is read, the sentence or the text stays as it was. A bad one has lost a statement or a
third of itself, has a changed number or a lost negation, or is no rewrite at all. Which texts get a bad one, and of
which kind, hangs on a hash of the text, so every run and every model sees the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Literal

from shared.standin import reading
from shared.standin.reading import Kind

Damage = Literal["drop_statement", "drop_third", "change_number", "drop_negation", "longer", "empty", "fence", "think"]

_ODD: tuple[Damage, ...] = ("longer", "empty", "fence", "think")
_ODD_SHARE = 0.02  # of all texts

_WORD = re.compile(r"^([(\[\"'“‘]*)(.*?)([)\]\"'”’.,;:!?…]*)$", re.S)
_TERMINATORS = frozenset(".!?;:")
_KEPT_FOR_SENSE = frozenset(("by", "but"))
_SYMBOLS = {"and": "+", "because": "∵", "therefore": "∴"}
_PROSE_WORDS = reading.SHORT_IN_PROSE
_CODE_WORDS = reading.SHORT


def rewrite(text: str, bad_share: float = 0.0) -> str:
    """The shorthand of a text; for ``bad_share`` of all texts (0 to 1) a bad one, by :func:`fate`."""
    kind = reading.kind_of(text)
    damage = fate(text, bad_share)
    return damaged(text, kind, damage) if damage else "\n".join(faithful(text, kind))


def faithful(text: str, kind: Kind) -> list[str]:
    """The units of a good rewrite: sentences of prose, lines of code. Joined, they read as the text does."""
    write = _code_lines if kind == "code" else _prose_sentences
    said = _terms(text, kind)
    for checked in (False, True):  # checking each unit costs as much as writing it, and is hardly ever needed
        units = write(text, checked)
        if _terms("\n".join(units), kind) == said:
            return units
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def fate(text: str, bad_share: float) -> Damage | None:
    """What goes wrong with a text's rewrite; ``None`` for most."""
    if draw(text, "fate") >= bad_share:
        return None
    if draw(text, "odd") * bad_share < _ODD_SHARE:
        return _ODD[int(draw(text, "which odd") * len(_ODD))]
    usual: tuple[Damage, ...] = ("drop_statement", "drop_third", "change_number", "drop_negation")
    return usual[int(draw(text, "which") * len(usual))]


def draw(*parts: str) -> float:
    """A number from 0 to 1 (excluded) that hangs on the parts alone."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def fault_of(shares: Mapping[str, float], *seed: str) -> str:
    """Which fault, if any: one at most, each with its share."""
    place = draw(*seed, "fault")
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return ""


# ---------------------------------------------------------------- damage


def damaged(text: str, kind: Kind, damage: Damage) -> str:
    """A bad rewrite. A damage the text has no place for (no number, no negation) becomes a lost third."""
    units = faithful(text, kind)
    good = "\n".join(units)
    if damage == "empty":
        return ""
    if damage == "longer":
        return f"{text}\n\n{good}"
    if damage == "fence":
        return f"```\n{good}\n```"
    if damage == "think":
        return f"<think>\nThe text has {len(units)} parts; keep every fact.\n</think>\n\n{good}"
    if damage == "drop_statement" and len(units) > 2:
        count = max(1, len(units) // 6)
        first = 1 + int(draw(text, "where") * (len(units) - count))
        bad = "\n".join(units[:first] + units[first + count :])
    elif damage == "change_number":
        bad = _with_changed_number(good, text)
    elif damage == "drop_negation":
        bad = _without_negation(good, text)
    else:
        bad = _without_third(units, text)
    return bad if _terms(bad, kind) != _terms(good, kind) else _without_third(units, text)


def _with_changed_number(good: str, seed: str) -> str:
    found = list(re.finditer(r"(?<!\w)\d+", good))
    if not found:
        return good
    match = found[int(draw(seed, "number") * len(found))]
    changed = int(match[0]) + 1 + int(draw(seed, "by") * max(2, int(match[0])))
    return f"{good[: match.start()]}{changed}{good[match.end() :]}"


_NEGATION = re.compile(
    r"\b(?:not|never|no|cannot|w/o|neither|nor|nobody|nothing|none)\b ?|!(?==)|(?<![\w)\]])!(?=[\w(])"
)


def _without_negation(good: str, seed: str) -> str:
    found = list(_NEGATION.finditer(good))
    if not found:
        return good
    match = found[int(draw(seed, "negation") * len(found))]
    return f"{good[: match.start()]}{'=' if good[match.end() : match.end() + 1] == '=' else ''}{good[match.end() :]}"


def _without_third(units: list[str], seed: str) -> str:
    words = "\n".join(units).split(" ")
    count = max(1, len(words) // 3)
    first = int(draw(seed, "third") * (len(words) - count + 1))
    return " ".join(words[:first] + words[first + count :])


# ---------------------------------------------------------------- prose


def _terms(text: str, kind: Kind) -> list[str]:
    return [term for statement in reading.read(text, kind) for term in statement.terms]


def _prose_sentences(text: str, checked: bool) -> list[str]:
    units = []
    for sentence in reading.sentences(text):
        short = telegraph(reading.without_phrases(sentence), _PROSE_WORDS, reading.SKIPPED)
        if not short or (checked and reading.prose_terms(short) != reading.prose_terms(sentence)):
            short = " ".join(sentence.split())
        units.append(short if short[-1] in _TERMINATORS else f"{short} |")
    return units


def telegraph(sentence: str, words: dict[str, str], skipped: frozenset[str], *, fold: bool = True) -> str:
    """A sentence without function words, with abbreviations and symbols; a dropped word's full stop stays.

    ``fold``: abbreviate words with a capital, too.
    """
    kept: list[str] = []
    opening = ""  # a bracket or quote whose word was dropped goes to the next word
    for word in sentence.split():
        head, core, tail = _WORD.match(word).groups()  # type: ignore[union-attr]  # matches any word
        low, head, opening = core.lower(), opening + head, ""
        if low in skipped and low not in _KEPT_FOR_SENSE and low not in _SYMBOLS:
            closing = "".join(sign for sign in tail if sign not in ",…")
            opening = head
            if kept and not head:
                kept[-1] = _without_comma(kept[-1]) + closing
            continue
        if low in _SYMBOLS and kept and not head:
            kept[-1] = _without_comma(kept[-1])
        if low in _SYMBOLS:
            core = _SYMBOLS[low]
        elif low in words and (fold or core == low):
            core = words[low]
        kept.append(f"{head}{core}{tail}")
    return re.sub(r"(?<=\d) (?=[°%€])", "", " ".join(kept))


def _without_comma(word: str) -> str:
    return word[:-1] if word.endswith(",") and not word.endswith(".,") else word


# ---------------------------------------------------------------- code

_STRING = r"\"\"\".*?\"\"\"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`"
_TYPES = "int|str|bool|float|bytes|string|number|boolean|void"
_SYNTAX: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\b(?:self|this)\.(?=\w)", "."),
        (r"\(self(?:, |(?=\)))", "("),
        (r"\b(?:export|public|private|readonly|static|const|let|var|pub|mut|new) (?=\w)", ""),
        (r"\b(?:def|function|func)\b(?= ?[\w(])", "fn"),
        (r"\breturn\b", "ret"),
        (r"\belse if\b", "elif"),
        (r"===", "=="),
        (r"!==", "!="),
        (rf"(?<=[\w\])]): (?:{_TYPES})(?=[,)= ]|$)", ""),
        (rf"(?<=\)) ?(?:->|:) (?:{_TYPES})(?= ?[:{{]|$)", ""),
        (r" ?(=>|->|:=|[-+*/%|&<>=!]=|&&|\|\||[=+*/%<>|,;]) ?", r"\1"),
        (r"(?<=\w): ", ":"),
        (r"\b(if|while|for|switch|match) ?\((.*)\)(?= ?\{?$)", r"\1 \2"),
        (r" ?\{$|[;:]$", ""),
    )
)
_OPENS = re.compile(r"\s*(?:if|elif|for|while)\b(?!.*: )")
_JUMP = re.compile(r"(?:ret|raise|throw|continue|break)\b")
_CLOSING_LINE = re.compile(r"[\s{}()\[\];,]+")


def _code_lines(text: str, checked: bool) -> list[str]:
    marker = _comment_marker(text)
    units: list[str] = []
    lines = _without_blocks(text, marker).expandtabs(4).splitlines()
    step = _indent_step(lines)
    for line in lines:
        body = line.strip()
        if not body:
            continue
        if _CLOSING_LINE.fullmatch(body):
            if units:
                units[-1] += re.sub(r"[\s{};,]", "", body)
            continue
        short = _code_line(body, marker)
        if checked and reading.code_terms(short) != reading.code_terms(body):
            short = body
        depth = (len(line) - len(line.lstrip())) // step
        if (
            units
            and _OPENS.match(units[-1])
            and _JUMP.match(short)
            and depth == len(units[-1]) - len(units[-1].lstrip()) + 1
        ):
            units[-1] += f": {short}"
        else:
            units.append(" " * depth + short)
    return units


def _indent_step(lines: list[str]) -> int:
    """Spaces a level: the smallest indentation there is."""
    return min((len(line) - len(line.lstrip()) for line in lines if line[:1] == " " and line.strip()), default=4)


def _comment_marker(text: str) -> str:
    if re.search(r"^\s*(?:def|class|async def|if|elif|for|while|with|try)\b.*:\s*(?:#.*)?$", text, re.M):
        return "#"
    if re.search(r"\b(?:SELECT|CREATE (?:TABLE|VIEW|FUNCTION|INDEX)|INSERT INTO)\b", text):
        return "--"
    return "//" if re.search(r"[;{]\s*$", text, re.M) else "#"


def _without_blocks(text: str, marker: str) -> str:
    """Docstrings and block comments as one comment line each."""

    def one_line(match: re.Match[str]) -> str:
        words = re.sub(r"^\s*\*+ ?", "", match[2], flags=re.M)
        return f"{match[1]}{marker} {' '.join(words.split())}"

    text = re.sub(r'(^[ \t]*)[rRbBuU]*"""(.*?)"""', one_line, text, flags=re.S | re.M)
    return re.sub(r"(^[ \t]*)/\*+(.*?)\*/", one_line, text, flags=re.S | re.M)


def _code_line(body: str, marker: str) -> str:
    pieces = re.split(rf"({_STRING}|{re.escape(marker)}+!? .*$)", body)
    out = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            for pattern, by in _SYNTAX:
                piece = pattern.sub(by, piece)
        elif piece.startswith(marker):
            words = piece.lstrip(marker[0] + "!").strip()
            piece = f"{marker}{telegraph(words, _CODE_WORDS, reading.SKIPPED_IN_CODE, fold=False)}"
        out.append(piece)
    return "".join(out).rstrip()
