"""Damage to a shop's data, of a kind and a share: what is lost, what is noise, and what keeps the questions fair.

In: clean events, items and pictures. Out: the same, damaged. Pure: a seed decides. It must not know who learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data.dataset import Images
from rayrec.history import Ints
from rayrec.schema import EVENT_SCHEMA

ATTRIBUTES = ("category", "brand", "price")
NOISY_PIXELS = 0.5
"""Share of a noisy picture's pixels that are noise: impulses, as a broken sensor or a bad transfer makes them."""
BOT_EVENTS = 2000
BOT_GAP_MS = 1000
HEALTHY = 1.0


@dataclass(frozen=True)
class Goods:
    """A shop's data: events (EVENT_SCHEMA, by visitor and time), items (ITEM_SCHEMA, by index) and pictures."""

    events: pa.Table
    items: pa.Table
    images: Images


Damage = Callable[[Goods, float, Ints, np.random.Generator], Goods]
"""Goods, share, the places of the events that may be damaged (see `free_events`), randomness -> goods."""


def free_events(events: pa.Table, actions: Iterable[str]) -> Ints:
    """Places of the events that may be damaged. [F] int64, ascending.

    Of each visitor's engagements (`actions`) the first, the last two and the last two purchases are left alone. The
    last ones are what leave-one-out asks about; with the first one every visitor that is tested keeps the three
    events without which its targets would be learned from.
    """
    engaged = np.asarray(pc.is_in(events["action"], pa.array(list(actions))).to_numpy(), bool)
    place_E = np.flatnonzero(engaged)
    code_E = events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()[place_E]
    bought_E = np.asarray(pc.equal(events["action"], "purchase").to_numpy(), bool)[place_E]
    back_E = _rank(code_E[::-1])[::-1]
    kept_E = (_rank(code_E) < 1) | (back_E < 2)
    bought = np.flatnonzero(bought_E)
    kept_E[bought[_rank(code_E[bought][::-1])[::-1] < 2]] = True
    return place_E[~kept_E]


def _rank(code_E: npt.NDArray[Any]) -> Ints:
    """How many equal values stand before each. [E]

    >>> _rank(np.array([7, 7, 3, 7])).tolist()
    [0, 1, 0, 2]
    """
    order = np.argsort(code_E, kind="stable")
    ordered = code_E[order]
    start_E = np.searchsorted(ordered, ordered)
    rank_E = np.empty(len(code_E), np.int64)
    rank_E[order] = np.arange(len(code_E)) - start_E
    return rank_E


def some(places: Ints, share: float, rng: np.random.Generator) -> Ints:
    """The rounded `share` of `places`, drawn without replacement, ascending."""
    return np.sort(rng.choice(places, round(share * len(places)), replace=False))


# ---------------------------------------------------------------- events


def lose_events(goods: Goods, share: float, free: Ints, rng: np.random.Generator) -> Goods:
    """A share of the free events is gone."""
    kept = np.ones(len(goods.events), bool)
    kept[some(free, share, rng)] = False
    return replace(goods, events=goods.events.filter(pa.array(kept)))


def break_events(goods: Goods, share: float, free: Ints, rng: np.random.Generator) -> Goods:
    """A share of the free events names an item drawn at random, and lacks its `value` and `price`.

    All other events have a value, so that a filter of incomplete rows can tell: a logger that breaks loses fields.
    """
    events, broken = goods.events, some(free, share, rng)
    is_broken = np.zeros(len(events), bool)
    is_broken[broken] = True
    ids = goods.items["item_id"].combine_chunks()
    item = np.asarray(pc.index_in(events["item_id"].combine_chunks(), ids).to_numpy(), np.int64).copy()
    item[broken] = rng.integers(0, len(ids), len(broken))
    value = pc.fill_null(events["value"], HEALTHY)
    columns = {
        "item_id": ids.take(pa.array(item)),
        "value": pc.if_else(pa.array(is_broken), pa.scalar(None, pa.float64()), value),
        "price": pc.if_else(pa.array(is_broken), pa.scalar(None, pa.float64()), events["price"]),
    }
    return replace(goods, events=_with(events, columns))


def add_bots(goods: Goods, share: float, free: Ints, rng: np.random.Generator) -> Goods:
    """Visitors who view items at random, one a second, thousands each: `share` times the events there were."""
    events, n = goods.events, round(share * len(goods.events))
    bots = max(1, n // BOT_EVENTS)
    bot_E = np.arange(n) * bots // max(1, n)
    times = goods.events["time_ms"].to_numpy()
    start_B = rng.choice(times, bots) if len(times) else np.zeros(bots, np.int64)
    ids = goods.items["item_id"].combine_chunks()
    columns = {
        "user_id": pa.array([f"bot-{bot}" for bot in bot_E.tolist()], pa.string()),
        "item_id": ids.take(pa.array(rng.integers(0, len(ids), n))),
        "time_ms": pa.array(start_B[bot_E] + _rank(bot_E) * BOT_GAP_MS, pa.int64()),
        "action": pa.array(["view"] * n, pa.string()),
    }
    added = {field.name: columns.get(field.name, pa.nulls(n, field.type)) for field in EVENT_SCHEMA}
    return replace(goods, events=pa.concat_tables([events, pa.table(added, schema=EVENT_SCHEMA)]))


# ---------------------------------------------------------------- items and pictures


def lose_attributes(goods: Goods, share: float, free: Ints, rng: np.random.Generator) -> Goods:
    """Of a share of the items the category is unknown; of a share, drawn anew, the brand; and so the price."""
    everyone = np.arange(len(goods.items))
    columns = {}
    for name in ATTRIBUTES:
        lost = np.zeros(len(everyone), bool)
        lost[some(everyone, share, rng)] = True
        column = goods.items[name]
        columns[name] = pc.if_else(pa.array(lost), pa.scalar(None, column.type), column)
    return replace(goods, items=_with(goods.items, columns))


def shuffle_attributes(goods: Goods, share: float, free: Ints, rng: np.random.Generator) -> Goods:
    """A share of the items hand their category on to one another, so that nobody keeps it; brand and price too."""
    columns = {}
    for name in ATTRIBUTES:
        given = rng.permutation(some(np.arange(len(goods.items)), share, rng))
        taken_from = np.arange(len(goods.items))
        taken_from[given] = np.roll(given, 1)
        columns[name] = goods.items[name].combine_chunks().take(pa.array(taken_from))
    return replace(goods, items=_with(goods.items, columns))


def lose_images(goods: Goods, share: float, free: Ints, rng: np.random.Generator) -> Goods:
    """A share of the pictures is gone."""
    images = goods.images
    kept = np.ones(len(images.item_M), bool)
    kept[some(np.arange(len(kept)), share, rng)] = False
    return replace(goods, images=Images(images.item_M[kept], images.pixels_MHWC[kept]))


def noise_images(goods: Goods, share: float, free: Ints, rng: np.random.Generator) -> Goods:
    """In a share of the pictures NOISY_PIXELS of the pixels are of a random colour."""
    pixels_MHWC = goods.images.pixels_MHWC.copy()
    for picture in some(np.arange(len(pixels_MHWC)), share, rng).tolist():
        height, width, _ = pixels_MHWC[picture].shape
        noisy_HW = rng.random((height, width)) < NOISY_PIXELS
        pixels_MHWC[picture][noisy_HW] = rng.integers(0, 256, (int(noisy_HW.sum()), 3), np.uint8)
    return replace(goods, images=Images(goods.images.item_M, pixels_MHWC))


def _with(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return table
