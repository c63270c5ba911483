"""Rules: what is kept, what is removed and why."""

from __future__ import annotations

import numpy as np
import pytest
from shopfake import catalogue

from rayrec.ranking.rules import Filters, Forbidden, Rules

SHOP = catalogue(per_style=4, new_per_style=0)  # red-0..3 are 1..4, green 5..8, blue 9..12; item n costs n + 1
ALL = np.arange(1, 13)


def apply(filters: Filters = Filters(), forbidden: Forbidden = Forbidden()) -> tuple[list[str], dict[str, int]]:
    keep, removed = Rules(SHOP).apply(ALL, filters, forbidden)
    return SHOP.ids[ALL[keep]].tolist(), removed


def test_without_rules_all_is_kept() -> None:
    assert apply() == (SHOP.ids[1:].tolist(), {})


@pytest.mark.parametrize(
    ("filters", "kept", "removed"),
    [
        (Filters(category=("red",)), ["red-0", "red-1", "red-2", "red-3"], {"category": 8}),
        (Filters(category=("red|things",)), ["red-0", "red-1", "red-2", "red-3"], {"category": 8}),
        (Filters(category=("red",), brand=("odd", "none")), ["red-1", "red-3"], {"category": 8, "brand": 2}),
        (Filters(category=("red", "blue"), price_max=1), ["red-0", "blue-0"], {"category": 4, "price": 6}),
        (Filters(category=("nothing",)), [], {"category": 12}),
        (Filters(price_max=1), ["red-0", "green-0", "blue-0"], {"price": 9}),
        (Filters(price_min=4), ["red-3", "green-3", "blue-3"], {"price": 9}),
        (Filters(price_min=2, price_max=2), ["red-1", "green-1", "blue-1"], {"price": 9}),
        (Filters(price_min=3, price_max=2), [], {"price": 12}),
        (Filters(item_type=("gift",)), [], {"item_type": 12}),
    ],
)  # fmt: skip
def test_filters(filters: Filters, kept: list[str], removed: dict[str, int]) -> None:
    assert apply(filters) == (kept, removed)


def test_forbidden_items_count_once_under_the_first_reason() -> None:
    reds = frozenset({"red-0", "red-1", "red-2"})
    forbidden = Forbidden(context=frozenset({"red-0"}), hidden=frozenset({"red-0", "red-1"}), bought=reds)
    kept, removed = apply(Filters(category=("red",)), forbidden)
    assert kept == ["red-3"]
    assert removed == {"context": 1, "hidden": 1, "bought": 1, "category": 8}


def test_unknown_forbidden_ids_are_no_matter() -> None:
    assert apply(forbidden=Forbidden(excluded=frozenset({"never-heard-of"})))[1] == {}


def test_an_item_without_a_price_passes_no_price_filter() -> None:
    shop = catalogue(per_style=2, new_per_style=0)
    shop.price[1] = np.nan
    keep, removed = Rules(shop).apply(np.array([1, 2]), Filters(price_min=0), Forbidden())
    assert keep.tolist() == [False, True]
    assert removed == {"price": 1}


def test_no_candidates() -> None:
    keep, removed = Rules(SHOP).apply(np.empty(0, np.int64), Filters(category=("red",)), Forbidden())
    assert keep.tolist() == []
    assert removed == {}


def test_mask_agrees_with_apply() -> None:
    filters, forbidden = Filters(category=("green",), price_max=3), Forbidden(hidden=frozenset({"green-1"}))
    mask = Rules(SHOP).mask(filters, forbidden)
    assert SHOP.ids[np.flatnonzero(mask)].tolist() == apply(filters, forbidden)[0] == ["green-0", "green-2"]
