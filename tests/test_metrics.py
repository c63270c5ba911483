from __future__ import annotations

import numpy as np
import pytest
from evaluation_shop import catalogue
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from rayrec.evaluation.metrics import (
    list_figures,
    ndcg_spread,
    pointwise_figures,
    popularity,
    rank_figures,
    ranks,
    ranks_unseen,
    top,
)

NAN, INF = float("nan"), float("inf")
few_levels = st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0, NAN])
score_rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 9)), elements=few_levels)


# ---------------------------------------------------------------- ranks and lists


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([9, 1, 3, 2], 2, 1),  # column 0 scores best and is no item
        ([0, 1, 3, 2], 1, 3),
        ([0, 5, 5, 5], 2, 3),  # ties count against us
        ([0, 1, NAN, 2], 2, 3),  # NaN is worst
        ([0, 1, NAN, NAN], 2, 3),
        ([0, -INF, NAN, 2], 2, 3),  # as bad as -inf
        ([NAN, 1, NAN, 0], 3, 2),
        ([0, INF, INF, 1], 1, 2),
        ([0, 7], 1, 1),
    ],
)
def test_rank(scores: list[float], target: int, rank: int) -> None:
    assert ranks(np.array([scores]), np.array([target])).tolist() == [rank]


@given(score_rows, st.data())
def test_rank_lies_in_range_and_falls_as_the_score_rises(scores: np.ndarray, data: st.DataObject) -> None:
    items = scores.shape[1] - 1
    target = np.array([data.draw(st.integers(1, items)) for _ in scores])
    rank = ranks(scores, target)
    assert ((rank >= 1) & (rank <= items)).all()
    better = scores.copy()
    better[np.arange(len(scores)), target] = INF
    assert (ranks(better, target) <= rank).all()


@given(score_rows, st.randoms(use_true_random=False))
def test_order_of_the_items_changes_no_rank(scores: np.ndarray, random: object) -> None:
    items = scores.shape[1] - 1
    order = np.array([0, *random.sample(range(1, items + 1), items)])  # type: ignore[attr-defined]
    target = np.full(len(scores), items)
    moved = np.full(len(scores), np.flatnonzero(order == items)[0])
    np.testing.assert_array_equal(ranks(scores, target), ranks(scores[:, order], moved))


@given(score_rows, st.data())
def test_unseen_rank_is_the_rank_once_seen_items_are_gone(scores: np.ndarray, data: st.DataObject) -> None:
    items = scores.shape[1] - 1
    target = data.draw(st.integers(1, items))
    seen = sorted(data.draw(st.sets(st.integers(0, items))) - {target})
    row, item = np.repeat(np.arange(len(scores)), len(seen)), np.tile(np.array(seen, np.int64), len(scores))
    kept = [n for n in range(items + 1) if n == 0 or n not in seen]
    np.testing.assert_array_equal(
        ranks_unseen(scores, np.full(len(scores), target), row, item),
        ranks(scores[:, kept], np.full(len(scores), kept.index(target))),
    )


@given(score_rows, st.integers(1, 12))
def test_top_is_the_sorted_head(scores: np.ndarray, k: int) -> None:
    for row, found in zip(scores, top(scores, k), strict=True):
        usable = [(-score, n) for n, score in enumerate(row) if n and not np.isnan(score) and score > -INF]
        expected = [score for score, _ in sorted(usable)[:k]]
        assert [-row[n] for n in found[: len(expected)]] == expected
        assert (found[len(expected) :] == 0).all()
        assert len(set(found[: len(expected)])) == len(expected)


def test_no_item_and_no_user() -> None:
    assert top(np.zeros((2, 1)), 3).tolist() == [[0, 0, 0], [0, 0, 0]]
    nobody = np.empty(0, np.int64)
    assert ranks(np.empty((0, 4)), nobody).tolist() == []
    assert set(rank_figures(nobody).values()) == {None}
    assert ndcg_spread(nobody) == {"ndcg@10_se": None, "ndcg@10_95": None}
    assert set(pointwise_figures(np.empty((0, 101))).values()) == {None}
    assert set(pointwise_figures(np.ones((3, 1))).values()) == {None}
    figures = list_figures(np.empty((0, 20), np.int64), catalogue(([1], 1, 1)))
    assert set(figures.values()) == {None}


# ---------------------------------------------------------------- figures


def test_rank_figures_by_hand() -> None:
    figures = rank_figures(np.array([1, 3, 11, 400]))
    assert figures["hr@1"] == 0.25
    assert figures["hr@10"] == figures["recall@10"] == 0.5
    assert figures["recall@20"] == 0.75
    assert figures["ndcg@10"] == pytest.approx((1 + 1 / 2) / 4)
    assert figures["ndcg@20"] == pytest.approx((1 + 1 / 2 + 1 / np.log2(12)) / 4)
    assert figures["mrr@10"] == pytest.approx((1 + 1 / 3) / 4)


def test_ndcg_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(50, 41)), rng.integers(1, 41, 50)
    truth = np.zeros((50, 40))
    truth[np.arange(50), target - 1] = 1
    rank = ranks(scores, target)
    for k in (5, 10, 20):
        assert rank_figures(rank)[f"ndcg@{k}"] == pytest.approx(ndcg_score(truth, scores[:, 1:], k=k))


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(0, 49))
def test_a_better_rank_never_lowers_a_figure(rank: list[int], gain: int) -> None:
    before = rank_figures(np.array(rank))
    after = rank_figures(np.maximum(np.array(rank) - gain, 1))
    assert all(after[name] >= before[name] - 1e-12 for name in before)


def test_spread_is_that_of_the_mean() -> None:
    rank = np.random.default_rng(0).integers(1, 30, 4000)
    gain = np.where(rank <= 10, 1 / np.log2(1 + rank), 0)
    spread = ndcg_spread(rank)
    assert spread["ndcg@10_se"] == pytest.approx(gain.std() / np.sqrt(4000), rel=0.1)
    low, high = spread["ndcg@10_95"]
    assert low < gain.mean() < high
    assert spread == ndcg_spread(rank)


def test_pointwise_equals_scikit_learn() -> None:
    scores = np.round(np.random.default_rng(1).uniform(0.01, 0.99, (30, 11)), 1)  # rounded: many ties
    labels = np.zeros_like(scores)
    labels[:, 0] = 1
    figures = pointwise_figures(scores)
    assert figures["auc"] == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()))
    assert figures["gauc"] == pytest.approx(np.mean([roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)]))
    assert figures["logloss"] == pytest.approx(log_loss(labels.ravel(), np.clip(scores, 1e-7, 1 - 1e-7).ravel()))


def test_pointwise_with_extreme_and_missing_scores() -> None:
    sure = pointwise_figures(np.array([[1.0, 0.0]]))
    assert (sure["auc"], sure["gauc"]) == (1.0, 1.0)
    assert sure["logloss"] == pytest.approx(1e-7, rel=0.01)
    missing = pointwise_figures(np.array([[NAN, 0.5]]))
    assert missing["auc"] == 0.0
    assert np.isfinite(missing["logloss"])


def test_lists_by_hand() -> None:
    items = catalogue(([1, 2], 0, 0), ([1], 0, 5), ([3], 1, 5), ([], 0, 9))
    figures = list_figures(np.array([[1, 2, 0], [2, 4, 0]]), items)
    assert figures["coverage@10"] == 3 / 4
    assert figures["diversity@10"] == pytest.approx(1 - 1 / 2)  # items 1 and 2; item 4 has no attribute
    assert popularity(items.n_train).tolist() == [0, 0.125, 0.5, 0.5, 0.875]
    assert figures["popularity@10"] == pytest.approx((0.125 + 0.5 + 0.5 + 0.875) / 4)


def test_diversity_counts_brand_and_categories_once() -> None:
    items = catalogue(([1, 1], 1, 0), ([1], 1, 0), ([1], 2, 0), ([5], 2, 0))
    assert list_figures(np.array([[1, 2]]), items)["diversity@10"] == pytest.approx(0.0)
    assert list_figures(np.array([[2, 3]]), items)["diversity@10"] == pytest.approx(1 - 1 / 3)
    assert list_figures(np.array([[1, 4]]), items)["diversity@10"] == pytest.approx(1.0)
    assert list_figures(np.array([[4]]), items)["diversity@10"] is None


def test_only_the_first_k_shown_count() -> None:
    items = catalogue(([1], 0, 0), ([1], 0, 5), ([3], 1, 5))
    assert list_figures(np.array([[1, 2, 3]]), items, k=2)["coverage@2"] == pytest.approx(2 / 3)
