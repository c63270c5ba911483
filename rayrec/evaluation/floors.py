"""The floors: rankers that need no training, and that every model has to beat.

In: counts of training events. Out: scores. They must not know more of a visitor than the history in question.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rayrec.data.cooccurrence import count_transitions, row_shares
from rayrec.data.training_events import TrainingEvents
from rayrec.evaluation.metrics import Scores
from rayrec.followers import Matrix
from rayrec.history import HistoryBatch, Ints
from rayrec.schema import ACTIONS

STEPS_BACK = 5
HALVING = 0.5
TIE_BREAK = 1e-3
"""The most that popularity adds to a Markov score, whose unit is a share of transitions."""


class Ranker(Protocol):
    """What the judge asks: a model, or a floor. Items are 1..N."""

    heads: tuple[str, ...]
    """What it can score by: "next" alone, or some of schema.HEADS. The first stands in for a head it has not."""

    actions: tuple[str, ...]
    """What it reads of a history: `encode_history` drops the rest."""

    def rank_all(self, history: HistoryBatch, head: str) -> Scores:
        """A score of every item, higher is better. [B, N + 1]; column 0 is ignored."""

    def score(self, history: HistoryBatch, candidates_BC: Ints, head: str) -> Scores:
        """How likely each candidate is the next item, in (0, 1). [B, C]; candidates_BC: [B, C] item index."""


class Popular:
    """Always the items with most training events."""

    heads: tuple[str, ...] = ("next",)
    actions: tuple[str, ...] = ACTIONS

    def __init__(self, n_train_N: Ints) -> None:
        self._count_N = n_train_N.astype(np.float32)

    def rank_all(self, history: HistoryBatch, head: str) -> npt.NDArray[np.float32]:
        """The items' training events, for every visitor alike. [B, N + 1], a read-only view."""
        return np.broadcast_to(self._count_N, (len(history), len(self._count_N)))

    def score(self, history: HistoryBatch, candidates_BC: Ints, head: str) -> Scores:
        """Chance that a candidate was drawn by popularity, the others evenly. [B, C]"""
        return against_even(popularity_share(self._count_N)[candidates_BC], len(self._count_N) - 1)


class Markov:
    """What followed the last five items in training: each step back weighs half, popularity breaks ties.

    A transition counts as its share of all that left the same item. The floor of the published comparisons on
    MovieLens-1M and Amazon Beauty, where it beats several neural models.
    """

    heads: tuple[str, ...] = ("next",)
    actions: tuple[str, ...] = ACTIONS

    def __init__(self, n_train_N: Ints, shares_NN: Matrix) -> None:
        self._popular_N = popularity_share(n_train_N)
        self._tie_break_N = (TIE_BREAK * n_train_N / max(n_train_N.max(initial=0), 1)).astype(np.float32)
        self._shares_NN = shares_NN.astype(np.float32)

    @classmethod
    def count(cls, events: TrainingEvents, n_train_N: Ints) -> Markov:
        """From the training events' transitions and the items' popularity ([N + 1])."""
        return cls(n_train_N, row_shares(count_transitions(events.item_E, events.offsets, len(n_train_N) - 1)))

    def rank_all(self, history: HistoryBatch, head: str) -> npt.NDArray[np.float32]:
        """Weighted shares of transitions from the last items. [B, N + 1]"""
        scores_BN: npt.NDArray[np.float32] = self._following(history).toarray()
        scores_BN += self._tie_break_N
        return scores_BN

    def score(self, history: HistoryBatch, candidates_BC: Ints, head: str) -> Scores:
        """As `Popular.score`, for an item drawn by transitions mixed with popularity, one part of each."""
        follow_BN = self._following(history).tocsr()
        total_B1 = np.asarray(follow_BN.sum(axis=1)).reshape(-1, 1)
        row_BC = np.broadcast_to(np.arange(len(candidates_BC))[:, None], candidates_BC.shape)
        follow_BC = np.asarray(follow_BN[row_BC.ravel(), candidates_BC.ravel()]).reshape(candidates_BC.shape)
        share_BC = (follow_BC + self._popular_N[candidates_BC]) / (total_B1 + 1)
        return against_even(share_BC, len(self._popular_N) - 1)

    def _following(self, history: HistoryBatch) -> Any:
        """Weighted sum of the transition rows of the last items. [B, N + 1] csr."""
        back_K = np.arange(min(STEPS_BACK, history.item_BL.shape[1]))
        column_BK = history.length_B[:, None] - 1 - back_K
        row_BK = np.broadcast_to(np.arange(len(history))[:, None], column_BK.shape)
        real = column_BK >= 0
        item = history.item_BL[row_BK[real], column_BK[real]]
        weight = np.broadcast_to(HALVING**back_K, column_BK.shape)[real].astype(np.float32)
        shape = (len(history), self._shares_NN.shape[0])
        return sparse.csr_array((weight, (row_BK[real], item)), shape=shape) @ self._shares_NN


def popularity_share(count_N: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Each item's share of the training events, with one event more for every item. [N + 1], 0 at 0."""
    share_N = count_N.astype(np.float64) + 1.0
    share_N[0] = 0.0
    return share_N / np.maximum(share_N.sum(), 1.0)


def against_even(share_BC: npt.NDArray[np.float64], n_items: int) -> npt.NDArray[np.float64]:
    """How likely each candidate is the one drawn by `share`, if the other C - 1 are drawn evenly. [B, C]

    By Bayes' rule for each candidate alone: share / (share + (C - 1) / N).
    """
    even = (share_BC.shape[1] - 1) / max(n_items, 1)
    return share_BC / (share_BC + even) if even else np.ones_like(share_BC)
