"""A dataset folder made at once, without prepare, for benches of training: walks over a heavy-tailed catalogue.

In: how many events. Out: a dataset folder with pictures. Nobody's taste is in it: it is for speed alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.data.dataset import FORMAT, Dataset
from rayrec.data.training_events import TrainingEvents
from rayrec.schema import ACTION_CODE, DATASET_VERSION, IMAGE_SCHEMA, ITEM_SCHEMA, SEQUENCE_SCHEMA, TARGET_ACTIONS

EVENTS_PER_USER = 20
N_ITEMS = 2_000
SHARDS = 4


def make_dataset(folder: Path, events: int, image_size: int) -> Dataset:
    """Write and open a dataset of about `events` events of users with 20 each, and 2,000 items with pictures."""
    rng = np.random.default_rng(0)
    sequences = _sequences(max(10, events // EVENTS_PER_USER), rng)
    items = make_items(np.bincount(TrainingEvents.of(sequences).item_E, minlength=N_ITEMS + 1)[1:])
    pixels = rng.integers(0, 256, (N_ITEMS, image_size**2 * 3), np.uint8)
    images = pa.table([np.arange(1, N_ITEMS + 1), [row.tobytes() for row in pixels]], names=IMAGE_SCHEMA.names)
    tables = {"sequences": sequences, "items": items, "images": images.cast(IMAGE_SCHEMA)}
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        size = -(-len(table) // SHARDS)
        for shard in range(SHARDS):
            pq.write_table(table.slice(shard * size, size), folder / name / f"{shard}.parquet")
    (folder / "vocab").mkdir()
    for name, content in {"categories": ["", "thing"], "brands": ["", "maker"], "encoder": {}}.items():
        (folder / "vocab" / f"{name}.json").write_text(json.dumps(content))
    facts = {"format": FORMAT, "version": DATASET_VERSION, "clock": "time", "config": {"images": {"size": image_size}}}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return Dataset.open(str(folder))


def draw_items(n: int, rng: np.random.Generator) -> np.ndarray:
    """Item indices with a heavy tail: few items get most events. [n] int64."""
    return np.minimum(rng.pareto(1.1, n) * 40, N_ITEMS - 1).astype(np.int64) + 1


def _sequences(users: int, rng: np.random.Generator) -> pa.Table:
    n = users * EVENTS_PER_USER
    offsets = np.arange(users + 1, dtype=np.int32) * EVENTS_PER_USER
    time_ms = 1_700_000_000_000 + np.cumsum(rng.integers(1_000, 600_000, (users, EVENTS_PER_USER)), 1).ravel()
    values = (draw_items(n, rng), np.full(n, ACTION_CODE["view"]), time_ms)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in values]
    names = pa.array([f"u{user:08d}" for user in range(users)])
    last, nothing = np.full(users, EVENTS_PER_USER), np.full(users, -1)
    places = [last - 2, last - 2, last - 1, *[nothing] * (2 * len(TARGET_ACTIONS))]
    return pa.table([names, *lists, *places], names=SEQUENCE_SCHEMA.names).cast(SEQUENCE_SCHEMA)


def make_items(n_train: np.ndarray) -> pa.Table:
    """Items (schema.ITEM_SCHEMA) with so many training events each. n_train: [N]."""
    n_items = len(n_train)
    ones = np.ones(n_items, np.int64)
    columns = {
        "item_index": np.arange(1, n_items + 1),
        "item_id": pa.array([f"{item:06d}" for item in range(n_items)]),
        "in_catalogue": ones.astype(bool),
        "has_image": ones.astype(bool),
        "category_codes": pa.array([[1]] * n_items, pa.list_(pa.int32())),
        "brand_code": ones,
        "title_codes": pa.array([[1 + item % 500] for item in range(n_items)], pa.list_(pa.int32())),
        "price_scaled": np.linspace(-1, 1, n_items),
        "price_bucket": 1 + np.arange(n_items) % 10,
        "n_train": n_train,
    }
    cells = [columns.get(field.name, pa.nulls(n_items, field.type)) for field in ITEM_SCHEMA]
    return pa.table(cells, names=ITEM_SCHEMA.names).cast(ITEM_SCHEMA)
