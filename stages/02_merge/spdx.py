"""Does a licence allow-list cover an SPDX licence expression?

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
