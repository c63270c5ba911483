"""How sure a mean over users is, and whether one model is ahead of another on the same users. Seeded.

In: each user's gain. Out: intervals and chances. It must not know models.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

DRAWS = 1000
SIGNS = 10_000
Gains = npt.NDArray[np.float64]


def interval(gain_U: Gains) -> list[float]:
    """95% interval of the mean, by a bootstrap over users."""
    means = [gain_U[drawn].mean() for drawn in _draws(len(gain_U))]
    return np.quantile(means, [0.025, 0.975]).tolist()


def ratio_interval(ours_U: Gains, theirs_U: Gains) -> list[float]:
    """95% interval of the ratio of the means; each draw takes the same users on both sides."""
    ratios = [ours_U[drawn].mean() / max(theirs_U[drawn].mean(), 1e-12) for drawn in _draws(len(ours_U))]
    return np.quantile(ratios, [0.025, 0.975]).tolist()


def difference_interval(ours_U: Gains, theirs_U: Gains) -> list[float]:
    """95% interval of the difference of the means; each draw takes the same users on both sides."""
    return interval(ours_U - theirs_U)


def chance_of_no_difference(ours_U: Gains, theirs_U: Gains) -> float:
    """Two-sided p of a randomisation test: how often the mean difference is as large with signs drawn at random.

    The test that Smucker et al. (2007) recommend for figures of retrieval.
    """
    difference_U = ours_U - theirs_U
    difference_U = difference_U[difference_U != 0]
    found = abs(difference_U.sum())
    rng = np.random.default_rng(0)
    as_large = sum(
        int((np.abs(_signs(rng, 100, len(difference_U)) @ difference_U) >= found - 1e-12).sum())
        for _ in range(SIGNS // 100)
    )
    return (as_large + 1) / (SIGNS + 1)


def _signs(rng: np.random.Generator, rows: int, n: int) -> Gains:
    return np.asarray(rng.integers(0, 2, (rows, n)) * 2.0 - 1.0, np.float64)


def _draws(n: int) -> Iterator[npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, n, n) for _ in range(DRAWS))
