"""Exact and near-duplicates of a frame of texts, keep-first.

The frame has ``order`` (uint64, unique; the smaller one is kept) and ``text``. Hashing, shingling, MinHash and
bucketing are a Daft plan; deciding who is kept is sequential by nature and looks only at the few that share a bucket.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import daft

HASHES = 126
"""MinHash values a text, at most: 25 bands of 5 at a threshold of 0.8."""
MISSED = 0.001
"""At most this share of pairs exactly at the threshold may share no band; far fewer above it."""
SEED = 1
_WORD = re.compile(r"\w+")


class Match(NamedTuple):
    """The kept text that this one duplicates, and the Jaccard similarity of their word 3-shingles."""

    order: int
    score: float


def exact_duplicates(texts: daft.DataFrame) -> tuple[daft.DataFrame, dict[int, Match]]:
    """The frame with only the first of equal texts, and what was left out. Equal by 128 bits of XXH3."""
    import daft
    from daft.functions import hash

    digests = {"low": hash(daft.col("text"), seed=0), "high": hash(daft.col("text"), seed=1)}
    hashed = texts.with_columns(digests)
    firsts = hashed.groupby("low", "high").agg(daft.col("order").min().alias("first"))
    marked = hashed.join(firsts, on=["low", "high"]).select("order", "first", "text").collect()
    later = marked.where(daft.col("order") != daft.col("first")).select("order", "first").to_pydict()
    unique = marked.where(daft.col("order") == daft.col("first")).select("order", "text")
    return unique, {n: Match(first, 1.0) for n, first in zip(later["order"], later["first"], strict=True)}


def near_duplicates(texts: daft.DataFrame, threshold: float) -> dict[int, Match]:
    """The texts whose Jaccard similarity with an earlier kept text is at least ``threshold``, with the most similar.

    Candidates share a MinHash band; every candidate is checked on its whole set of shingles, so precision is 1 and
    recall is above ``1 - MISSED``. A text that is dropped drops no other: similarity is not transitive.
    """
    import daft

    buckets = _buckets(texts, *bands(threshold))
    homes = defaultdict(list)
    for bucket, members in enumerate(buckets):
        for order in members:
            homes[order].append(bucket)
    wanted = daft.from_pydict({"order": daft.Series.from_pylist(list(homes), "order", daft.DataType.uint64())})
    found = texts.join(wanted, on="order").to_pydict()
    return _keep_first(dict(zip(found["order"], found["text"], strict=True)), homes, threshold)


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows a band: the most rows, thus the fewest false candidates, that miss at most ``MISSED``.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman and Ullman,
    *Mining of Massive Datasets*, section 3.4.2). Tools that balance both errors lose 20 % of the pairs at 0.8.
    """
    for rows in range(HASHES, 1, -1):
        if (1 - threshold**rows) ** (HASHES // rows) <= MISSED:
            return HASHES // rows, rows
    return HASHES, 1


def words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores: what two formattings of the same text share."""
    return _WORD.findall(text.lower())


def shingles(text: str) -> frozenset[str]:
    """Every three words in a row; all words when there are fewer; nothing when there are none."""
    found = words(text)
    return frozenset(" ".join(found[i : i + 3]) for i in range(max(1, len(found) - 2))) if found else frozenset()


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared shingles over all shingles; 0 when there are none."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def _buckets(texts: daft.DataFrame, count: int, rows: int) -> list[list[int]]:
    """Sets of texts that agree in all rows of some band; those of one text are left out."""
    import daft
    from daft.functions import hash, minhash, slice, to_list

    col = daft.col

    @daft.func.batch(return_dtype=daft.DataType.string(), use_process=False)
    def spaced(column: Any) -> Any:
        return [" ".join(words(text)) for text in column.to_pylist()]

    signature = minhash(spaced(col("text")), num_hashes=count * rows, ngram_size=3, seed=SEED)
    signed = texts.select("order", signature.cast(daft.DataType.list(daft.DataType.uint32())).alias("signature"))
    keys = [hash(slice(col("signature"), i * rows, (i + 1) * rows), daft.lit(i)) for i in range(count)]
    keyed = signed.select("order", to_list(*keys).alias("key")).explode("key")
    shared = keyed.groupby("key").agg(col("order").count().alias("size"), col("order").list_agg().alias("members"))
    members: list[list[int]] = shared.where("size > 1").select("members").to_pydict()["members"]
    return members


def _keep_first(texts: dict[int, str], homes: dict[int, list[int]], threshold: float) -> dict[int, Match]:
    """Walk in order; compare each text with the kept ones it shares a bucket with."""
    cached = lru_cache(maxsize=10_000)(lambda order: shingles(texts[order]))  # bounds memory: about 10 kB a text
    kept: defaultdict[int, list[int]] = defaultdict(list)
    dropped = {}
    for order in sorted(homes):
        mine = cached(order)
        candidates = sorted({earlier for bucket in homes[order] for earlier in kept[bucket]})
        best = max((Match(other, jaccard(mine, cached(other))) for other in candidates), key=_closest, default=None)
        if best is not None and best.score >= threshold:
            dropped[order] = best
        else:
            for bucket in homes[order]:
                kept[bucket].append(order)
    return dropped


def _closest(match: Match) -> tuple[float, int]:
    return match.score, -match.order
