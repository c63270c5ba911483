"""The state as a raw folder: what was served and done today is what `prepare` reads tomorrow.

In: a state. Out: Parquet files of events, lists shown among them as impressions. It must not know the backend. One
visitor at a time is held in memory, and nobody's rows are split over two files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.errors import UsageError
from rayrec.progress import Task
from rayrec.schema import EVENT_SCHEMA, SESSION_PREFIX
from rayrec.state.protocol import Event, Shown, State, UserRecord

ROWS_A_FILE = 200_000
RAW_SCHEMA = pa.schema([pa.field("timestamp", pa.int64()) if f.name == "time_ms" else f for f in EVENT_SCHEMA])


@dataclass(frozen=True)
class Exported:
    """What was written. nobodys: lists that were shown to nobody in particular, which teach nothing."""

    visitors: int
    events: int
    impressions: int
    nobodys: int
    files: int


def export_events(state: State, folder: Path) -> Exported:
    """Write `folder`/events/*.parquet: every event held, and each item of every list shown as an impression.

    An impression's event_id is made of its request and position, so that it counts once however often it is exported.
    Erased visitors have left nothing to write. Raises UsageError if there are events in the folder already.
    """
    place = folder / "events"
    if place.exists() and any(place.iterdir()):
        raise UsageError(f"{place}: is not empty; name a new folder, so that no old export is mixed in")
    place.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(("visitors", "events", "impressions", "nobodys", "files"), 0)
    rows: list[dict[str, Any]] = []
    with Task("export events", state.counts()["events"]) as task:
        for visitor in state.visitors():
            record = state.user(visitor)
            if not visitor:
                counts["nobodys"] += len(record.shown)
                continue
            counts["visitors"] += 1
            counts["events"] += len(record.events)
            found = rows_of(record)
            counts["impressions"] += len(found) - len(record.events)
            rows += found
            task.advance(len(record.events))
            if len(rows) >= ROWS_A_FILE:
                counts["files"] += _write(rows, place, counts["files"])
                rows = []
    counts["files"] += _write(rows, place, counts["files"])
    return Exported(**counts)


def rows_of(record: UserRecord) -> list[dict[str, Any]]:
    """A visitor's events and lists as rows of RAW_SCHEMA."""
    impressions = [row for shown in record.shown for row in _impression_rows(shown)]
    return [*(_event_row(event) for event in record.events), *impressions]


def _event_row(event: Event) -> dict[str, Any]:
    row = {name: getattr(event, name) for name in EVENT_SCHEMA.names if name not in ("user_id", "time_ms")}
    return {**row, **_whose(event.visitor, event.session_id), "timestamp": event.time_ms}


def _impression_rows(shown: Shown) -> Iterator[dict[str, Any]]:
    for position, (item_id, propensity) in enumerate(zip(shown.item_ids, shown.propensities, strict=True)):
        yield {
            **_whose(shown.visitor, None),
            "item_id": item_id,
            "timestamp": shown.time_ms,
            "action": "impression",
            "event_id": f"{shown.request_id}:{position}",
            "request_id": shown.request_id,
            "position": position,
            "scene": shown.scene,
            "propensity": propensity,
            "model": shown.model,
        }


def _whose(visitor: str, session_id: str | None) -> dict[str, str | None]:
    """As a log names a visitor."""
    if visitor.startswith(SESSION_PREFIX):
        return {"user_id": None, "session_id": visitor.removeprefix(SESSION_PREFIX)}
    return {"user_id": visitor, "session_id": session_id}


def _write(rows: list[dict[str, Any]], place: Path, number: int) -> int:
    """Write a file, whole or not at all; how many that are."""
    if not rows:
        return 0
    part, whole = (place / f"{name}-{number:05d}.parquet" for name in (".part", "part"))
    fields = [field.with_nullable(True) for field in RAW_SCHEMA]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), part, compression="zstd")
    part.rename(whole)
    return 1
