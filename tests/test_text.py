"""Search over a shop whose right answers are plain to see, in English and in Chinese, well and badly spelt."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.catalogue import Catalogue
from rayrec.ranking.text import TextIndex
from rayrec.schema import ITEM_SCHEMA

ITEMS = {
    "dress": ("Red dress, long", "Women|Dresses", "Maison"),
    "jeans": ("Blue jeans", "Men|Trousers", "Denim & Co"),
    "shoe": ("Running shoes for women", "Women|Shoes", "Fleet"),
    "cafe": ("Café table", "Furniture", None),
    "qipao": ("红色连衣裙 夏季", "女装", "美丽"),
    "shirt": ("蓝色衬衫", "男装", "大山"),
    "phone": ("Xiaomi 小米手机 14", "手机", "小米"),
    "plain": (None, None, None),
}


def shop(items: dict[str, tuple[str | None, str | None, str | None]]) -> Catalogue:
    rows = [
        {
            "item_index": n, "item_id": item_id, "title": title, "category": category, "brand": brand, "price": None,
            "in_catalogue": True, "has_image": False, "category_codes": [], "brand_code": 0, "title_codes": [],
            "price_scaled": 0.0, "price_bucket": 0, "n_train": 1,
        }
        for n, (item_id, (title, category, brand)) in enumerate(items.items(), 1)
    ]  # fmt: skip
    return Catalogue.from_table(pa.Table.from_pylist(rows, schema=ITEM_SCHEMA))


@pytest.fixture(scope="module")
def index() -> TextIndex:
    return TextIndex(shop(ITEMS))


def found(index: TextIndex, query: str, n: int = 10) -> list[str]:
    items, score = index.search(query, n)
    assert np.all(np.diff(score) <= 0)
    assert not len(score) or score[0] == 1.0
    return [list(ITEMS)[item - 1] for item in items]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("red dress", "dress"),
        ("DRESSES", "dress"),
        ("maison", "dress"),
        ("trouser", "jeans"),
        ("denim", "jeans"),
        ("cafe", "cafe"),
        ("café", "cafe"),
        ("runing shoe", "shoe"),
        ("trousesr", "jeans"),
        ("furnitrue", "cafe"),
        ("连衣裙", "qipao"),
        ("红色", "qipao"),
        ("衬衫", "shirt"),
        ("男", "shirt"),
        ("小米", "phone"),
        ("xiaomi手机", "phone"),
        ("xaiomi", "phone"),
        ("女装 连衣裙", "qipao"),
    ],
)
def test_what_is_meant_comes_first(index: TextIndex, query: str, first: str) -> None:
    assert found(index, query)[0] == first


@pytest.mark.parametrize("query", ["", "   ", "zzz", "裤子鞋", '!?*:()[]"^~', "AND OR NOT", "words:"])
def test_nothing_is_found_where_nothing_is_meant(index: TextIndex, query: str) -> None:
    assert found(index, query) == []


def test_words_as_written_beat_misspelt_ones(index: TextIndex) -> None:
    other = TextIndex(shop({"a": ("dresser", None, None), "b": ("dressed up", None, None), "c": ("dress", None, None)}))
    items, _ = other.search("dress", 3)
    assert items[0] == 3


def test_more_of_the_words_are_better(index: TextIndex) -> None:
    assert found(index, "women dress")[0] == "dress"
    assert set(found(index, "women dress")) == {"dress", "shoe"}
    assert found(index, "women dress", n=1) == ["dress"]


def test_an_empty_catalogue_is_searched() -> None:
    assert TextIndex(shop({})).search("dress", 5)[0].tolist() == []


@given(st.text(max_size=600))
def test_any_text_is_a_query(index: TextIndex, query: str) -> None:
    items, score = index.search(query, 5)
    assert len(items) == len(score) <= 5
    assert len(set(items.tolist())) == len(items)
