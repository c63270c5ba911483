"""A shop to serve, made at once: a bundle with a real model that was never trained, and a state full of visitors.

In: how many items, visitors and events of each. Out: a BUNDLES folder, a SQLite file. Its lists are of no worth, and
cost what good ones cost. Seeded.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse

from rayrec.bundle import Bundle, BundleWriter, publish
from rayrec.catalogue import Catalogue
from rayrec.config import ImageConfig, PrepareConfig, preset
from rayrec.data.items import CATALOGUE_SCHEMA, BuiltItems, build_items
from rayrec.errors import StateError
from rayrec.followers import Followers, Matrix
from rayrec.history import Ints
from rayrec.model.recommender import build
from rayrec.schema import ACTION_CODE
from rayrec.state.sqlite import SqliteState

SKEW = 3.0
"""Item n of N is drawn as floor(N * u ** SKEW): few items get most events."""
NEW_SHARE = 0.005
NEXT, NEAR = 20, 40
"""How many followers of an item are drawn, for each matrix; some are drawn twice and count double."""
CATEGORIES, BRANDS, WORDS = 50, 200, 2000
ACTION_SHARES = {"view": 0.85, "cart": 0.08, "purchase": 0.05, "favorite": 0.02}
GAP_MS = 3_600_000
ROWS_AT_ONCE = 500_000


def item_id(n: int) -> str:
    """The id of item n, from 0."""
    return f"i{n:07d}"


def user_id(n: int) -> str:
    """The id of visitor n, from 0."""
    return f"u{n:07d}"


def make_bundle(bundles: Path, items: int, seed: int = 0) -> Bundle:
    """Write and publish the bundle of `items` items: preset small with the weights that it begins with."""
    rng = np.random.default_rng([seed, items])
    built = _items(items, rng)
    catalogue = Catalogue.from_table(built.table)
    followers = Followers(_follows(items, NEXT, rng), _follows(items, NEAR, rng))
    config = preset("small")
    torch.manual_seed(seed)
    model = build(config, catalogue)
    with BundleWriter(bundles, "made") as writer:
        writer.tensors(model.state_dict())
        writer.json("config.json", config.model_dump(mode="json"))
        writer.array("vectors.npy", model.encode_items().numpy())
        writer.matrix("cooccurrence/next", followers.next)
        writer.matrix("cooccurrence/near", followers.near)
        pq.write_table(catalogue.table, writer.file("items/items.parquet"))
        vocab = {**built.vocab, "encoder": built.encoder.to_dict(), "images": ImageConfig().model_dump(mode="json")}
        for name, content in vocab.items():
            writer.json(f"vocab/{name}.json", content)
        bundle = writer.commit(clock="time", items=items)
    publish(bundle)
    return bundle


def _items(items: int, rng: np.random.Generator) -> BuiltItems:
    """Encoded as prepare encodes them; the first have the most events, the last none."""
    n_train = np.ceil(1e5 * (1 + np.arange(items)) ** -0.8).astype(np.int64) + 5
    n_train[items - max(1, int(NEW_SHARE * items)) :] = 0
    ids = [item_id(n) for n in range(items)]
    columns = {
        "item_id": ids,
        "title": [" ".join(f"word{word}" for word in words) for words in rng.integers(WORDS, size=(items, 4)).tolist()],
        "category": [f"category {n}" for n in rng.integers(CATEGORIES, size=items).tolist()],
        "brand": [f"brand {n}" for n in rng.integers(BRANDS, size=items).tolist()],
        "price": np.round(rng.gamma(2, 20, items), 2),
    }
    cells = [columns.get(field.name, pa.nulls(items, field.type)) for field in CATALOGUE_SCHEMA]
    catalogue = pa.table(cells, names=CATALOGUE_SCHEMA.names).cast(CATALOGUE_SCHEMA)
    return build_items(catalogue, ids, n_train, set(), PrepareConfig())


def _follows(items: int, drawn: int, rng: np.random.Generator) -> Matrix:
    """How often each item followed each, row and column 0 empty. [N + 1, N + 1] csr, float32."""
    from_E = np.repeat(np.arange(1, items + 1), drawn)
    to_E = 1 + draw_items(items, items * drawn, rng)
    counts = sparse.coo_array((np.ones(len(to_E), np.float32), (from_E, to_E)), shape=(items + 1, items + 1))
    return sparse.csr_array(counts)


def draw_items(items: int, n: int, rng: np.random.Generator) -> Ints:
    """Items from 0, the first ones most often. [n] int64."""
    return np.minimum(items * rng.random(n) ** SKEW, items - 1).astype(np.int64)


def fill_state(path: Path, users: int, events: int, items: int, seed: int = 0) -> None:
    """Write a state in which each of `users` visitors has `events` events, the newest just now.

    Rows lie in order of time, as those of a shop do: a visitor's own are spread over the whole file.
    """
    SqliteState.open(f"sqlite:///{path}").close()
    rng = np.random.default_rng([seed, items, users, events])
    ids = np.array([item_id(n) for n in range(items)], object)
    actions = np.array(list(ACTION_SHARES), object)
    assert set(ACTION_SHARES) <= set(ACTION_CODE)
    first_ms = time.time_ns() // 1_000_000 - events * GAP_MS
    insert = "INSERT INTO events (visitor, item_id, action, time_ms, event_id) VALUES (?, ?, ?, ?, ?)"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        # Nothing is at stake: a file that was not finished is made again.
        for pragma in ("journal_mode = DELETE", "journal_mode = OFF", "synchronous = OFF", "cache_size = -200000"):
            if db.execute(f"PRAGMA {pragma}").fetchone() == ("wal",):
                raise StateError(f"{path}: somebody else has it open")
        # Indices are built at the end: row by row it would take many times as long.
        indices = db.execute(
            "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'events' AND sql LIKE 'CREATE INDEX%'"
        )
        held = dict(indices.fetchall())
        for name in held:
            db.execute(f"DROP INDEX {name}")
        db.execute("BEGIN")
        for place in range(events):
            for start in range(0, users, ROWS_AT_ONCE):
                who = range(start, min(users, start + ROWS_AT_ONCE))
                item = ids[draw_items(items, len(who), rng)].tolist()
                action = rng.choice(actions, len(who), p=list(ACTION_SHARES.values())).tolist()
                time_ms = (first_ms + place * GAP_MS + rng.integers(0, GAP_MS, len(who))).tolist()
                event_ids = (f"{place:04x}{n:08x}" for n in who)
                db.executemany(insert, zip(map(user_id, who), item, action, time_ms, event_ids, strict=True))
        for statement in held.values():
            db.execute(statement)
        db.execute("COMMIT")
