"""Two honest baselines: what anyone can do to a text without a model, in as many tokens as the candidate took.

A model is worth its cost only where it beats these at the same length.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable

Count = Callable[[str], int]
"""Tokens of a text."""

STOP_WORDS = frozenset(
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself "
    "it its itself they them their theirs themselves what which who whom this that these those "
    "am is are was were be been being have has had having do does did doing would should could ought "
    "i'm you're he's she's it's we're they're i've you've we've they've i'd you'd he'd she'd we'd they'd "
    "i'll you'll he'll she'll we'll they'll isn't aren't wasn't weren't hasn't haven't hadn't doesn't don't didn't "
    "won't wouldn't shan't shouldn't can't cannot couldn't mustn't "
    "let's that's who's what's here's there's when's where's why's how's a an the "
    "and but if or because as until while of at by for with about against between into through during before after "
    "above below to from up down in out on off over under again further then once here there when where why how "
    "all any both each few more most other some such no nor not only own same so than too very".split()
)
"""The English stop words published with the Snowball stemmers (M. Porter, algorithms/english/stop.txt, BSD-3-Clause);
all 174 of them, the negations too."""
_WORD = re.compile(r"(?<![\w.'’-])[A-Za-z]+(?:['’][A-Za-z]+)?(?![\w'’-]|[.(]\w)[ \t]*")


def truncation(text: str, tokens: int, count: Count) -> str:
    """The longest beginning of a text that has at most ``tokens`` tokens."""
    # A longer beginning hardly ever has fewer tokens, so bisecting lands within a few characters of the place.
    end = bisect_left(range(1, len(text) + 1), tokens + 1, key=lambda size: count(text[:size]))
    while end < len(text) and count(text[: end + 1]) <= tokens:
        end += 1
    while end and count(text[:end]) > tokens:
        end -= 1
    return text[:end].rstrip()


def without_stop_words(text: str, tokens: int, count: Count) -> str:
    """The text without its first stop words: as many as it takes to ``tokens`` tokens, then cut if that is not enough.

    White space behind a deleted word goes with it. Words inside identifiers and paths are no stop words.
    """
    spans = [found.span() for found in _WORD.finditer(text) if _plain(found[0]) in STOP_WORDS]

    def left(deleted: int) -> str:
        """The text without the first so many stop words."""
        kept, start = [], 0
        for begin, end in spans[:deleted]:
            kept.append(text[start:begin])
            start = end
        return re.sub(r"[ \t]+$", "", "".join(kept) + text[start:], flags=re.MULTILINE)

    deleted = bisect_left(range(len(spans)), -tokens, key=lambda n: -count(left(n)))
    shorter = left(deleted)
    return shorter if count(shorter) <= tokens else truncation(shorter, tokens, count)


def _plain(word: str) -> str:
    return word.rstrip().lower().replace("’", "'")


RULES: dict[str, Callable[[str, int, Count], str]] = {"truncation": truncation, "stop_words": without_stop_words}
"""Rules by the name of their contestant."""
