"""Which rows a step sees: a function of seed and step alone, so a killed run goes on as if it had not been."""

from __future__ import annotations

from functools import lru_cache

from shared.records import content_id


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, rows: int) -> list[int]:
    """The rows of an epoch in the order they are trained on."""
    return sorted(range(rows), key=lambda row: content_id(str(seed), str(epoch), str(row)))


def rows_of_step(step: int, batch_size: int, seed: int, rows: int) -> list[int]:
    """The rows of a step, counted from 1: the next ones of an endless row of epochs; none is left out."""
    places = range((step - 1) * batch_size, step * batch_size)
    return [order_of(seed, place // rows, rows)[place % rows] for place in places]
