"""Does a licence allow-list cover an SPDX licence expression, and what does one ask of whoever publishes?

Source: SPDX specification 2.3, annex D (``OR`` offers a choice, ``AND`` binds both and binds tighter, ``WITH`` adds an
exception, ``+`` means this version or any later one; identifiers and operators compare without regard to case).
"""

from __future__ import annotations

import re
from collections.abc import Collection

_TOKEN = re.compile(r"\s*(?:(?P<bracket>[()])|(?P<word>[A-Za-z0-9.:+-]+))")


def allowed(expression: str, allow: Collection[str]) -> bool:
    """Whether somebody who accepts only the licences in ``allow`` may use what is under ``expression``.

    ``MIT OR GPL-3.0-only`` needs one of the two, ``MIT AND GPL-3.0-only`` both. An exception only adds permissions and
    ``X+`` includes ``X``, so both pass with ``X``. What is no SPDX expression passes only if listed as it is.
    """
    accepted = {name.lower() for name in allow}
    if expression.strip().lower() in accepted:
        return True
    try:
        tokens = _tokens(expression.lower())
        verdict = _any_of(tokens, accepted)
    except (ValueError, IndexError, RecursionError):
        return False
    return verdict and tokens == ["end"]


def _tokens(expression: str) -> list[str]:
    """The tokens, ``end`` last."""
    tokens, at = [], 0
    expression = expression.strip()
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if not match:
            raise ValueError(expression)
        tokens.append(match["bracket"] or match["word"])
        at = match.end()
    return [*tokens, "end"]


def _any_of(tokens: list[str], accepted: set[str]) -> bool:
    verdict = _all_of(tokens, accepted)
    while tokens[0] == "or":
        tokens.pop(0)
        verdict = _all_of(tokens, accepted) or verdict
    return verdict


def _all_of(tokens: list[str], accepted: set[str]) -> bool:
    verdict = _one(tokens, accepted)
    while tokens[0] == "and":
        tokens.pop(0)
        verdict = _one(tokens, accepted) and verdict
    return verdict


def _one(tokens: list[str], accepted: set[str]) -> bool:
    name = tokens.pop(0)
    if name == "(":
        verdict = _any_of(tokens, accepted)
        if tokens.pop(0) != ")":
            raise ValueError("unbalanced brackets")
        return verdict
    if name in ("or", "and", "with", "end", ")"):
        raise ValueError(f"a licence is missing before {name}")
    verdict = name in accepted or name.removesuffix("+") in accepted
    if tokens[0] == "with":
        tokens.pop(0)
        exception = tokens.pop(0)
        return verdict or f"{name} with {exception}" in accepted
    return verdict


# ---------------------------------------------------------------- what licences ask for

_OBLIGATIONS = (
    ("CC-BY-NC-SA-", "no commercial use, share alike and attribution"),
    ("CC-BY-NC", "no commercial use, and attribution"),
    ("CC-BY-ND", "that nothing made from it is passed on"),
    ("CC-BY-SA-", "share alike (what is made from it goes under the same licence, or one it names) and attribution"),
    ("CC-BY-", "attribution (the author, the licence, and that it was changed)"),
    ("ODbL-", "share alike (a data base made from it goes under the same licence) and attribution"),
    ("AGPL-", "copyleft (what is made from it goes under the same licence, also when it is only served)"),
    ("GPL-", "copyleft (what is made from it goes under the same licence)"),
    ("LGPL-", "copyleft (changes to it go under the same licence)"),
    ("MPL-", "copyleft for each file (changes to it go under the same licence)"),
    ("EPL-", "copyleft (what is made from it goes under the same licence)"),
)


def obligation(expression: str) -> str:
    """What a licence asks of whoever publishes what is made from it, beyond keeping its notice; ``""`` for nothing.

    ``MIT OR GPL-3.0-only`` asks nothing: it lets one choose. In brackets and beside ``AND`` all are taken to bind.
    """
    words = [match["word"] or match["bracket"] for match in _TOKEN.finditer(expression.lower())]
    asked = {word: _asked(word) for word in words if word not in ("and", "or", "with", "(", ")")}
    if "or" in words and not {"and", "("} & set(words) and "" in asked.values():
        return ""
    return "; ".join(dict.fromkeys(text for text in asked.values() if text))


def _asked(name: str) -> str:
    return next((text for start, text in _OBLIGATIONS if name.startswith(start.lower())), "")
