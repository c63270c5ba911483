"""The measures: pure functions of ranks, shown lists and scores.

In: arrays. Out: ranks and figures, None where nothing can be measured. It must not know models or files.

A question has one right item, so recall@k equals hr@k; both names are given because both are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from rayrec.catalogue import Catalogue
from rayrec.history import Ints

Scores: TypeAlias = npt.NDArray[np.floating[Any]]
Figures: TypeAlias = dict[str, Any]

CUTOFFS = (5, 10, 20)
SHOWN = 20
"""Length of the lists that are kept for coverage, diversity and popularity."""

BOOTSTRAPS = 1000
PROBABILITY_FLOOR = 1e-7
PAIRS_AT_ONCE = 200_000


# ---------------------------------------------------------------- from scores to ranks and lists


def ranks(scores_BN: Scores, target_B: Ints) -> Ints:
    """Rank of each row's target among items 1..N, 1 is the best. [B] int64.

    scores_BN: [B, N + 1]; column 0 is ignored; NaN is as bad as -inf. Ties count against us: the rank is one
    more than the number of other items that score at least as high.
    """
    scores_BN = nan_is_worst(scores_BN)
    target_score_B1 = np.take_along_axis(scores_BN, target_B[:, None], axis=1)
    return np.asarray((scores_BN[:, 1:] >= target_score_B1).sum(axis=1), np.int64)


def ranks_unseen(scores_BN: Scores, target_B: Ints, row_S: Ints, item_S: Ints) -> Ints:
    """As `ranks`, without the items a visitor has seen: distinct pairs of row_S and item_S, [S]."""
    scores_BN = nan_is_worst(scores_BN)
    target_score_B = np.take_along_axis(scores_BN, target_B[:, None], axis=1)[:, 0]
    ahead_S = (scores_BN[row_S, item_S] >= target_score_B[row_S]) & (item_S > 0) & (item_S != target_B[row_S])
    return ranks(scores_BN, target_B) - np.bincount(row_S[ahead_S], minlength=len(target_B))


def top(scores_BN: Scores, k: int) -> Ints:
    """The k best items of each row, best first. [B, k] int64; 0 where no more score above -inf."""
    scores_BN = nan_is_worst(scores_BN)[:, 1:]
    found = min(k, scores_BN.shape[1])
    item_BK = np.zeros((len(scores_BN), k), np.int64)
    if not found:
        return item_BK
    best_BF = np.argpartition(scores_BN, -found, axis=1)[:, -found:]
    score_BF = np.take_along_axis(scores_BN, best_BF, axis=1)
    order_BF = np.lexsort((best_BF, -score_BF), axis=1)
    score_BF = np.take_along_axis(score_BF, order_BF, axis=1)
    best_BF = np.take_along_axis(best_BF, order_BF, axis=1) + 1
    item_BK[:, :found] = np.where(score_BF > -np.inf, best_BF, 0)
    return item_BK


def nan_is_worst(scores: Scores) -> Scores:
    """The scores with -inf in place of NaN; the same array if there is none."""
    if not np.isnan(scores.min(initial=0)):  # min hands on any NaN: no mask is made where there is none
        return scores
    return np.where(np.isnan(scores), scores.dtype.type(-np.inf), scores)


# ---------------------------------------------------------------- figures of ranks


def rank_figures(rank_U: Ints, cutoffs: Sequence[int] = CUTOFFS) -> Figures:
    """hr@1, and hr, ndcg, recall and mrr at each cutoff: means over users. None for no user.

    With one right item at rank r <= k: hr = recall = 1, ndcg = 1 / log2(1 + r), mrr = 1 / r; else all are 0.
    """
    figures: Figures = {"hr@1": mean(rank_U <= 1)}
    for k in cutoffs:
        hit_U = rank_U <= k
        figures[f"hr@{k}"] = figures[f"recall@{k}"] = mean(hit_U)
        figures[f"ndcg@{k}"] = mean(ndcg(rank_U, k))
        figures[f"mrr@{k}"] = mean(hit_U / rank_U)
    return figures


def ndcg(rank_U: Ints, k: int) -> npt.NDArray[np.float64]:
    """Discounted gain of one right item at each rank, 0 beyond k. [U]"""
    return np.where(rank_U <= k, 1.0 / np.log2(1.0 + rank_U), 0.0)


def ndcg_spread(rank_U: Ints, k: int = 10, *, seed: int = 0) -> Figures:
    """How sure ndcg@k is: its standard error and 95% interval, by a bootstrap over users.

    Drawing users again is drawing ranks again, and only ranks up to k count: a multinomial over k + 1 cells
    gives the same distribution, whatever the number of users.
    """
    if not len(rank_U):
        return {f"ndcg@{k}_se": None, f"ndcg@{k}_95": None}
    cell_U = np.minimum(rank_U, k + 1)
    share = np.bincount(cell_U, minlength=k + 2)[1:] / len(rank_U)
    drawn = np.random.default_rng(seed).multinomial(len(rank_U), share, size=BOOTSTRAPS)
    means = drawn @ ndcg(np.arange(1, k + 2), k) / len(rank_U)
    low, high = np.quantile(means, [0.025, 0.975])
    return {f"ndcg@{k}_se": float(means.std()), f"ndcg@{k}_95": [float(low), float(high)]}


def mean(values: npt.NDArray[Any]) -> float | None:
    """The mean, None of nothing."""
    return float(values.mean()) if len(values) else None


# ---------------------------------------------------------------- figures of shown lists


def list_figures(shown_UK: Ints, catalogue: Catalogue, k: int = 10) -> Figures:
    """coverage, diversity and popularity of the first k of each list ([U, K] item index, 0 is nothing).

    coverage@k: share of the catalogue that is shown to anyone.
    diversity@k: one less the mean likeness of two items in a list: the Jaccard index of their sets of
        categories and brand. Pairs in which either has neither are left out; None if no pair is left.
    popularity@k: mean popularity of what is shown, as the share of the catalogue with fewer training events
        (ties half): 0.5 is even-handed, near 1 only the best known are shown.
    """
    shown_UK = shown_UK[:, :k]
    flat = shown_UK[shown_UK > 0]
    n_items = len(catalogue)
    return {
        f"coverage@{k}": len(np.unique(flat)) / n_items if len(shown_UK) and n_items else None,
        f"diversity@{k}": diversity(shown_UK, attributes(catalogue)),
        f"popularity@{k}": mean(popularity(catalogue.n_train)[flat]),
    }


def popularity(n_train_N: Ints) -> npt.NDArray[np.float64]:
    """Share of the items 1..N with fewer training events than each, ties half. [N + 1], 0 at 0."""
    n_items = len(n_train_N) - 1
    share_N = np.zeros(len(n_train_N))
    if n_items:
        share_N[1:] = (pd.Series(n_train_N[1:]).rank().to_numpy() - 0.5) / n_items
    return share_N


def attributes(catalogue: Catalogue) -> Any:
    """Which categories and brand each item has. [N + 1, codes] float32 of 0 and 1, csr."""
    category, brand = catalogue.category, catalogue.brand
    row = np.repeat(np.arange(len(category)), np.diff(category.offsets))
    codes = int(category.values.max(initial=0)) + 1
    known, branded = category.values > 0, np.flatnonzero(brand > 0)
    rows = np.concatenate([row[known], branded])
    columns = np.concatenate([category.values[known], codes + brand[branded]])
    shape = (len(brand), codes + int(brand.max(initial=0)) + 1)
    matrix = sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)
    matrix.data[:] = 1.0  # a category named twice is one category
    return matrix


def diversity(shown_UK: Ints, attributes_NF: Any) -> float | None:
    """One less the mean Jaccard index over all pairs of items shown together; see `list_figures`."""
    size = attributes_NF.shape[0]
    count_N = np.asarray(attributes_NF.sum(axis=1)).ravel()
    left, right = np.array(list(combinations(range(shown_UK.shape[1]), 2)), np.int64).reshape(-1, 2).T
    low, high = (
        np.minimum(shown_UK[:, left], shown_UK[:, right]),
        np.maximum(shown_UK[:, left], shown_UK[:, right]),
    )
    usable = (count_N[low] > 0) & (count_N[high] > 0)
    pair_P, times_P = np.unique(low[usable] * size + high[usable], return_counts=True)
    if not len(pair_P):
        return None
    likeness = 0.0
    for start in range(0, len(pair_P), PAIRS_AT_ONCE):
        one, other = np.divmod(pair_P[start : start + PAIRS_AT_ONCE], size)
        both = np.asarray(attributes_NF[one].multiply(attributes_NF[other]).sum(axis=1)).ravel()
        jaccard = both / (count_N[one] + count_N[other] - both)
        likeness += float(jaccard @ times_P[start : start + PAIRS_AT_ONCE])
    return 1.0 - likeness / float(times_P.sum())


# ---------------------------------------------------------------- pointwise figures


def pointwise_figures(score_UC: Scores) -> Figures:
    """auc, gauc and logloss of the right item (column 0) against sampled ones (the rest). [U, C] in [0, 1].

    auc pools the pairs of all users; gauc is the mean of each user's own (all have equally many candidates);
    a tie counts half, as is usual. NaN counts as 0. logloss is over all candidates: it depends on their number.
    """
    score_UC = np.where(np.isnan(score_UC), 0.0, score_UC).astype(np.float64)
    users, candidates = score_UC.shape
    if not users or candidates < 2:
        return {"auc": None, "gauc": None, "logloss": None}
    right_U1, wrong_UC = score_UC[:, :1], score_UC[:, 1:]
    place = pd.Series(np.concatenate([right_U1.ravel(), wrong_UC.ravel()])).rank().to_numpy()[:users]
    auc = (place.sum() - users * (users + 1) / 2) / (users * wrong_UC.size)
    gauc = ((wrong_UC < right_U1) + 0.5 * (wrong_UC == right_U1)).mean()
    share_UC = np.clip(score_UC, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    loss = -(np.log(share_UC[:, 0]).sum() + np.log1p(-share_UC[:, 1:]).sum()) / score_UC.size
    return {"auc": float(auc), "gauc": float(gauc), "logloss": float(loss)}
