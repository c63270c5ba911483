"""A little dirt for the sample shop: rows and pictures that a good `prepare` must find, each kind counted.

In: the clean log as a table of strings, the pictures' paths. Out: the table with dirt among its rows, and counts.
It must not touch a clean row: take the dirt away and the clean log is left.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

BOT_ID: Final = "u999999"
BOT_EVENTS: Final = 1200
TRUNCATED_LINE: Final = "u000001,s0000"
_SHARE: Final = 0.001  # of the clean rows, of each kind

Row = dict[str, str]


def _set(**values: str) -> Callable[[Row], Row]:
    return lambda row: {**row, **values}


_KINDS: Final[dict[str, Callable[[Row], Row]]] = {
    "duplicate": lambda row: row,
    "empty_item": _set(item_id=""),
    "empty_visitor": _set(user_id="", session_id=""),
    "bad_time": _set(timestamp="yesterday"),
    "empty_time": _set(timestamp=""),
    "future_time": _set(timestamp="2999-01-01T00:00:00Z"),
    "ancient_time": _set(timestamp="1970-01-01T00:00:00Z"),
    "unknown_action": _set(action="teleport"),
    "bad_quantity": _set(action="purchase", quantity="1000000000"),
    "bad_price": _set(action="purchase", price="-12.00"),
}
"""What each kind does to a copy of a clean row that is no purchase."""


def soil(clean: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, dict[str, int]]:
    """The table with dirty rows beside the clean ones they were copied from, and the count of each kind.

    All columns are strings. The bot's events lie in one hour.
    """
    count = max(3, round(_SHARE * len(clean)))
    plain_rows = np.flatnonzero(np.array(clean["action"]) != "purchase")
    place, rows, dirt = [], [], {}
    for kind, change in _KINDS.items():
        chosen = rng.choice(plain_rows, size=min(count, len(plain_rows)), replace=False)
        rows += [change(row) for row in clean.take(chosen).to_pylist()]
        place.append(chosen)
        dirt[kind] = len(chosen)
    rows += _bot_rows(clean, len(clean) // 2, rng)
    place.append(np.full(BOT_EVENTS, len(clean) // 2))
    dirt["bot"] = BOT_EVENTS
    both = pa.concat_tables([clean, pa.Table.from_pylist(rows, schema=clean.schema)])
    order = np.argsort(np.concatenate([np.arange(len(clean)), *place]), kind="stable")
    return both.take(order), dirt


def _bot_rows(clean: pa.Table, place: int, rng: np.random.Generator) -> list[Row]:
    """Views by one visitor, one every three seconds, in the clock hour of the clean row at `place`."""
    hour = clean["timestamp"][place].as_py()[:13]
    items = clean["item_id"].take(rng.integers(len(clean), size=BOT_EVENTS)).to_pylist()
    blank = {**dict.fromkeys(clean.column_names, ""), "user_id": BOT_ID, "session_id": "bot", "action": "view"}
    return [
        {**blank, "item_id": item, "timestamp": f"{hour}:{n // 20:02d}:{n % 20 * 3:02d}Z"}
        for n, item in enumerate(items)
    ]


def soil_images(paths: list[Path], rng: np.random.Generator) -> dict[str, int]:
    """Cut one picture short and put text into another."""
    cut, text = (paths[place] for place in rng.choice(len(paths), size=2, replace=False))
    cut.write_bytes(cut.read_bytes()[:200])
    text.write_text("This is a picture of a product.\n")
    return {"image_cut_short": 1, "image_is_text": 1}
