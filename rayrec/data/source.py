"""What a run of prepare is about to read: all of a raw folder, or what a dataset does not know of it yet.

In: a raw folder, settings, and the intake of a dataset that is added to. Out: a `Source`, and the plan of its tasks. It
must not know what the tasks do. Where adding would give another dataset than a full run does, it is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.cluster import cpus
from rayrec.config import PrepareConfig
from rayrec.data.catalogue_files import RawCatalogue, overlaid, read_catalogue
from rayrec.data.clock import Clock, detect_clock
from rayrec.data.events import Rules
from rayrec.data.image_shards import FOLDER, OldImages, old_images, untouched
from rayrec.data.intake import (
    CATALOGUE,
    PICTURES,
    Erased,
    Intake,
    OldEvents,
    Taken,
    as_facts,
    records,
    sha256,
    unknown,
)  # fmt: skip
from rayrec.data.items import CATALOGUE_SCHEMA
from rayrec.data.mapping import Mapping
from rayrec.data.raw import Raw, plan, raw_settings, sample_pieces, text_bytes
from rayrec.data.readers import read_piece
from rayrec.data.stages import Plan, event_columns
from rayrec.data.staging import Folder
from rayrec.errors import DataError, UsageError
from rayrec.files import filesystem
from rayrec.schema import REJECT_SCHEMA
from rayrec.settings import with_settings

PARTITION_BYTES = 48 * 1024 * 1024
"""Text of the events that one task cleans at a time; it needs about ten times as much memory."""
GROWTH = 1.5
"""A partition may grow by so much before the events of earlier runs are dealt out to more of them."""
SAMPLE_FILES = 5


@dataclass(frozen=True)
class Source:
    """What is to be read. `raw` holds the new files alone.

    records       of the new event files
    new_items     the catalogue's files, if they are to be read
    text_bytes    of all event files, old ones included
    raw_settings  what the raw folder's own file of settings says
    """

    raw: Raw
    config: PrepareConfig
    rules: Rules
    clock: Clock
    clock_found: Clock
    records: list[Taken]
    new_items: bool
    text_bytes: int
    raw_settings: dict[str, Any]
    old: Intake | None = None
    erased: Erased = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All event files, old and new, in the order in which their rows count."""
        old = [file.name for file in self.old.files] if self.old else []
        return sorted([*old, *(file.name for file in self.raw.events)])


def fresh(raw: Raw, config: PrepareConfig, mapping: Mapping) -> Source:
    """All of a raw folder."""
    settings = raw_settings(raw)
    config = _completed(config, settings)
    found = _clock_found(raw, mapping)
    clock = found if config.clock == "auto" else config.clock
    rules = Rules.of(config.clean, clock, mapping)
    size = text_bytes(raw.events)
    return Source(raw, config, rules, clock, found, records(raw.fs, raw.events, ()), bool(raw.items), size, settings)


def added(old: Intake, raw: Raw, settings: Iterable[str], mapping: Mapping | None) -> Source | None:
    """What `old` does not know of a raw folder; None if it knows all of it.

    settings, mapping: as the user gave them; what was not given is as it was. Raises UsageError where they are others,
    DataError where the new files cannot be added so that the outcome is that of a full run.
    """
    before = PrepareConfig.model_validate(old.dataset.manifest["config"])
    _require_same_settings(settings, before, old.dataset.path)
    known = Mapping.model_validate(old.facts["mapping"])
    if mapping is not None and mapping != known:
        raise UsageError(f"{old.dataset.path}: was prepared with another mapping; leave --map out, or --add")
    of_folder = raw_settings(raw)
    if of_folder and of_folder != old.facts["raw_settings"]:
        raise DataError(f"{raw.uri}: its settings (prepare.yaml) are others than those of {old.dataset.path}{_IN_FULL}")
    events = unknown(raw.fs, raw.events, old.files, raw.uri)
    new = replace(raw, events=tuple(events))
    new_items = _items_changed(old, raw)
    if not events and not new_items and untouched(raw, known_images(old)):
        return None
    clock: Clock = old.dataset.manifest["clock"]
    found: Clock = old.facts["clock_found"]
    if events and before.clock == "auto" and (seen := _clock_found(new, known)) != found:
        names = ", ".join(file.name for file in events[:SAMPLE_FILES])
        raise DataError(f"{names}: times of kind '{seen}', where {old.dataset.path} has '{found}'{_IN_FULL}")
    rules = Rules.of(before.clean, clock, known)
    size = old.facts["text_bytes"] + text_bytes(events)
    taken = records(raw.fs, events, old.files)
    return Source(new, before, rules, clock, found, taken, new_items, size, old.facts["raw_settings"], old)


def less(old: Intake, erased: Erased, raw: str) -> Source | None:
    """What `old` has taken in without the events of erased visitors; None if it holds none of them.

    raw: a raw folder out of whose files they have been taken: as these are now, they count as taken in.
    """
    gone = old.erased_rows(erased)
    if not gone:
        return None
    fs, root = filesystem(raw)
    here = {file.path: file for file in _listed(fs, root)}
    files = [replace(file, erased=file.erased + gone[file.name]) for file in old.files]
    files = [_again(fs, here[file.path], file) if file.path in here else file for file in files]
    facts = {**old.facts, "files": as_facts(files)}
    before = PrepareConfig.model_validate(old.dataset.manifest["config"])
    clock: Clock = old.dataset.manifest["clock"]
    rules = Rules.of(before.clean, clock, Mapping.model_validate(facts["mapping"]))
    nothing = Raw(fs, root, "", (), (), {})
    found: Clock = facts["clock_found"]
    size, settings = facts["text_bytes"], facts["raw_settings"]
    return Source(
        nothing, before, rules, clock, found, [], False, size, settings, replace(old, facts=facts), erased
    )  # fmt: skip


def _listed(fs: pafs.FileSystem, root: str) -> list[pafs.FileInfo]:
    entries = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    return [entry for entry in entries if entry.type == pafs.FileType.File]


def _again(fs: pafs.FileSystem, file: pafs.FileInfo, taken: Taken) -> Taken:
    return replace(taken, size_bytes=file.size, mtime_ns=file.mtime_ns, sha256=sha256(fs, file.path))


_IN_FULL = ": run prepare without --add on all raw files"


def plan_of(source: Source, out: Folder) -> Plan:
    """The tasks and partitions of a run, on the cluster that is there."""
    rank = {name: n for n, name in enumerate(source.names)}
    new = source.raw.events
    tasks = [
        tuple(replace(piece, file=rank[new[piece.file].name]) for piece in task)
        for task in plan(source.raw.fs, new, 2 * cpus())
    ]
    old = source.old
    old_ranks = [rank[file.name] for file in old.files] if old else []
    file_P = np.sort(np.array([*(piece.file for task in tasks for piece in task), *old_ranks], np.int64))
    first_of_file = {int(file): int(n) for file, n in zip(*np.unique(file_P, return_index=True), strict=True)}
    by_size = -(-source.text_bytes // PARTITION_BYTES)
    if source.config.shards:
        partitions = source.config.shards
    elif old:
        partitions = old.n_partitions if by_size <= GROWTH * old.n_partitions else by_size
    else:
        partitions = max(by_size, min(cpus(), len(tasks)))
    events = None
    if old:
        number_F = np.array([first_of_file[n] for n in old_ranks], np.int64)
        has_event_ids = "event_id" in old.facts["found"]
        events = OldEvents(old.folder, old.n_partitions, number_F, has_event_ids, source.erased)
    numbers = tuple(_numbers(tasks, first_of_file))
    return Plan(source.raw.fs, out, tuple(tasks), numbers, file_P, partitions, source.rules, source.config, events)


def _numbers(tasks: list[Any], first_of_file: dict[int, int]) -> Iterator[tuple[int, ...]]:
    """The numbers of each task's pieces, which come in the order of their files."""
    next_of = dict(first_of_file)
    for task in tasks:
        numbers = []
        for piece in task:
            numbers.append(next_of[piece.file])
            next_of[piece.file] += 1
        yield tuple(numbers)


# ---------------------------------------------------------------- the catalogue and pictures


def source_catalogue(source: Source) -> tuple[RawCatalogue, list[dict[str, Any]]]:
    """The catalogue as it is with the new files, and its batches: files that were read together, for the manifest.

    The files of a raw folder that gave items before stand in for those; what another folder lists goes on top.
    """
    old, raw = source.old, source.raw
    batches: list[dict[str, Any]] = old.facts["catalogue"]["batches"] if old else []
    before = old_catalogue(old) if old else None
    if before is not None and not source.new_items:
        return before, batches
    others = [batch for batch in batches if batch["folder"] != raw.uri]
    taken = {name for batch in others for name in batch["names"]}
    place = raw.uri.rpartition("/")[2]
    items = [file if file.name not in taken else replace(file, name=f"{file.name} ({place})") for file in raw.items]
    if clash := [file.name for file in items if file.name in taken]:
        raise DataError(f"{raw.uri}: another catalogue was taken in as {clash[0]}; give this file a name of its own")
    read = read_catalogue(replace(raw, items=tuple(items)), source.rules.mapping)
    names = [file.name for file in items]
    files = as_facts(Taken.of(raw.fs, file) for file in raw.items)
    batch = {"folder": raw.uri, "names": names, "files": files, "repairs": read.repairs}
    if before is None:
        return read, [batch]
    gone = {name for one in batches if one["folder"] == raw.uri for name in one["names"]}
    repairs: dict[str, int] = {}
    for one in others:
        for what, n in one["repairs"].items():
            repairs[what] = repairs.get(what, 0) + n
    return overlaid(replace(before, repairs=repairs), read, gone), [*others, batch]


def old_catalogue(old: Intake) -> RawCatalogue:
    """The clean catalogue that a dataset has kept."""
    kept = old.table(CATALOGUE)
    repairs: dict[str, int] = {}
    for batch in old.facts["catalogue"]["batches"]:
        for what, n in batch["repairs"].items():
            repairs[what] = repairs.get(what, 0) + n
    images = [(ref.item_id, ref.where, ref.source, ref.row) for ref in known_images(old).refs if ref.source != FOLDER]
    return RawCatalogue(
        items=kept.select(CATALOGUE_SCHEMA.names).cast(CATALOGUE_SCHEMA),
        files=kept["file"].combine_chunks(),
        images=images,
        rejects=pa.concat_tables([REJECT_SCHEMA.empty_table(), *old.tables("rejects/items/")]),
        repairs=repairs,
        report=old.facts["catalogue"]["report"],
    )


def _items_changed(old: Intake, raw: Raw) -> bool:
    """Whether the raw folder's catalogue is another than was taken in. Raises DataError if it is gone."""
    batches = old.facts["catalogue"]["batches"]
    here = next((batch for batch in batches if batch["folder"] == raw.uri), None)
    if not raw.items:
        if here is not None and here["files"]:
            raise DataError(
                f"{raw.uri}: its catalogue ({', '.join(here['names'])}) is gone; put it back, or {_IN_FULL[2:]}"
            )
        return False

    def known(batch: dict[str, Any]) -> bool:
        files = {file["name"]: Taken(**file) for file in batch["files"]}
        same = [file.name in files and files[file.name].same_as(raw.fs, file) for file in raw.items]
        return len(files) == len(same) and all(same)

    return not any(known(batch) for batch in ([here] if here is not None else batches))


def known_images(old: Intake) -> OldImages:
    """What a dataset knows of pictures."""
    table = old.dataset.table("items").select(["item_index", "item_id"]).sort_by("item_index")
    shards = [name for name in old.dataset.manifest["files"] if name.startswith("images/")]
    return old_images(old.table(PICTURES), ["", *table["item_id"].to_pylist()], old.folder, shards)


# ---------------------------------------------------------------- settings


def _require_same_settings(settings: Iterable[str], before: PrepareConfig, path: str) -> None:
    """Raise UsageError if a setting that was given is not the dataset's."""
    for setting in settings:
        if with_settings(before, [setting]) != before:
            raise UsageError(
                f"--set {setting}: {path} was prepared otherwise, and adding to it changes no setting; leave it out"
                f"{_IN_FULL.replace(':', ', or')}"
            )


def _completed(config: PrepareConfig, raw_settings: dict[str, Any]) -> PrepareConfig:
    """`config` with the raw folder's settings where the user left the default."""
    mine, default = config.model_dump(), PrepareConfig().model_dump()

    def value(tree: Any, path: str) -> Any:
        return reduce(lambda node, name: node.get(name) if isinstance(node, dict) else None, path.split("."), tree)

    chosen = [
        f"{path}={json.dumps(v)}" for path, v in raw_settings.items() if value(mine, path) == value(default, path)
    ]
    return with_settings(config, chosen)


def _clock_found(raw: Raw, mapping: Mapping) -> Clock:
    """The clock that a sample of the first files shows. Raises DataError for missing columns."""
    times: list[pa.Array] = []
    for piece in sample_pieces(raw.fs, raw.events[:SAMPLE_FILES]):
        block = next(read_piece(raw.fs, piece, event_columns(piece, mapping)), None)
        if block is not None and len(block.rows):
            times.append(block.rows["timestamp"].combine_chunks()[:10_000])
    return detect_clock(pa.concat_arrays(times) if times else pa.array([], pa.string()))
