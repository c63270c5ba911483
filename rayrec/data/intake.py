"""What a dataset keeps of what it has taken in, so that a later day can be added and come out as in a full run.

In: a finished dataset. Out: the raw files it knows, and the events of each partition as they were before visitors were
cleaned. It must not know how events are cleaned. What depends on everything (repeats, robots, cuts, numbers of items)
is found anew each time; what a row shows by itself, and a picture, is not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec import __version__
from rayrec.data.dataset import Dataset
from rayrec.data.events import ROW_BITS, ROW_MASK
from rayrec.data.readers import RawFile
from rayrec.data.staging import Folder
from rayrec.errors import DataError
from rayrec.files import filesystem
from rayrec.history import Ints
from rayrec.progress import step
from rayrec.schema import REJECT_SCHEMA, visitor_id

INTAKE_VERSION = 1
EVENTS = "intake/events"
CATALOGUE = "intake/catalogue.parquet"
PICTURES = "intake/images.parquet"
AT_ONCE = 8
ERASED = "erased"
"""Why rows of a report are gone that are no longer held anywhere."""

Erased: TypeAlias = Mapping[str, int]
"""Until when (epoch ms, inclusive) nothing of a visitor may be known, by `schema.visitor_id`."""


@dataclass(frozen=True)
class Taken:
    """A raw file that was taken in: under which name, whence, its content, and its rows, broken ones included.

    erased: of its rows, those that are kept no longer, for their visitor was erased.
    """

    name: str
    path: str
    size_bytes: int
    mtime_ns: int | None
    sha256: str
    rows: int = 0
    erased: int = 0

    @classmethod
    def of(cls, fs: pafs.FileSystem, file: RawFile, rows: int = 0) -> Taken:
        """The record of a file, which is read for its hash."""
        return cls(file.name, file.path, file.size_bytes, file.mtime_ns, sha256(fs, file.path), rows)

    def same_as(self, fs: pafs.FileSystem, file: RawFile) -> bool:
        """Whether `file` is this one: in place, size and time, as make and git ask, or else in content."""
        if file.size_bytes != self.size_bytes:
            return False
        untouched = file.mtime_ns is not None and file.mtime_ns == self.mtime_ns and file.path == self.path
        return untouched or sha256(fs, file.path) == self.sha256


@dataclass(frozen=True)
class Intake:
    """What a finished dataset has taken in. `facts` is the section "intake" of its manifest."""

    dataset: Dataset
    folder: Folder
    facts: dict[str, Any]

    @classmethod
    def of(cls, path: str) -> Intake:
        """Raises UsageError if there is no dataset, DataError if it does not hold what adding to it needs."""
        dataset = Dataset.open(path)
        facts = dataset.manifest.get("intake")
        if not facts or facts["version"] != INTAKE_VERSION:
            raise DataError(
                f"{path}: does not hold what adding to it needs (it is of another rayrec, or derived from another "
                "another one); run prepare without --add on all raw files, once"
            )
        if dataset.manifest["rayrec"] != __version__:
            raise DataError(
                f"{path}: made by rayrec {dataset.manifest['rayrec']}, and this is {__version__}, which may clean "
                "otherwise; run prepare without --add on all raw files, once"
            )
        return cls(dataset, Folder(*filesystem(dataset.path)), facts)

    @property
    def files(self) -> tuple[Taken, ...]:
        """The files of events; a row's origin has the place of its file among them."""
        return tuple(Taken(**file) for file in self.facts["files"])

    @property
    def n_partitions(self) -> int:
        """Partitions that its events lie in."""
        return int(self.facts["partitions"])

    def visitors(self) -> set[str]:
        """Everybody whose events are held, in memory."""
        found: set[str] = set()
        for partition in range(self.n_partitions):
            found.update(pc.unique(self._partition(partition, ["user_id"])["user_id"]).to_pylist())
        return found

    def row_rejects(self) -> pa.Table:
        """What was rejected for what a row shows by itself; REJECT_SCHEMA."""
        return pa.concat_tables([REJECT_SCHEMA.empty_table(), *self.tables("rejects/events/rows-")])

    def erased_rows(self, erased: Erased) -> Counter[str]:
        """How many rows are to be kept no longer, rejected ones included, by the name of their file."""
        rejects, names = self.row_rejects(), [file.name for file in self.files]
        rows = Counter[str](rejects["file"].filter(tells_of(rejects, erased)).to_pylist())
        for partition in range(self.n_partitions):
            events = self._partition(partition, ["user_id", "time_ms", "origin"])
            gone = events.filter(is_erased(events, erased))
            rows.update(names[place] for place in (gone["origin"].to_numpy() >> ROW_BITS).tolist())
        return rows

    def _partition(self, partition: int, columns: list[str]) -> pa.Table:
        with self.folder.fs.open_input_file(self.folder.path(f"{EVENTS}/part-{partition:05d}.parquet")) as stream:
            return pq.read_table(stream, columns=columns)

    def table(self, name: str) -> pa.Table:
        """One Parquet file of the dataset."""
        with self.folder.fs.open_input_file(self.folder.path(name)) as stream:
            return pq.read_table(stream)

    def tables(self, start: str) -> list[pa.Table]:
        """All Parquet files whose name begins with `start`, in order."""
        return [self.table(name) for name in self.dataset.manifest["files"] if name.startswith(start)]


@dataclass(frozen=True)
class OldEvents:
    """The events of an intake as tasks read them, without those of the erased.

    number_F: the number of the piece that each file counts as.
    """

    folder: Folder
    n_partitions: int
    number_F: Ints
    has_event_ids: bool
    erased: Erased = field(default_factory=dict)

    def read(self, partition: int) -> pa.Table:
        """The rows of one partition, their `origin` in the numbers of this run."""
        with self.folder.fs.open_input_file(self.folder.path(f"{EVENTS}/part-{partition:05d}.parquet")) as stream:
            events = pq.read_table(stream)
        if self.erased:
            events = events.filter(pc.invert(is_erased(events, self.erased)))
        events = events.combine_chunks()
        return with_origins(events, self.number_F, np.zeros(len(self.number_F), np.int64))


def with_origins(events: pa.Table, number_P: Ints, first_row_P: Ints) -> pa.Table:
    """`events` with each origin (p, row) as (number_P[p], first_row_P[p] + row)."""
    origin_R = events["origin"].to_numpy()
    piece_R = origin_R >> ROW_BITS
    origin = pa.array((number_P[piece_R] << ROW_BITS) | ((origin_R & ROW_MASK) + first_row_P[piece_R]))
    return events.set_column(events.column_names.index("origin"), "origin", origin)


def is_erased(events: pa.Table, erased: Erased) -> pa.Array:
    """Whether each event is one of a visitor who was erased then or later. [E] bool."""
    names = pa.array(list(erased), pa.string())
    place = pc.index_in(events["user_id"].combine_chunks(), names)
    until = pa.array(list(erased.values()), pa.int64()).take(place)
    return pc.fill_null(pc.less_equal(events["time_ms"].combine_chunks(), until), False)


def tells_of(rejects: pa.Table, erased: Erased) -> pa.Array:
    """Whether each rejected row is one of a visitor who was erased, whenever it says that it happened. [R] bool."""
    if not erased:
        return pa.array(np.zeros(len(rejects), bool))
    return pa.array([_visitor_of(raw) in erased for raw in rejects["raw"].to_pylist()], pa.bool_())


def _visitor_of(raw: str | None) -> str | None:
    """Whose a rejected row is, as far as it can be read."""
    try:
        row = json.loads(raw or "")
        return visitor_id(row.get("user_id"), row.get("session_id"))
    except (ValueError, AttributeError):
        return None


# ---------------------------------------------------------------- which files are new


def unknown(fs: pafs.FileSystem, files: Iterable[RawFile], taken: Sequence[Taken], folder: str) -> list[RawFile]:
    """Those of `files` that were not taken in yet, under names that nothing else bears.

    folder: where they lie, which tells a file from an earlier one of the same name elsewhere: "events.csv (day-2)".
    Raises DataError for a file that was taken in and has changed since: its old rows cannot be told from the new.
    """
    by_name, places = {known.name: known for known in taken}, {known.path for known in taken}
    new = []
    for file in files:
        names = (file.name, f"{file.name} ({folder.rpartition('/')[2]})")
        if any(name in by_name and by_name[name].same_as(fs, file) for name in names):
            continue
        if file.path in places:
            raise DataError(
                f"{file.path}: has changed since it was taken in. Put what is new into a file of its own, or run "
                "prepare without --add on all raw files"
            )
        free = [name for name in names if name not in by_name]
        if not free:
            raise DataError(f"{file.path}: another file was taken in as {names[1]}; give this one a name of its own")
        new.append(replace(file, name=free[0]))
    return new


def records(fs: pafs.FileSystem, files: Sequence[RawFile], taken: Sequence[Taken]) -> list[Taken]:
    """The records of new files; says which of them hold just what another one does."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda file: Taken.of(fs, file), files))
    name_of = {known.sha256: known.name for known in taken}
    for one in found:
        if one.sha256 in name_of:
            step(f"{one.name} holds the very bytes of {name_of[one.sha256]}, and its rows count again: is that meant?")
    return found


def as_facts(files: Iterable[Taken]) -> list[dict[str, Any]]:
    """Records for the manifest."""
    return [asdict(file) for file in files]


def sha256(fs: pafs.FileSystem, path: str) -> str:
    """SHA-256 of a raw file as it lies there, compressed or not, in hex."""
    digest = hashlib.sha256()
    with fs.open_input_stream(path, compression=None) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
