"""Candidates of the second stage on counts written down by hand."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrec.followers import Followers
from rayrec.history import HistoryBatch, encode_history
from rayrec.model.candidates import FOLLOW_FEATURES, NOTHING_FOLLOWED, Memory, Remembered, retrieve, top, union


def histories(*visits: list[int]) -> HistoryBatch:
    items = [item for visit in visits for item in visit]
    offsets = np.cumsum([0, *map(len, visits)])
    return encode_history(items, np.ones(len(items)), np.arange(len(items)), offsets, max_len=10, clock="order")


def counts(n_items: int, **pairs: float) -> sp.csr_array:
    matrix = np.zeros((n_items + 1, n_items + 1), np.float32)
    for pair, count in pairs.items():
        before, after = pair.lstrip("_").split("_")
        matrix[int(before), int(after)] = count
    return sp.csr_array(matrix)


def memory(near: dict[str, float] | None = None, **pairs: float) -> Memory:
    return Memory(Followers(counts(3, **pairs), counts(3, **(near or {}))))


def test_each_step_back_weighs_half() -> None:
    history, known = histories([1, 2], [2, 1], []), memory(_1_2=4, _2_3=6, _2_1=2)
    next_BN = [[0, 2, 2, 6], [0, 1, 4, 3], [0, 0, 0, 0]]
    assert known.ask(history).next_BN.tolist() == next_BN
    feature_BCF = known.features(history, np.tile(np.arange(4), (3, 1)))
    np.testing.assert_allclose(feature_BCF[..., 0], np.log1p(next_BN), rtol=1e-6)
    share_BN = np.array([[0, 0.25, 0.5, 0.75], [0, 0.125, 1, 0.375], [0, 0, 0, 0]])
    np.testing.assert_allclose(feature_BCF[..., 5], np.log(share_BN + 1e-4) / 4 + 1, rtol=1e-6)


def test_an_item_seen_twice_counts_twice_and_the_sixth_step_back_not_at_all() -> None:
    remembered = memory(_1_2=16, _3_1=1).ask(histories([1, 1], [1, 3, 3, 3, 3, 3]))
    assert remembered.next_BN[:, 2].tolist() == [24.0, 0.0]


def test_the_features_of_candidates_by_hand() -> None:
    """What came next, near and before, the longer memory and two steps, for a candidate, an absent one and padding."""
    known = memory({"_1_2": 3.0, "_2_1": 5.0, "_1_3": 1.0}, _1_2=4, _2_1=2)
    feature_CF = known.features(histories([2, 1]), np.array([[2, 3, 0, 2]]))[0]
    assert feature_CF.shape == (4, FOLLOW_FEATURES)
    np.testing.assert_array_equal(feature_CF[3], feature_CF[0], "the same item twice")
    by_hand = [
        np.log1p(4.0),
        np.log1p(3.0),
        np.log1p(5.0),  # before: 2 came before 1, five times
        np.log1p(3.0),
        np.log1p(7.5),  # two steps: 2 to 1, half as recent, then 1 to 2
        np.log(4 / 4 + 1e-4) / 4 + 1,
        np.log(3 / 4 + 1e-4) / 4 + 1,
    ]
    np.testing.assert_allclose(feature_CF[0], by_hand, rtol=1e-5)
    never = np.log(1e-4) / 4 + 1
    np.testing.assert_allclose(
        feature_CF[1],
        [0, np.log1p(1.0), 0, np.log1p(1.0), np.log1p(2.5), never, np.log(0.25 + 1e-4) / 4 + 1],
        rtol=1e-5,
    )
    np.testing.assert_allclose(feature_CF[2], NOTHING_FOLLOWED, rtol=1e-5)


def test_the_longer_memory_fades_slowly() -> None:
    history, known = histories([1, *[3] * 9]), memory({"_1_2": 10.0})
    assert known.ask(history).near_BN[0, 2] == 0.0
    near, longer_memory = known.features(history, np.array([[2]]))[0, 0, [1, 3]].tolist()
    assert near == 0
    np.testing.assert_allclose(longer_memory, np.log1p(10 * 0.9**9), rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_the_features_are_products_of_matrices(data: st.DataObject) -> None:
    """Whatever was asked before, and however long its catalogue was."""
    n = data.draw(st.integers(3, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    next_NN, near_NN = (rng.integers(0, 4, (2, n, n)) * (rng.random((2, n, n)) < 0.5)).astype(np.float32)
    known = Memory(Followers(sp.csr_array(next_NN), sp.csr_array(near_NN)))
    past = data.draw(st.lists(st.lists(st.integers(1, n - 1), max_size=7), min_size=1, max_size=3))
    candidate_BC = rng.integers(0, n, (len(past), data.draw(st.integers(1, 6))))
    feature_BCF = known.features(histories(*past), candidate_BC)
    for b, items in enumerate(past):
        recent_N = np.zeros(n)
        for step, item in enumerate(items[::-1][:5]):
            recent_N[item] += 0.5**step
        reached_FN = np.log1p([recent_N @ next_NN, recent_N @ near_NN, recent_N @ near_NN.T])
        walked_N = np.log1p(recent_N @ near_NN @ near_NN)
        np.testing.assert_allclose(feature_BCF[b, :, :3].T, reached_FN[:, candidate_BC[b]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(feature_BCF[b, :, 4], walked_N[candidate_BC[b]], rtol=1e-5, atol=1e-6)


def test_top_finds_the_best_even_of_too_few() -> None:
    scores_BN = np.array([[0.0, 5, 1, 3], [9, 0, 2, 1]], np.float32)
    assert [set(row) for row in top(scores_BN, 2).tolist()] == [{1, 3}, {0, 2}]
    assert sorted(top(scores_BN, 9)[0].tolist()) == [0, 1, 2, 3]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
def test_union_is_that_of_sets(rows: list[list[int]], common: list[int]) -> None:
    usable_N = np.arange(10) % 4 > 0
    parts = [np.array(rows), np.broadcast_to(np.array(common), (len(rows), len(common)))]
    out_BC = union(parts, 10, usable_N)
    wanted = [sorted(item for item in {*row, *common} if usable_N[item]) for row in rows]
    assert [[item for item in row if item] for row in out_BC.tolist()] == wanted
    assert out_BC.shape[1] == max(1, max(map(len, wanted)))
    assert all(
        row == sorted(row[: len(want)]) + [0] * (len(row) - len(want))
        for row, want in zip(out_BC.tolist(), wanted, strict=True)
    )


def test_all_sources_are_asked() -> None:
    history = histories([7], [8, 9])
    model_BN, next_BN, near_BN = np.zeros((3, 2, 13), np.float32)
    model_BN[0, [0, 1, 2, 3, 4]] = [9, 5, 5, 5, 5]
    model_BN[1, [1, 3, 5, 6]] = 5
    next_BN[:, [10, 11, 6, 5]] = 1
    near_BN[:, [2, 10, 11, 6]] = 1
    remembered = Remembered(sp.csr_array(next_BN), sp.csr_array(near_BN))
    out_BC = retrieve(history, model_BN, remembered, np.array([12, 1, 2]), np.ones(13, bool), 4)
    assert {12, 7, 10, 11, 6, 5, 2} < set(out_BC[0].tolist())
    assert set(out_BC[1].tolist()) - {0} == {1, 2, 3, 5, 6, 10, 11, 12, 8, 9}


def test_a_visitor_without_history_still_gets_the_popular() -> None:
    nothing_BN = np.zeros((1, 6), np.float32)
    nothing = Remembered(sp.csr_array(nothing_BN), sp.csr_array(nothing_BN))
    out_BC = retrieve(histories([]), nothing_BN, nothing, np.array([3, 5, 1]), np.ones(6, bool), 8)
    assert {3, 5} <= set(out_BC[0].tolist())


def test_cold_items_have_places_of_their_own_and_take_none_from_others() -> None:
    model_BN = np.array([[0, 1, 2, 3, 4, 9, 8, 7, 6]], np.float32)
    warm_N = np.arange(9) < 5
    nothing = Remembered(sp.csr_array((1, 9), dtype=np.float32), sp.csr_array((1, 9), dtype=np.float32))
    out_BC = retrieve(histories([]), model_BN, nothing, np.array([], np.int64), warm_N, 4)
    assert set(out_BC[0].tolist()) == {1, 2, 3, 4, 5}
