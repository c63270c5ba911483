"""What follows what, as counts: the memory beside the model that retrieval, features and explanations read.

In: sparse counts. Out: a value that stages and replicas share. It must not know how it was counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse

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
