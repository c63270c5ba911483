"""Lists with the floor mixed in: known scores have a known order."""

from __future__ import annotations

import numpy as np
import pytest

from rayrec.bench.mixing import mixed, scale

SHARE_BN = np.array([[0.0, 0.9, 0.0, 0.0, 0.5, 0.0]])
LISTED = [[3, 5, 2]], [[3.0, 2.0, 1.0]]


def test_without_weight_a_list_keeps_its_order_and_the_rest_ties_with_its_worst() -> None:
    assert mixed(*LISTED, 1.0, SHARE_BN, 0.0, 6).tolist() == [[3, 5, 1, 2, 4, 0]]


def test_the_floor_speaks_by_its_weight() -> None:
    # Logs of the shares: -6.9 of none, -0.1 of item 1, -0.7 of item 4, which count as the list's worst, 1.
    assert mixed(*LISTED, 1.0, SHARE_BN, 0.1, 4).tolist() == [[3, 5, 1, 4]]  # 2.31, 1.31, 0.99, 0.93
    assert mixed(*LISTED, 1.0, SHARE_BN, 0.2, 4).tolist() == [[3, 1, 4, 5]]  # 1.62, 0.98, 0.86, 0.62
    assert mixed(*LISTED, 1.0, SHARE_BN, 2.0, 5).tolist() == [[1, 4, 3, 5, 2]]
    assert mixed(*LISTED, 0.1, SHARE_BN, 0.2, 4).tolist() == [[3, 5, 1, 4]], "a small unit makes the list louder"


def test_what_was_seen_or_is_no_item_is_left_out() -> None:
    share_BN = SHARE_BN.copy()
    share_BN[0, 3] = -np.inf
    items, scores = [[0, 3, 5, 2, 4]], [[9.0, 3.0, 2.0, 1.0, -np.inf]]
    assert mixed(items, scores, 1.0, share_BN, 0.0, 5).tolist() == [[5, 1, 2, 4, 0]]


def test_without_a_list_the_floor_speaks_alone() -> None:
    assert mixed([[]], [[]], 1.0, SHARE_BN, 1.0, 2).tolist() == [[1, 4]]


def test_the_unit_is_the_spread_within_lists() -> None:
    assert scale([[1.0, 3.0], [10.0, 16.0], [5.0, -np.inf]]) == pytest.approx(2.0)
    assert scale([[2.0, 2.0]]) == scale([]) == scale([[1.0]]) == 1.0
