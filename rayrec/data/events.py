"""One block of raw rows to canonical events: each row is kept or rejected for the first reason that holds.

In: text columns under canonical names. Out: typed columns, and the reason of each rejected row. Only what one row
shows by itself is judged here; it must not know other rows, files or Ray.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.config import CleanConfig
from rayrec.data.clock import Clock, now_ms, parse_moment, parse_times
from rayrec.data.ids import clean_ids, written_as_float
from rayrec.data.mapping import Mapping
from rayrec.errors import UsageError
from rayrec.history import Ints
from rayrec.schema import ACTION_CODE, EVENT_SCHEMA, SESSION_PREFIX

Mask: TypeAlias = npt.NDArray[np.bool_]

EARLIEST = "1995-01-01"
"""Web shops are no older: an earlier time is a broken one."""
FUTURE_SLACK_MS = 14 * 3_600_000
"""A local time without its zone may be this far ahead of UTC."""

NUMBERS = ("value", "price", "quantity", "position", "propensity")
TEXTS = ("event_id", "session_id", "request_id", "scene", "model", "variant")
REQUIRED = ("user_id", "item_id", "time_ms", "action")

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


@dataclass(frozen=True)
class Rules:
    """What makes a row acceptable: the clock, the window of times [after, before), and the other limits."""

    clock: Clock
    after_ms: int
    before_ms: int
    mapping: Mapping
    clean: CleanConfig

    @classmethod
    def of(cls, clean: CleanConfig, clock: Clock, mapping: Mapping) -> Rules:
        """The rules of a configuration. Raises UsageError for a window that makes no sense on this clock."""
        if clock == "order":
            if clean.after or clean.before:
                raise UsageError("clean.after and clean.before need times, and these timestamps are order numbers")
            return cls(clock, -(2**62), 2**62, mapping, clean)
        after = parse_moment(clean.after or EARLIEST, "clean.after")
        before = parse_moment(clean.before, "clean.before") if clean.before else now_ms() + FUTURE_SLACK_MS
        if after >= before:
            raise UsageError(f"clean.after ({clean.after}) must lie before clean.before ({clean.before})")
        return cls(clock, after, before, mapping, clean)


class Verdict:
    """The reason for which each row of a block is rejected; the first one given to a row stays."""

    def __init__(self, n_rows: int) -> None:
        self.code_R = np.zeros(n_rows, np.int16)
        self.reasons = [""]

    def reject(self, where_R: Mask, reason: str) -> None:
        """Reject the rows at `where_R` that are not rejected yet."""
        fresh_R = where_R & (self.code_R == 0)
        if fresh_R.any():
            self.reasons.append(reason)
            self.code_R[fresh_R] = len(self.reasons) - 1

    @property
    def kept(self) -> Mask:
        """The rows that nothing speaks against."""
        return np.asarray(self.code_R == 0)


def canonical_events(rows: pa.Table, rules: Rules) -> tuple[pa.Table, Verdict, Counter[str]]:
    """Canonical columns of `rows` (text, canonical names), the verdict on each row, and the repairs made.

    The table has as many rows as `rows`, rejected ones included (their values mean nothing): `user_id, item_id`
    string, `time_ms` int64, `action` int8 (schema.ACTION_CODE), and of the optional columns those that are there.
    """
    n_rows = len(rows)
    verdict = Verdict(n_rows)
    repairs: Counter[str] = Counter()
    columns: dict[str, pa.Array] = {}

    texts = {name: _text(rows, name, repairs) for name in ("user_id", "item_id", *TEXTS) if name in rows.column_names}
    columns["user_id"] = _visitors(texts.get("user_id"), texts.get("session_id"))
    columns["item_id"] = texts["item_id"]
    verdict.reject(_is_null(columns["user_id"]), "no_user")
    verdict.reject(_is_null(columns["item_id"]), "no_item")

    time = pc.utf8_trim_whitespace(_column(rows, "timestamp"))
    time_ms, read = parse_times(time, rules.clock)
    verdict.reject(_is_null(time) | (pc.equal(time, "").fill_null(False).to_numpy(zero_copy_only=False)), "no_time")
    verdict.reject(~read, "bad_time")
    verdict.reject((time_ms < rules.after_ms) | (time_ms >= rules.before_ms), "time_out_of_window")
    columns["time_ms"] = pa.array(time_ms)

    action = _column(rows, "action")
    code_R = _action_codes(action, rules.mapping)
    verdict.reject(_is_null(action), "no_action")
    verdict.reject(code_R == 0, "unknown_action")
    columns["action"] = pa.array(code_R)

    numbers = {name: _number(rows, name, verdict) for name in NUMBERS if name in rows.column_names}
    _judge_numbers(numbers, code_R, verdict, repairs, rules.clean)
    columns.update({name: pa.array(values, mask=np.isnan(values)) for name, values in numbers.items()})
    columns.update({name: texts[name] for name in TEXTS if name in texts})
    if rules.clean.expected:
        verdict.reject(
            _missing_share(columns, n_rows, rules.clean.expected) > rules.clean.max_missing, "too_many_missing"
        )
    return pa.table(columns), verdict, repairs


# ---------------------------------------------------------------- text


def _column(rows: pa.Table, name: str) -> pa.Array:
    return rows[name].combine_chunks()


def _is_null(column: pa.Array) -> Mask:
    return np.asarray(column.is_null().to_numpy(zero_copy_only=False), bool)


def _text(rows: pa.Table, name: str, repairs: Counter[str]) -> pa.Array:
    """A column of ids or names: trimmed, and a whole number that was written as a float read back as it was."""
    distinct = _column(rows, name).dictionary_encode()
    words = distinct.dictionary
    clean, as_float = clean_ids(words), written_as_float(words)
    trimmed = pc.if_else(pc.is_valid(clean), pc.utf8_trim_whitespace(words), pa.scalar(None, pa.string()))
    for what, changed in (("trimmed", pc.not_equal(trimmed, words)), ("float_to_id", as_float)):
        n = _rows_with(distinct.indices, pc.fill_null(changed, False))
        if n:
            repairs[f"{what}:{name}"] += n
    return clean.take(distinct.indices)


def _rows_with(indices: pa.Array, flag_of_word: pa.Array) -> int:
    """How many rows hold a word that is flagged."""
    if not pc.any(flag_of_word).as_py():
        return 0
    return int(pc.sum(flag_of_word.take(indices.drop_null())).as_py() or 0)


def _visitors(users: pa.Array | None, sessions: pa.Array | None) -> pa.Array:
    """schema.visitor_id of each row; null where there is neither user nor session."""
    if sessions is None:
        assert users is not None, "the columns were checked: user_id or session_id is there"
        return users
    anonymous = pc.binary_join_element_wise(SESSION_PREFIX, sessions, "")
    return anonymous if users is None else pc.coalesce(users, anonymous)


def _action_codes(action: pa.Array, mapping: Mapping) -> npt.NDArray[np.int8]:
    """schema.ACTION_CODE of each row; 0 where the action is missing or unknown."""
    distinct = action.dictionary_encode()
    known = [mapping.action(word) for word in distinct.dictionary.to_pylist()]
    code_of_word = np.array([ACTION_CODE[name] if name else 0 for name in known] + [0], np.int8)
    place_R = pc.fill_null(distinct.indices, len(known)).to_numpy(zero_copy_only=False)
    return code_of_word[place_R]


# ---------------------------------------------------------------- numbers


def _number(rows: pa.Table, name: str, verdict: Verdict) -> npt.NDArray[np.float64]:
    """A numeric column, NaN where missing; rows whose value is no finite number are rejected."""
    column = pc.utf8_trim_whitespace(_column(rows, name))
    numeric = pc.fill_null(pc.match_substring_regex(column, _NUMBER), False)
    present = column.is_valid()
    text = pc.if_else(numeric, column, pa.scalar(None, pa.string()))
    values = np.asarray(pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    good = np.asarray(numeric.to_numpy(zero_copy_only=False), bool) & np.isfinite(values)
    verdict.reject(np.asarray(present.to_numpy(zero_copy_only=False), bool) & ~good, f"{name}_not_a_number")
    return np.where(good, values, np.nan)


def _judge_numbers(
    numbers: dict[str, npt.NDArray[np.float64]],
    action_R: npt.NDArray[np.int8],
    verdict: Verdict,
    repairs: Counter[str],
    clean: CleanConfig,
) -> None:
    """Reject impossible values; the quantity of a cancellation becomes positive (many logs write it negative)."""
    if "price" in numbers:
        price_R = numbers["price"]
        verdict.reject((price_R < 0) | (price_R > clean.max_price), "impossible_price")
    if "quantity" in numbers:
        quantity_R = numbers["quantity"]
        turned_R = (action_R == ACTION_CODE["cancel"]) & (quantity_R < 0)
        quantity_R[turned_R] *= -1
        verdict.reject((quantity_R <= 0) | (quantity_R > clean.max_abs_quantity), "impossible_quantity")
        if n := int(np.sum(turned_R & verdict.kept)):
            repairs["cancel_quantity_made_positive"] += n
    if "propensity" in numbers:
        verdict.reject((numbers["propensity"] <= 0) | (numbers["propensity"] > 1), "impossible_propensity")
    if "position" in numbers:
        position_R = numbers["position"]
        whole_R = np.isnan(position_R) | ((position_R == np.rint(position_R)) & (np.abs(position_R) < 2**31))
        verdict.reject(~whole_R | (position_R < 0), "impossible_position")


def _missing_share(columns: dict[str, pa.Array], n_rows: int, expected: tuple[str, ...]) -> npt.NDArray[np.float64]:
    unknown = [name for name in expected if name not in EVENT_SCHEMA.names]
    if unknown:
        raise UsageError(
            f"clean.expected: {', '.join(unknown)}: no such column; known are {', '.join(EVENT_SCHEMA.names)}"
        )
    missing = sum(
        (_is_null(columns[name]) if name in columns else np.ones(n_rows, bool)).astype(int) for name in expected
    )
    return np.asarray(missing / len(expected), np.float64)


def with_origin(events: pa.Table, piece: int, row_R: Ints) -> pa.Table:
    """`events` with the column `origin`: the piece and the row within it, so that input order can be restored."""
    return events.append_column("origin", pa.array((np.int64(piece) << ROW_BITS) | row_R))


ROW_BITS = 40
ROW_MASK = (1 << ROW_BITS) - 1
