"""All events of some visitors, cleaned of what only other rows can show: repeats, robots, cancelled purchases.

In: canonical events of whole visitors (`origin` tells where each row came from). Out: the events that stay, sorted
by visitor and time, and which rows went and why. It must not know files, partitions or Ray.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.config import CleanConfig
from rayrec.data.clock import Clock
from rayrec.data.events import Mask
from rayrec.history import Ints
from rayrec.schema import ACTION_CODE

HOUR_MS = 3_600_000
PURCHASE, CANCEL, IMPRESSION = ACTION_CODE["purchase"], ACTION_CODE["cancel"], ACTION_CODE["impression"]


@dataclass
class Cleaned:
    """What became of the events. `gone`: reason to rows; `collapsed`: rows that were folded into an equal one."""

    events: pa.Table
    collapsed: pa.Table
    gone: list[tuple[str, pa.Table]] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)

    def reject(self, where_R: Mask, reason: str) -> None:
        """Take the rows at `where_R` out of `events`."""
        if where_R.any():
            self.gone.append((reason, self.events.filter(pa.array(where_R))))
            self.events = self.events.filter(pa.array(~where_R))


def clean_visitors(events: pa.Table, clean: CleanConfig, clock: Clock) -> Cleaned:
    """Clean the events of whole visitors: `events` has unique `event_id`s and any order.

    Equal rows without an event_id collapse into the first; robots go; cancellations annul their purchases.
    """
    cleaned = collapse_repeats(sort_events(events))
    if clock == "time" and clean.bot_events_per_hour:
        cleaned.reject(robots(cleaned.events, clean), "bot")
    _annul_purchases(cleaned)
    return cleaned


def sort_events(events: pa.Table) -> pa.Table:
    """Sorted by (user_id, time_ms), and as in the input where these are equal."""
    order = np.lexsort((_ints(events, "origin"), _ints(events, "time_ms"), alphabetical(events["user_id"])))
    return events.take(pa.array(order)).combine_chunks()


def alphabetical(column: pa.ChunkedArray) -> Ints:
    """The rank of each value among the distinct values of a text column, in byte order. [R] int64."""
    distinct = column.combine_chunks().dictionary_encode()
    rank = np.empty(len(distinct.dictionary) + 1, np.int64)
    rank[pc.sort_indices(distinct.dictionary).to_numpy()] = np.arange(len(distinct.dictionary))
    rank[-1] = -1  # null
    return rank[pc.fill_null(distinct.indices, len(distinct.dictionary)).to_numpy(zero_copy_only=False)]


def starts(key_R: npt.NDArray[np.generic]) -> Mask:
    """Where a new run of equal values begins. [R] bool."""
    return np.r_[True, key_R[1:] != key_R[:-1]][: len(key_R)]


def _ints(events: pa.Table, name: str) -> Ints:
    return np.asarray(events[name].to_numpy(), np.int64)


# ---------------------------------------------------------------- repeats


def collapse_repeats(events: pa.Table) -> Cleaned:
    """Fold equal rows without an event_id into the first; purchases and cancellations add their quantities up.

    `events` is sorted. A quantity that is not stated counts as 1 once such rows meet.
    """
    user_R, time_R = alphabetical(events["user_id"]), _ints(events, "time_ms")
    new_R = starts(user_R) | starts(time_R)
    tied_R = ~new_R | np.r_[~new_R[1:], False][: len(new_R)]  # only rows at one moment can be equal
    if "event_id" in events.column_names:
        tied_R &= events["event_id"].is_null().to_numpy()
    tie_T = np.flatnonzero(tied_R)
    if not len(tie_T):
        return Cleaned(events, events.slice(0, 0))
    tied = events.take(pa.array(tie_T))
    keys = [np.cumsum(new_R)[tie_T], *(_codes(tied, name) for name in tied.column_names if name not in _NOT_COMPARED)]
    order_T = np.lexsort((tie_T, *reversed(keys)))
    first_T = np.logical_or.reduce([starts(key[order_T]) for key in keys])
    kept_T = tie_T[order_T][np.maximum.accumulate(np.where(first_T, np.arange(len(order_T)), 0))]
    repeat_R = np.zeros(len(events), bool)
    repeat_R[tie_T[order_T][~first_T]] = True
    summed = _sum_quantities(events, tie_T[order_T], kept_T)
    return Cleaned(summed.filter(pa.array(~repeat_R)), events.filter(pa.array(repeat_R)))


_NOT_COMPARED = ("user_id", "time_ms", "origin", "event_id")


def _codes(table: pa.Table, name: str) -> Ints:
    """Equal values, equal codes; null is a value of its own."""
    distinct = table[name].combine_chunks().dictionary_encode(null_encoding="encode")
    return np.asarray(distinct.indices.to_numpy(zero_copy_only=False), np.int64)


def _sum_quantities(events: pa.Table, row_T: Ints, kept_T: Ints) -> pa.Table:
    """Give each kept purchase or cancellation the quantities of the rows folded into it (row_T into kept_T)."""
    action_R = _ints(events, "action")
    folded_T = (row_T != kept_T) & np.isin(action_R[row_T], (PURCHASE, CANCEL))
    if not folded_T.any():
        return events
    if "quantity" not in events.column_names:
        events = events.append_column("quantity", pa.nulls(len(events), pa.float64()))
    quantity_R = _quantities(events)
    stated_R = np.where(np.isnan(quantity_R), 1.0, quantity_R)
    total_R = quantity_R.copy()
    total_R[kept_T[folded_T]] = stated_R[kept_T[folded_T]]
    np.add.at(total_R, kept_T[folded_T], stated_R[row_T[folded_T]])
    return _with_quantities(events, total_R)


def _quantities(events: pa.Table) -> npt.NDArray[np.float64]:
    return np.array(events["quantity"].to_numpy(), np.float64)


def _with_quantities(events: pa.Table, quantity_R: npt.NDArray[np.float64]) -> pa.Table:
    column = pa.array(quantity_R, mask=np.isnan(quantity_R))
    return events.set_column(events.column_names.index("quantity"), "quantity", column)


# ---------------------------------------------------------------- robots


def robots(events: pa.Table, clean: CleanConfig) -> Mask:
    """Rows of visitors who do more than `bot_events_per_hour` within some hour. [R] bool; `events` is sorted.

    Purchases, cancellations and impressions do not count: a shop books big orders line by line, and shows whole
    pages; neither makes the visitor a robot.
    """
    user_R = np.cumsum(starts(alphabetical(events["user_id"]))) - 1
    action_R = _ints(events, "action")
    counted = np.flatnonzero(~np.isin(action_R, (PURCHASE, CANCEL, IMPRESSION)))
    user_C, time_C = user_R[counted], _ints(events, "time_ms")[counted]
    width = clean.bot_events_per_hour
    hasty_C = (user_C[width:] == user_C[:-width]) & (time_C[width:] - time_C[:-width] < HOUR_MS)
    suspects = np.unique(user_C[width:][hasty_C])
    busy = np.bincount(user_R, minlength=1)[suspects] >= clean.bot_min_events
    return np.isin(user_R, suspects[busy])


# ---------------------------------------------------------------- cancellations


def _annul_purchases(cleaned: Cleaned) -> None:
    """Match each cancellation with the latest earlier purchase of the same visitor and item that is large enough.

    A purchase whose whole quantity is cancelled goes with its cancellation; one that is cancelled in part is reduced.
    A cancellation that states no quantity takes the whole purchase.
    """
    events = cleaned.events
    action_R = _ints(events, "action")
    if not (action_R == CANCEL).any():
        return
    quantity_R = _quantities(events) if "quantity" in events.column_names else np.full(len(events), np.nan)
    left_R = quantity_R.copy()
    annulled, used, lone = [np.zeros(len(events), bool) for _ in range(3)]
    reduced: set[int] = set()
    open_purchases: dict[int, list[int]] = defaultdict(list)
    for row, key in _rows_with_cancellations(events, action_R):
        if action_R[row] == PURCHASE:
            open_purchases[key].append(row)
            continue
        purchases = open_purchases[key]
        wanted = quantity_R[row]
        match = next((p for p in reversed(purchases) if _covers(left_R[p], wanted)), None)
        if match is None:
            lone[row] = True
            continue
        used[row] = True
        if np.isnan(wanted) or np.isnan(left_R[match]) or left_R[match] == wanted:
            annulled[match] = True
            purchases.remove(match)
            reduced.discard(match)
        else:
            left_R[match] -= wanted
            reduced.add(match)
    if reduced:
        cleaned.events = _with_quantities(events, left_R)
        cleaned.repairs["purchase_reduced_by_cancel"] += len(reduced)
    reason_R = np.select([annulled, used, lone], [1, 2, 3], 0)
    for code, reason in enumerate(("cancelled", "cancels_a_purchase", "cancel_without_purchase"), start=1):
        cleaned.reject(reason_R == code, reason)
        reason_R = reason_R[reason_R != code]


def _covers(left: float, wanted: float) -> bool:
    return bool(np.isnan(wanted) or np.isnan(left) or left >= wanted)


def _rows_with_cancellations(events: pa.Table, action_R: Ints) -> list[tuple[int, int]]:
    """Purchases and cancellations, oldest first, of each visitor and item with any cancellation: (row, key)."""
    booked = np.flatnonzero(np.isin(action_R, (PURCHASE, CANCEL)))
    user_B = np.cumsum(starts(alphabetical(events["user_id"])))[booked]
    item_B = _codes(events, "item_id")[booked]
    key_B = user_B * (int(item_B.max()) + 1) + item_B
    chosen_B = np.isin(key_B, key_B[action_R[booked] == CANCEL])
    return list(zip(booked[chosen_B].tolist(), key_B[chosen_B].tolist(), strict=True))
