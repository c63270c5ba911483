"""The nearest rows: exactly, and by an index that may miss some."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.ranking import nearest
from rayrec.ranking.nearest import Nearest

N, D, K = 20_000, 16, 50


@pytest.fixture(scope="module")
def vectors_ND() -> npt.NDArray[np.float32]:
    """Items in 100 groups, as of categories."""
    rng = np.random.default_rng(0)
    vectors_ND = rng.normal(size=(100, D))[rng.integers(0, 100, N)] + 0.7 * rng.normal(size=(N, D))
    vectors_ND[0] = 0
    return vectors_ND.astype(np.float32)


@pytest.fixture(scope="module")
def query_BD(vectors_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(1)
    return (vectors_ND[rng.integers(1, N, 20)] + 0.5 * rng.normal(size=(20, D))).astype(np.float32)


@pytest.fixture(scope="module")
def index(vectors_ND: npt.NDArray[np.float32]) -> Nearest:
    pytest.importorskip("faiss", reason="the extra 'ann' is not installed")
    return Nearest(vectors_ND, exact_below=1000)


def everything(n: int = N) -> npt.NDArray[np.bool_]:
    return np.arange(n) > 0


def test_a_small_catalogue_is_searched_exactly(vectors_ND: npt.NDArray[np.float32]) -> None:
    few = Nearest(vectors_ND[:500], exact_below=501)
    assert not few.approximate
    query_D = vectors_ND[7]
    found = few.search(query_D[None], [everything(500)], 10)[0]
    expected = 1 + np.argsort(-(vectors_ND[1:500] @ query_D), kind="stable")[:10]
    assert found.tolist() == expected.tolist()


def test_the_index_finds_nearly_all_of_the_nearest(
    index: Nearest, vectors_ND: npt.NDArray[np.float32], query_BD: npt.NDArray[np.float32]
) -> None:
    assert index.approximate
    masks = [everything()] * len(query_BD)
    exact = Nearest(vectors_ND, N + 1).search(query_BD, masks, K)
    found = index.search(query_BD, masks, K)
    recall = np.mean([len(np.intersect1d(one, right)) / K for one, right in zip(found, exact, strict=True)])
    assert recall > 0.8
    for query_D, rows in zip(query_BD, found, strict=True):
        assert len(set(rows.tolist())) == K
        assert np.all(np.diff(vectors_ND[rows] @ query_D) <= 0), "best first"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_only_what_may_be_found_is_found(index: Nearest, query_BD: npt.NDArray[np.float32], share: float) -> None:
    mask_N = everything() & (np.random.default_rng(2).random(N) < share)
    for rows in index.search(query_BD, [mask_N] * len(query_BD), K):
        assert len(rows) == K
        assert mask_N[rows].all()


def test_among_few_the_search_is_exact(
    index: Nearest, vectors_ND: npt.NDArray[np.float32], query_BD: npt.NDArray[np.float32]
) -> None:
    mask_N = everything() & (np.arange(N) % 50 == 0)
    exact = Nearest(vectors_ND, N + 1).search(query_BD, [mask_N] * 20, K)
    for one, right in zip(index.search(query_BD, [mask_N] * 20, K), exact, strict=True):
        assert one.tolist() == right.tolist()


def test_what_changed_or_is_new_is_found_at_once(index: Nearest, vectors_ND: npt.NDArray[np.float32]) -> None:
    """A vector that goes far out is the nearest to its own direction, and no longer to its old one."""
    moved_ND = np.concatenate([vectors_ND, np.full((2, D), 9, np.float32)])
    moved_ND[5] = -9
    later = index.over(moved_ND, np.array([5, N, N + 1]))
    outwards, inwards = (later.search(np.full((1, D), sign, np.float32), [everything(N + 2)], 3)[0] for sign in (1, -1))
    assert set(outwards[:2].tolist()) == {N, N + 1}
    assert inwards[0] == 5
    assert 5 not in later.search(vectors_ND[5][None], [everything(N + 2)], K)[0]
    assert index.search(np.full((1, D), 1, np.float32), [everything()], 3)[0].max() < N, "the earlier one is as it was"


def test_after_many_changes_the_index_is_made_anew(index: Nearest, vectors_ND: npt.NDArray[np.float32]) -> None:
    rows = np.arange(1, N // 10)
    later = index.over(vectors_ND, rows)
    assert later.approximate
    assert not later._changed_N.any()


def test_without_the_library_it_is_exact_and_says_so(
    vectors_ND: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nearest, "faiss", None)
    with caplog.at_level(logging.WARNING):
        assert not Nearest(vectors_ND, 1000).approximate
    assert "rayrec[ann]" in caplog.text


@given(st.lists(st.floats(-5, 5, width=32) | st.just(float("nan")), min_size=1, max_size=30), st.integers(1, 40))
def test_order_is_best_first_and_ties_by_place(scores: list[float], n: int) -> None:
    places = nearest.order(np.array(scores, np.float32), n).tolist()
    assert len(places) == min(n, len(scores)) == len(set(places))
    lowest = float("-inf")
    ranked = sorted(range(len(scores)), key=lambda at: (-(lowest if scores[at] != scores[at] else scores[at]), at))
    if n >= len(scores):
        assert places == ranked
    assert [scores[at] for at in places if scores[at] == scores[at]] == [
        scores[at] for at in ranked[: len(places)] if scores[at] == scores[at]
    ]
