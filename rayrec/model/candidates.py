"""Candidates of the second stage, for a batch: nearest by model, followers of the last items, history, popular.

In: histories, user and item vectors, the transition matrix. Out: candidate matrices. It must not know the fusion.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from rayrec.history import HistoryBatch

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

STEPS_BACK = 5
DECAY = 0.5


class Transitions:
    """Which item follows which, asked for whole histories at once: the last 5 items, each step back weighing half.

    count: [N + 1, N + 1] csr, count[i, j] how often j followed i in training.
    """

    def __init__(self, count: sp.csr_array) -> None:
        self.count = sp.csr_array(count).astype(np.float32)
        total_N = np.asarray(self.count.sum(1)).ravel()
        self.share = sp.csr_array(sp.diags_array(1.0 / np.maximum(total_N, 1.0)) @ self.count).astype(np.float32)

    def scores(self, history: HistoryBatch) -> tuple[Floats, Floats]:
        """Weighted counts and weighted shares of what follows. Two of [B, N + 1] float32."""
        weight_BN = _recent(history, self.count.shape[0])
        return (weight_BN @ self.count).toarray(), (weight_BN @ self.share).toarray()


def _recent(history: HistoryBatch, n_rows: int) -> sp.csr_array:
    """The last items of each visitor with their weights. [B, N + 1] csr."""
    back_K = np.arange(STEPS_BACK)
    at_BK = history.length_B[:, None] - 1 - back_K
    visitor_P, step_P = np.nonzero(at_BK >= 0)
    item_P = history.item_BL[visitor_P, at_BK[visitor_P, step_P]]
    weight_P = (DECAY**step_P).astype(np.float32)
    return sp.csr_array((weight_P, (visitor_P, item_P)), shape=(len(history), n_rows))


def top(scores_BN: Floats, k: int) -> Ints:
    """Columns of the k highest scores of each row, in no order. [B, k] int64."""
    # numpy's argpartition takes ten times as long and more where most scores are equal, as transition counts are.
    found = torch.from_numpy(scores_BN).topk(min(k, scores_BN.shape[1]), dim=1, sorted=False)
    item_BK: Ints = found.indices.numpy()
    return item_BK


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
    history: HistoryBatch, model_BN: Floats, follow_BN: Floats, popular_N: Ints, warm_N: npt.NDArray[np.bool_], k: int
) -> Ints:
    """Candidates from all sources: k nearest by model and k / 4 among the cold, k followers, the history, the popular.

    model_BN: [B, N + 1] scores by model. follow_BN: [B, N + 1] transition scores. popular_N: items, most popular
    first. warm_N: [N + 1] bool, has training events. -> [B, C] int64, ascending, 0 padding.
    """
    popular_BK = np.broadcast_to(popular_N[: k // 4], (len(history), len(popular_N[: k // 4])))
    usable_N = np.arange(model_BN.shape[1]) > 0
    follow_BK = top(follow_BN, k)
    follow_BK = np.where(np.take_along_axis(follow_BN, follow_BK, 1) > 0, follow_BK, 0)
    cold_N = np.flatnonzero(usable_N & ~warm_N)
    parts = [top(np.where(warm_N, model_BN, -np.inf), k), follow_BK, history.item_BL, popular_BK]
    if len(cold_N):
        parts.append(cold_N[top(model_BN[:, cold_N], k // 4)])
    return union(parts, model_BN.shape[1], usable_N)
