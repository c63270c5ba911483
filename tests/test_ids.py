"""One id however it was written, in the log, in the catalogue, and beside its picture."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.ids import LARGEST_WHOLE, clean_ids, floats_as_text, written_as_float


def test_what_spreadsheets_do_to_ids_is_undone() -> None:
    text = pa.array(["17850.0", " 17850 ", "0017.00", "1.5", "v1.0", "", " ", None, "1e5"])
    assert clean_ids(text).to_pylist() == ["17850", "17850", "0017", "1.5", "v1.0", None, None, None, "1e5"]
    assert written_as_float(text).to_pylist() == [True, False, True, False, False, False, False, False, False]


def test_large_floats_keep_their_digits() -> None:
    column = pa.array(
        [100000000001.0, 1700000000123.0, 1700000000123.5, -17850.0, 12.5, 0.00001, None, math.nan, 1e300]
    )
    assert floats_as_text(column).to_pylist() == [
        "100000000001", "1700000000123", "1700000000123.500000", "-17850", "12.5", "0.00001", None, "nan", "1e+300",
    ]  # fmt: skip
    assert floats_as_text(pa.array([3.0, math.inf], pa.float32())).to_pylist() == ["3", "inf"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_as_text_is_the_same_number(value: float) -> None:
    (text,) = floats_as_text(pa.array([value])).to_pylist()
    assert float(text) == pytest.approx(value, rel=1e-12, abs=1e-300)
    if value.is_integer() and abs(value) < LARGEST_WHOLE:
        assert text == str(int(value))
