from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data import cooccurrence
from rayrec.data.cooccurrence import count_together, count_transitions, row_shares
from rayrec.data.training_events import TrainingEvents, training_mask
from rayrec.followers import strongest

visitors = st.lists(st.lists(st.integers(0, 6), max_size=9), max_size=6)


def end_to_end(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item for items in lists for item in items], np.int64), np.cumsum([0, *map(len, lists)])


def test_transitions_do_not_cross_visitors() -> None:
    counts = count_transitions(*end_to_end([[1, 2, 3], [], [3, 3]]), 3).toarray()
    assert {(i, j): counts[i, j] for i, j in zip(*np.nonzero(counts), strict=True)} == {
        (1, 2): 1,
        (2, 3): 1,
        (3, 3): 1,
    }


@given(visitors, st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=1, max_size=4))
def test_transitions_equal_the_plain_loop(lists: list[list[int]], weights: list[float]) -> None:
    expected = np.zeros((7, 7))
    for items in lists:
        for later, after in enumerate(items):
            for distance, weight in enumerate(weights, start=1):
                if later - distance >= 0 and after and items[later - distance]:
                    expected[items[later - distance], after] += weight
    np.testing.assert_array_equal(count_transitions(*end_to_end(lists), 6, weights=weights).toarray(), expected)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    flat = end_to_end([rng.integers(1, 9, n).tolist() for n in rng.integers(0, 20, 30)])
    whole = count_transitions(*flat, 8, weights=(1, 0.5))
    monkeypatch.setattr(cooccurrence, "CHUNK_EVENTS", 7)
    np.testing.assert_array_equal(count_transitions(*flat, 8, weights=(1, 0.5)).toarray(), whole.toarray())


@given(visitors)
def test_together_is_symmetric_and_knows_no_self(lists: list[list[int]]) -> None:
    counts = count_together(*end_to_end(lists), 6, window=3)
    np.testing.assert_array_equal(counts.toarray(), counts.toarray().T)
    assert not counts.diagonal().any()
    assert (counts.data > 0).all()


def test_strongest_keeps_the_greatest_then_the_lowest_column() -> None:
    counts = count_transitions(*end_to_end([[1, 3, 1, 3, 1, 2], [1, 4], [2, 1]]), 4)
    assert counts.toarray()[1].tolist() == [0, 0, 1, 2, 1]
    assert strongest(counts, 2).toarray()[1].tolist() == [0, 0, 1, 2, 0]
    assert strongest(counts, 0).nnz == 0
    np.testing.assert_array_equal(strongest(counts, 9).toarray(), counts.toarray())


def test_row_shares_sum_to_one_or_stay_empty() -> None:
    shares = row_shares(count_transitions(*end_to_end([[1, 2, 1, 3]]), 3)).toarray()
    assert shares.sum(axis=1).tolist() == [0, 1, 1, 0]


def sequences(*rows: tuple[list[int], int, int, int, int, int]) -> pa.Table:
    """Rows of (items, n_train, purchase_valid_at, purchase_test_at, cart_valid_at, cart_test_at)."""
    item, n_train, *targets = zip(*rows, strict=True)
    names = ("purchase_valid_at", "purchase_test_at", "cart_valid_at", "cart_test_at")
    return pa.table(
        {
            "item": pa.array(item, pa.list_(pa.int32())),
            "n_train": pa.array(n_train, pa.int32()),
            **{name: pa.array(places, pa.int32()) for name, places in zip(names, targets, strict=True)},
        }
    )


def test_training_leaves_out_held_out_events_and_targets_of_actions() -> None:
    table = sequences(
        ([1, 2, 3, 4, 5], 3, -1, 1, -1, -1), ([6, 7, 8, 9], 4, -1, -1, 1, 3), ([8, 9, 10], 1, 1, 2, -1, -1)
    )
    assert training_mask(table).tolist() == [1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0]
    for part in (table, pa.concat_tables([table.slice(0, 1), table.slice(1)])):
        events = TrainingEvents.of(part)
        assert events.item_E.tolist() == [1, 3, 6, 8, 8]
        assert events.offsets.tolist() == [0, 2, 4, 5]


def test_training_events_of_no_visitor() -> None:
    events = TrainingEvents.of(sequences(([], 0, -1, -1, -1, -1)).slice(1))
    assert events.item_E.tolist() == []
    assert events.offsets.tolist() == [0]
