"""What a state holds and earlier exports do not, as files of one raw folder that `prepare --add` reads.

In: a state, the raw folder of exports, and how the dataset names columns. Out: new files in that folder. The folder is
its own record: an event is known by its id, whenever it came in, so an export that was ended half way is made up for by
the next. It must not know who reads the folder.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.data.edits import LISTED, SHOWN
from rayrec.data.intake import Erased, is_erased
from rayrec.files import filesystem, read_text
from rayrec.progress import Task, step
from rayrec.schema import SESSION_PREFIX, visitor_id
from rayrec.state.export import RAW_SCHEMA, ROWS_A_FILE, rows_of
from rayrec.state.protocol import ItemEdit, State

Hashes = npt.NDArray[np.uint64]
EDITS_AT_ONCE = 1000
JOINS = "_joins.json"
"""Which session became whose, for the day when they are erased; `prepare` passes it over."""
ITEMS_SCHEMA = pa.schema(
    [("item_id", pa.string()), *((n, pa.float64() if n == "price" else pa.string()) for n in SHOWN)]
)


@dataclass(frozen=True)
class New:
    """What was written: events and impressions that are new, and items and pictures that are new or changed."""

    events: int = 0
    impressions: int = 0
    items: int = 0
    pictures: int = 0


class Exports:
    """The raw folder of exports, a path or URI. columns: what the dataset calls canonical columns, where otherwise."""

    def __init__(self, raw: str, columns: Mapping[str, str]) -> None:
        self.fs, self.root = filesystem(raw)
        self.columns = columns

    def export(self, state: State, catalogue: pa.Table) -> New:
        """Write what is new of `state`. catalogue: the items as the dataset took them in (item_id and edits.SHOWN)."""
        events, impressions = self._events(state)
        items, pictures = self._items(state, catalogue) if len(catalogue) else (0, 0)
        return New(events, impressions, items, pictures)

    def files(self) -> list[str]:
        """The paths of whole files of events."""
        found = self.fs.get_file_info(pafs.FileSelector(f"{self.root}/events", allow_not_found=True))
        return sorted(f.path for f in found if f.base_name.endswith(".parquet") and not f.base_name.startswith("."))

    def __bool__(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.files()) or self._is_file("items.parquet")

    # ------------------------------------------------------------ who was erased since

    def visitors(self) -> set[str]:
        """Whose events lie here, and the sessions that were joined to somebody."""
        found = set(self._joins().values())
        for path in self.files():
            found.update(_visitors(self._events_of(path)))
        return found

    def forget(self, erased: Mapping[str, int]) -> Erased:
        """Take out what visitors did before they were erased (until when, epoch ms, by visitor).

        Returns `erased` with the sessions that had been joined to them, whose events may have been exported before.
        """
        joins = self._joins()
        all_of = {**erased, **{session: erased[user] for session, user in joins.items() if user in erased}}
        for path in self.files():
            events = self._events_of(path)
            whose = pa.table({"user_id": pa.array(_visitors(events)), "time_ms": events["timestamp"]})
            gone = is_erased(whose, all_of)
            if not pc.any(gone).as_py():
                continue
            rest = events.filter(pc.invert(gone))
            if len(rest):
                self._write(path.removeprefix(f"{self.root}/"), rest)
            else:
                self.fs.delete_file(path)
        return all_of

    def forget_joins(self, erased: Mapping[str, int]) -> None:
        """Forget which sessions were those of erased visitors, when nobody needs to know it any more."""
        joins = self._joins()
        left = {session: user for session, user in joins.items() if user not in erased}
        if left != joins:
            self._put(JOINS, json.dumps(left).encode())

    def _events_of(self, path: str) -> pa.Table:
        """A file of events, its columns under their canonical names."""
        theirs = {name: canonical for canonical, name in self.columns.items()}
        with self.fs.open_input_file(path) as stream:
            table = pq.read_table(stream)
        return table.rename_columns([theirs.get(name, name) for name in table.column_names])

    def _joins(self) -> dict[str, str]:
        return dict(json.loads(read_text(self.fs, f"{self.root}/{JOINS}") or "{}"))

    # ------------------------------------------------------------ events

    def _events(self, state: State) -> tuple[int, int]:
        known = self._known()
        before = self._joins()
        joins = dict(before)
        counts = [0, 0]
        run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"  # two may be of one second
        for number, rows in enumerate(_batches(state, joins)):
            ids = hashes([row["event_id"] for row in rows])
            new = [row for row, old in zip(rows, np.isin(ids, known).tolist(), strict=True) if not old]
            if new:
                fields = [field.with_nullable(True) for field in RAW_SCHEMA]
                self._write(f"events/{run}-{number:05d}.parquet", pa.Table.from_pylist(new, pa.schema(fields)))
                shown = sum(row["action"] == "impression" for row in new)
                counts = [counts[0] + len(new) - shown, counts[1] + shown]
        if joins != before:
            self._put(JOINS, json.dumps(joins).encode())
        return counts[0], counts[1]

    def _known(self) -> Hashes:
        """Hashes of the ids of all events that lie here. Eight bytes an event."""
        name = self.columns.get("event_id", "event_id")
        found = [np.empty(0, np.uint64)]
        for path in self.files():
            with self.fs.open_input_file(path) as stream:
                found.append(hashes(pq.read_table(stream, columns=[name])[name].to_pylist()))
        return np.concatenate(found)

    # ------------------------------------------------------------ the catalogue, as the shop changed it live

    def _items(self, state: State, catalogue: pa.Table) -> tuple[int, int]:
        """Items of which the shop said something, whole rows: what it left out is as in the catalogue."""
        before = {row["item_id"]: row for row in catalogue.select(["item_id", *SHOWN]).to_pylist()}
        rows, pictures = [], 0
        for edit in _edits(state):
            known = before.get(edit.item_id)
            if known is None and not edit.facts.get(LISTED, True):
                continue  # it came and went between two exports
            row = {"item_id": edit.item_id, **(known or dict.fromkeys(SHOWN))}
            rows.append(row | {name: edit.facts[name] for name in SHOWN if name in edit.facts})
            pictures += self._picture(state, edit)
        rows.sort(key=lambda row: str(row["item_id"]))
        table = self._named(pa.Table.from_pylist(rows, ITEMS_SCHEMA))
        if not rows or (self._is_file("items.parquet") and self._read("items.parquet").equals(table)):
            return 0, pictures
        self._write("items.parquet", table, named=True)
        return len(rows), pictures

    def _picture(self, state: State, edit: ItemEdit) -> bool:
        """Write the picture that was put for an item, unless it lies here; whether it was written."""
        data = state.item_picture(edit.item_id) if edit.picture_seq else None
        if data is None:
            return False
        if "/" in edit.item_id or edit.item_id.startswith("."):
            step(f"item {edit.item_id}: its picture is left out, for its id cannot name a file")
            return False
        name = f"images/{edit.item_id}.jpg"
        if self._is_file(name):
            with self.fs.open_input_stream(f"{self.root}/{name}") as stream:
                if stream.read() == data:
                    return False
        self._put(name, data)
        return True

    # ------------------------------------------------------------ files

    def _is_file(self, name: str) -> bool:
        return bool(self.fs.get_file_info(f"{self.root}/{name}").type == pafs.FileType.File)

    def _read(self, name: str) -> pa.Table:
        with self.fs.open_input_file(f"{self.root}/{name}") as stream:
            return pq.read_table(stream)

    def _named(self, table: pa.Table) -> pa.Table:
        return table.rename_columns([self.columns.get(name, name) for name in table.column_names])

    def _write(self, name: str, table: pa.Table, *, named: bool = False) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table if named else self._named(table), sink, compression="zstd")
        self._put(name, sink.getvalue())

    def _put(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file, whole or not at all: readers pass over names that begin with a dot."""
        folder, _, file = f"{self.root}/{name}".rpartition("/")
        part = f"{folder}/.{uuid.uuid4().hex}-{file}"
        self.fs.create_dir(folder, recursive=True)
        with self.fs.open_output_stream(part) as stream:
            stream.write(content)
        self.fs.move(part, f"{folder}/{file}")


def hashes(ids: Sequence[str]) -> Hashes:
    """64 bits of each id, the same everywhere. [N]"""
    return pd.util.hash_array(np.array(ids, object), categorize=False) if ids else np.empty(0, np.uint64)


def _visitors(events: pa.Table) -> list[str]:
    """Whose each event is."""
    pairs = zip(events["user_id"].to_pylist(), events["session_id"].to_pylist(), strict=True)
    return [visitor_id(user, session) for user, session in pairs]


def _batches(state: State, joins: dict[str, str]) -> Iterator[list[dict[str, Any]]]:
    """All rows that a state holds, some visitors' at a time. Sessions that were joined to them are noted in `joins`."""
    rows: list[dict[str, Any]] = []
    with Task("export events", state.counts()["events"]) as task:
        for visitor in state.visitors():
            if not visitor:
                continue  # lists that were shown to nobody in particular teach nothing
            record = state.user(visitor)
            found = rows_of(record)
            joins.update({SESSION_PREFIX + session: visitor for session in record.sessions})
            task.advance(sum(row["action"] != "impression" for row in found))
            rows += found
            if len(rows) >= ROWS_A_FILE:
                yield rows
                rows = []
    if rows:
        yield rows


def _edits(state: State) -> Iterator[ItemEdit]:
    seq = 0
    while edits := state.item_edits(seq, EDITS_AT_ONCE):
        yield from edits
        seq = edits[-1].seq
