"""How sure a difference is: users drawn again, and users' signs flipped. In: a gain for each user. Out: intervals, p.

Users are the same on both sides and in the same order; nothing else is known of them. Sources: Efron and Tibshirani,
An Introduction to the Bootstrap (1993), chapter 13, for the percentile interval; chapter 15 for the permutation test.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

DRAWS = 1000
FLIPS = 10_000
FLIPS_AT_ONCE = 500
LEAST = 1e-12

Gains = npt.NDArray[np.float64]


def interval(gain_U: Gains) -> list[float]:
    """95% interval of the mean, by a bootstrap over users. gain_U: [U], U > 0."""
    means = [gain_U[drawn].mean() for drawn in _draws(len(gain_U))]
    return np.quantile(means, [0.025, 0.975]).tolist()


def ratio_interval(ours_U: Gains, theirs_U: Gains) -> list[float]:
    """95% interval of the ratio of the means; each draw takes the same users on both sides. [U] each, U > 0."""
    ratios = [ours_U[drawn].mean() / max(theirs_U[drawn].mean(), LEAST) for drawn in _draws(len(ours_U))]
    return np.quantile(ratios, [0.025, 0.975]).tolist()


def p_value(ours_U: Gains, theirs_U: Gains) -> float:
    """Two-sided chance of a mean difference as great as seen, were it even which of the two a user's gain is.

    By FLIPS random sign flips of the users' differences; at least 1 / (FLIPS + 1), for the order seen is one of them.
    [U] each.
    """
    difference = ours_U - theirs_U
    difference = difference[difference != 0]  # a flip leaves the others as they are
    seen, as_great, rng = abs(difference.sum()), 0, np.random.default_rng(0)
    for _ in range(FLIPS // FLIPS_AT_ONCE):
        sign = rng.integers(0, 2, (FLIPS_AT_ONCE, len(difference)), np.int8).astype(np.float32) * 2 - 1
        as_great += int((np.abs(sign @ difference.astype(np.float32)) >= seen * (1 - 1e-5)).sum())
    return (as_great + 1) / (FLIPS + 1)


def _draws(n: int) -> Iterator[npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, n, n) for _ in range(DRAWS))
