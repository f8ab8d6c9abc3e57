"""Embeds a text as hashed words, word pairs and the letters of words: texts that say the same lie close together.

No model and no training. Each feature is hashed to one dimension and a sign (Weinberger et al. 2009, "Feature hashing
for large scale multitask learning"), so unrelated texts come out near 0 in any number of dimensions.
"""

from __future__ import annotations

import base64
import itertools
import math
import re
import sys
import zlib
from array import array
from collections import Counter
from functools import lru_cache

from shared.standin.reading import SKIPPED

_TOKEN = re.compile(r"\w+")
_WORD, _PAIR, _LETTERS = 1.0, 0.5, 0.25
"""Weights. A word of 7 letters has 15 letter groups: together they weigh about as much as the word itself."""


def vector(text: str, dimensions: int) -> array[float]:
    """A unit vector of 32-bit floats; the first unit vector for a text without words."""
    words = [word.lower() for word in _TOKEN.findall(text)]
    sums = [0.0] * dimensions
    for word, count in Counter(words).items():
        factor = (1.0 + math.log(count)) * (0.1 if word in SKIPPED else 1.0)
        for slot, value in _features(word, dimensions):
            sums[slot] += value * factor
    for (one, two), count in Counter(itertools.pairwise(words)).items():
        slot, value = _feature(f"{one} {two}", _PAIR, dimensions)
        sums[slot] += value * (1.0 + math.log(count))
    norm = math.sqrt(math.fsum(x * x for x in sums))
    if not norm:
        sums[0] = norm = 1.0
    return array("f", (x / norm for x in sums))


@lru_cache(maxsize=1 << 15)
def _features(word: str, dimensions: int) -> tuple[tuple[int, float], ...]:
    """A word, and its groups of 3 to 5 letters with its ends marked."""
    marked = f"^{word}$"
    groups = {marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)}
    return (
        _feature(word, _WORD, dimensions),
        *(_feature(f"~{group}", _LETTERS, dimensions) for group in sorted(groups)),
    )


def _feature(name: str, weight: float, dimensions: int) -> tuple[int, float]:
    mixed = (zlib.crc32(name.encode("utf-8", "replace")) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    return (mixed >> 32) % dimensions, weight if mixed & (1 << 20) else -weight


def base64_of(values: array[float]) -> str:
    """Little-endian 32-bit floats in base64, as the OpenAI API sends them unless asked for numbers."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
