"""A training as `torchrun` starts it: plain torch with DistributedDataParallel, no Ray. Run by `bench train`.

In, as arguments: a dataset, settings. Out: a line of JSON with the epochs, by the first worker. It is the same `Fit`
over the same rows as under Ray Train; each worker reads its share of the shards.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from rayrec.config import Config, preset
from rayrec.data.dataset import Dataset
from rayrec.progress import step
from rayrec.settings import with_settings
from rayrec.training.fit import Fit, Job
from rayrec.training.group import Group, add_up_alike, cores
from rayrec.training.local import LocalFeed
from rayrec.training.survey import survey
from rayrec.training.tracking import describe


class Torchrun(Group):
    """The other workers, by way of torch alone; nothing is saved."""

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`."""
        if self.rank == 0 and metrics["stage"] != "done":
            step(describe(metrics))

    def keep(self, place: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`."""

    def step(self, stage: str, epoch: int, steps: int, step: int, loss: float) -> None:
        """See `fit.Peers`."""

    def ending(self) -> bool:
        """See `fit.Peers`."""
        return False

    def warned(self) -> bool:
        """See `fit.Peers`."""
        return False


def train(path: str, config: Config) -> list[dict[str, Any]]:
    """This worker's part of a training; its epochs."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    add_up_alike(max(1, cores() // world))
    torch.distributed.init_process_group("gloo")
    try:
        dataset = Dataset.open(path)
        facts = survey(dataset, len(dataset.catalogue()), config)
        own = LocalFeed(dataset, config, shards=facts.shards[rank::world])
        job = Job(config, path, facts.first_stage, facts.rows, shards=facts.shards)
        fit = Fit(job, own, Torchrun(rank, world, torch.device("cpu")))
        fit.run()
    finally:
        torch.distributed.destroy_process_group()
    return fit.history if rank == 0 else []


if __name__ == "__main__":
    if history := train(sys.argv[1], with_settings(preset("small"), sys.argv[2:])):
        print(json.dumps(history))
