"""Times as logs write them, to one integer column; and what kind of clock a log has.

In: columns of text. Out: epoch milliseconds in UTC (or plain order numbers), and "time", "date" or "order".
It must not know which times are sensible.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.errors import UsageError
from rayrec.history import Ints

Clock = Literal["time", "date", "order"]
Mask: TypeAlias = npt.NDArray[np.bool_]
Parse = Callable[[pa.Array], tuple[Ints, Mask]]

DAY_MS = 86_400_000
ORDER_BELOW = 1e8
"""Numbers under this are order numbers if a whole log is so: as epoch seconds they would lie before March 1973."""
MS_ABOVE = 1e11
"""Larger numbers are epoch milliseconds: as seconds they would lie after the year 5000."""

_NUMBER = r"^[+-]?\d{1,18}(\.\d*)?$"
_DATE = r"^\d{4}-\d{2}-\d{2}$"
_COMPACT_DATE = r"^(19|20)\d{2}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$"
_DATE_TIME = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}([.,]\d{1,9})?)? ?(Z|UTC|[+-]\d{2}(:?\d{2})?)?$"
_MIDNIGHT = r"[T ]00:00(:00([.,]0+)?)? ?(Z|UTC|[+-]00(:?00)?)?$"


def detect_clock(sample: pa.Array) -> Clock:
    """The kind of clock that most values of `sample` ([N] string) show; "time" if none can be read.

    >>> detect_clock(pa.array(["1", "2", "17"])), detect_clock(pa.array(["2018-09-20"]))
    ('order', 'date')
    """
    values = pc.utf8_trim_whitespace(sample.drop_null())
    compact_dates = _matches(values, _COMPACT_DATE)
    numbers = _matches(values, _NUMBER)
    if numbers.sum() * 2 > len(values):
        if compact_dates.sum() == numbers.sum():
            return "date"
        size = np.abs(pc.cast(values.filter(pa.array(numbers)), pa.float64()).to_numpy(zero_copy_only=False))
        return "order" if np.all(size < ORDER_BELOW) else "time"
    dates = _matches(values, _DATE) | (_matches(values, _DATE_TIME) & _matches(values, _MIDNIGHT))
    return "date" if len(values) and dates.sum() * 2 > len(values) else "time"


def parse_times(text: pa.Array, clock: Clock) -> tuple[Ints, Mask]:
    """Times ([N] string) to epoch ms in UTC, or to order numbers on clock "order", and which could be read.

    Epoch seconds or milliseconds, ISO 8601 with or without a zone (without: UTC), dates as 2018-09-20 or 20180920
    (the latter on clock "date" only). On clock "date" the time of day is dropped; on "order" only numbers are read.

    >>> parse_times(pa.array(["2018-09-20T02:00:00+02:00", "1537401600", "x"]), "time")[0].tolist()
    [1537401600000, 1537401600000, 0]
    """
    time_ms = np.zeros(len(text), np.int64)
    read = np.zeros(len(text), bool)
    if clock == "date":
        _put(time_ms, read, _matches(text, _COMPACT_DATE), text, _calendar)
    _put(time_ms, read, _matches(text, _NUMBER) & ~read, text, _orders if clock == "order" else _epoch_ms)
    if clock != "order":
        rest = ~read & pc.is_valid(text).to_numpy(zero_copy_only=False)
        if rest.any():
            _put(time_ms, read, rest & (_matches(text, _DATE) | _matches(text, _DATE_TIME)), text, _calendar)
    if clock == "date":
        time_ms -= time_ms % DAY_MS
    return time_ms, read


def parse_moment(text: str, setting: str) -> int:
    """One moment of a setting (ISO 8601 or epoch seconds) to epoch ms. Raises UsageError that names the setting."""
    time_ms, read = parse_times(pa.array([str(text).strip()]), "time")
    if not read[0]:
        raise UsageError(f"{setting}: '{text}' is no time; write 2017-11-25T00:00:00+08:00 or epoch seconds")
    return int(time_ms[0])


def now_ms() -> int:
    """The present, in epoch ms."""
    return int(dt.datetime.now(dt.timezone.utc).timestamp() * 1000)


def _put(time_ms: Ints, read: Mask, where: Mask, text: pa.Array, parse: Parse) -> None:
    """Parse the values at `where` with `parse`, and set `time_ms` and `read` where it could."""
    if not where.any():
        return
    chosen = text if where.all() else text.filter(pa.array(where))
    values, good = parse(chosen)
    place = np.flatnonzero(where)[good]
    time_ms[place] = values[good]
    read[place] = True


def _orders(text: pa.Array) -> tuple[Ints, Mask]:
    number = pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False)
    return number.astype(np.int64), np.abs(number) < 2**53


def _epoch_ms(text: pa.Array) -> tuple[Ints, Mask]:
    number = pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False)
    scaled = np.where(np.abs(number) < MS_ABOVE, number * 1000.0, number)
    good = np.abs(scaled) < 2**53
    return np.where(good, np.rint(scaled), 0).astype(np.int64), good


def _calendar(text: pa.Array) -> tuple[Ints, Mask]:
    distinct = text.dictionary_encode()
    moments = _distinct_moments(distinct.dictionary)
    time_ms = moments.astype("datetime64[ms]").astype(np.int64)
    place = distinct.indices.to_numpy()
    return time_ms[place], ~np.isnat(moments)[place]


def _distinct_moments(text: pa.Array) -> npt.NDArray[np.datetime64]:
    """Moments in UTC, NaT where the calendar has no such day or hour."""
    for unit in (pa.timestamp("us"), pa.timestamp("us", "UTC")):  # none has a zone, or all have: the fast ways
        with contextlib.suppress(pa.ArrowInvalid):
            return np.asarray(pc.cast(text, unit), "datetime64[ms]")
    plain = [value.replace(" UTC", "Z").replace("UTC", "Z").replace(",", ".") for value in text.to_pylist()]
    moments = pd.to_datetime(pd.Series(plain, dtype=object), format="ISO8601", utc=True, errors="coerce")
    return np.asarray(moments.dt.tz_localize(None), "datetime64[ms]")


def _matches(text: pa.Array, pattern: str) -> Mask:
    matched = pc.fill_null(pc.match_substring_regex(text, pattern), False)
    return np.asarray(matched.to_numpy(zero_copy_only=False), bool)
