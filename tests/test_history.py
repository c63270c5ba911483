"""The encoder of behaviour against a loop that is slow and plainly right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.history import MAX_GAP_S, HistoryBatch, encode_history
from rayrec.schema import ACTION_CODE, ACTIONS

DAY_MS = 86_400_000
FIELDS = ("item_BL", "action_BL", "gap_s_BL", "hour_BL", "seen_BL", "length_B", "since_s_B", "now_hour_B")

Event = tuple[int, int, int]
"""(item, action, time_ms)"""


def asked_ms(history: list[Event]) -> int:
    """Some time after the last event, or a little before: clocks differ."""
    return sum(item * time_ms for item, _, time_ms in history[-1:]) - 1000


def encode(histories: list[list[Event]], max_len: int, clock: str, **reads: Any) -> HistoryBatch:
    reads = {"asked_ms": [asked_ms(history) for history in histories], **reads}
    events = [event for history in histories for event in history]
    item, action, time_ms = zip(*events, strict=True) if events else ((), (), ())
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories], dtype=np.int64)])
    return encode_history(item, action, time_ms, offsets, max_len=max_len, clock=clock, **reads)


def encode_slowly(histories: list[list[Event]], max_len: int, clock: str) -> dict[str, Any]:
    rows: dict[str, list[Any]] = {name: [] for name in FIELDS}
    for history in histories:
        newest = history[-max_len:]
        padding = max_len - len(newest)
        gaps, hours, seen = [], [], []
        for place, (item, _, time_ms) in enumerate(newest):
            gap_s = (time_ms - newest[place - 1][2]) / 1000 if place and clock != "order" else 0.0
            gaps.append(min(max(gap_s, 0.0), MAX_GAP_S))
            hours.append(time_ms // 1000 % 86_400 / 3600 if clock == "time" else -1.0)
            seen.append(item in [earlier for earlier, _, _ in newest[:place]])
        rows["item_BL"].append([item for item, _, _ in newest] + [0] * padding)
        rows["action_BL"].append([action for _, action, _ in newest] + [0] * padding)
        rows["gap_s_BL"].append(gaps + [0.0] * padding)
        rows["hour_BL"].append(hours + [-1.0] * padding)
        rows["seen_BL"].append(seen + [False] * padding)
        rows["length_B"].append(len(newest))
        since_s = steps_down((asked_ms(history) - newest[-1][2]) / 1000) if newest and clock != "order" else -1
        rows["since_s_B"].append(since_s)
        rows["now_hour_B"].append(asked_ms(history) // 3_600_000 % 24 if clock == "time" else -1)
    return rows


def steps_down(since_s: float) -> float:
    step_s = 60.0
    while since_s >= 2 * step_s:
        step_s *= 2
    return step_s if since_s >= 60 else 0.0


histories = st.lists(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 15), st.integers(0, 3 * DAY_MS)), max_size=8).map(
        lambda events: sorted(events, key=lambda event: event[2])
    ),
    max_size=6,
)


@given(histories, st.integers(1, 10), st.sampled_from(["time", "date", "order"]))
def test_it_equals_a_plain_loop(histories: list[list[Event]], max_len: int, clock: str) -> None:
    batch, slow = encode(histories, max_len, clock), encode_slowly(histories, max_len, clock)
    for name in FIELDS:
        expected = np.array(slow[name], np.float32).reshape(getattr(batch, name).shape)
        np.testing.assert_allclose(getattr(batch, name), expected, rtol=1e-6, err_msg=name)


@given(histories, st.integers(1, 10))
def test_a_history_that_was_cut_before_gives_the_same(histories: list[list[Event]], max_len: int) -> None:
    whole, cut = encode(histories, max_len, "time"), encode([h[-max_len:] for h in histories], max_len, "time")
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name), err_msg=name)


@given(histories, st.integers(1, 10))
def test_a_visitor_is_encoded_the_same_alone_and_in_a_batch(histories: list[list[Event]], max_len: int) -> None:
    together = encode(histories, max_len, "time")
    for b, history in enumerate(histories):
        alone = encode([history], max_len, "time")
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(together, name)[b], getattr(alone, name)[0], err_msg=name)


@given(histories, st.integers(1, 8), st.sets(st.sampled_from(ACTIONS[:3]), min_size=1))
def test_events_that_are_not_read_are_as_if_never_logged(
    histories: list[list[Event]], max_len: int, actions: set[str]
) -> None:
    codes = {ACTION_CODE[action] for action in actions}
    bare = [[event for event in history if event[1] in codes] for history in histories]
    asked = [10 * DAY_MS] * len(histories)
    found = encode(histories, max_len, "time", actions=sorted(actions), asked_ms=asked)
    expected = encode(bare, max_len, "time", asked_ms=asked)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_types_and_shapes() -> None:
    batch = encode([[(1, 1, 0)], [(2, 1, 5), (3, 2, 9)]], max_len=4, clock="time")
    assert len(batch) == 2
    assert {name: (getattr(batch, name).dtype.name, getattr(batch, name).shape) for name in FIELDS} == {
        "item_BL": ("int64", (2, 4)),
        "action_BL": ("int64", (2, 4)),
        "gap_s_BL": ("float32", (2, 4)),
        "hour_BL": ("float32", (2, 4)),
        "seen_BL": ("bool", (2, 4)),
        "length_B": ("int64", (2,)),
        "since_s_B": ("float32", (2,)),
        "now_hour_B": ("float32", (2,)),
    }


def test_no_visitors_and_no_events() -> None:
    assert encode([], max_len=3, clock="time").item_BL.shape == (0, 3)
    empty = encode([[], []], max_len=3, clock="time")
    assert empty.length_B.tolist() == [0, 0]
    assert (empty.item_BL == 0).all()
    assert (empty.hour_BL == -1).all()
    assert (empty.since_s_B == -1).all()


def test_who_does_not_say_when_is_not_guessed_at() -> None:
    batch = encode([[(1, 1, 0)]], 2, "time", asked_ms=None)
    assert batch.since_s_B.tolist() == [-1]
    assert batch.now_hour_B.tolist() == [-1]


def test_a_moment_is_the_same_for_a_while_and_then_another() -> None:
    batches = [encode([[(1, 1, 0)]], 2, "time", asked_ms=[minute * 60_000]) for minute in (4, 7, 8)]
    moment = [batch.moments()[0] for batch in batches]
    assert moment[0] == moment[1] != moment[2]
    assert len({batch.digests()[0] for batch in batches}) == 1, "the events are the same"


def test_narrow_types_as_stored_are_taken() -> None:
    batch = encode_history(
        np.array([7], np.int32), np.array([6], np.int8), np.array([10**12]), np.array([0, 1], np.int32),
        max_len=2, clock="time",
    )  # fmt: skip
    assert batch.item_BL.tolist() == [[7, 0]]
    assert batch.action_BL.tolist() == [[6, 0]]


@pytest.mark.parametrize(
    ("clock", "gaps", "hours"),
    [
        ("time", [0, 86_400, 3600], [23, 23, 0]),
        ("date", [0, 86_400, 3600], [-1, -1, -1]),
        ("order", [0, 0, 0], [-1, -1, -1]),
    ],
)
def test_what_each_clock_tells(clock: str, gaps: list[float], hours: list[float]) -> None:
    start = 23 * 3_600_000
    batch = encode([[(1, 1, start), (1, 1, start + DAY_MS), (1, 1, start + DAY_MS + 3_600_000)]], 3, clock)
    assert batch.gap_s_BL.tolist() == [gaps]
    assert batch.hour_BL.tolist() == [hours]


def test_the_last_millisecond_of_a_day_is_before_24() -> None:
    hour = encode([[(1, 1, DAY_MS - 1), (1, 1, -1)]], 2, "time").hour_BL
    assert (hour >= 23.99).all()
    assert (hour < 24).all()


def test_gaps_are_bounded_and_never_negative() -> None:
    batch = encode([[(1, 1, 10_000), (1, 1, 5_000), (1, 1, 10 * 365 * DAY_MS)]], 3, "time")
    assert batch.gap_s_BL.tolist() == [[0, 0, MAX_GAP_S]]
