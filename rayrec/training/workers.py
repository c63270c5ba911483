"""A worker of Ray Train: its rows by Ray Data, its peers by Ray Train, its progress on a board.

In: a `Job` by reference. Out: reports and checkpoints. What is learned, and how, is `fit`'s matter.

Ray Train starts workers anew after a fault. They go on from the newest checkpoint in the run's storage that is whole,
heard of or not: of one that was reported just before a fault, Ray Train may know nothing.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch

from rayrec.training.batches import ROWS_A_CHUNK
from rayrec.training.checkpoints import fetch, newest, seal
from rayrec.training.fit import EndedError, Fit, Job
from rayrec.training.group import Group, add_up_alike, cores

CACHE_BYTES = 1 << 30

_told_to_end = threading.Event()
"""This process got SIGTERM."""


@dataclass(frozen=True)
class Shown:
    """How far the first worker is."""

    stage: str
    epoch: int
    step: int
    steps: int
    loss: float


@ray.remote(num_cpus=0)
class Board:
    """Where the first worker pins its progress, for whoever started the training to read."""

    def __init__(self) -> None:
        self.shown: Shown | None = None
        self.epochs: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.left_out: set[str] = set()
        self.ending = False
        self.ended: str | None = None

    def show(self, shown: Shown) -> bool:
        """Replace what is shown. Whether the training was asked to end."""
        self.shown = shown
        return self.ending

    def note(self, text: str) -> None:
        """Append something to tell."""
        self.notes.append(text)

    def leave_out(self, shard: str, why: str, of: int) -> int:
        """Tell, once, that one `of` so many shards is left out. How many of them are."""
        if shard not in self.left_out:
            self.left_out.add(shard)
            self.note(f"{shard}: this shard cannot be read ({why}) and is left out ({len(self.left_out)} of {of})")
        return len(self.left_out)

    def trains(self) -> bool:
        """Whether steps have been taken, so that there is something to save."""
        return self.shown is not None

    def end(self) -> None:
        """Ask the workers to end the training, after a checkpoint."""
        self.ending = True

    def end_at(self, place: str) -> None:
        """Say where the workers did so."""
        self.ended = place

    def ended_at(self) -> str | None:
        """Where the workers ended, if they were asked to."""
        return self.ended

    def add(self, metrics: dict[str, Any]) -> None:
        """Append the line of a finished epoch."""
        self.epochs.append(metrics)

    def read(self, after: int, notes_after: int) -> tuple[Shown | None, list[dict[str, Any]], list[str]]:
        """What is shown, and the epochs' lines and the notes from those numbers on."""
        return self.shown, self.epochs[after:], self.notes[notes_after:]


def hear_sigterm() -> None:
    """Have a first SIGTERM end the training after a checkpoint, and a second one this process, as Ray does.

    For the main thread of a worker's process, which is not the one that trains.
    """
    at_once = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        if _told_to_end.is_set() and callable(at_once):
            at_once(number, frame)
        _told_to_end.set()

    signal.signal(signal.SIGTERM, note)


def train_worker(given: dict[str, Any]) -> None:
    """What Ray Train runs in every worker.

    given: "job", a reference to a `Job`; "board"; "storage", where the run's checkpoints lie.
    """
    job: Job = ray.get(given["job"])
    context = ray.train.get_context()
    if not job.config.train.gpu:
        add_up_alike(max(1, cores() // context.get_local_world_size()))
    with tempfile.TemporaryDirectory() as scratch:
        peers = RayPeers(given["board"])
        if peers.rank == 0 and job.config.train.min_workers:
            peers.tell(f"{peers.world} of {job.config.train.workers} worker(s)")
        resume = _newest(given["storage"], Path(scratch), peers)
        try:
            Fit(job, RayFeed(keep=not job.config.train.max_samples), peers, resume).run()
        except EndedError as ended:
            if peers.rank == 0:
                ray.get(peers.board.end_at.remote(str(ended)))


def _newest(storage: str, scratch: Path, peers: RayPeers) -> Path | None:
    """The checkpoint to go on from, the same on every worker."""
    found = {"name": newest(storage, scratch, peers.tell)} if peers.rank == 0 else None
    name = peers.agree(found)["name"]
    return fetch(storage, name, scratch) if name else None


@dataclass
class RayFeed:
    """This worker's rows from Ray Data: streamed in the first epoch, and kept for the next ones while they fit.

    Rows are compact (17 bytes an event); what does not fit CACHE_BYTES is streamed anew each epoch. The stream's order
    is that of the shards, and which rows are whose follows from it (`trainer.IN_ORDER`), so that a later run on as many
    workers gets the same.
    keep: whether to; not where epochs end before their rows do.
    """

    keep: bool = True
    kept: dict[str, pa.Table] = field(default_factory=dict)

    def chunks(self, table: str, rng: np.random.Generator) -> Iterator[pa.Table]:
        """See `fit.Feed`."""
        if table not in self.kept:
            yield from self._stream(table)
            return
        rows = self.kept[table]
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), ROWS_A_CHUNK):
            yield rows.take(pa.array(order[start : start + ROWS_A_CHUNK]))

    def catch_up(self, table: str) -> None:
        """See `fit.Feed`."""
        if self.keep and table not in self.kept:
            for _ in self._stream(table):
                pass

    def _stream(self, table: str) -> Iterator[pa.Table]:
        parts: list[pa.Table] | None = [] if self.keep else None
        size_bytes = 0
        for part in ray.train.get_dataset_shard(table).iter_batches(batch_size=ROWS_A_CHUNK, batch_format="pyarrow"):
            size_bytes += part.nbytes
            parts = [*parts, part] if parts is not None and size_bytes < CACHE_BYTES else None
            yield part
        if parts:
            self.kept[table] = pa.concat_tables(parts).combine_chunks()


class RayPeers(Group):
    """The other workers, by way of Ray Train."""

    def __init__(self, board: Any) -> None:
        context = ray.train.get_context()
        super().__init__(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
        self.board, self.last_shown = board, 0.0
        self.answer: Any = None
        self.asked = self.was_warned = False

    def tell(self, text: str) -> None:
        """Have whoever started the training say so."""
        self.board.note.remote(text)

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`."""
        if self.rank == 0:
            ray.get(self.board.add.remote(metrics))
            self._checkpoint(metrics, save, parts=1)
        else:
            ray.train.report(metrics)

    def keep(self, place: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`. Ray Train puts the workers' parts together."""
        self._checkpoint(place, save, parts=self.world)

    def _checkpoint(self, metrics: dict[str, Any], save: Callable[[Path], None], parts: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            seal(Path(folder), self.rank, parts)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def step(self, stage: str, epoch: int, steps: int, step: int, loss: float) -> None:
        """See `fit.Peers`."""
        if self.rank == 0 and time.monotonic() - self.last_shown > 0.5:
            self.last_shown = time.monotonic()
            self.answer = self.board.show.remote(Shown(stage, epoch, step, steps, loss))

    def ending(self) -> bool:
        """See `fit.Peers`: by SIGTERM to this process, or by whoever started the training, who tells the board."""
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            self.asked, self.answer = self.asked or ray.get(self.answer), None
        return self.asked or _told_to_end.is_set()

    def warned(self) -> bool:
        """See `fit.Peers`: a node that is drained, as one is that gets SIGTERM or that a cloud takes back."""
        before, self.was_warned = self.was_warned, ray.train.get_preemption_info() is not None
        return self.was_warned and not before
