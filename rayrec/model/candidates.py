"""Candidates of the second stage, for a batch: nearest by model, followers of the last items, history, popular.

In: histories, scores by model, what follows what. Out: candidate matrices. It must not know the fusion.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from rayrec.followers import Followers, Reached, longer, strongest, weights_at
from rayrec.history import HistoryBatch

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

RECENT, LONGER = (5, 0.5), (20, 0.9)
"""How many of the newest items are asked about, and what a step back weighs."""

LEAST_SHARE = 1e-4
NOTHING_FOLLOWED = (0.0,) * 5 + (math.log(LEAST_SHARE) / 4 + 1,) * 2
"""The features of a candidate that never followed anything: counts of what came right after the last items and near
them, what came before, a longer memory, what is near to what is near; two shares."""
FOLLOW_FEATURES = len(NOTHING_FOLLOWED)

WALKED = 50
"""Of what is near an item, how many of the strongest a second step goes through."""


class Memory:
    """What followed items like the visitor's, asked for whole histories at once.

    The newest 5 items count, each step back half as much; for the longer memory the newest 20, a tenth less a step.
    """

    def __init__(self, followers: Followers) -> None:
        self.next, self.near = (sp.csr_array(counts).astype(np.float32) for counts in (followers.next, followers.near))
        self.before = sp.csr_array(self.near.T)
        self.next_share, self.near_share = _shares(self.next), _shares(self.near)
        self.walk = strongest(self.near, WALKED)

    def over(self, n_rows: int) -> Memory:
        """The same memory for a longer catalogue: nothing is known of what is new."""
        later = copy.copy(self)
        for name, counts in vars(self).items():
            setattr(later, name, longer(counts, n_rows))
        return later

    def ask(self, history: HistoryBatch) -> Remembered:
        """What followed the items of each history, of all items."""
        recent_BN = _recent(history, *RECENT).over(self.next.shape[0])
        return Remembered(recent_BN @ self.next, recent_BN @ self.near)

    def features(self, history: HistoryBatch, candidate_BC: Ints) -> Floats:
        """How each candidate followed the visitor's items, each number at about unit scale. [B, C, FOLLOW_FEATURES]."""
        recent, longer_past = _recent(history, *RECENT), _recent(history, *LONGER)
        walked = recent.through(self.walk).through(self.walk)
        reached = [recent.through(counts) for counts in (self.next, self.near, self.next_share, self.near_share)]
        reached += [recent.through(self.before), longer_past.through(self.near), walked]
        next_BC, near_BC, next_share_BC, near_share_BC, *others = weights_at(reached, candidate_BC, self.next.shape[0])
        shares = [np.log(share_BC + LEAST_SHARE) / 4 + 1 for share_BC in (next_share_BC, near_share_BC)]
        counts = [np.log1p(count_BC) for count_BC in (next_BC, near_BC, *others)]
        return np.stack([*counts, *shares], -1).astype(np.float32)


@dataclass(frozen=True)
class Remembered:
    """Scores of every item by what followed, sparse: [B, N + 1] csr."""

    next: sp.csr_array
    near: sp.csr_array

    @property
    def next_BN(self) -> Floats:
        """[B, N + 1] float32."""
        dense: Floats = self.next.toarray()
        return dense

    @property
    def near_BN(self) -> Floats:
        """[B, N + 1] float32."""
        dense: Floats = self.near.toarray()
        return dense


def _shares(counts: sp.csr_array) -> sp.csr_array:
    total_N = np.asarray(counts.sum(1)).ravel()
    return sp.csr_array(sp.diags_array(1.0 / np.maximum(total_N, 1.0)) @ counts).astype(np.float32)


def _recent(history: HistoryBatch, steps: int, decay: float) -> Reached:
    """The last items of each visitor with their weights."""
    at_BK = history.length_B[:, None] - 1 - np.arange(min(steps, history.item_BL.shape[1]))
    visitor_P, step_P = np.nonzero(at_BK >= 0)
    weight_P = (decay**step_P).astype(np.float32)
    bound_B = np.concatenate([[0], np.cumsum(np.count_nonzero(at_BK >= 0, axis=1))])
    return Reached(history.item_BL[visitor_P, at_BK[visitor_P, step_P]], weight_P, bound_B)


def top(scores_BN: Floats, k: int) -> Ints:
    """Columns of the k highest scores of each row, in no order. [B, k] int64."""
    # numpy's argpartition takes ten times as long and more where most scores are equal, as transition counts are.
    found = torch.from_numpy(scores_BN).topk(min(k, scores_BN.shape[1]), dim=1, sorted=False)
    item_BK: Ints = found.indices.numpy()
    return item_BK


def followed(scores_BN: Floats, k: int) -> Ints:
    """As `top`, with 0 in place of items that never followed."""
    item_BK = top(scores_BN, k)
    return np.where(np.take_along_axis(scores_BN, item_BK, 1) > 0, item_BK, 0)


def union(parts: list[Ints], n_rows: int, usable_N: npt.NDArray[np.bool_]) -> Ints:
    """Distinct usable items of each row over all parts, ascending, padded with 0. Parts: [B, k] -> [B, C] int64."""
    chosen_BN = np.zeros((len(parts[0]), n_rows), bool)
    for part_BK in parts:
        np.put_along_axis(chosen_BN, part_BK, True, axis=1)
    chosen_BN &= usable_N
    visitor_P, item_P = np.nonzero(chosen_BN)
    length_B = chosen_BN.sum(1)
    out_BC = np.zeros((len(chosen_BN), max(1, int(length_B.max(initial=0)))), np.int64)
    out_BC[visitor_P, np.arange(len(visitor_P)) - np.repeat(np.cumsum(length_B) - length_B, length_B)] = item_P
    return out_BC


def retrieve(
    history: HistoryBatch, model_BN: Floats, remembered: Remembered, popular_N: Ints, warm_N: npt.NDArray[np.bool_],
    k: int,
) -> Ints:  # fmt: skip
    """Candidates from all sources: the model's, what followed, the history itself, and the popular.

    model_BN: [B, N + 1] scores by model, which gives k warm and k / 4 cold items. remembered: gives 2 k. popular_N:
    items, most popular first. warm_N: [N + 1] bool, has training events. -> [B, C] int64, ascending, 0 padding.
    """
    popular_BK = np.broadcast_to(popular_N[: k // 4], (len(history), len(popular_N[: k // 4])))
    usable_N = np.arange(model_BN.shape[1]) > 0
    cold_N = np.flatnonzero(usable_N & ~warm_N)
    parts = [top(np.where(warm_N, model_BN, -np.inf), k), history.item_BL, popular_BK]
    parts += [followed(remembered.next_BN, k), followed(remembered.near_BN, k)]
    if len(cold_N):
        parts.append(cold_N[top(model_BN[:, cold_N], k // 4)])
    return union(parts, model_BN.shape[1], usable_N)
