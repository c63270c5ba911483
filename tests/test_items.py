"""Catalogues cleaned and encoded by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.catalogue import Catalogue
from rayrec.config import PrepareConfig
from rayrec.data.items import (
    CATALOGUE_SCHEMA,
    AttributeEncoder,
    BuiltItems,
    CleanedItems,
    build_items,
    category_levels,
    clean_items,
    encode_categories,
    parse_prices,
    price_buckets,
)
from rayrec.data.vocabulary import Vocabulary, hash_code
from rayrec.schema import ITEM_SCHEMA, REJECT_SCHEMA, TITLE_BUCKETS

NAN = float("nan")


def clean(rows: list[dict[str, Any]], file: str = "items.csv") -> CleanedItems:
    table = pa.Table.from_pylist([{"file": file, "row": n, **row} for n, row in enumerate(rows, start=1)])
    return clean_items(table)


def catalogue(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in CATALOGUE_SCHEMA.names} for row in rows], CATALOGUE_SCHEMA
    )


def build(
    items: pa.Table,
    counts: dict[str, int] | None = None,
    images: frozenset[str] = frozenset(),
    **settings: Any,
) -> BuiltItems:
    counts = counts or {}
    return build_items(items, list(counts), counts, images, PrepareConfig(**settings))


# ---------------------------------------------------------------- cleaning


def test_rows_without_an_id_are_rejected_with_their_content() -> None:
    cleaned = clean([{"item_id": "a", "title": "A"}, {"item_id": None, "title": "B"}, {"item_id": "  ", "title": "C"}])
    assert cleaned.kept["item_id"].to_pylist() == ["a"]
    assert cleaned.rejects.schema == REJECT_SCHEMA
    assert cleaned.rejects.select(["file", "row", "reason"]).to_pylist() == [
        {"file": "items.csv", "row": 2, "reason": "no_item_id"},
        {"file": "items.csv", "row": 3, "reason": "no_item_id"},
    ]
    assert json.loads(cleaned.rejects["raw"][0].as_py()) == {"item_id": None, "title": "B"}


def test_the_raw_column_is_what_a_rejected_row_shows() -> None:
    assert clean([{"item_id": "", "raw": ",x,y"}]).rejects["raw"].to_pylist() == [",x,y"]


def test_ids_are_text_and_keep_their_zeros() -> None:
    assert clean([{"item_id": "0108775015"}, {"item_id": " 007 "}]).kept["item_id"].to_pylist() == ["0108775015", "007"]


def test_an_id_that_was_written_as_a_float_is_the_same_item() -> None:
    cleaned = clean([{"item_id": "17850.0", "title": "A"}, {"item_id": "17850", "title": "A"}])
    assert cleaned.kept["item_id"].to_pylist() == ["17850"]


def test_an_item_may_be_called_null() -> None:
    assert clean([{"item_id": "null"}]).kept["item_id"].to_pylist() == ["null"]


def test_words_for_missing_are_missing() -> None:
    rows = [{"item_id": str(n), "brand": word} for n, word in enumerate(["NaN", "null", "None", "N/A", " ", "Nanette"])]
    assert clean(rows).kept["brand"].to_pylist() == [None] * 5 + ["Nanette"]


def test_absent_columns_are_unknown() -> None:
    cleaned = clean([{"item_id": "a"}])
    assert cleaned.kept.schema == CATALOGUE_SCHEMA
    assert cleaned.kept.to_pylist() == [
        {"item_id": "a", "title": None, "category": None, "brand": None, "price": None, "image": None}
    ]


def test_several_rows_of_an_item_collapse_to_the_most_frequent_known_values() -> None:
    cleaned = clean(
        [
            {"item_id": "a", "title": "Lantern", "price": "2", "brand": None},
            {"item_id": "b", "title": "Hat", "price": "5", "brand": None},
            {"item_id": "a", "title": "LANTERN WHITE", "price": "3", "brand": "Acme"},
            {"item_id": "a", "title": "LANTERN WHITE", "price": None, "brand": None},
        ]
    )
    assert cleaned.kept.select(["item_id", "title", "price", "brand"]).to_pylist() == [
        {"item_id": "a", "title": "LANTERN WHITE", "price": 2.0, "brand": "Acme"},  # of 2 and 3 the earlier
        {"item_id": "b", "title": "Hat", "price": 5.0, "brand": None},
    ]
    assert cleaned.repairs == {"title.conflicting": 1, "price.conflicting": 1}
    assert cleaned.kept.schema == CATALOGUE_SCHEMA


def test_the_first_row_of_an_item_is_the_kept_one_and_files_are_named() -> None:
    cleaned = clean(
        [
            {"item_id": "a", "file": "1.csv"},
            {"item_id": "b", "file": "1.csv"},
            {"item_id": "a", "file": "2.csv"},
            {"item_id": "", "file": "2.csv"},
            {"item_id": "c", "file": "2.csv"},
            {"item_id": "b", "file": "3.csv"},
        ]
    )
    assert cleaned.kept_file.to_pylist() == ["1.csv", "1.csv", "2.csv"]
    assert cleaned.collapsed_file.to_pylist() == ["2.csv", "3.csv"]
    assert cleaned.rejects["file"].to_pylist() == ["2.csv"]


def test_an_unusable_price_costs_the_price_and_not_the_item() -> None:
    rows = [{"item_id": str(n), "price": price} for n, price in enumerate(["3.50", "free", "-1", "0", "", None, "inf"])]
    cleaned = clean(rows)
    assert cleaned.kept["price"].to_pylist() == [3.5, None, None, None, None, None, None]
    assert cleaned.repairs == {"price.unparsable": 2, "price.not_positive": 2}
    assert len(cleaned.rejects) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12.99", 12.99), (" 7 ", 7), ("+3", 3), (".5", 0.5), ("5.", 5), ("1e3", 1000), ("1.299", 1.299),
        ("$12.99", 12.99), ("12,99 €", 12.99), ("USD 12", 12), ("£1,234.50", 1234.5), ("1.234,50", 1234.5),
        ("1,234", 1234), ("1,234,567", 1_234_567), ("1.234.567,8", 1_234_567.8), ("1 234,50 kr.", 1234.5),
        ("¥1,200", 1200), ("0,5", 0.5), ("1'299.00 CHF", 1299), ("12\u00a0345,6", 12345.6),
        ("1.2.3", None), ("12-15", None), ("abc", None), ("--", None), ("1,2,3", None), ("1e999", None), ("€", None),
    ],
)  # fmt: skip
def test_prices_as_people_write_them(text: str, expected: float | None) -> None:
    prices, repairs = parse_prices(pa.array([text]))
    assert prices.to_pylist() == [expected]
    assert repairs == {"price.unparsable": int(expected is None), "price.not_positive": 0}


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.float32(), pa.float64(), pa.decimal128(6, 2), pa.large_string(), pa.string()]
)
def test_prices_of_any_type(kind: pa.DataType) -> None:
    prices, repairs = parse_prices(pa.array(["4", "0", None]).cast(kind))
    assert prices.to_pylist() == [4.0, None, None]
    assert repairs == {"price.unparsable": 0, "price.not_positive": 1}


def test_prices_that_are_nan_are_missing_and_no_repair() -> None:
    prices, repairs = parse_prices(pa.array([NAN, 2.0]))
    assert prices.to_pylist() == [None, 2.0]
    assert repairs == {"price.unparsable": 0, "price.not_positive": 0}


def test_an_empty_catalogue() -> None:
    rows = pa.table(
        {"item_id": pa.array([], pa.string()), "file": pa.array([], pa.string()), "row": pa.array([], pa.int64())}
    )
    cleaned = clean_items(rows)
    assert (len(cleaned.kept), len(cleaned.rejects), len(cleaned.collapsed_file)) == (0, 0, 0)
    assert cleaned.kept.schema == CATALOGUE_SCHEMA


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "item_id": st.sampled_from(["a", "b", "c", "", None]),
                "title": st.sampled_from(["x", "y", None]),
                "price": st.one_of(st.none(), st.text("0123456789.,- €e", max_size=8)),
            }
        ),
        min_size=1,
        max_size=30,
    )
)
def test_no_row_is_lost_and_each_item_has_its_most_frequent_title(rows: list[dict[str, Any]]) -> None:
    cleaned = clean_items(
        pa.table(
            {name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]}
            | {"file": ["f"] * len(rows), "row": list(range(1, len(rows) + 1))}
        )
    )
    assert len(rows) == len(cleaned.kept) + len(cleaned.collapsed_file) + len(cleaned.rejects)
    assert len(cleaned.kept_file) == len(cleaned.kept)
    for item in cleaned.kept.to_pylist():
        titles = [row["title"] for row in rows if row["item_id"] == item["item_id"] and row["title"]]
        assert item["title"] == (max(titles, key=titles.count) if titles else None)  # max takes the earliest
        assert item["price"] is None or item["price"] > 0


# ---------------------------------------------------------------- numbering


def test_items_are_numbered_by_training_count_then_id() -> None:
    items = catalogue({"item_id": "b"}, {"item_id": "a"}, {"item_id": "c"})
    built = build(items, {"c": 5, "log-only": 7, "a": 0})
    assert built.table.schema == ITEM_SCHEMA
    columns = ["item_index", "item_id", "n_train", "in_catalogue"]
    assert [tuple(row.values()) for row in built.table.select(columns).to_pylist()] == [
        (1, "log-only", 7, False),
        (2, "c", 5, True),
        (3, "a", 0, True),
        (4, "b", 0, True),
    ]


def test_the_result_does_not_depend_on_the_order_of_rows() -> None:
    rows = [{"item_id": str(n), "category": f"c{n % 3}", "price": float(n + 1), "title": f"t {n}"} for n in range(30)]
    counts = {str(n): n % 4 for n in range(40)}
    one = build(catalogue(*rows), counts)
    other = build(catalogue(*rows[::-1]), dict(reversed(counts.items())))
    assert one.table.equals(other.table)
    assert one.vocab == other.vocab
    assert one.encoder == other.encoder


def test_counts_may_be_an_array_beside_the_ids() -> None:
    items = catalogue({"item_id": "a"})
    by_array = build_items(items, pa.array(["z", "a"]), np.array([1, 2]), set(), PrepareConfig())
    by_name = build_items(items, ["z", "a"], {"a": 2, "z": 1}, set(), PrepareConfig())
    assert by_array.table.equals(by_name.table)
    assert by_array.table["n_train"].to_pylist() == [2, 1]


def test_no_catalogue_and_no_events() -> None:
    empty = build(catalogue())
    assert empty.table.schema == ITEM_SCHEMA
    assert len(empty.table) == 0
    assert empty.vocab == {"categories": [""], "brands": [""]}
    only_events = build(catalogue(), {"a": 1})
    assert only_events.table["in_catalogue"].to_pylist() == [False]
    assert only_events.table["category_codes"].to_pylist() == [[]]


def test_the_table_opens_as_a_catalogue() -> None:
    items = catalogue({"item_id": "a", "category": "x|y", "title": "red shoe", "price": 3.0}, {"item_id": "b"})
    opened = Catalogue.from_table(build(items, {"a": 3}, frozenset({"a"})).table)
    assert len(opened) == 2
    assert opened.index == {"a": 1, "b": 2}
    assert len(opened.category[1]) == 2
    assert opened.has_image.tolist() == [False, True, False]


def test_images_are_marked_and_ids_without_an_item_ignored() -> None:
    built = build(catalogue({"item_id": "a"}, {"item_id": "b"}), images=frozenset({"b", "stray"}))
    assert built.table["has_image"].to_pylist() == [False, True]


# ---------------------------------------------------------------- categories, brands, titles


def test_levels_of_categories() -> None:
    levels, owner = category_levels(pa.array(["Tops/Vest", None, "a| b |", "A > B / C", "/", "Tops"]))
    assert levels.to_pylist() == ["Tops", "Tops/Vest", "a", "b", "A", "A/B", "A/B/C", "Tops"]
    assert owner.tolist() == [0, 0, 2, 2, 3, 3, 3, 5]


def test_each_level_of_each_category_has_a_code_once() -> None:
    built = build(
        catalogue({"item_id": "1", "category": "A/x|A/y"}, {"item_id": "2", "category": "A"}, {"item_id": "3"})
    )
    assert built.vocab["categories"] == ["", "A", "A/x", "A/y"]  # A occurs three times
    assert built.table["category_codes"].to_pylist() == [[1, 2, 3], [1], []]
    assert built.table["category"].to_pylist() == ["A/x|A/y", "A", None]


def test_an_unknown_category_has_no_code_but_its_known_parent_has() -> None:
    codes = encode_categories(pa.array(["A/new", "B", None]), Vocabulary(["", "A", "A/x"]))
    assert codes.values.tolist() == [1]
    assert codes.offsets.tolist() == [0, 1, 1, 1]


def test_brands_have_codes_and_unknown_is_0() -> None:
    built = build(catalogue({"item_id": "1", "brand": "b"}, {"item_id": "2"}, {"item_id": "3", "brand": "b"}), {"z": 0})
    assert built.vocab["brands"] == ["", "b"]
    assert built.table["brand_code"].to_pylist() == [1, 0, 1, 0]


def test_a_huge_vocabulary_is_hashed() -> None:
    rows = [{"item_id": f"{n}", "brand": f"b{n}", "category": f"c{n}"} for n in range(5)]
    hashing = {"hash_above": 4, "hash_buckets": 32}
    built = build(catalogue(*rows), brand=hashing, category=hashing)
    hashed = Vocabulary.of_hashes(32).words
    assert built.vocab == {"brands": hashed, "categories": hashed}
    assert built.table["brand_code"].to_pylist() == [hash_code(f"b{n}", 32) for n in range(5)]
    assert built.table["category_codes"].to_pylist() == [[hash_code(f"c{n}", 32)] for n in range(5)]


def test_titles_are_hashed_words() -> None:
    built = build(
        catalogue({"item_id": "1", "title": "Red shoe, RED"}, {"item_id": "2", "title": "红"}, {"item_id": "3"})
    )
    red, shoe, red_zh = (hash_code(word, TITLE_BUCKETS) for word in ("red", "shoe", "红"))
    assert built.table["title_codes"].to_pylist() == [[red, shoe], [red_zh], []]


@pytest.mark.parametrize(
    ("settings", "expected", "repairs"),
    [
        ({}, ["b", "b", "c", None], {}),
        ({"fill": "mode"}, ["b", "b", "c", "b"], {"brand.filled": 1}),
        ({"fill": "constant", "constant": "own"}, ["b", "b", "c", "own"], {"brand.filled": 1}),
        ({"fill": "mode", "drop_above": 0.2}, [None] * 4, {"brand.dropped": 1}),
    ],
)
def test_text_columns_are_repaired_as_configured(
    settings: dict[str, Any], expected: list[str | None], repairs: dict[str, int]
) -> None:
    rows = [{"item_id": str(n), "brand": brand} for n, brand in enumerate(["b", "b", "c", None])]
    built = build(catalogue(*rows), brand=settings)
    assert built.table["brand"].to_pylist() == expected
    assert {what: n for what, n in built.repairs.items() if what.startswith("brand")} == repairs
    words = built.vocab["brands"]
    assert [words[code] or None for code in built.table["brand_code"].to_pylist()] == expected


# ---------------------------------------------------------------- prices


def test_prices_fall_into_deciles() -> None:
    rows = [{"item_id": f"{n:03}", "price": float(n)} for n in range(1, 101)]
    built = build(catalogue(*rows, {"item_id": "none"}))
    assert built.table["price_bucket"].to_pylist() == [1 + (n - 1) // 10 for n in range(1, 101)] + [0]


def test_buckets_of_prices_beyond_and_on_the_edges() -> None:
    deciles = tuple(float(n) for n in range(1, 10))
    assert price_buckets(np.array([0.5, 1, 1.5, 9, 99, NAN]), deciles).tolist() == [1, 1, 2, 9, 10, 0]
    assert price_buckets(np.array([0.5, NAN]), ()).tolist() == [0, 0]


def test_equal_prices_share_a_bucket() -> None:
    built = build(catalogue(*({"item_id": str(n), "price": 5.0} for n in range(8))))
    assert built.table["price_bucket"].to_pylist() == [1] * 8
    assert built.table["price_scaled"].to_pylist() == [0.0] * 8


def test_prices_are_scaled_and_shown_as_they_are() -> None:
    items = catalogue({"item_id": "1", "price": 10.0}, {"item_id": "2", "price": 30.0}, {"item_id": "3"})
    built = build(items, price={"scale": "minmax", "clip": "none", "fill": "median"})
    assert built.table["price"].to_pylist() == [10.0, 30.0, None]
    assert built.table["price_scaled"].to_pylist() == [0.0, 1.0, 0.5]
    assert built.repairs["price.filled"] == 1


def test_an_unfilled_price_scales_to_0() -> None:
    items = catalogue({"item_id": "1", "price": 10.0}, {"item_id": "2", "price": 30.0}, {"item_id": "3"})
    built = build(items, price={"scale": "zscore", "clip": "none", "fill": "none"})
    assert built.table["price_scaled"].to_pylist() == [-1.0, 1.0, 0.0]


# ---------------------------------------------------------------- later items


def test_a_saved_encoder_encodes_items_as_they_were_built() -> None:
    rows = [
        {"item_id": f"{n:02}", "category": f"A/{n % 3}|B", "brand": f"b{n % 2}", "price": 1.0 + n, "title": f"t {n}"}
        for n in range(20)
    ]
    built = build(catalogue(*rows, {"item_id": "99"}))
    saved = json.loads(json.dumps(built.encoder.to_dict()))
    encoded = AttributeEncoder.from_dict(saved, built.vocab).encode(built.table)
    for name, column in encoded.items():
        assert column.to_pylist() == built.table[name].to_pylist(), name
