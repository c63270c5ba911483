"""The catalogue as arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.catalogue import Catalogue, Ragged
from rayrec.schema import ITEM_SCHEMA

ROWS = [
    {
        "item_index": 1, "item_id": "007", "title": "Red shoe", "category": "a|b", "brand": "x", "price": 9.5,
        "in_catalogue": True, "has_image": True, "category_codes": [1, 2], "brand_code": 1, "title_codes": [5, 6, 7],
        "price_scaled": 0.5, "price_bucket": 3, "n_train": 4,
    },
    {
        "item_index": 2, "item_id": "b", "title": None, "category": None, "brand": None, "price": None,
        "in_catalogue": False, "has_image": False, "category_codes": [], "brand_code": 0, "title_codes": [],
        "price_scaled": 0.0, "price_bucket": 0, "n_train": 1,
    },
    {
        "item_index": 3, "item_id": "c", "title": "Hat", "category": "a", "brand": "x", "price": 2.0,
        "in_catalogue": True, "has_image": False, "category_codes": [1], "brand_code": 1, "title_codes": [8],
        "price_scaled": -0.5, "price_bucket": 1, "n_train": 0,
    },
]  # fmt: skip


def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS, ITEM_SCHEMA)


def test_row_0_is_unknown_and_the_rest_follow_the_table() -> None:
    catalogue = Catalogue.from_table(table())
    assert len(catalogue) == 3
    assert catalogue.ids.tolist() == ["", "007", "b", "c"]
    assert catalogue.brand.tolist() == [0, 1, 0, 1]
    assert [catalogue.category[n].tolist() for n in range(4)] == [[], [1, 2], [], [1]]
    assert [catalogue.title[n].tolist() for n in range(4)] == [[], [5, 6, 7], [], [8]]
    np.testing.assert_array_equal(catalogue.price, np.array([np.nan, 9.5, np.nan, 2.0], np.float32))
    assert catalogue.price_scaled.tolist() == [0, 0.5, 0, -0.5]
    assert catalogue.price_bucket.tolist() == [0, 3, 0, 1]
    assert catalogue.n_train.tolist() == [0, 4, 1, 0]
    assert catalogue.has_image.tolist() == [False, True, False, False]
    assert catalogue.index == {"007": 1, "b": 2, "c": 3}


def test_a_table_in_several_chunks_is_the_same() -> None:
    whole = Catalogue.from_table(table())
    chunked = Catalogue.from_table(pa.concat_tables([table().slice(0, 1), table().slice(1)]))
    assert chunked.ids.tolist() == whole.ids.tolist()
    assert chunked.title.values.tolist() == whole.title.values.tolist()
    assert chunked.title.offsets.tolist() == whole.title.offsets.tolist()


def test_an_empty_catalogue_has_only_the_unknown() -> None:
    catalogue = Catalogue.from_table(ITEM_SCHEMA.empty_table())
    assert len(catalogue) == 0
    assert catalogue.ids.tolist() == [""]
    assert catalogue.index == {}
    assert len(catalogue.category) == 1
    assert catalogue.category[0].tolist() == []


@pytest.mark.parametrize("index", [[2, 1, 3], [1, 2, 4], [0, 1, 2]])
def test_items_out_of_order_are_refused(index: list[int]) -> None:
    wrong = table().set_column(0, ITEM_SCHEMA.field("item_index"), pa.array(index, pa.int32()))
    with pytest.raises(ValueError, match=r"1\.\.N"):
        Catalogue.from_table(wrong)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6), st.data())
def test_taking_rows_of_a_ragged_array(lists: list[list[int]], data: st.DataObject) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])])
    ragged = Ragged(np.array([value for row in lists for value in row], np.int64), offsets.astype(np.int64))
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6))
    taken = ragged.take(np.array(rows, np.int64))
    assert len(taken) == len(rows)
    assert [taken[n].tolist() for n in range(len(rows))] == [lists[row] for row in rows]
