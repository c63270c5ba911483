"""The same training in this process alone, without Ray: for tests, and to measure what Ray Train costs.

In: a dataset and settings. Out: a folder with the finished model, as `publish` reads it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from rayrec.config import Config
from rayrec.data.dataset import Dataset
from rayrec.training.batches import ROWS_A_CHUNK
from rayrec.training.checkpoints import check, seal
from rayrec.training.fit import Fit, Job
from rayrec.training.group import add_up_alike
from rayrec.training.loop import OneWorker
from rayrec.training.survey import survey
from rayrec.training.windows import stage_rows


@dataclass
class LocalFeed:
    """Every row of a dataset, in memory; or of some of its shards."""

    dataset: Dataset
    config: Config
    kept: dict[str, pa.Table] = field(default_factory=dict)
    shards: tuple[str, ...] = ()

    def chunks(self, table: str, rng: np.random.Generator) -> Iterator[pa.Table]:
        """See `fit.Feed`."""
        if table not in self.kept:
            self.kept[table] = stage_rows(
                self.dataset.sequences(shards=self.shards), table, self.config
            ).combine_chunks()
        rows = self.kept[table]
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), ROWS_A_CHUNK):
            yield rows.take(pa.array(order[start : start + ROWS_A_CHUNK]))

    def catch_up(self, table: str) -> None:
        """See `fit.Feed`. Every epoch is alike."""


@dataclass
class Alone(OneWorker):
    """A worker without others. `folder` receives every checkpoint, the finished model last."""

    folder: Path
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def wrap(self, model: nn.Module, apart: Sequence[nn.Parameter] = ()) -> nn.Module:
        """See `fit.Peers`."""
        return model

    def average(self, table: nn.Parameter) -> Tensor | None:
        """See `parts.Sharing`."""
        return table.grad

    def exchange(self, row_R: Tensor, value_RD: Tensor) -> tuple[Tensor, Tensor]:
        """See `fit.Peers`."""
        return row_R, value_RD

    def send(self, given_W: Sequence[Tensor]) -> list[Tensor]:
        """See `parts.Sharing`."""
        return list(given_W)

    def whole(self, part_KX: Tensor) -> Tensor | None:
        """See `parts.Sharing`."""
        return part_KX

    def agree(self, value: dict[str, Any] | None) -> dict[str, Any]:
        """See `fit.Peers`."""
        assert value is not None
        return value

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`."""
        self.on_epoch(metrics)
        self._put(save)

    def keep(self, place: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`."""
        self._put(save)

    def step(self, stage: str, epoch: int, steps: int, step: int, loss: float) -> None:
        """See `fit.Peers`."""

    def ending(self) -> bool:
        """See `fit.Peers`. Nobody asks."""
        return False

    def warned(self) -> bool:
        """See `fit.Peers`. Nobody warns."""
        return False

    def _put(self, save: Callable[[Path], None]) -> None:
        """The files, written aside, take the place of those of the last checkpoint; their seal does so last."""
        with tempfile.TemporaryDirectory(dir=self.folder) as part:
            save(Path(part))
            seal(Path(part))
            for path in sorted(Path(part).iterdir(), key=lambda path: path.name.startswith("seal-")):
                path.replace(self.folder / path.name)


def train_alone(
    dataset: Dataset,
    config: Config,
    folder: Path,
    *,
    resume: Path | None = None,
    keep: Path | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Fit:
    """See `train_as`; `folder` ends with model.safetensors, vectors.npy and state.json. keep: see `fit.Job`."""
    add_up_alike(torch.get_num_threads())
    return train_as(Alone(folder, on_epoch), dataset, config, resume=resume, keep=keep)


def train_as(
    worker: Alone, dataset: Dataset, config: Config, *, resume: Path | None = None, keep: Path | None = None
) -> Fit:
    """Train in this process, on the threads it has; `worker` hears of every epoch and receives the checkpoints.

    Raises DamagedCheckpointError if `resume` is not whole.
    """
    if resume is not None:
        check(resume)
    facts = survey(dataset, len(dataset.catalogue()), config)
    job = Job(
        config,
        dataset.path,
        facts.first_stage,
        facts.rows,
        keep=keep,
        fingerprint=dataset.fingerprint(),
        shards=facts.shards,
    )
    fit = Fit(job, LocalFeed(dataset, config, shards=facts.shards), worker, resume)
    fit.run()
    return fit
