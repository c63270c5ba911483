"""What a model said is kept by what is in a history, and only what is new is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import shopfake
from hypothesis import given
from hypothesis import strategies as st

from rayrec.history import HistoryBatch, encode_history
from rayrec.ranking.newest import Newest
from rayrec.ranking.scoring import Remembering, padded

HEADS = {"next": 1.0}


class Counting(shopfake.FakeScorer):
    """Says how many candidates it was asked to score."""

    def __init__(self) -> None:
        super().__init__()
        self.scored = 0

    def fuse(
        self, history: HistoryBatch, user_BD: np.ndarray, candidates_BC: np.ndarray, heads: Mapping[str, float]
    ) -> np.ndarray:
        self.scored += np.count_nonzero(candidates_BC)
        return super().fuse(history, user_BD, candidates_BC, heads)


def histories(*visitors: list[int], action: int = 1, second: int = 1) -> HistoryBatch:
    items = [item for visitor in visitors for item in visitor]
    offsets = np.cumsum([0, *map(len, visitors)])
    times = np.arange(len(items)) * 1000 * second
    return encode_history(items, [action] * len(items), times, offsets, max_len=8, clock="time")


def fused(
    model: Remembering, history: HistoryBatch, *candidates: list[int], heads: Mapping[str, float] = HEADS
) -> tuple[np.ndarray, list[bool]]:
    rows = padded([np.array(row, np.int64) for row in candidates])
    score_BC, known_B = model.fuse(history, model.user_vectors(history), rows, heads)
    return score_BC, known_B.tolist()


lists = st.lists(st.sets(st.integers(1, 60), max_size=12).map(sorted), min_size=1, max_size=4)
pasts = st.lists(st.integers(1, 60), max_size=5)


@given(st.data())
def test_scores_are_the_model_s_whatever_was_asked_before(data: st.DataObject) -> None:
    plain, model = shopfake.FakeScorer(), Remembering(shopfake.FakeScorer(), 3)
    visitors = data.draw(st.lists(pasts, min_size=1, max_size=4))
    for _ in range(4):
        asked = data.draw(lists)
        batch = histories(*(data.draw(st.sampled_from(visitors)) for _ in asked))
        rows = padded([np.array(row, np.int64) for row in asked])
        wanted_BC = plain.fuse(batch, plain.user_vectors(batch), rows, HEADS)
        np.testing.assert_array_equal(model.user_vectors(batch), plain.user_vectors(batch))
        np.testing.assert_array_equal(fused(model, batch, *asked)[0], wanted_BC)


def test_only_what_is_new_is_computed() -> None:
    scorer = Counting()
    model, batch = Remembering(scorer, 10), histories([1, 2], [3])
    assert fused(model, batch, [1, 2, 3], [4, 5])[1] == [False, False]
    assert (scorer.calls, scorer.scored) == ([2], 5)
    assert fused(model, batch, [1, 3], [4, 5])[1] == [True, True]
    assert (scorer.calls, scorer.scored) == ([2], 5)
    assert fused(model, batch, [1, 2, 3, 9], [4, 5])[1] == [False, True]  # one candidate more
    assert (scorer.calls, scorer.scored) == ([2], 6)


def test_whatever_a_visitor_does_is_asked_anew() -> None:
    scorer = Counting()
    model = Remembering(scorer, 10)
    for changed in (histories([1, 2]), histories([1, 2, 2]), histories([2, 1]), histories([1, 2], action=2)):
        assert fused(model, changed, [1, 2])[1] == [False]
    assert fused(model, histories([1, 2], second=60), [1, 2])[1] == [False]
    assert fused(model, histories([1, 2]), [1, 2], heads={"next": 0.5})[1] == [False]
    assert fused(model, histories([1, 2]), [1, 2])[1] == [True]


def test_at_another_moment_scores_are_asked_anew_and_vectors_are_not() -> None:
    scorer = Counting()
    model, batch = Remembering(scorer, 10), histories([1, 2])
    fused(model, batch, [1, 2, 3])
    later = dataclasses.replace(batch, since_s_B=np.array([240.0], np.float32))
    assert fused(model, later, [1, 2, 3])[1] == [False]
    assert (scorer.calls, scorer.scored) == ([1], 6)
    assert fused(model, batch, [1, 2, 3])[1] == fused(model, later, [1, 2, 3])[1] == [True]
    scorer.reads_moment = False
    model = Remembering(scorer, 10)
    fused(model, batch, [1, 2, 3])
    assert fused(model, later, [1, 2, 3])[1] == [True], "a model that does not read it says the same"


def test_padding_changes_nothing_of_who_is_who() -> None:
    alone, beside = histories([1, 2]), histories([1, 2], [1, 2, 3, 4, 5])
    assert alone.digests()[0] == beside.digests()[0] == beside.take([1, 0]).digests()[1]
    assert len({*beside.digests(), *histories([]).digests()}) == 3


def test_nothing_is_kept_where_nothing_may_be() -> None:
    model = Remembering(shopfake.FakeScorer(), 0)
    for _ in range(2):
        assert fused(model, histories([1]), [1, 2])[1] == [False]


def test_a_model_that_fails_leaves_nothing_behind() -> None:
    scorer = shopfake.FakeScorer()
    model = Remembering(scorer, 10)
    scorer.broken = "fuse"
    with pytest.raises(RuntimeError):
        fused(model, histories([1]), [1, 2])
    scorer.broken = None
    assert fused(model, histories([1]), [1, 2])[1] == [False]


def test_the_newest_are_held() -> None:
    held: Newest[int] = Newest(2)
    held.put(b"a", 1)
    held.put(b"b", 2)
    assert held.get(b"a") == 1
    held.put(b"c", 3)  # b was not used for the longest
    assert [held.get(key) for key in (b"a", b"b", b"c")] == [1, None, 3]
