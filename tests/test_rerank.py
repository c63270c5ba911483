"""Diversity and exploration: orders and propensities that can be worked out by hand."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.ranking.explore import explore, slot_propensity
from rayrec.ranking.rerank import diversify

TWO_STYLES = np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]  # items 0, 1, 2 alike; 3 is different


def order(scores: list[float], diversity: float, k: int = 4, unit: np.ndarray = TWO_STYLES) -> list[int]:
    score_BM = np.array([scores], np.float32)
    return diversify(score_BM, unit[None], np.array([diversity], np.float32), k)[0].tolist()


def test_no_diversity_keeps_the_scores_order() -> None:
    assert order([0.9, 0.8, 0.7, 0.6], 0.0) == [0, 1, 2, 3]


def test_diversity_brings_the_different_item_forward() -> None:
    assert order([0.9, 0.8, 0.7, 0.6], 0.5) == [0, 3, 1, 2]


def test_it_is_maximal_marginal_relevance() -> None:
    # After 0 is taken: item 1 is worth 0.8 * 0.5 - 0.2 * 1, item 3 is worth 0: relevance 0.5 against 0.
    scores = [1.0, 0.5, 0.25, 0.0]
    assert order(scores, 0.2, k=2) == [0, 1]
    assert order(scores, 0.4, k=2) == [0, 3]  # 0.6 * 0.5 - 0.4 < 0


def test_nan_ranks_after_numbers_and_padding_last() -> None:
    for diversity in (0.0, 0.5, 1.0):
        assert order([np.nan, 0.1, -np.inf, 0.9], diversity)[2:] == [0, 2]


def test_rows_do_not_touch_each_other() -> None:
    score_BM = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]], np.float32)
    both = diversify(score_BM, np.stack([TWO_STYLES] * 2), np.array([0.5, 0.0], np.float32), 3)
    assert both.tolist() == [[0, 3, 1], [3, 2, 1]]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.floats(0, 1, width=32), st.integers(1, 15))
def test_an_order_shows_each_item_once(scores: list[float], diversity: float, k: int) -> None:
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(len(scores), 3)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    shown = order(scores, diversity, k, unit)
    assert len(shown) == min(k, len(scores)) == len(set(shown))


def test_equal_scores_keep_their_places() -> None:
    assert order([0.5] * 4, 0.0) == [0, 1, 2, 3]


# ---------------------------------------------------------------- exploration


def test_no_exploration_is_certain() -> None:
    items, propensity = explore(np.array([7, 8, 9]), 2, 0.0, np.random.default_rng(0))
    assert items.tolist() == [7, 8]
    assert propensity.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("left", [1, 2, 7])
def test_the_propensities_of_a_slot_add_up_to_one(rate: float, left: int) -> None:
    assert sum(slot_propensity(pick, left, rate) for pick in range(left)) == pytest.approx(1.0)


def test_propensities_are_the_true_frequencies() -> None:
    rng, rate, n = np.random.default_rng(1), 0.6, 30_000
    seen: Counter[tuple[int, ...]] = Counter()
    stated: dict[tuple[int, ...], float] = {}
    for _ in range(n):
        items, propensity = explore(np.arange(3), 2, rate, rng)
        seen[tuple(items.tolist())] += 1
        stated[tuple(items.tolist())] = float(np.prod(propensity))
    assert set(seen) == set(permutations(range(3), 2))
    assert sum(stated.values()) == pytest.approx(1.0)
    for shown, times in seen.items():
        error = 4 * np.sqrt(stated[shown] * (1 - stated[shown]) / n)
        assert times / n == pytest.approx(stated[shown], abs=error), shown


def test_more_slots_than_items() -> None:
    items, propensity = explore(np.array([4, 5]), 10, 1.0, np.random.default_rng(0))
    assert sorted(items.tolist()) == [4, 5]
    assert propensity.tolist() == [0.5, 1.0]
    assert explore(np.empty(0, np.int64), 3, 0.5, np.random.default_rng(0))[0].tolist() == []
