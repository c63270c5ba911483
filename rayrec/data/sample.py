"""`rayrec sample`: a shop whose right answers are known, as a raw folder like any user's.

In: a folder and a SampleConfig. Out: events.csv (or events/ in shards), items.csv, images/ITEM_ID.jpg and truth.json.
It must not know the rule of choice nor how a picture is drawn.
"""

from __future__ import annotations

import csv
import json
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from rayrec.data.sample_choice import ACTION_NAMES, PURCHASE
from rayrec.data.sample_dirt import TRUNCATED_LINE, soil, soil_images
from rayrec.data.sample_events import Log, simulate
from rayrec.data.sample_images import Look, draw
from rayrec.data.sample_oracle import TRUTH_FORMAT, TRUTH_VERSION, Oracle, Query
from rayrec.data.sample_world import BRANDS, CATEGORIES, SampleConfig, World, anonymous_session
from rayrec.errors import ResourceError, UsageError
from rayrec.progress import Task

__all__ = ["Oracle", "Query", "SampleConfig", "SampleReport", "write_shop"]

ONE_FILE_ROWS: Final = 500_000
SHARD_ROWS: Final = 250_000


@dataclass(frozen=True)
class SampleReport:
    """What was written. `rows` counts the lines of the log below their headers, dirt included."""

    folder: str
    users: int
    anonymous: int
    items: int
    cold_items: int
    events: int
    rows: int
    days: int
    dirt: dict[str, int] = field(default_factory=dict)


def write_shop(folder: Path, config: SampleConfig) -> SampleReport:
    """Write a sample shop; the same config writes the same bytes. `folder` appears when all of it is there.

    Raises UsageError if `folder` exists and holds anything, ResourceError if it cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not an empty folder; name another, or remove it first")
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        part.mkdir(parents=True)
        report = _write(part, folder, config)
        part.replace(folder)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written ({error.strerror}); free space or name another") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report


def _write(part: Path, folder: Path, config: SampleConfig) -> SampleReport:
    """The files of the shop that will be called `folder`, into `part`."""
    world, log = simulate(config)
    table = _event_table(world, log, config.users)
    dirt: dict[str, int] = {}
    rng = np.random.default_rng((config.seed, 1))
    if config.dirty:
        table, dirt = soil(table, rng)
    _write_events(part, table, config.dirty)
    _write_items(part / "items.csv", world)
    images = _write_images(part / "images", world, config)
    if config.dirty:
        dirt |= {"truncated_line": 1, **soil_images(images, rng)}
    cold = [item_id for item_id, day in zip(world.item_id, world.launch_N, strict=True) if day >= world.days]
    truth = {
        "format": TRUTH_FORMAT, "version": TRUTH_VERSION, "config": asdict(config), "dirt": dirt,
        "cold_items": sorted(cold), "world": world.to_json(),
    }  # fmt: skip
    (part / "truth.json").write_text(json.dumps(truth))
    return SampleReport(
        folder=str(folder),
        users=config.users,
        anonymous=len(world.visitor) - config.users,
        items=config.items,
        cold_items=len(cold),
        events=config.events,
        rows=len(table) + dirt.get("truncated_line", 0),
        days=world.days,
        dirt=dirt,
    )


def _event_table(world: World, log: Log, users: int) -> pa.Table:
    """The log as strings, oldest first; an anonymous visitor has a session and no user."""
    n_anonymous = len(world.visitor) - users
    user_U = pa.array([*world.visitor[:users], *[""] * n_anonymous])
    session_E = np.unique(log.visitor_E * 2**32 + log.session_E, return_inverse=True)[1]
    n_known = int(session_E.max()) + 1 - n_anonymous  # visitors are in order: the last sessions are anonymous
    sessions = [f"s{number:08d}" for number in range(n_known)] + [anonymous_session(n) for n in range(n_anonymous)]
    bought = log.action_E == PURCHASE
    price = [f"{price:.2f}" for price in world.price_N] + [""]
    quantity = [""] + [str(n) for n in range(1, 10)]
    time = np.datetime_as_string(log.time_s_E.astype("datetime64[s]"), timezone="UTC")
    return pa.table(
        {
            "user_id": user_U.take(pa.array(log.visitor_E)),
            "session_id": pa.array(sessions).take(pa.array(session_E)),
            "item_id": pa.array(world.item_id).take(pa.array(log.item_E)),
            "timestamp": pa.array(time),
            "action": pa.array(ACTION_NAMES).take(pa.array(log.action_E)),
            "price": pa.array(price).take(pa.array(np.where(bought, log.item_E, len(world.item_id)))),
            "quantity": pa.array(quantity).take(pa.array(log.quantity_E)),
        }
    )


def _write_events(folder: Path, table: pa.Table, dirty: bool) -> None:
    if len(table) <= ONE_FILE_ROWS:
        paths, step = [folder / "events.csv"], ONE_FILE_ROWS
    else:
        (folder / "events").mkdir()
        step = SHARD_ROWS
        paths = [folder / "events" / f"part-{n:05d}.csv" for n in range(-(-len(table) // step))]
    options = pacsv.WriteOptions(include_header=False, quoting_style="none")
    for n, path in enumerate(paths):
        with path.open("wb") as stream:
            stream.write((",".join(table.column_names) + "\n").encode())
            pacsv.write_csv(table.slice(n * step, step), stream, options)
            if dirty and path == paths[-1]:
                stream.write(TRUNCATED_LINE.encode())


def _write_items(path: Path, world: World) -> None:
    with path.open("w", newline="") as stream:
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(("item_id", "title", "category", "brand", "price"))
        for item in sorted(range(len(world.item_id)), key=world.item_id.__getitem__):
            category, brand = CATEGORIES[world.category_N[item]].name, BRANDS[world.brand_N[item]]
            price = f"{world.price_N[item]:.2f}"
            out.writerow((world.item_id[item], world.title(item), category, brand, price))


def _write_images(folder: Path, world: World, config: SampleConfig) -> list[Path]:
    folder.mkdir()
    paths = []
    seeds = np.random.default_rng((config.seed, 2)).integers(2**31, size=len(world.item_id))
    with Task("sample: pictures", total=len(world.item_id)) as task:
        for item, seed in enumerate(seeds):
            path = folder / f"{world.item_id[item]}.jpg"
            draw(look(world, item), config.image_size, int(seed)).save(path, quality=90)
            paths.append(path)
            task.advance()
    return paths


def look(world: World, item: int) -> Look:
    """What a picture shows of an item."""
    columns = (world.category_N, world.colour_N, world.style_N, world.material_N, world.brand_N, world.tier_N)
    return Look(*(int(column[item]) for column in columns))
