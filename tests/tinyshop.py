"""A shop small enough to train on in seconds, with one thing to learn: what follows what.

Items 1..40 come in four colours of ten; their pictures show the colour. Visitors walk along one colour, each item
followed by the next, the ninth by the first. The tenth of each colour is cold: nobody ever met it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.config import Config, preset
from rayrec.data.columns import ColumnFit
from rayrec.data.dataset import FORMAT, Dataset
from rayrec.data.training_events import TrainingEvents
from rayrec.schema import ACTION_CODE, DATASET_VERSION, IMAGE_SCHEMA, ITEM_SCHEMA, SEQUENCE_SCHEMA
from rayrec.settings import with_settings

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
PER_COLOUR = 10
N_ITEMS = PER_COLOUR * len(COLOURS)
COLD = tuple(range(PER_COLOUR, N_ITEMS + 1, PER_COLOUR))
START_MS = 1_700_000_000_000

TINY = (
    "model.width=16",
    "model.hidden_width=24",
    "model.max_len=10",
    "model.image_size=16",
    "model.cnn_channels=[8,8]",
    "model.candidates=10",
    "model.fusion_width=16",
    "model.dropout=0.1",
    "train.epochs=3",
    "train.fusion_epochs=1",
    "train.fusion_steps=0",
    "train.fusion_holdout=0.3",
    "train.refit_epochs=2",
    "train.batch_size=16",
    "train.fusion_batch_size=16",
    "train.lr=0.02",
    "train.precision=fp32",
)


def tiny(*settings: str) -> Config:
    """The small preset, made tiny, with `settings` on top."""
    return with_settings(preset("small"), [*TINY, *settings])


def after(item: int) -> int:
    """The item that visitors take after `item`."""
    colour, place = divmod(item - 1, PER_COLOUR)
    return colour * PER_COLOUR + (place + 1) % (PER_COLOUR - 1) + 1


def sequence_table(users: int = 60, seed: int = 0) -> pa.Table:
    """Walks of 8 to 14 events, leave-one-out; now and then a purchase, and one step in ten goes anywhere."""
    rng = np.random.default_rng(seed)
    rows = [_walk(n, rng) for n in range(users)]
    return pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA)


def _walk(user: int, rng: np.random.Generator) -> dict[str, Any]:
    length = int(rng.integers(8, 15))
    items = [int(rng.integers(len(COLOURS))) * PER_COLOUR + int(rng.integers(PER_COLOUR - 1)) + 1]
    while len(items) < length:
        anywhere = int(rng.integers(len(COLOURS))) * PER_COLOUR + int(rng.integers(PER_COLOUR - 1)) + 1
        items.append(anywhere if rng.random() < 0.1 else after(items[-1]))
    bought = rng.random(length) < 0.25
    places = [place for place in np.flatnonzero(bought).tolist() if place]
    return {
        "user_id": f"u{user}",
        "item": items,
        "action": np.where(bought, ACTION_CODE["purchase"], ACTION_CODE["view"]).tolist(),
        "time_ms": (START_MS + user * 1000 + np.cumsum(rng.integers(1_000, 4_000_000, length))).tolist(),
        "n_train": length - 2,
        "valid_at": length - 2,
        "test_at": length - 1,
        "purchase_valid_at": places[-2] if len(places) > 1 else -1,
        "purchase_test_at": places[-1] if places else -1,
        "cart_valid_at": -1,
        "cart_test_at": -1,
    }


def item_table(sequences: pa.Table) -> pa.Table:
    """The forty items, with their training events counted."""
    n_train_N = np.bincount(TrainingEvents.of(sequences).item_E, minlength=N_ITEMS + 1)
    rows = []
    for item in range(1, N_ITEMS + 1):
        colour, place = divmod(item - 1, PER_COLOUR)
        name = list(COLOURS)[colour]
        rows.append(
            {
                "item_index": item,
                "item_id": f"{name}-{place}",
                "title": f"{name} thing {place}",
                "category": name,
                "brand": "even" if place % 2 == 0 else "odd",
                "price": float(1 + place),
                "in_catalogue": True,
                "has_image": item % 7 != 0,
                "category_codes": [colour + 1],
                "brand_code": 1 + place % 2,
                "title_codes": [colour + 1, 100 + place],
                "price_scaled": place / 4.5 - 1,
                "price_bucket": 1 + place,
                "n_train": int(n_train_N[item]),
            }
        )
    return pa.Table.from_pylist(rows, schema=ITEM_SCHEMA)


def image_table(items: pa.Table, size: int) -> pa.Table:
    """A picture of noise around the colour for each item that has one."""
    rng = np.random.default_rng(1)
    rows = []
    for item in items.filter(items["has_image"]).to_pylist():
        colour = np.array(COLOURS[item["category"]])
        pixels = np.clip(colour + rng.integers(-20, 20, (size, size, 3)), 0, 255).astype(np.uint8)
        rows.append({"item_index": item["item_index"], "pixels": pixels.tobytes()})
    return pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA)


def write(folder: Path, *, image_size: int = 16, users: int = 60, seed: int = 0, sequences: pa.Table = None) -> Dataset:
    """The shop as a dataset folder, opened. `sequences` in place of the walks."""
    table = sequences if sequences is not None else sequence_table(users, seed)
    items = item_table(table)
    shards = {"sequences": table, "items": items, "images": image_table(items, image_size)}
    for name, rows in shards.items():
        (folder / name).mkdir(parents=True)
        half = -(-len(rows) // 2)
        for shard, start in enumerate((0, half)):
            pq.write_table(rows.slice(start, half), folder / name / f"{shard}.parquet")
    (folder / "vocab").mkdir()
    price = ColumnFit(kept=True, low=None, high=None, fill=None, logs=False, center=5.5, width=4.5)
    encoder = {"price": asdict(price), "price_deciles": list(range(1, 10))}
    for name, content in {"categories": ["", *COLOURS], "brands": ["", "even", "odd"], "encoder": encoder}.items():
        (folder / "vocab" / f"{name}.json").write_text(json.dumps(content))
    manifest = {
        "format": FORMAT,
        "version": DATASET_VERSION,
        "clock": "time",
        "config": {"images": {"size": image_size}},
        "counts": {"users": len(table), "items": N_ITEMS},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Dataset.open(str(folder))
