"""Means with their uncertainty, by the bootstrap: cases are drawn anew with replacement, many times.

The interval is the percentile interval: from the 2.5th to the 97.5th percentile of the resampled means (Efron and
Tibshirani 1993, An Introduction to the Bootstrap, ch. 13). It holds what chance in the choice of test examples does;
not what another training seed would have done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.receipts import Interval

PERCENTILES = (2.5, 97.5)
DIGITS = 6
ROWS = 256
"""Resamples computed at a time: memory is this many times the number of cases."""


def interval(values: Sequence[float], resamples: int, seed: int) -> Interval:
    """The mean of the values, at least one, and its interval.

    The same seed draws the same cases for any values of one length, so contestants are compared on the same draws.
    """
    array, n = np.asarray(values, np.float64), len(values)
    mean = float(array.mean())
    low = high = mean
    if n > 1:
        rng = np.random.default_rng([seed, n])
        means = np.concatenate(
            [
                rng.multinomial(n, np.full(n, 1 / n), size=min(ROWS, resamples - start)) @ array / n
                for start in range(0, resamples, ROWS)
            ]
        )
        low, high = (float(bound) for bound in np.percentile(means, PERCENTILES))
    return Interval(value=round(mean, DIGITS), low=round(low, DIGITS), high=round(high, DIGITS), n=n)


def paired(ours: Sequence[float], theirs: Sequence[float], resamples: int, seed: int) -> Interval:
    """The mean of the differences ours − theirs, case by case, and its interval.

    Cases that are hard for both cancel out, so it is narrower than the two intervals make it look.
    """
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], resamples, seed)
