"""Sequences and splits, on logs small enough to split by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrec.data.sequences import Cuts, build_sequences, k_core, time_cuts
from rayrec.data.training_events import training_mask
from rayrec.errors import DataError, UsageError
from rayrec.schema import ACTION_CODE, SEQUENCE_SCHEMA

V, P, C = (ACTION_CODE[name] for name in ("view", "purchase", "cart"))
TARGETS = tuple(f"{action}_{split}_at" for action in ("purchase", "cart") for split in ("valid", "test"))


def sequences(users: str, actions: list[int], times: list[int] | None = None, **options: object) -> pa.Table:
    n = len(users)
    time = np.arange(n) if times is None else np.array(times)
    settings = {"cuts": None, "max_events": 100, **options}
    return build_sequences(pa.array(list(users)), np.arange(1, n + 1), np.array(actions, np.int8), time, **settings)  # type: ignore[arg-type]


def places(table: pa.Table) -> list[tuple[int, ...]]:
    names = ("n_train", "valid_at", "test_at", *TARGETS)
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_leave_one_out() -> None:
    table = sequences("aaaaabbccc", [V, P, P, V, P, P, P, V, V, V])
    assert table.schema == SEQUENCE_SCHEMA
    assert table["user_id"].to_pylist() == ["a", "b", "c"]
    assert table["item"].to_pylist() == [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    assert places(table) == [
        (3, 3, 4, 2, 4, -1, -1),
        (2, -1, -1, -1, -1, -1, -1),
        (1, 1, 2, -1, -1, -1, -1),
    ]


def test_withheld_purchases_are_not_trained_on() -> None:
    table = sequences("aaaaa", [V, P, P, V, V])
    assert places(table) == [(3, 3, 4, 1, 2, -1, -1)]
    assert training_mask(table).tolist() == [True, False, False, False, False]


def test_carts_are_withheld_as_purchases_are() -> None:
    table = sequences("aaaaaaaabbb", [V, C, C, V, P, C, V, V, C, V, V])
    assert places(table) == [(6, 6, 7, -1, 4, 2, 5), (1, 1, 2, -1, -1, -1, -1)]
    assert training_mask(table).tolist() == [True, True, False, True, False, False, False, False, True, False, False]


def test_a_target_needs_history() -> None:
    assert places(sequences("aaa", [P, V, V])) == [(1, 1, 2, -1, -1, -1, -1)]


def test_split_by_time() -> None:
    table = sequences(
        "aaaaabbcccc", [V, V, P, C, P, V, V, C, V, V, V], [1, 2, 11, 21, 22, 1, 25, 12, 13, 14, 15], cuts=Cuts(10, 20)
    )
    assert places(table) == [(2, 2, 3, 2, 4, -1, 3), (1, *[-1] * 6), (0, *[-1] * 6)]


def test_the_cuts_leave_the_share_asked_for() -> None:
    times = np.random.default_rng(0).permutation(1000)
    cuts = time_cuts(times, "time:0.1", "time")
    assert cuts == Cuts(800, 900)


def test_what_cannot_be_cut() -> None:
    with pytest.raises(UsageError, match="order numbers"):
        time_cuts(np.arange(10), "time:0.1", "order")
    with pytest.raises(DataError, match="too coarse"):
        time_cuts(np.zeros(100, np.int64), "time:0.1", "date")
    with pytest.raises(DataError, match="too few"):
        time_cuts(np.empty(0, np.int64), "time:0.1", "time")


def test_only_the_newest_events_stay() -> None:
    table = sequences("aaaaabb", [V] * 7, max_events=3)
    assert table["item"].to_pylist() == [[3, 4, 5], [6, 7]]
    assert places(table)[0] == (1, 1, 2, -1, -1, -1, -1)


def test_no_events_no_sequences() -> None:
    assert len(sequences("", [])) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([V, P, C])), min_size=1, max_size=40), st.booleans())
@settings(max_examples=100, deadline=None)
def test_targets_lie_where_they_should(rows: list[tuple[int, int]], by_time: bool) -> None:
    rows.sort(key=lambda row: row[0])
    users, actions = "".join(str(user) for user, _ in rows), [action for _, action in rows]
    cuts = Cuts(len(rows) // 3, 2 * len(rows) // 3) if by_time else None
    table = sequences(users, actions, list(range(len(rows))), cuts=cuts)
    assert [n for items in table["item"].to_pylist() for n in items] == list(range(1, len(rows) + 1))
    for row in table.to_pylist():
        length = len(row["item"])
        targets = [row[name] for name in ("valid_at", "test_at", *TARGETS)]
        assert all(place == -1 or (0 < place < length and length >= 3) for place in targets)
        wanted = zip(targets[2:], (P, P, C, C), strict=True)
        assert all(place == -1 or row["action"][place] == action for place, action in wanted)
        assert all(place == -1 or place >= row["n_train"] for place in targets[:2])
        assert all(test == -1 or valid < test for valid, test in (targets[2:4], targets[4:]))


def test_k_core_strikes_out_in_turn() -> None:
    # user 2 goes for having one event, then item 2 for having one left, then user 1 likewise
    user, item = np.array([0, 0, 1, 1, 2, 3, 3]), np.array([0, 1, 1, 2, 2, 0, 1])
    assert k_core(user, item, 2).tolist() == [True, True, False, False, False, True, True]
    assert not k_core(user, item, 9).any()
    assert k_core(user, item, 1).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=60), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_k_core_is_one_and_the_largest(pairs: list[tuple[int, int]], k: int) -> None:
    user, item = (np.array([pair[n] for pair in pairs], np.int64) for n in (0, 1))
    kept = k_core(user, item, k)
    assert all(np.sum(user[kept] == u) >= k for u in user[kept])
    assert all(np.sum(item[kept] == i) >= k for i in item[kept])
    assert k_core(user[kept], item[kept], k).all()
