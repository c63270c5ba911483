"""Catalogues with a shop's later word on its items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from rayrec.catalogue import Catalogue
from rayrec.config import PrepareConfig
from rayrec.data.edits import edited
from rayrec.data.items import CATALOGUE_SCHEMA, BuiltItems, build_items
from rayrec.schema import ITEM_SCHEMA

ROWS: list[dict[str, Any]] = [
    {"item_id": "a", "title": "Red dress", "category": "Tops|Dresses", "brand": "Aurora", "price": 10.0},
    {"item_id": "b", "title": "Blue dress", "category": "Dresses", "brand": "Boreal", "price": 20.0},
    {"item_id": "c", "title": "Green shoe", "category": "Shoes", "brand": "Aurora", "price": 30.0},
]


def built(rows: list[dict[str, Any]] = ROWS) -> BuiltItems:
    catalogue = pa.Table.from_pylist([{"image": None, **row} for row in rows], CATALOGUE_SCHEMA)
    return build_items(catalogue, ["a", "b"], [5, 3], {"a"}, PrepareConfig())


def change(facts: dict[str, dict[str, Any]], *pictured: str, items: BuiltItems | None = None) -> Catalogue:
    items = items or built()
    return edited(Catalogue.from_table(items.table), facts, set(pictured), items.encoder)[0]


def row(catalogue: Catalogue, item_id: str) -> dict[str, Any]:
    found: dict[str, Any] = catalogue.table.slice(catalogue.index[item_id] - 1, 1).to_pylist()[0]
    return found


def test_what_is_said_changes_and_the_rest_stays() -> None:
    before = Catalogue.from_table(built().table)
    after = change({"b": {"price": 5.0, "title": None}})
    assert after.ids.tolist() == before.ids.tolist()
    assert row(after, "b") == row(before, "b") | {
        "price": 5.0, "title": None, "title_codes": [],
        "price_scaled": row(after, "b")["price_scaled"], "price_bucket": 1,
    }  # fmt: skip
    assert row(after, "b")["price_scaled"] < row(before, "b")["price_scaled"]
    for untouched in ("a", "c"):
        assert row(after, untouched) == row(before, untouched)


def test_a_new_item_comes_last_and_is_encoded_as_training_would() -> None:
    new = {"title": "Red dress", "category": "Tops|Dresses", "brand": "Aurora", "price": 10.0}
    after = change({"new": new}, "new")
    assert after.ids.tolist()[1:] == ["a", "b", "c", "new"]
    assert row(after, "new") == row(after, "a") | {"item_index": 4, "item_id": "new", "n_train": 0}
    assert after.listed[4]
    assert after.in_stock[4]
    assert after.has_image[4]
    assert after.n_train[4] == 0


def test_unknown_words_of_a_new_item_are_unknown() -> None:
    after = change({"new": {"category": "Hats", "brand": "Nobody", "price": None}})
    assert (row(after, "new")["category_codes"], row(after, "new")["brand_code"]) == ([], 0)
    assert np.isnan(after.price[4])
    assert row(after, "new")["category"] == "Hats"


def test_gone_and_sold_out_and_back() -> None:
    after = change({"a": {"listed": False}, "b": {"in_stock": False}})
    assert after.listed.tolist() == [False, False, True, True]
    assert after.in_stock.tolist() == [True, True, False, True]
    items = built()
    back, rows = edited(after, {"a": {"listed": True}, "b": {"in_stock": True}}, set(), items.encoder)
    assert rows.tolist() == [1, 2]
    assert back.listed[1:].all()
    assert back.in_stock.all()


def test_one_item_put_does_not_hide_those_that_are_known_from_logs_alone() -> None:
    logs_only = build_items(CATALOGUE_SCHEMA.empty_table(), ["a", "b"], [5, 3], set(), PrepareConfig())
    after = change({"new": {"title": "Hat"}}, items=logs_only)
    assert after.listed.tolist() == [False, True, True, True]


FACTS = st.fixed_dictionaries(
    {},
    optional={
        "title": st.none() | st.sampled_from(["Red dress", "Hat"]),
        "category": st.none() | st.sampled_from(["Tops", "Shoes|Dresses"]),
        "brand": st.none() | st.sampled_from(["Aurora", "Nobody"]),
        "price": st.none() | st.floats(0.5, 100),
        "in_stock": st.booleans(),
        "listed": st.booleans(),
    },
)


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "new", "newer"]), FACTS), max_size=4))
def test_one_by_one_is_as_all_together(batches: list[dict[str, dict[str, Any]]]) -> None:
    items = built()
    one_by_one = Catalogue.from_table(items.table)
    together: dict[str, dict[str, Any]] = {}
    for batch in batches:
        for item_id, facts in batch.items():
            together[item_id] = together.get(item_id, {}) | facts
            one_by_one = edited(one_by_one, {item_id: facts}, set(), items.encoder)[0]
    at_once = edited(Catalogue.from_table(items.table), together, set(), items.encoder)[0]
    assert one_by_one.table.to_pylist() == at_once.table.to_pylist()
    assert one_by_one.table.schema == ITEM_SCHEMA
    assert one_by_one.listed.tolist() == at_once.listed.tolist()
    assert one_by_one.in_stock.tolist() == at_once.in_stock.tolist()
