"""What follows what, as counts: the memory beside the model that retrieval, features and explanations read.

In: sparse counts. Out: a value that stages and replicas share. It must not know how it was counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Matrix: TypeAlias = Any
"""A scipy.sparse.csr_array (scipy ships no types)."""

NEAR_WEIGHTS = tuple(0.8**step for step in range(10))
"""What a pair one, two, ... events apart adds to `near`."""


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
