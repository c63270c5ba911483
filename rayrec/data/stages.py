"""The stages of prepare, each a function of one task: files in, files out, counts back.

In: a `Plan` and the number of a piece of work. Out: files in the staging folder, and a small result. It must not
know who runs the tasks, nor in what order. Names of files are fixed by the number, so a task may run twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rayrec.config import PrepareConfig
from rayrec.data.events import ROW_BITS, ROW_MASK, Rules, canonical_events, with_origin
from rayrec.data.intake import EVENTS, OldEvents, with_origins
from rayrec.data.ledger import Ledger
from rayrec.data.mapping import EVENT_COLUMNS, Mapping, require_event_columns, resolve
from rayrec.data.readers import BLOCK_BYTES, Block, Choose, Piece, read_piece
from rayrec.data.sequences import Cuts, build_sequences
from rayrec.data.shuffle import partition_of, read_partition, read_table, write_partitions, write_table
from rayrec.data.staging import WORK, Folder
from rayrec.data.training_events import flat, training_mask
from rayrec.data.visitors import Cleaned, clean_visitors
from rayrec.history import Ints
from rayrec.schema import ACTION_CODE, ACTIONS, EVENT_SCHEMA, SEQUENCE_SCHEMA, SESSION_PREFIX

KEEP = "keep"


@dataclass(frozen=True)
class Plan:
    """What all tasks of one run share.

    Pieces are numbered through in the order of their files, old ones included: a file that was taken in by an earlier
    run counts as one piece. numbers: of each task's pieces. file_of_piece: [P] the number of each piece's file.
    """

    raw_fs: pafs.FileSystem
    out: Folder
    tasks: tuple[tuple[Piece, ...], ...]
    numbers: tuple[tuple[int, ...], ...]
    file_of_piece: Ints
    n_partitions: int
    rules: Rules
    config: PrepareConfig
    old: OldEvents | None = None

    @property
    def dealt_anew(self) -> bool:
        """Whether the old events go to other partitions than they lie in."""
        return self.old is not None and self.old.n_partitions != self.n_partitions


@dataclass
class Result:
    """What a task reports. `rows` is the count of rows read of each piece; the rest belongs to single stages."""

    ledger: Ledger = field(default_factory=Ledger)
    files: list[str] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)


# ---------------------------------------------------------------- 1. read, judge each row, and deal out by visitor


def ingest(plan: Plan, task: int) -> Result:
    """Read the pieces of a task to canonical events, and deal them out to the partitions of their visitors."""
    result = Result()
    rejects = Rejects(plan, result.ledger)
    waiting: list[pa.Table] = []
    waiting_bytes = 0
    for number, piece in zip(plan.numbers[task], plan.tasks[task], strict=True):
        for block in _blocks(plan, piece):
            events, verdict, repairs = canonical_events(block.rows, plan.rules)
            result.ledger.of(piece.file).read += block.read
            result.ledger.repair(repairs)
            result.rows[number] = result.rows.get(number, 0) + block.read
            result.ignored.update(block.ignored)
            result.found.update(block.rows.column_names)
            rejects.of_block(block, number, verdict.code_R, verdict.reasons)
            kept = pa.array(verdict.kept)
            waiting.append(with_origin(events, number, block.row_R).filter(kept))
            waiting_bytes += waiting[-1].nbytes
            if waiting_bytes > BLOCK_BYTES:
                _deal(plan, f"{task:05d}", waiting, result)
                waiting_bytes = 0
    _deal(plan, f"{task:05d}", waiting, result)
    rejects.write(f"ingest-{task:05d}")
    return result


def event_columns(piece: Piece, mapping: Mapping) -> Choose:
    """The columns of events in a piece; raises DataError where a needed one is missing."""

    def choose(found: list[str]) -> dict[str, str]:
        columns = resolve(found, EVENT_COLUMNS, mapping)
        if found:
            require_event_columns(piece.raw.name, found, columns, mapping)
        return columns

    return choose


def _blocks(plan: Plan, piece: Piece) -> Iterator[Block]:
    """The blocks of a piece. One without any column (JSON lines of which none is an object) has no rows to judge."""
    for block in read_piece(plan.raw_fs, piece, event_columns(piece, plan.rules.mapping)):
        yield block if block.rows.column_names else replace(block, rows=_NO_ROWS)


_NO_ROWS = pa.table({name: pa.array([], pa.string()) for name in ("user_id", "item_id", "timestamp", "action")})


def _deal(plan: Plan, task: str, waiting: list[pa.Table], result: Result, *, only_ids: bool = False) -> None:
    """Write the waiting events (or their event ids alone), one batch a partition, and forget them."""
    if not waiting:
        return
    events = pa.concat_tables(waiting, promote_options="default")
    waiting.clear()
    name = f"{task}-{len(result.files):04d}.arrow"
    partition_R = partition_of(events["user_id"], plan.n_partitions)
    if not only_ids:
        write_partitions(plan.out.fs, plan.out.path(f"{WORK}/dealt-{name}"), events, partition_R, plan.n_partitions)
    result.files.append(name)
    if "event_id" in events.column_names:
        ids = events.select(["event_id", "origin"]).append_column("partition", pa.array(partition_R))
        of_id = partition_of(events["event_id"], plan.n_partitions)
        write_partitions(plan.out.fs, plan.out.path(f"{WORK}/ids-{name}"), ids, of_id, plan.n_partitions)


# ---------------------------------------------------------------- what earlier runs have taken in


def deal_old(plan: Plan, part: int) -> Result:
    """Deal one partition of the old events out anew; where they may stay in it, deal their event ids alone."""
    assert plan.old is not None
    result = Result()
    _deal(plan, f"old-{part:05d}", [plan.old.read(part)], result, only_ids=not plan.dealt_anew)
    return result


def carry_rejects(plan: Plan, rejects: pa.Table, files: dict[str, int], columns: set[str]) -> Result:
    """Enter what earlier runs rejected for what a row shows by itself, and judge again what lay in the future then.

    rejects: REJECT_SCHEMA. files: the number of the piece that each old file counts as, by its name. columns: the
    canonical ones that old files have.
    """
    result = Result()
    entered = Rejects(plan, result.ledger)
    number_R = np.array([files[name] for name in rejects["file"].to_pylist()], np.int64)
    origin_R = (number_R << ROW_BITS) | rejects["row"].to_numpy().astype(np.int64)
    late = np.flatnonzero(pc.equal(rejects["reason"], LATE).to_numpy(zero_copy_only=False))
    reason_R = rejects["reason"].to_pylist()
    if len(late):
        rows = [json.loads(raw) for raw in rejects["raw"].take(pa.array(late)).to_pylist()]
        names = [name for name in EVENT_COLUMNS if name in columns]
        text = pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})
        events, verdict, repairs = canonical_events(text, plan.rules)
        for place, code in zip(late.tolist(), verdict.code_R.tolist(), strict=True):
            reason_R[place] = verdict.reasons[code]
        turned = "cancel_quantity_made_positive"  # the only repair that is counted of good rows alone
        result.ledger.repair({turned: repairs[turned]})
        good = pa.array(verdict.kept)
        events = events.append_column("origin", pa.array(origin_R[late])).filter(good)
        _deal(plan, "late", [events] if len(events) else [], result)
    bad = [place for place, reason in enumerate(reason_R) if reason]
    raws = rejects["raw"].take(pa.array(bad, pa.int64())).to_pylist()
    if bad:
        entered.enter(origin_R[bad], [reason_R[place] for place in bad], raws)
    entered.write("ingest-old")
    return result


LATE = "time_out_of_window"


# ---------------------------------------------------------------- 2. event ids that occur again anywhere


def find_repeats(plan: Plan, dealt: list[str], partition: int) -> Result:
    """Of the event ids of one partition, deal every occurrence but the first to the partition of its visitor."""
    paths = [path for name in dealt if _exists(plan, path := plan.out.path(f"{WORK}/ids-{name}"))]
    ids = read_partition(plan.out.fs, paths, partition)
    ids = ids.filter(ids["event_id"].is_valid()).sort_by("origin")
    codes = ids["event_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    again = np.ones(len(ids), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    repeats = ids.filter(pa.array(again))
    path = plan.out.path(f"{WORK}/repeats-{partition:05d}.arrow")
    partition_R = repeats["partition"].to_numpy()
    write_partitions(plan.out.fs, path, repeats.select(["origin"]), partition_R, plan.n_partitions)
    return Result()


def _exists(plan: Plan, path: str) -> bool:
    return bool(plan.out.fs.get_file_info(path).type == pafs.FileType.File)


# ---------------------------------------------------------------- 3. clean whole visitors


@dataclass
class CleanResult(Result):
    """item_ids: the different items of the events."""

    item_ids: list[str] = field(default_factory=list)


def clean(plan: Plan, dealt: list[str], has_event_ids: bool, first_row: Ints, partition: int) -> CleanResult:
    """Keep the events of one partition's visitors for later runs, then clean them: repeats, robots, cancellations.

    first_row: [P] rows of its file before each piece.
    """
    result = CleanResult()
    rejects = Rejects(plan, result.ledger)
    paths = [path for name in dealt if _exists(plan, path := plan.out.path(f"{WORK}/dealt-{name}"))]
    there = [plan.old.read(partition)] if plan.old and not plan.dealt_anew else []
    new = [read_partition(plan.out.fs, paths, partition)] if paths else []
    events = pa.concat_tables([*there, *new], promote_options="default").combine_chunks()
    kept = with_origins(events, plan.file_of_piece, first_row)
    plan.out.parquet(f"{EVENTS}/part-{partition:05d}.parquet", kept, compression="zstd")
    if has_event_ids:
        paths = [plan.out.path(f"{WORK}/repeats-{n:05d}.arrow") for n in range(plan.n_partitions)]
        repeats = read_partition(plan.out.fs, paths, partition)
        again = pc.is_in(events["origin"], repeats["origin"].combine_chunks())
        rejects.of_events(events.filter(again), "repeated_event_id")
        events = events.filter(pc.invert(again))
    cleaned = clean_visitors(events, plan.config.clean, plan.rules.clock)
    _enter(plan, cleaned, rejects)
    write_table(plan.out.fs, plan.out.path(f"{WORK}/clean-{partition:05d}.arrow"), cleaned.events)
    rejects.write(f"clean-{partition:05d}")
    result.item_ids = pc.unique(cleaned.events["item_id"]).to_pylist()
    return result


def _enter(plan: Plan, cleaned: Cleaned, rejects: Rejects) -> None:
    rejects.ledger.collapse(plan.file_of_piece[cleaned.collapsed["origin"].to_numpy() >> ROW_BITS])
    rejects.ledger.repair(cleaned.repairs)
    for reason, rows in cleaned.gone:
        rejects.of_events(rows, reason)


def _engaged(plan: Plan, events: pa.Table) -> npt.NDArray[np.bool_]:
    codes = [ACTION_CODE[action] for action in plan.config.sequences.actions]
    return np.isin(events["action"].to_numpy(), codes)


# ---------------------------------------------------------------- 4. events out, sequences built, training counted


@dataclass
class FinishResult(Result):
    """What is left in the end.

    kept        rows by file          actions   rows by canonical action
    n_events    [I] events and        n_train   [I] training events of each item (by place in the sorted ids)
    """

    kept: Counter[int] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    users: int = 0
    sessions: int = 0
    sequences: int = 0
    n_events: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    n_train: Ints = field(default_factory=lambda: np.empty(0, np.int64))


def finish(plan: Plan, cuts: Cuts | None, partition: int) -> FinishResult:
    """Write one partition's events; build its sequences over provisional item numbers (places in the sorted ids)."""
    result = FinishResult()
    rejects = Rejects(plan, result.ledger)
    events, outside = _core(plan, partition)
    rejects.of_events(outside, "k_core")
    item_ids = read_table(plan.out.fs, plan.out.path(f"{WORK}/item_ids.arrow"))["item_id"].combine_chunks()
    item_E = pc.index_in(events["item_id"].combine_chunks(), item_ids).to_numpy(zero_copy_only=False).astype(np.int64)
    engaged = _engaged(plan, events)
    sequences = build_sequences(
        events["user_id"].combine_chunks().filter(pa.array(engaged)),
        item_E[engaged],
        events["action"].to_numpy()[engaged],
        events["time_ms"].to_numpy()[engaged],
        cuts,
        plan.config.sequences.max_events,
    )
    places = flat(sequences, "item")[0]
    result.ledger.repair({"events_beyond_max_events": int(engaged.sum()) - len(places)})
    result.n_train = np.bincount(places[training_mask(sequences)], minlength=len(item_ids))
    result.n_events = np.bincount(item_E, minlength=len(item_ids))
    result.sequences = len(sequences)
    _count(plan, events, result)
    write_table(plan.out.fs, plan.out.path(f"{WORK}/sequences-{partition:05d}.arrow"), sequences)
    plan.out.parquet(f"events/part-{partition:05d}.parquet", _as_event_schema(events))
    rejects.write(f"finish-{partition:05d}")
    return result


def engaged_times(plan: Plan, partition: int) -> Ints:
    """The times of one partition's engagements, [E] int64."""
    events, _ = _core(plan, partition)
    return np.asarray(events["time_ms"].to_numpy()[_engaged(plan, events)], np.int64)


def _core(plan: Plan, partition: int) -> tuple[pa.Table, pa.Table]:
    """The clean events of one partition, and those of them outside the k-core."""
    events = read_table(plan.out.fs, plan.out.path(f"{WORK}/clean-{partition:05d}.arrow"))
    if not plan.config.clean.k_core:
        return events, events.slice(0, 0)
    keep = read_table(plan.out.fs, plan.out.path(f"{WORK}/core-{partition:05d}.arrow"))[KEEP]
    return events.filter(keep), events.filter(pc.invert(keep))


def _count(plan: Plan, events: pa.Table, result: FinishResult) -> None:
    files, rows = np.unique(plan.file_of_piece[events["origin"].to_numpy() >> ROW_BITS], return_counts=True)
    result.kept.update(dict(zip(files.tolist(), rows.tolist(), strict=True)))
    codes, rows = np.unique(events["action"].to_numpy(), return_counts=True)
    result.actions.update({ACTIONS[code - 1]: n for code, n in zip(codes.tolist(), rows.tolist(), strict=True)})
    visitors = pc.unique(events["user_id"])
    result.sessions = int(pc.sum(pc.starts_with(visitors, SESSION_PREFIX)).as_py() or 0)
    result.users = len(visitors) - result.sessions


def _as_event_schema(events: pa.Table) -> pa.Table:
    names = pa.array(["", *ACTIONS])
    columns = {"action": names.take(events["action"].combine_chunks())}
    columns |= {name: events[name] for name in events.column_names if name not in ("action", "origin")}
    filled = {f.name: columns.get(f.name, pa.nulls(len(events), f.type)) for f in EVENT_SCHEMA}
    return pa.table(filled).cast(EVENT_SCHEMA)


# ---------------------------------------------------------------- 5. final item numbers


def number(plan: Plan, index_of_place: Ints, partition: int) -> Result:
    """Write one partition's sequences with the final item indices (`index_of_place`: of each provisional number)."""
    path = plan.out.path(f"{WORK}/sequences-{partition:05d}.arrow")
    sequences = read_table(plan.out.fs, path).combine_chunks()
    lists = sequences["item"].combine_chunks()
    item = index_of_place[np.asarray(lists.flatten())].astype(np.int32)
    lengths = np.asarray(lists.value_lengths(), np.int64)
    numbered = pa.ListArray.from_arrays(pa.array(np.r_[0, np.cumsum(lengths)].astype(np.int32)), pa.array(item))
    sequences = sequences.set_column(1, SEQUENCE_SCHEMA.field("item"), numbered)
    plan.out.parquet(f"sequences/part-{partition:05d}.parquet", sequences.cast(SEQUENCE_SCHEMA))
    return Result()


# ---------------------------------------------------------------- rejects


class Rejects:
    """The rejected rows of one task, counted in its ledger and kept until their final row numbers are known."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.plan, self.ledger = plan, ledger
        self.origins: list[Ints] = []
        self.reasons: list[str] = []
        self.raws: list[str | None] = []

    def of_block(self, block: Block, piece: int, code_R: npt.NDArray[np.int16], reasons: list[str]) -> None:
        """Enter the rows of a raw block that have a reason (index into `reasons`, 0 is none), and its broken lines."""
        bad = np.flatnonzero(code_R)
        self.enter(
            (np.int64(piece) << ROW_BITS) | block.row_R[bad],
            [reasons[code] for code in code_R[bad].tolist()],
            _as_json(block.rows.take(pa.array(bad))),
        )
        rows = np.array([broken.row for broken in block.broken], np.int64)
        self.enter(
            (np.int64(piece) << ROW_BITS) | rows,
            [broken.reason for broken in block.broken],
            [broken.text for broken in block.broken],
        )

    def of_events(self, events: pa.Table, reason: str) -> None:
        """Enter canonical events that go for one reason."""
        names = np.array(["", *ACTIONS], object)
        action = pa.array(names[events["action"].to_numpy()], pa.string())
        rows = events.set_column(events.column_names.index("action"), "action", action).drop_columns(["origin"])
        self.enter(events["origin"].to_numpy(), [reason] * len(events), _as_json(rows))

    def enter(self, origins: Ints, reasons: list[str], raws: Sequence[str | None]) -> None:
        """Enter rows with their reasons and what they held."""
        files = self.plan.file_of_piece[origins >> ROW_BITS]
        reason_R = np.array(reasons, object)
        for reason in dict.fromkeys(reasons):
            self.ledger.reject(files[reason_R == reason], reason)
        self.origins.append(origins)
        self.reasons += reasons
        self.raws += raws

    def write(self, name: str) -> None:
        """Keep the rows in the work folder, if there are any."""
        if self.reasons:
            table = pa.table(
                {
                    "origin": pa.array(np.concatenate(self.origins)),
                    "reason": pa.array(self.reasons),
                    "raw": pa.array(self.raws, pa.string()),
                }
            )
            write_table(self.plan.out.fs, self.plan.out.path(f"{WORK}/rejects-{name}.arrow"), table)


def _as_json(rows: pa.Table) -> list[str]:
    return [
        json.dumps({name: value for name, value in row.items() if value is not None}, ensure_ascii=False)
        for row in rows.to_pylist()
    ]


def source_of(origin: pa.ChunkedArray, plan: Plan, names: list[str], first_row: Ints) -> tuple[pa.Array, pa.Array]:
    """File name and row number of each origin; `first_row` is the count of rows before each piece in its file."""
    origin_R = origin.to_numpy()
    piece_R = origin_R >> ROW_BITS
    return pa.array(names).take(pa.array(plan.file_of_piece[piece_R])), pa.array(
        (origin_R & ROW_MASK) + first_row[piece_R]
    )
