"""Tiny shops for the tests of evaluation: catalogues and sequences written down by hand, or a real log."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.catalogue import Catalogue
from rayrec.data.dataset import FORMAT, Dataset
from rayrec.data.training_events import TrainingEvents
from rayrec.history import HistoryBatch
from rayrec.schema import ACTION_CODE, ACTIONS, DATASET_VERSION, ITEM_SCHEMA, SEQUENCE_SCHEMA, TARGET_ACTIONS

VIEW, CART, PURCHASE = (ACTION_CODE[name] for name in ("view", "cart", "purchase"))


def item_table(
    n_train: Sequence[int], categories: Sequence[list[int]] | None = None, brands: Sequence[int] | None = None
) -> pa.Table:
    """Items 1..N of ITEM_SCHEMA with these training events, category codes and brand codes."""
    size = len(n_train)
    columns: dict[str, Any] = {
        "item_index": np.arange(1, size + 1),
        "item_id": pa.array([f"i{n}" for n in range(1, size + 1)]),
        "in_catalogue": np.ones(size, bool),
        "has_image": np.zeros(size, bool),
        "category_codes": pa.array(categories or [[]] * size, pa.list_(pa.int32())),
        "brand_code": np.array(brands or [0] * size),
        "title_codes": pa.array([[]] * size, pa.list_(pa.int32())),
        "price_scaled": np.zeros(size),
        "price_bucket": np.zeros(size, np.int8),
        "n_train": np.array(n_train),
    }
    cells = [columns.get(field.name, pa.nulls(size, field.type)) for field in ITEM_SCHEMA]
    return pa.table(cells, names=ITEM_SCHEMA.names).cast(ITEM_SCHEMA)


def catalogue(*items: tuple[list[int], int, int]) -> Catalogue:
    """Items of (category codes, brand code, training events)."""
    categories, brands, n_train = zip(*items, strict=True)
    return Catalogue.from_table(item_table(n_train, categories, brands))


def sequence_table(*histories: Sequence[int | tuple[int, int]]) -> pa.Table:
    """Leave-one-out sequences of histories: an item index is a view, (item, action) any event. Users u0, u1, ...

    The last event is the test target, the one before it the validation target, if there are three. Purchases:
    the last is the purchase test target, the one before it the validation target; never the very first event. Carts
    likewise.
    """
    rows = []
    for n, history in enumerate(histories):
        events = [event if isinstance(event, tuple) else (event, VIEW) for event in history]
        tested = len(events) >= 3
        bought, put = (
            [-1, -1, *(place for place, (_, action) in enumerate(events) if action == wanted and place and tested)]
            for wanted in (PURCHASE, CART)
        )
        rows.append(
            {
                "user_id": f"u{n}",
                "item": [item for item, _ in events],
                "action": [action for _, action in events],
                "time_ms": [1_000 * place for place in range(len(events))],
                "n_train": len(events) - 2 if tested else len(events),
                "valid_at": len(events) - 2 if tested else -1,
                "test_at": len(events) - 1 if tested else -1,
                "purchase_valid_at": bought[-2],
                "purchase_test_at": bought[-1],
                "cart_valid_at": put[-2],
                "cart_test_at": put[-1],
            }
        )
    return pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA)


def counted_items(sequences: pa.Table, n_items: int, **attributes: Any) -> pa.Table:
    """Items 1..n_items with the training events that `sequences` has of each."""
    n_train = np.bincount(TrainingEvents.of(sequences).item_E, minlength=n_items + 1)[1:]
    return item_table(n_train.tolist(), **attributes)


def random_shop(seed: int, users: int, n_items: int) -> tuple[pa.Table, pa.Table]:
    """Sequences of users who mostly step to the next item of a ring, and their items."""
    rng = np.random.default_rng(seed)
    histories = []
    for length in rng.integers(1, 15, users):
        steps = np.where(rng.random(length) < 0.6, 1, rng.integers(0, n_items, length))
        items = np.cumsum(np.append(rng.integers(n_items), steps[1:])) % n_items + 1
        actions = rng.choice([VIEW, PURCHASE, CART], length, p=[0.6, 0.3, 0.1])
        histories.append(list(zip(items.tolist(), actions.tolist(), strict=True)))
    sequences = sequence_table(*histories)
    categories = [[n % 3 + 1] for n in range(n_items)]
    return sequences, counted_items(sequences, n_items, categories=categories)


def write_dataset(folder: Path, sequences: pa.Table, items: pa.Table, *, shards: int = 2) -> Dataset:
    """A dataset folder of these tables, without what evaluation does not read."""
    for name in ("sequences", "items"):
        (folder / name).mkdir(parents=True)
    size = -(-len(sequences) // shards)
    for shard in range(shards):
        pq.write_table(sequences.slice(shard * size, size), folder / "sequences" / f"{shard}.parquet")
    pq.write_table(items, folder / "items" / "0.parquet")
    manifest = {"format": FORMAT, "version": DATASET_VERSION, "clock": "time"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Dataset.open(str(folder))


def leave_one_out(events: pa.Table) -> tuple[pa.Table, int]:
    """Sequences of a raw log by its timestamps, all views, three or more a user; and the number of items."""
    events = events.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    item = np.unique(events["item_id"].to_numpy(), return_inverse=True)[1] + 1
    length = pc.value_counts(events["user_id"]).field("counts").to_numpy()  # in order of appearance: sorted
    place = pa.array(np.concatenate([np.arange(n) for n in length]))
    offsets = np.append(0, np.cumsum(length)).astype(np.int32)
    view, nothing = np.full(len(item), VIEW), np.full(len(length), -1)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (item, view, place)]
    users = pa.array([f"u{n}" for n in range(len(length))])
    places = [length - 2, length - 2, length - 1, *[nothing] * 2 * len(TARGET_ACTIONS)]
    table = pa.table([users, *lists, *places], names=SEQUENCE_SCHEMA.names).cast(SEQUENCE_SCHEMA)
    return table, int(item.max())


class ScoreTable:
    """A ranker that knows each item's score under each head, whatever the history."""

    actions = ACTIONS

    def __init__(self, **scores: Sequence[float]) -> None:
        self.heads = tuple(scores)
        self._scores = {head: np.array([0.0, *values], np.float32) for head, values in scores.items()}
        self.calls: list[tuple[str, int]] = []

    def rank_all(self, history: HistoryBatch, head: str) -> np.ndarray:
        self.calls.append((head, len(history)))
        return np.broadcast_to(self._scores[head], (len(history), len(self._scores[head])))

    def score(self, history: HistoryBatch, candidates_BC: np.ndarray, head: str) -> np.ndarray:
        return 1 / (1 + np.exp(-self._scores[head][candidates_BC]))


def maker(ranker: Any) -> Callable[[], Any]:
    """A maker of a ranker that exists already."""
    return lambda: ranker
