"""Clean events to visitors' sequences: the splits, and the k-core.

In: events sorted by visitor and time, as arrays. Out: `schema.SEQUENCE_SCHEMA`. It must not know files or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrec.data.events import Mask
from rayrec.data.visitors import starts
from rayrec.errors import DataError, UsageError
from rayrec.history import Ints
from rayrec.schema import ACTION_CODE, SEQUENCE_SCHEMA, TARGET_ACTIONS

MIN_EVENTS = 3
"""Visitors with fewer events train but are not tested."""


@dataclass(frozen=True)
class Cuts:
    """A split by global time: validation is [valid_ms, test_ms), test is from test_ms on."""

    valid_ms: int
    test_ms: int


def time_cuts(time_ms: Ints, split: str, clock: str) -> Cuts:
    """The cuts of a split `time:<f>` over all engagements' times ([E], any order).

    At least the share f of the events lies in test, and as much in validation (equal times stay together).
    Raises UsageError on a clock that has no times, DataError if no event is left for training.
    """
    if clock == "order":
        raise UsageError(f"split={split}: these timestamps are order numbers, not times; use split=loo")
    share = float(split.partition(":")[2])
    places = [int(len(time_ms) * (1 - part * share)) for part in (2, 1)]
    if not len(time_ms) or places[0] < 1:
        raise DataError(f"split={split}: {len(time_ms)} events are too few to split")
    ordered = np.partition(time_ms, places)
    cuts = Cuts(int(ordered[places[0]]), int(ordered[places[1]]))
    if cuts.valid_ms >= cuts.test_ms or cuts.valid_ms <= int(time_ms.min()):
        raise DataError(f"split={split}: the times are too few or too coarse to cut into three; use split=loo")
    return cuts


def build_sequences(
    user: pa.Array, item_E: Ints, action_E: Ints, time_E: Ints, cuts: Cuts | None, max_events: int
) -> pa.Table:
    """Sequences of all visitors, from their engagements sorted by visitor and time ([E] each).

    user: [E] string; item_E: item index; action_E: schema.ACTION_CODE. Only a visitor's newest `max_events` stay.
    """
    if not len(item_E):
        return SEQUENCE_SCHEMA.empty_table()
    code_E = np.asarray(user.dictionary_encode().indices.to_numpy(), np.int64)
    start_U = np.flatnonzero(starts(code_E))
    length_E = np.repeat(np.diff(np.r_[start_U, len(code_E)]), np.diff(np.r_[start_U, len(code_E)]))
    place_E = np.arange(len(code_E)) - np.repeat(start_U, np.diff(np.r_[start_U, len(code_E)]))
    new_E = place_E >= length_E - max_events
    start_U = np.cumsum(np.r_[0, np.minimum(np.diff(np.r_[start_U, len(code_E)]), max_events)])
    item_E, action_E, time_E = item_E[new_E], action_E[new_E], time_E[new_E]
    offsets = pa.array(start_U.astype(np.int32))
    split = leave_one_out(start_U, action_E) if cuts is None else split_by_time(start_U, action_E, time_E, cuts)
    table = pa.table(
        {
            "user_id": user.filter(pa.array(new_E)).take(pa.array(start_U[:-1])),
            "item": pa.ListArray.from_arrays(offsets, pa.array(item_E.astype(np.int32))),
            "action": pa.ListArray.from_arrays(offsets, pa.array(action_E.astype(np.int8))),
            "time_ms": pa.ListArray.from_arrays(offsets, pa.array(time_E)),
            **{name: pa.array(places.astype(np.int32)) for name, places in split.items()},
        }
    )
    return table.select(SEQUENCE_SCHEMA.names).cast(SEQUENCE_SCHEMA)


# ---------------------------------------------------------------- splits


def leave_one_out(offsets: Ints, action_E: Ints) -> dict[str, Ints]:
    """Places of the split, [U] each: the last event is the test, the one before it the validation.

    Likewise the last purchase and the one before it, wherever they lie, for the purchase protocol, and so for each
    of TARGET_ACTIONS. A target needs an event before it, a visitor MIN_EVENTS events; -1 is "none".
    """
    length_U = np.diff(offsets)
    tested_U = length_U >= MIN_EVENTS
    places = {
        "n_train": np.where(tested_U, length_U - 2, length_U),
        "valid_at": np.where(tested_U, length_U - 2, -1),
        "test_at": np.where(tested_U, length_U - 1, -1),
    }
    for action in TARGET_ACTIONS:
        last_U, before_U = _last_two(offsets, action_E == ACTION_CODE[action])
        places[f"{action}_valid_at"] = np.where(tested_U & (before_U > 0), before_U, -1)
        places[f"{action}_test_at"] = np.where(tested_U & (last_U > 0), last_U, -1)
    return places


def split_by_time(offsets: Ints, action_E: Ints, time_E: Ints, cuts: Cuts) -> dict[str, Ints]:
    """Places of the split, [U] each: a target is a visitor's first event in a window of time.

    The first of all, and the first of each of TARGET_ACTIONS.
    """
    tested_U = np.diff(offsets) >= MIN_EVENTS
    valid_E = (time_E >= cuts.valid_ms) & (time_E < cuts.test_ms)
    test_E = time_E >= cuts.test_ms
    before_U = np.add.reduceat((time_E < cuts.valid_ms).astype(np.int64), offsets[:-1])

    def target(where_E: Mask) -> Ints:
        place_U = _first(offsets, where_E)
        return np.where(tested_U & (place_U > 0), place_U, -1)

    places = {"n_train": before_U, "valid_at": target(valid_E), "test_at": target(test_E)}
    for action in TARGET_ACTIONS:
        wanted_E = action_E == ACTION_CODE[action]
        places[f"{action}_valid_at"] = target(valid_E & wanted_E)
        places[f"{action}_test_at"] = target(test_E & wanted_E)
    return places


def _first(offsets: Ints, where_E: Mask) -> Ints:
    """The place of the first marked event of each visitor, -1 if there is none."""
    marked = np.flatnonzero(where_E)
    user_M = np.searchsorted(offsets, marked, side="right") - 1
    first_U = np.full(len(offsets) - 1, -1, np.int64)
    first_U[user_M[::-1]] = (marked - offsets[:-1][user_M])[::-1]
    return first_U


def _last_two(offsets: Ints, where_E: Mask) -> tuple[Ints, Ints]:
    """The places of the last marked event of each visitor and of the one before it, -1 if there is none."""
    marked = np.flatnonzero(where_E)
    user_M = np.searchsorted(offsets, marked, side="right") - 1
    place_M = marked - offsets[:-1][user_M]
    last_U = np.full(len(offsets) - 1, -1, np.int64)
    before_U = last_U.copy()
    last_U[user_M] = place_M
    same_M = user_M[1:] == user_M[:-1]
    before_U[user_M[:-1][same_M]] = place_M[:-1][same_M]
    return last_U, before_U


# ---------------------------------------------------------------- k-core


def k_core(user_E: Ints, item_E: Ints, k: int) -> npt.NDArray[np.bool_]:
    """The events of the largest set in which every user and every item has at least `k` events. [E] bool.

    user_E, item_E: [E] codes from 0. Users and items below k are struck out in turn until none is left to strike
    (Batagelj and Zaversnik 2003, on the bipartite multigraph of events).
    """
    kept_E = np.ones(len(user_E), bool)
    while True:
        n_user = np.bincount(user_E[kept_E], minlength=1)
        n_item = np.bincount(item_E[kept_E], minlength=1)
        few_E = kept_E.copy()
        few_E[kept_E] = (n_user[user_E[kept_E]] < k) | (n_item[item_E[kept_E]] < k)
        if not few_E.any():
            return kept_E
        kept_E &= ~few_E
