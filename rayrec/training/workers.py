"""A worker of Ray Train: its rows by Ray Data, its peers by Ray Train, its progress on a board.

In: a `Job` by reference. Out: reports and checkpoints. What is learned, and how, is `fit`'s matter.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from torch import nn

from rayrec.training.batches import ROWS_A_CHUNK
from rayrec.training.fit import Fit, Job

CACHE_BYTES = 1 << 30


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

    def show(self, shown: Shown) -> None:
        """Replace what is shown."""
        self.shown = shown

    def add(self, metrics: dict[str, Any]) -> None:
        """Append the line of a finished epoch."""
        self.epochs.append(metrics)

    def read(self, after: int) -> tuple[Shown | None, list[dict[str, Any]]]:
        """What is shown, and the epochs' lines from number `after` on."""
        return self.shown, self.epochs[after:]


def train_worker(given: dict[str, Any]) -> None:
    """What Ray Train runs in every worker. given: "job", a reference to a `Job`, and "board"."""
    job: Job = ray.get(given["job"])
    context = ray.train.get_context()
    if not job.config.train.gpu:
        torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
    checkpoint = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        peers = RayPeers(given["board"])
        resume = Path(checkpoint.to_directory(scratch)) if checkpoint else None
        Fit(job, RayFeed(), peers, resume).run()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class RayFeed:
    """This worker's rows from Ray Data: streamed in the first epoch, and kept for the next ones while they fit.

    Rows are compact (17 bytes an event); what does not fit CACHE_BYTES is streamed anew each epoch.
    """

    kept: dict[str, pa.Table] = field(default_factory=dict)

    def chunks(self, table: str, rng: np.random.Generator) -> Iterator[pa.Table]:
        """See `fit.Feed`."""
        if table in self.kept:
            rows = self.kept[table]
            order = rng.permutation(len(rows))
            for start in range(0, len(rows), ROWS_A_CHUNK):
                yield rows.take(pa.array(order[start : start + ROWS_A_CHUNK]))
            return
        parts: list[pa.Table] | None = []
        size_bytes = 0
        for part in ray.train.get_dataset_shard(table).iter_batches(batch_size=ROWS_A_CHUNK, batch_format="pyarrow"):
            size_bytes += part.nbytes
            parts = [*parts, part] if parts is not None and size_bytes < CACHE_BYTES else None
            yield part
        if parts:
            self.kept[table] = pa.concat_tables(parts).combine_chunks()


class RayPeers:
    """The other workers, by way of Ray Train."""

    def __init__(self, board: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.board, self.last_shown = board, 0.0

    def wrap(self, model: nn.Module) -> nn.Module:
        """See `fit.Peers`."""
        if self.world == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        # A batch without pictures leaves the CNN unused.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, find_unused_parameters=True, broadcast_buffers=False
        )

    def agree(self, value: dict[str, Any] | None) -> dict[str, Any]:
        """See `fit.Peers`."""
        if self.world == 1:
            assert value is not None
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0, device=self.device)
        assert held[0] is not None
        return held[0]

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                save(Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.get(self.board.add.remote(metrics))
            ray.train.report(metrics, checkpoint=checkpoint)

    def step(self, stage: str, epoch: int, steps: int, step: int, loss: float) -> None:
        """See `fit.Peers`."""
        if self.rank == 0 and time.monotonic() - self.last_shown > 0.5:
            self.last_shown = time.monotonic()
            self.board.show.remote(Shown(stage, epoch, step, steps, loss))
