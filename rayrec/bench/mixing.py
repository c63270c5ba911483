"""A recorded list mixed with the Markov floor: what a peer would gain by the tables that our model has.

In: the best items of some users with their scores, and a score of every item. Out: lists anew. It must not know whose
scores they are, nor what the right answer is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayrec.evaluation.metrics import Scores, top
from rayrec.history import Ints

SHARE_FLOOR = 1e-3
"""Share of transitions below which an item counts as not met: popularity's tie break has this size."""

WEIGHTS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Of the log share; the best is chosen on validation."""


def scale(scores: Sequence[Sequence[float]]) -> float:
    """The unit of a peer's scores: their mean standard deviation within a list; 1 where they do not differ."""
    finite = [[score for score in one if np.isfinite(score)] for one in scores]
    spreads = [np.std(one) for one in finite if len(one) > 1]
    return (float(np.mean(spreads)) if spreads else 0.0) or 1.0


def mixed(
    items: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    unit: float,
    share_BN: Scores,
    weight: float,
    length: int,
) -> Ints:
    """The best `length` items by score / unit + weight * log(share). [B, length] item index, 0 is nothing.

    items, scores: B lists of item indices, and how good each is; what is no item (0), or has no finite score, is left
    out. share_BN: [B, N + 1], at least 0; -inf takes an item out. An item that is not in a list counts as its worst:
    what is known of it is that it is no better.
    """
    total_BN = weight * np.log(np.maximum(share_BN, 0.0) + SHARE_FLOOR)
    for row, (listed, score) in enumerate(zip(items, scores, strict=True)):
        item_K, score_K = np.asarray(listed, np.int64), np.asarray(score, np.float64)
        real_K = (item_K > 0) & np.isfinite(score_K)
        if real_K.any():
            gain_N = np.full(total_BN.shape[1], score_K[real_K].min())
            gain_N[item_K[real_K]] = score_K[real_K]
            total_BN[row] += gain_N / unit
    total_BN[share_BN == -np.inf] = -np.inf
    return top(total_BN, length)
