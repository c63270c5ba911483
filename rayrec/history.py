"""The one encoder of behaviour: visitors' events to padded arrays, for training and serving alike.

In: item indices, action codes and times. Out: a `HistoryBatch` of numpy arrays. It must not know models or files.
Because both sides call this function, training and serving cannot drift apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rayrec.schema import ACTION_CODE, ACTIONS

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]

MAX_GAP_S = 365 * 86_400.0
UNKNOWN = -1.0


@dataclass(frozen=True)
class HistoryBatch:
    """Histories of B visitors, oldest event first, padded on the right to L.

    item_BL    [B, L] int64    item index; 0 is padding
    action_BL  [B, L] int64    action code (schema.ACTION_CODE); 0 is padding
    gap_s_BL   [B, L] float32  seconds since the event before; 0 for the first of the L, and always on clock "order"
    hour_BL    [B, L] float32  hour of the day in UTC, [0, 24); -1 where the clock has no time of day, or padding
    seen_BL    [B, L] bool     the item occurred earlier among these L events
    length_B   [B]    int64    events that are not padding; 0 for a visitor without history

    And of the moment at which the visitor asks, UNKNOWN (-1) where it is not told, or the clock cannot tell:

    since_s_B  [B]    float32  seconds since the newest of the events, see `rounded_down`; unknown without any
    now_hour_B [B]    float32  hour of the day in UTC, whole
    """

    item_BL: Ints
    action_BL: Ints
    gap_s_BL: Floats
    hour_BL: Floats
    seen_BL: npt.NDArray[np.bool_]
    length_B: Ints
    since_s_B: Floats
    now_hour_B: Floats

    def __len__(self) -> int:
        return len(self.length_B)

    def take(self, rows: Sequence[int]) -> HistoryBatch:
        """Only the histories `rows`."""
        return HistoryBatch(**{name: values[list(rows)] for name, values in vars(self).items()})

    def digests(self) -> list[bytes]:
        """What tells the events of each history from all others: a hash of them, whatever they are padded to."""
        columns = (self.item_BL, self.action_BL, self.gap_s_BL, self.hour_BL, self.seen_BL)
        return [
            hashlib.blake2b(b"".join(values_BL[b, :length].tobytes() for values_BL in columns), digest_size=16).digest()
            for b, length in enumerate(self.length_B.tolist())
        ]

    def moments(self) -> list[bytes]:
        """What tells the moment at which each visitor asks from all others, 8 bytes each."""
        return [moment_2.tobytes() for moment_2 in np.stack([self.since_s_B, self.now_hour_B], 1)]


def encode_history(
    item: npt.ArrayLike,
    action: npt.ArrayLike,
    time_ms: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    max_len: int,
    clock: str,
    actions: Sequence[str] = ACTIONS,
    asked_ms: npt.ArrayLike | None = None,
) -> HistoryBatch:
    """Encode the events of B visitors, laid end to end.

    item, action, time_ms: [E], all visitors' events one after another, oldest first within a visitor.
    offsets: [B + 1], from 0 to E; visitor b's events are offsets[b] : offsets[b + 1].
    max_len: L; only the newest L events of a visitor are kept.
    clock: "time", "date" or "order"; gaps need time or date, hours need time.
    actions: what the model reads; events of other actions are dropped before anything else, as if never logged.
    asked_ms: [B], the moment for which each visitor asks, where it is told.

    >>> batch = encode_history([5, 7, 5], [1, 1, 2], [0, 1000, 3000], [0, 3], max_len=4, clock="time")
    >>> batch.item_BL.tolist(), batch.gap_s_BL.tolist(), batch.seen_BL.tolist()
    ([[5, 7, 5, 0]], [[0.0, 1.0, 2.0, 0.0]], [[False, False, True, False]])
    """
    bounds = np.asarray(offsets, np.int64)
    read_E = is_read(np.asarray(action, np.int64), actions)
    if not read_E.all():
        bounds = np.concatenate([[0], np.cumsum(read_E)])[bounds]
        item, action, time_ms = (np.asarray(values, np.int64)[read_E] for values in (item, action, time_ms))
    length_B = np.minimum(np.diff(bounds), max_len)
    real_BL = np.arange(max_len) < length_B[:, None]
    # Truncate before anything is derived: a served history that was cut elsewhere gives the same numbers.
    source_E = ((bounds[1:] - length_B)[:, None] + np.arange(max_len))[real_BL]
    visitor_E, first_E = np.nonzero(real_BL)[0], np.nonzero(real_BL)[1] == 0
    item_E = np.asarray(item, np.int64)[source_E]
    action_E = np.asarray(action, np.int64)[source_E]
    time_E = np.asarray(time_ms, np.int64)[source_E]

    gap_E = np.zeros(len(item_E), np.float32)
    if clock != "order" and len(item_E) > 1:
        gap_E[1:] = np.clip(np.diff(time_E) / 1000.0, 0.0, MAX_GAP_S)
        gap_E[first_E] = 0.0
    hour_E = (time_E // 1000 % 86_400 / 3600.0).astype(np.float32)  # with milliseconds float32 could round to 24
    if clock != "time":
        hour_E[:] = -1.0

    def padded(values_E: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
        out_BL = np.full(real_BL.shape, fill, values_E.dtype)
        out_BL[real_BL] = values_E
        return out_BL

    return HistoryBatch(
        item_BL=padded(item_E, 0),
        action_BL=padded(action_E, 0),
        gap_s_BL=padded(gap_E, 0),
        hour_BL=padded(hour_E, -1),
        seen_BL=padded(_seen_before(item_E, visitor_E), False),
        length_B=length_B,
        **_moment(asked_ms, time_E, length_B, clock),
    )


def _moment(asked_ms: npt.ArrayLike | None, time_E: Ints, length_B: Ints, clock: str) -> dict[str, Floats]:
    """`since_s_B` and `now_hour_B` of a HistoryBatch. time_E: of the events that are read."""
    since_B, hour_B = (np.full(len(length_B), UNKNOWN, np.float32) for _ in range(2))
    if asked_ms is not None and clock != "order":
        asked_B, has_any_B = np.asarray(asked_ms, np.int64), length_B > 0
        newest_B = time_E[np.cumsum(length_B)[has_any_B] - 1]
        since_B[has_any_B] = rounded_down((asked_B[has_any_B] - newest_B) / 1000.0)
        if clock == "time":
            hour_B[:] = asked_B // 3_600_000 % 24
    return {"since_s_B": since_B, "now_hour_B": hour_B}


def rounded_down(since_s: npt.ArrayLike) -> Floats:
    """Seconds as 0, 1, 2, 4, 8, ... minutes, up to MAX_GAP_S: a moment is then the same for a while, and with it what
    was computed for it. float32.

    >>> rounded_down([-5, 59, 60, 200, 86_400]).tolist()
    [0.0, 0.0, 60.0, 120.0, 61440.0]
    """
    minutes = np.clip(np.asarray(since_s, np.float64), 0.0, MAX_GAP_S) / 60
    return (60 * np.where(minutes < 1, 0.0, 2 ** np.floor(np.log2(np.maximum(minutes, 1))))).astype(np.float32)


def is_read(action_E: Ints, actions: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether a model of these `actions` reads each event, by its code. [E] bool. The one rule, in training as well."""
    read: npt.NDArray[np.bool_] = np.isin(action_E, [ACTION_CODE[action] for action in actions])
    return read


def _seen_before(item_E: Ints, visitor_E: Ints) -> npt.NDArray[np.bool_]:
    """Whether each event's item occurred earlier among the same visitor's events. [E] bool."""
    order_E = np.lexsort((np.arange(len(item_E)), item_E, visitor_E))
    repeat_E = np.zeros(len(item_E), bool)
    repeat_E[order_E[1:]] = (np.diff(item_E[order_E]) == 0) & (np.diff(visitor_E[order_E]) == 0)
    return repeat_E
