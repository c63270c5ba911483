"""What is damaged is exactly what was asked for, and what is asked about is never touched."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rayrec.bench.damage import (
    ATTRIBUTES,
    NOISY_PIXELS,
    Goods,
    add_bots,
    break_events,
    free_events,
    lose_attributes,
    lose_events,
    lose_images,
    noise_images,
    shuffle_attributes,
)
from rayrec.data.dataset import Images
from rayrec.schema import EVENT_SCHEMA, ITEM_SCHEMA

ACTIONS = ("view", "purchase")
N_ITEMS = 20


def event_table(*rows: tuple[str, str]) -> pa.Table:
    """Events of (user, action) on changing items, a second apart."""
    return pa.Table.from_pylist(
        [
            {"user_id": user, "item_id": f"i{n % N_ITEMS}", "time_ms": 1000 * n, "action": action, "price": 5.0}
            for n, (user, action) in enumerate(rows)
        ],
        EVENT_SCHEMA,
    )


def goods() -> Goods:
    events = event_table(*[(f"u{user}", "view") for user in range(10) for _ in range(23)])
    items = pa.Table.from_pylist(
        [
            {
                "item_index": n + 1, "item_id": f"i{n}", "title": "", "category": f"c{n}", "brand": f"b{n}",
                "price": float(n), "in_catalogue": True, "has_image": True, "category_codes": [], "brand_code": 0,
                "title_codes": [], "price_scaled": 0.0, "price_bucket": 0, "n_train": 1,
            }
            for n in range(N_ITEMS)
        ],
        ITEM_SCHEMA,
    )  # fmt: skip
    return Goods(events, items, Images(np.arange(1, N_ITEMS + 1), np.full((N_ITEMS, 8, 8, 3), 7, np.uint8)))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_first_last_two_and_last_two_purchases_are_left_alone() -> None:
    actions = ["view", "purchase", "purchase", "view", "purchase", "view", "impression", "view", "view", "impression"]
    events = event_table(*[("a", action) for action in actions], ("b", "view"), ("b", "view"), ("b", "view"))
    assert free_events(events, ACTIONS).tolist() == [1, 3, 5]


def test_visitors_of_four_events_can_lose_one() -> None:
    events = event_table(*[(user, "view") for user in "aaaabbbccd"])
    assert free_events(events, ACTIONS).tolist() == [1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_events_are_lost_as_asked(share: float) -> None:
    whole = goods()
    free = free_events(whole.events, ACTIONS)
    assert len(free) == 200
    left = lose_events(whole, share, free, rng()).events
    assert len(left) == len(whole.events) - round(share * 200)
    kept = whole.events.take(pa.array(np.setdiff1d(np.arange(len(whole.events)), free)))
    assert set(kept["time_ms"].to_pylist()) <= set(left["time_ms"].to_pylist())
    assert left["time_ms"].to_pylist() == sorted(left["time_ms"].to_pylist())


def test_broken_events_say_so_and_the_others_do_not_change() -> None:
    whole = goods()
    free = free_events(whole.events, ACTIONS)
    broken = break_events(whole, 0.3, free, rng()).events
    marked = np.flatnonzero(broken["value"].is_null().to_numpy())
    assert len(marked) == 60
    assert set(marked) <= set(free)
    assert broken["price"].is_null().to_numpy()[marked].all()
    changed = np.flatnonzero(pc.not_equal(broken["item_id"], whole.events["item_id"]).to_numpy())
    assert set(changed) <= set(marked)
    assert 45 <= len(changed) <= 60, "one draw in twenty is the item that was there"


def test_bots_bring_their_share_and_nothing_else_changes() -> None:
    whole = goods()
    soiled = add_bots(whole, 0.5, np.empty(0, np.int64), rng()).events
    assert soiled.slice(0, len(whole.events)).equals(whole.events)
    bots = soiled.slice(len(whole.events)).to_pandas()
    assert (len(bots), set(bots["user_id"])) == (115, {"bot-0"})
    assert bots["time_ms"].diff().dropna().eq(1000).all()
    assert bots["item_id"].nunique() == N_ITEMS


def test_many_bots_share_the_work() -> None:
    soiled = add_bots(goods(), 30, np.empty(0, np.int64), rng()).events.to_pandas()
    per_bot = soiled[soiled["user_id"].str.startswith("bot-")]["user_id"].value_counts()
    assert per_bot.tolist() == [2300, 2300, 2300]


def test_attributes_are_lost_each_for_its_own_items() -> None:
    items = lose_attributes(goods(), 0.5, np.empty(0, np.int64), rng()).items
    assert [items[name].null_count for name in ATTRIBUTES] == [10, 10, 10]
    assert not items["category"].is_null().equals(items["brand"].is_null())


def test_shuffled_attributes_are_the_same_words_elsewhere() -> None:
    whole = goods()
    items = shuffle_attributes(whole, 0.5, np.empty(0, np.int64), rng()).items
    for name in ATTRIBUTES:
        assert sorted(items[name].to_pylist()) == sorted(whole.items[name].to_pylist())
        assert pc.sum(pc.not_equal(items[name], whole.items[name])).as_py() == 10
    assert items["item_id"].equals(whole.items["item_id"])


def test_pictures_are_lost_and_soiled_as_asked() -> None:
    whole = goods()
    left = lose_images(whole, 0.3, np.empty(0, np.int64), rng()).images
    assert len(left.item_M) == len(left.pixels_MHWC) == 14
    noisy = noise_images(whole, 0.3, np.empty(0, np.int64), rng()).images
    changed_M = (noisy.pixels_MHWC != 7).any(-1).mean((1, 2))
    assert (changed_M > 0).sum() == 6
    assert changed_M[changed_M > 0].mean() == pytest.approx(NOISY_PIXELS, abs=0.1)
    assert (whole.images.pixels_MHWC == 7).all(), "the clean ones are not written to"


def test_the_seed_decides() -> None:
    whole = goods()
    free = free_events(whole.events, ACTIONS)
    first, again = (lose_events(whole, 0.5, free, np.random.default_rng(3)).events for _ in range(2))
    other = lose_events(whole, 0.5, free, np.random.default_rng(4)).events
    assert first.equals(again)
    assert not first.equals(other)
