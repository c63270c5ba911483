"""What follows what, as counts: the memory beside the model that retrieval, features and explanations read.

In: sparse counts. Out: a value that stages and replicas share. It must not know how it was counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

Matrix: TypeAlias = Any
"""A scipy.sparse.csr_array (scipy ships no types)."""

NEAR_WEIGHTS = tuple(0.8**step for step in range(10))
"""What a pair one, two, ... events apart adds to `near`."""


FOLLOWERS_KEPT = 500
"""Of what follows an item, how many of the strongest a model knows: in training and serving alike."""


@dataclass(frozen=True)
class Followers:
    """Counts over training events, [N + 1, N + 1] csr each; row and column 0 are empty.

    next: how often item j came right after item i. near: j within ten events after i, a step further counting
    four fifths as much.
    """

    next: Matrix
    near: Matrix

    def map(self, change: Callable[[Matrix], Matrix]) -> Followers:
        """Both matrices changed alike."""
        return Followers(change(self.next), change(self.near))

    def __add__(self, other: Followers) -> Followers:
        """The counts of both."""
        return Followers(self.next + other.next, self.near + other.near)

    def kept(self) -> Followers:
        """The strongest FOLLOWERS_KEPT of each item, float32."""
        return self.map(lambda counts: strongest(counts.astype(np.float32), FOLLOWERS_KEPT))


def strongest(matrix: Matrix, keep: int) -> Matrix:
    """The `keep` greatest entries of each row; of equal ones the lowest column. csr, sorted indices."""
    matrix = sparse.csr_array(matrix)
    length_N = np.diff(matrix.indptr)
    row = np.repeat(np.arange(matrix.shape[0]), length_N)
    order = np.lexsort((matrix.indices, -matrix.data, row))  # rows stay together: indptr still holds
    place = np.arange(len(order)) - np.repeat(matrix.indptr[:-1], length_N)
    chosen = order[place < keep]
    return sparse.csr_array((matrix.data[chosen], (row[chosen], matrix.indices[chosen])), shape=matrix.shape)


def longer(matrix: Matrix, n_rows: int) -> Matrix:
    """The same entries, with empty rows and columns behind them; the entries are shared, not copied. csr."""
    added = n_rows - matrix.shape[0]
    indptr = np.concatenate([matrix.indptr, np.full(added, matrix.indptr[-1], matrix.indptr.dtype)])
    return sparse.csr_array((matrix.data, matrix.indices, indptr), shape=(n_rows, n_rows))


@dataclass(frozen=True)
class Reached:
    """Items with weights for each of B visitors, one after another; an item may be there more than once.

    item_E: [E] int64. weight_E: [E] float32. bound_B: [B + 1] int64, where each visitor's begin, and the end.
    """

    item_E: Ints
    weight_E: Floats
    bound_B: Ints

    def through(self, counts: Matrix) -> Reached:
        """A step on: the entries of each item's row, by the item's weight.

        As the product of sparse matrices, without what that costs: arrays as long as the catalogue.
        """
        start_E = counts.indptr[self.item_E]
        length_E = counts.indptr[self.item_E + 1] - start_E
        end_E = np.concatenate([[0], np.cumsum(length_E, dtype=np.int64)])
        entry = np.arange(end_E[-1]) + np.repeat(start_E - end_E[:-1], length_E)
        weight = counts.data[entry] * np.repeat(self.weight_E, length_E)
        return Reached(counts.indices[entry], weight, end_E[self.bound_B])

    def over(self, n_rows: int) -> Matrix:
        """As a matrix. [B, n_rows] csr."""
        return sparse.csr_array((self.weight_E, self.item_E, self.bound_B), shape=(len(self.bound_B) - 1, n_rows))


def weights_at(reached: Sequence[Reached], candidate_BC: Ints, n_rows: int) -> Floats:
    """The weight of each candidate, 0 where it was not reached. M of B visitors -> [M, B, C] float32."""
    n_visitors, n_candidates = candidate_BC.shape
    found_MBC = np.empty((len(reached), n_visitors, n_candidates), np.float32)
    place_N = _table.of(n_rows)
    for b, candidate_C in enumerate(candidate_BC):
        place_N[candidate_C] = np.arange(n_candidates)
        place_C = place_N[candidate_C]  # one place for an item that is there twice
        for m, way in enumerate(reached):
            inside = slice(way.bound_B[b], way.bound_B[b + 1])
            place_E = place_N[way.item_E[inside]]
            is_asked = place_E >= 0
            weight_C = np.bincount(place_E[is_asked], way.weight_E[inside][is_asked], n_candidates)
            found_MBC[m, b] = weight_C[place_C]
        place_N[candidate_C] = -1
    return found_MBC


def merged(parts: Sequence[Reached], b: int, n_rows: int) -> tuple[Ints, Floats]:
    """What visitor b reached in all `parts`: each item once, and the sum of its weights. [E] int64, [E] float32."""
    inside = [slice(part.bound_B[b], part.bound_B[b + 1]) for part in parts]
    item_E = np.concatenate([part.item_E[cut] for part, cut in zip(parts, inside, strict=True)])
    weight_E = np.concatenate([part.weight_E[cut] for part, cut in zip(parts, inside, strict=True)])
    place_N, entry_E = _table.of(n_rows), np.arange(len(item_E))
    place_N[item_E] = entry_E
    place_E = place_N[item_E]  # of an item that is there more than once, the last
    place_N[item_E] = -1
    weight_E = np.bincount(place_E, weight_E, len(item_E)).astype(np.float32)
    is_last = place_E == entry_E
    return item_E[is_last].astype(np.int64), weight_E[is_last]


class _Table(threading.local):
    """A table over all items, -1 throughout between uses: to make one costs more than the few entries that are set."""

    def __init__(self) -> None:
        self._place_N = np.empty(0, np.int64)

    def of(self, n_rows: int) -> Ints:
        """The thread's own, of at least `n_rows`."""
        if len(self._place_N) < n_rows:
            self._place_N = np.full(n_rows, -1)
        return self._place_N


_table = _Table()
