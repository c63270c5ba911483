"""`rayrec prepare`: a shop's logs, catalogue and images become a dataset. The story, told by Ray Data.

In: a raw folder and settings. Out: a dataset folder, and the report of what became of every row. What a stage does
to the rows is told in `stages`, and what a row must be in `events` and `visitors`; here is only their order.
"""

from __future__ import annotations

import datetime as dt
import json
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec import __version__
from rayrec.cluster import connect, quiet_data
from rayrec.config import PrepareConfig
from rayrec.data.catalogue_files import RawCatalogue
from rayrec.data.clock import Clock
from rayrec.data.dataset import Dataset
from rayrec.data.image_shards import ImageDecoder, image_refs
from rayrec.data.intake import CATALOGUE, ERASED, INTAKE_VERSION, PICTURES, Erased, Intake, as_facts, tells_of
from rayrec.data.items import BuiltItems, build_items
from rayrec.data.ledger import merged
from rayrec.data.mapping import Mapping
from rayrec.data.raw import find_raw
from rayrec.data.sequences import Cuts, k_core, time_cuts
from rayrec.data.shuffle import read_table, write_table
from rayrec.data.source import Source, added, fresh, known_images, less, plan_of, source_catalogue
from rayrec.data.stages import (
    KEEP,
    CleanResult,
    FinishResult,
    Result,
    carry_rejects,
    clean,
    deal_old,
    engaged_times,
    find_repeats,
    finish,
    ingest,
    number,
    source_of,
)
from rayrec.data.staging import WORK, Folder, Staging, cannot_write
from rayrec.errors import DataError, RayrecError, ResourceError
from rayrec.files import read_text
from rayrec.history import Ints
from rayrec.progress import Task, step
from rayrec.schema import DATASET_VERSION, REJECT_SCHEMA

R = TypeVar("R")


def prepare(raw: str, dataset: str, config: PrepareConfig, mapping: Mapping | None = None) -> dict[str, Any]:
    """Prepare the raw folder `raw` into the dataset folder `dataset` (paths or URIs); answers the report.

    Raises UsageError for input that does not exist or an output that must not be overwritten, DataError for input
    that cannot be used, ResourceError where nothing can be written or no cluster be had. Nothing half-done stays.
    """
    started = time.monotonic()
    return _run(fresh(find_raw(raw), config, mapping or Mapping()), dataset, started)


def add(raw: str, dataset: str, settings: Iterable[str] = (), mapping: Mapping | None = None) -> dict[str, Any]:
    """Add to a finished dataset what `raw` holds that it does not; answers the report of the whole.

    The outcome is what `prepare` makes of the old and the new raw files together. Settings and mapping go on; those
    that are given must be the same. Raises as `prepare`, and DataError where adding could not give that outcome.
    """
    started = time.monotonic()
    old = Intake.of(dataset)
    source = added(old, find_raw(raw, events=False), settings, mapping)
    if source is None:
        step(f"{dataset}: knows all that {raw} holds, and stays as it is")
        return dict(json.loads(read_text(old.folder.fs, old.folder.path("report.json")) or "{}"))
    return _run(source, dataset, started)


def forget(dataset: str, erased: Erased, raw: str) -> dict[str, Any] | None:
    """Take what erased visitors did out of a finished dataset; the report of the rest, None if there was nothing.

    raw: a raw folder out of whose files it has been taken already. The bundles that have learned from it stay.
    """
    started = time.monotonic()
    source = less(Intake.of(dataset), erased, raw)
    return None if source is None else _run(source, dataset, started)


def _run(source: Source, dataset: str, started: float) -> dict[str, Any]:
    staging = Staging(dataset)
    try:
        with staging as out:
            connect(dashboard=False)
            quiet_data()
            run = Run(source, out)
            report = {**run.report(), "clock": source.clock, "clock_found": source.clock_found}
            report["seconds"] = round(time.monotonic() - started, 2)
            out.json("report.json", report)
            if source.old and Dataset.open(dataset).manifest != source.old.dataset.manifest:
                raise ResourceError(f"{dataset}: was changed by another run meanwhile, and stays so; run this again")
            staging.commit({**_facts(report, source.clock, source.config), "intake": run.intake})
            return report
    except OSError as error:
        raise cannot_write(dataset, error) from None


class Run:
    """One run of prepare: the stages in their order. Each reads what the one before has left in the work folder."""

    def __init__(self, source: Source, out: Folder) -> None:
        self.source, self.raw, self.config, self.old, self.out = source, source.raw, source.config, source.old, out
        self.plan = plan_of(source, out)
        self.names = source.names
        self.intake: dict[str, Any] = {}

    def report(self) -> dict[str, Any]:
        """Run all stages; answers `report.json` without the time taken."""
        catalogue, batches = source_catalogue(self.source)
        kept_items = catalogue.items.append_column("file", catalogue.files)
        self.out.parquet(CATALOGUE, kept_items, compression="zstd")
        if len(catalogue.rejects):
            self.out.parquet("rejects/items/part-00000.parquet", catalogue.rejects)
        ingested = self._ingest()
        cleaned = self._clean(ingested)
        finished = self._finish(cleaned)
        items = self._items(catalogue, finished)
        images = self._images(catalogue, items, {file: b["folder"] for b in batches for file in b["names"]})
        self._reject_events(self._first_rows(ingested))
        self._note_intake(ingested, catalogue, batches)

        ledger = merged(result.ledger for result in [*ingested, *cleaned, *finished])
        kept = sum((result.kept for result in finished), Counter[int]())
        ledger.repair({f"items:{what}": n for what, n in {**catalogue.repairs, **items.repairs}.items()})
        events = ledger.report(self.names, kept)
        return {
            "events": events,
            "items": catalogue.report,
            "images": images,
            "repairs": dict(sorted(ledger.repairs.items())),
            "users": sum(result.users for result in finished),
            "sessions": sum(result.sessions for result in finished),
            "sequences": sum(result.sequences for result in finished),
            "catalogue": len(items.table),
            "unlisted_items": _unlisted(items.table),
            "actions": dict(sum((result.actions for result in finished), Counter[str]()).most_common()),
            "ignored_columns": sorted(set().union(*(result.ignored for result in ingested))),
        }

    def _ingest(self) -> list[Result]:
        """What each task has read of new files; the first result is of old ones, if there are any."""
        results = list(each("Reading events", partial(ingest, self.plan), len(self.plan.tasks)))
        if self.old:
            results = [self._old_events(self.old), *results]
        read = sum(result.ledger.total().read for result in results)
        if not read:
            raise DataError(f"{', '.join(self.names[:5])}: a header and no rows; there is nothing to prepare")
        self._refuse_nothing(results)
        return results

    def _old_events(self, old: Intake) -> Result:
        """What earlier runs have read, as if it had been read now."""
        assert self.plan.old is not None
        pieces = dict(zip((file.name for file in old.files), self.plan.old.number_F.tolist(), strict=True))
        rejects = old.row_rejects()
        rejects = rejects.filter(pc.invert(tells_of(rejects, self.source.erased)))
        whole = carry_rejects(self.plan, rejects, pieces, set(old.facts["found"]))
        for file in old.files:
            number = pieces[file.name]
            whole.rows[number] = file.rows
            account = whole.ledger.of(int(self.plan.file_of_piece[number]))
            account.read += file.rows
            if file.erased:
                account.rejected[ERASED] += file.erased
        whole.ledger.repair(old.facts["repairs"])
        whole.ignored.update(old.facts["ignored"])
        whole.found.update(old.facts["found"])
        if self.plan.old.has_event_ids or self.plan.dealt_anew:
            dealt = each("Dealing out old events", partial(deal_old, self.plan), old.n_partitions)
            whole.files += [name for result in dealt for name in result.files]
        return whole

    def _first_rows(self, ingested: list[Result]) -> Ints:
        """How many rows of its file lie before each piece. [P]"""
        rows = Counter[int]()
        for result in ingested:
            rows.update(result.rows)
        file_P = self.plan.file_of_piece
        first_row = np.zeros(len(file_P), np.int64)
        for n in range(1, len(file_P)):
            if file_P[n] == file_P[n - 1]:
                first_row[n] = first_row[n - 1] + rows[n - 1]
        return first_row

    def _note_intake(self, ingested: list[Result], catalogue: RawCatalogue, batches: list[dict[str, Any]]) -> None:
        """What a later run needs to know of this one, for the manifest."""
        ledger = merged(result.ledger for result in ingested)
        new = {one.name: one for one in self.source.records}
        known = {one.name: one for one in self.old.files} if self.old else {}
        files = [replace(new.get(name) or known[name], rows=ledger.of(n).read) for n, name in enumerate(self.names)]
        self.intake = {
            "version": INTAKE_VERSION,
            "partitions": self.plan.n_partitions,
            "text_bytes": self.source.text_bytes,
            "mapping": self.plan.rules.mapping.model_dump(mode="json"),
            "raw_settings": self.source.raw_settings,
            "clock_found": self.source.clock_found,
            "found": sorted(set().union(*(result.found for result in ingested))),
            "ignored": sorted(set().union(*(result.ignored for result in ingested))),
            "repairs": dict(sorted(ledger.repairs.items())),
            "files": as_facts(files),
            "catalogue": {"batches": batches, "report": catalogue.report},
        }

    def _clean(self, ingested: list[Result]) -> list[CleanResult]:
        dealt = [name for result in ingested for name in result.files]
        n = self.plan.n_partitions
        has_event_ids = any("event_id" in result.found for result in ingested)
        if has_event_ids:
            list(each("Finding repeated events", partial(find_repeats, self.plan, dealt), n))
        cleaner = partial(clean, self.plan, dealt, has_event_ids, self._first_rows(ingested))
        results = list(each("Cleaning visitors", cleaner, n))
        self._refuse_nothing([*ingested, *results])
        return results

    def _finish(self, cleaned: list[CleanResult]) -> list[FinishResult]:
        item_ids = sorted(set().union(*(result.item_ids for result in cleaned)))
        table = pa.table({"item_id": pa.array(item_ids, pa.string())})
        write_table(self.out.fs, self.out.path(f"{WORK}/item_ids.arrow"), table)
        if self.config.clean.k_core:
            self._mark_core(table["item_id"].combine_chunks())
        cuts = self._cuts() if self.config.split != "loo" else None
        results = list(each("Building sequences", partial(finish, self.plan, cuts), self.plan.n_partitions))
        self._refuse_nothing([*cleaned, *results], sum(result.kept.total() for result in results))
        return results

    def _cuts(self) -> Cuts:
        """Where a split by time cuts, found in memory: 8 bytes an event."""
        partitions = range(self.plan.n_partitions)
        times = [engaged_times(self.plan, partition) for partition in partitions]
        return time_cuts(np.concatenate(times), self.config.split, self.plan.rules.clock)

    def _mark_core(self, item_ids: pa.Array) -> None:
        """Find the k-core, in memory: 16 bytes an event."""
        users, items = [], []
        n_users = 0
        for partition in range(self.plan.n_partitions):
            path = self.out.path(f"{WORK}/clean-{partition:05d}.arrow")
            events = read_table(self.out.fs, path, ["user_id", "item_id"]).combine_chunks()
            user = events["user_id"].combine_chunks().dictionary_encode()
            users.append(user.indices.to_numpy().astype(np.int64) + n_users)
            n_users += len(user.dictionary)
            items.append(pc.index_in(events["item_id"].combine_chunks(), item_ids).to_numpy().astype(np.int64))
        kept_E = k_core(np.concatenate(users), np.concatenate(items), self.config.clean.k_core)
        ends = np.cumsum([len(part) for part in users])[:-1]
        for partition, keep in enumerate(np.split(kept_E, ends)):
            path = self.out.path(f"{WORK}/core-{partition:05d}.arrow")
            write_table(self.out.fs, path, pa.table({KEEP: pa.array(keep)}))

    def _items(self, catalogue: RawCatalogue, finished: list[FinishResult]) -> BuiltItems:
        """Number and encode the items, write them and their vocabularies, then the sequences with these numbers."""
        item_ids = read_table(self.out.fs, self.out.path(f"{WORK}/item_ids.arrow"))["item_id"].combine_chunks()
        n_events = np.sum([result.n_events for result in finished], axis=0)
        n_train = np.sum([result.n_train for result in finished], axis=0)
        there = n_events > 0
        items = build_items(catalogue.items, item_ids.filter(pa.array(there)), n_train[there], frozenset(), self.config)
        for name, words in items.vocab.items():
            self.out.json(f"vocab/{name}.json", words)
        self.out.json("vocab/encoder.json", items.encoder.to_dict())
        place = pc.index_in(item_ids, items.table["item_id"].combine_chunks())
        index_of_place = pc.fill_null(pc.add(place, 1), 0).to_numpy(zero_copy_only=False).astype(np.int32)
        list(each("Numbering items", partial(number, self.plan, index_of_place), self.plan.n_partitions))
        return items

    def _images(self, catalogue: RawCatalogue, items: BuiltItems, folder_of: dict[str, str]) -> dict[str, Any]:
        """Decode the images of known items; write the item table, which says who has one.

        folder_of: the raw folder of each catalogue file.
        """
        index = dict(zip(items.table["item_id"].to_pylist(), items.table["item_index"].to_pylist(), strict=True))
        old = known_images(self.old) if self.old else None
        refs = image_refs(self.raw, catalogue.images, folder_of, old)
        decoder = ImageDecoder(self.raw.uri, self.out, self.config.images, refs, index, old)
        list(each("Moving images", decoder.deal_old, decoder.n_old))
        gallery = decoder.gathered(each("Decoding images", decoder.decode, decoder.n_batches))
        if old and decoder.refs:
            step(f"images: {gallery.decoded} decoded, {gallery.taken_over} as they were")
        self.out.parquet(PICTURES, gallery.known, compression="zstd")
        if len(gallery.rejects):
            self.out.parquet("rejects/images/part-00000.parquet", gallery.rejects)
        has_image = np.zeros(len(items.table), bool)
        has_image[gallery.index - 1] = True
        place = items.table.column_names.index("has_image")
        table = items.table.set_column(place, items.table.schema.field(place), pa.array(has_image))
        self.out.parquet("items/part-00000.parquet", table)
        return gallery.report

    def _reject_events(self, first_row: Ints) -> None:
        """Write the rejected events with their file and row, now that the rows of every piece are counted.

        What a row showed by itself lies apart from what other rows showed: a later run takes over the first.
        """
        shards = [name for name in self.out.files() if name.startswith(f"{WORK}/rejects-")]
        for n, name in enumerate(shards):
            table = read_table(self.out.fs, self.out.path(name)).sort_by("origin")
            file, row = source_of(table["origin"], self.plan, self.names, first_row)
            rejects = pa.table({"file": file, "row": row, "reason": table["reason"], "raw": table["raw"]})
            kind = "rows" if name.startswith(f"{WORK}/rejects-ingest") else "visitors"
            self.out.parquet(f"rejects/events/{kind}-{n:05d}.parquet", rejects.cast(REJECT_SCHEMA))

    def _refuse_nothing(self, results: list[Any], kept: int | None = None) -> None:
        """Raise DataError if no row is left, saying why they went."""
        total = merged(result.ledger for result in results).total()
        left = total.kept if kept is None else kept
        if left <= 0:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in total.rejected.most_common())
            raise DataError(
                f"{', '.join(self.names[:5])}: every row was rejected ({reasons}). Check the columns and actions "
                "(--map), the clock (--set clock=...) and the window of times (--set clean.after=..., clean.before=...)"
            )


def _unlisted(items: pa.Table) -> int:
    """Items of the log that the catalogue lacks; none if there is no catalogue, for then all are recommended."""
    listed = int(pc.sum(items["in_catalogue"]).as_py() or 0)
    return len(items) - listed if listed else 0


# ---------------------------------------------------------------- Ray Data


def each(title: str, work: Callable[[int], R], n: int) -> Iterator[R]:
    """`work(0)`, ..., `work(n - 1)`, run by Ray Data on the whole cluster; the results in order.

    Raises what `work` raised. A task that is lost with its node runs again: `work` must not mind.
    """
    import ray

    if not n:
        return

    def apply(batch: Any) -> Any:
        return {"id": batch["id"], "result": [pickle.dumps(_outcome(work, int(i))) for i in batch["id"]]}

    results: dict[int, R] = {}
    numbers = ray.data.range(n, override_num_blocks=n)
    # Results are small. To reserve memory for those to come, Ray Data would leave CPUs idle between two tasks.
    numbers.context.op_resource_reservation_enabled = False
    with Task(title, n) as task:
        for row in numbers.map_batches(apply, batch_size=1).iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, Exception):
                raise result
            results[row["id"]] = result
            task.advance()
    yield from (results[i] for i in range(n))


def _outcome(work: Callable[[int], R], number: int) -> R | Exception:
    """The result, or the error that a user can mend: as an exception Ray would wrap it and print its stack."""
    try:
        return work(number)
    except (RayrecError, OSError) as error:
        return error


def _facts(report: dict[str, Any], clock: Clock, config: PrepareConfig) -> dict[str, Any]:
    """What the manifest says beside the files."""
    counts = {name: report[name] for name in ("users", "sessions", "sequences", "catalogue")}
    return {
        "version": DATASET_VERSION,
        "rayrec": __version__,
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "clock": clock,
        "config": config.model_dump(mode="json"),
        "counts": {**counts, **{kind: report[kind]["kept"] for kind in ("events", "items", "images")}},
    }
