"""Item-to-item counts: what follows what, and what goes together.

In: visitors' items laid end to end. Out: sparse matrices [N + 1, N + 1], row and column 0 empty.
It must not know why they are counted: floors, retrieval and features all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rayrec.followers import NEAR_WEIGHTS, Followers, Matrix

CHUNK_EVENTS = 2_000_000


def count_transitions(
    item_E: npt.NDArray[np.integer[Any]],
    offsets: npt.NDArray[np.integer[Any]],
    n_items: int,
    *,
    weights: Sequence[float] = (1.0,),
) -> Matrix:
    """How often item j came after item i in a visitor's events. [N + 1, N + 1] float64, csr, sorted indices.

    item_E: [E] item index 1..n_items, all visitors' events end to end; an event of the unknown item 0 counts
        for nothing but keeps its place.
    offsets: [U + 1]; visitor u's events are offsets[u] : offsets[u + 1].
    weights: what a pair one, two, ... events apart adds.

    An item that follows itself is counted like any other. Works in chunks: memory is bounded by CHUNK_EVENTS
    and the number of distinct pairs.

    >>> count_transitions(np.array([1, 2, 1, 2]), np.array([0, 3, 4]), 2).toarray().tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    size = n_items + 1
    item_E = np.asarray(item_E, np.int64)
    visitor_E = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    total: Matrix = sparse.csr_array((size, size), dtype=np.float64)
    for distance, weight in enumerate(weights, start=1):
        for start in range(0, len(item_E) - distance, CHUNK_EVENTS):
            stop = min(start + CHUNK_EVENTS, len(item_E) - distance)
            before, after = slice(start, stop), slice(start + distance, stop + distance)
            pair = (visitor_E[before] == visitor_E[after]) & (item_E[before] > 0) & (item_E[after] > 0)
            cells = (item_E[before][pair], item_E[after][pair])
            total = total + sparse.csr_array((np.full(len(cells[0]), weight), cells), shape=(size, size))
    total.sort_indices()
    return total


def count_followers(
    item_E: npt.NDArray[np.integer[Any]], offsets: npt.NDArray[np.integer[Any]], n_items: int
) -> Followers:
    """Both counts of `Followers`; arguments as of `count_transitions`."""
    return Followers(
        count_transitions(item_E, offsets, n_items),
        count_transitions(item_E, offsets, n_items, weights=NEAR_WEIGHTS),
    )


def count_together(
    item_E: npt.NDArray[np.integer[Any]],
    offsets: npt.NDArray[np.integer[Any]],
    n_items: int,
    *,
    window: int,
) -> Matrix:
    """How often two different items stood at most `window` events apart, in either order.

    Symmetric, empty diagonal; otherwise as `count_transitions`.
    """
    forward = count_transitions(item_E, offsets, n_items, weights=(1.0,) * window)
    return without_empty(forward + forward.T - sparse.diags_array(2 * forward.diagonal(), format="csr"))


def row_shares(matrix: Matrix) -> Matrix:
    """Each row divided by its sum: the share of what followed. Empty rows stay empty."""
    total_N = np.asarray(matrix.sum(axis=1)).ravel()
    scale_N = np.divide(1.0, total_N, out=np.zeros_like(total_N), where=total_N > 0)
    return sparse.csr_array(sparse.diags_array(scale_N) @ matrix)


def without_empty(matrix: Matrix) -> Matrix:
    """The same csr matrix without stored zeros, indices sorted."""
    matrix = sparse.csr_array(matrix)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix
