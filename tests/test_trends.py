"""What is on now, counted from the newest events."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shopfake import FakeScorer

from rayrec.ranking import trends
from rayrec.ranking.trends import HOUR_MS, Trends, nothing
from rayrec.state.protocol import Happening

CATALOGUE = FakeScorer().catalogue
IDS = CATALOGUE.ids.tolist()
NOW_MS = 1_700_000_000_000


def happened(*items: int, after: int | None = None, hours_ago: float = 0, seq: int = 1) -> list[Happening]:
    time_ms = int(NOW_MS - hours_ago * HOUR_MS)
    return [
        Happening(seq + n, IDS[item], "view", time_ms, None if after is None else IDS[after])
        for n, item in enumerate(items)
    ]


def test_popular_is_what_was_met_most_within_the_window() -> None:
    on = Trends(24)
    on.add(happened(5, 5, 5, 5, hours_ago=25))
    on.add(happened(3, 2, 3, 4, 3, 2))
    assert on.over(CATALOGUE, NOW_MS).popular.tolist() == [3, 2, 4]
    assert on.over(CATALOGUE, NOW_MS + 25 * HOUR_MS).popular.tolist() == []


def test_what_follows_what() -> None:
    on = Trends(24)
    on.add(happened(3, 3, 7, after=2))
    on.add(happened(2, after=2))
    follows = on.over(CATALOGUE, NOW_MS).follows
    assert {(row, column): follows[row, column] for row, column in zip(*follows.nonzero(), strict=True)} == {
        (2, 3): 2.0, (2, 7): 1.0
    }  # fmt: skip


def test_items_that_the_catalogue_has_not_count_for_nothing() -> None:
    on = Trends(24)
    on.add([Happening(1, "unheard of", "view", NOW_MS, IDS[1]), Happening(2, IDS[1], "view", NOW_MS, "unheard of")])
    trend = on.over(CATALOGUE, NOW_MS)
    assert (trend.popular.tolist(), trend.follows.nnz, on.seq) == ([1], 0, 2)


def test_without_a_window_nothing_is_on() -> None:
    trend = nothing(CATALOGUE)
    assert (len(trend.popular), trend.follows.nnz, trend.follows.shape) == (0, 0, (len(IDS), len(IDS)))


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(1, 9)), max_size=12), max_size=8))
def test_of_many_the_newest_count(batches: list[list[tuple[int, int | None]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trends, "KEEP_HAPPENINGS", 10)
        on, told = Trends(24), []
        for batch in batches:
            new = [happened(item, after=before, seq=len(told) + n)[0] for n, (item, before) in enumerate(batch)]
            on.add(new)
            told += batch
            trend = on.over(CATALOGUE, NOW_MS)
            newest = told[-10:]
            met = Counter(item for item, _ in newest)
            assert trend.popular.tolist() == sorted(met, key=lambda item: (-met[item], item))
            pairs = Counter((before, item) for item, before in newest if before not in (None, item))
            dense = np.zeros(trend.follows.shape)
            for cell, n in pairs.items():
                dense[cell] = n
            assert np.array_equal(trend.follows.toarray(), dense)
