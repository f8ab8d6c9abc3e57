"""What each conversation is to be, drawn from the seed before anything is asked.

Shares are met by stratification, not by chance: of ``n`` conversations, a value with share ``s`` gets ``floor(n s)``
or one more (largest remainders), then the values are dealt in a seeded order, each attribute on its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from shared.records import Plan, QAPair, content_id

V = TypeVar("V")
BLOCK = 100
"""Values a block; a share below 1/100 could lose one between two blocks."""


def quotas(shares: Mapping[V, float], n: int) -> dict[V, int]:
    """How often each value occurs among ``n``: within one of ``n`` x share, ``n`` in sum (largest remainder method)."""
    total = math.fsum(shares.values())
    exact = {value: n * share / total for value, share in shares.items()}
    counts = {value: math.floor(amount + 1e-9) for value, amount in exact.items()}
    by_remainder = sorted(exact, key=lambda value: (counts[value] - exact[value], list(exact).index(value)))
    for value in by_remainder[: n - sum(counts.values())]:
        counts[value] += 1
    return counts


def dealt(shares: Mapping[V, float], n: int, seed: str) -> list[V]:
    """``n`` values with the quotas of ``n``, in an order that depends on the seed alone.

    They are dealt in blocks, each in its own order, so that a larger ``n`` changes the last block and adds others:
    most conversations of a smaller run are conversations of a larger one, and paid for already.
    """
    values: list[V] = []
    for start in range(0, n, BLOCK):
        before, after = quotas(shares, start), quotas(shares, min(start + BLOCK, n))
        block = [value for value in shares for _ in range(after[value] - before[value])]
        random.Random(f"{seed} {start}").shuffle(block)
        values += block
    return values


def draw(
    pairs: Sequence[QAPair],
    *,
    count: int,
    per_pair: int,
    seed: int,
    shares: Mapping[str, Mapping[str, float]],
    turns: Mapping[int, float],
    personas: Mapping[str, Sequence[str]],
) -> list[tuple[QAPair, Plan]]:
    """One plan per conversation: at most ``per_pair`` a pair and ``count`` in all (0 = no limit).

    Pairs take turns, in a seeded order, so that every pair has its first conversation before any has its second.
    ``shares`` has style, system_prompt, emotion, modality and variation; a persona is one that ``personas`` matches
    to the pair's categories; difficulty is the pair's.
    """
    order = sorted(pairs, key=lambda pair: content_id(str(seed), pair.id))
    seeds = [pair for _ in range(per_pair) for pair in order][: count or None]
    n = len(seeds)
    columns = {name: dealt(values, n, f"{seed} {name}") for name, values in shares.items()}
    turn_counts = dealt(turns, n, f"{seed} turns")
    plans = []
    for i, pair in enumerate(seeds):
        matching = sorted({persona for category in pair.categories for persona in personas.get(category, ())})
        choices = matching or sorted({persona for row in personas.values() for persona in row})
        plan = Plan(
            persona=random.Random(f"{seed} persona {i}").choice(choices),
            **{name: column[i] for name, column in columns.items()},
            turns=turn_counts[i],
            difficulty=pair.difficulty,
        )
        plans.append((pair, plan))
    return plans
