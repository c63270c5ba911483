"""Ids as text, the same for events, catalogue and pictures.

In: text as it was read. Out: clean ids. What spreadsheets and missing values do to ids is undone here and nowhere else.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

_FLOAT_ID = r"^\d+\.0+$"
LARGEST_WHOLE = 2.0**53
"""Up to here a float64 tells whole numbers apart."""


def clean_ids(text: pa.Array) -> pa.Array:
    """Trimmed, and a whole number that was written as a float ("17850.0") read back; null where nothing is left."""
    trimmed = pc.utf8_trim_whitespace(text)
    trimmed = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
    return pc.if_else(written_as_float(trimmed), pc.replace_substring_regex(trimmed, r"\.0+$", ""), trimmed)


def written_as_float(text: pa.Array) -> pa.Array:
    """Whether each text, trimmed, is a whole number with a decimal point. bool, no nulls."""
    return pc.fill_null(pc.match_substring_regex(pc.utf8_trim_whitespace(text), _FLOAT_ID), False)


def floats_as_text(column: pa.Array) -> pa.Array:
    """Numbers as people write them: 100000000001.0 is "100000000001", which Arrow's cast makes "1.00000000001e+11"."""
    column = column.cast(pa.float64())
    exact = pc.less(pc.abs(column), LARGEST_WHOLE)
    whole = pc.and_(exact, pc.equal(pc.trunc(column), column))
    as_whole = pc.if_else(whole, column, None).cast(pa.int64()).cast(pa.string())
    large = pc.and_(exact, pc.greater_equal(pc.abs(column), 1e9))
    as_decimal = pc.if_else(large, column, None).cast(pa.decimal128(22, 6), safe=False).cast(pa.string())
    return pc.coalesce(as_whole, as_decimal, column.cast(pa.string()))
