"""What a checkpoint of a training holds, and what each worker puts into it and takes out.

In: a model, its learner, a place in the training; a folder. Out: files in the folder; the state that they hold. It must
not know when checkpoints are written, nor where their folders lie.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayrec.config import Config
from rayrec.errors import UsageError
from rayrec.model.paper import PaperModel
from rayrec.model.recommender import Recommender
from rayrec.training.checkpoints import STATE
from rayrec.training.loop import EarlyStop, Learner, Progress
from rayrec.training.parts import Parts
from rayrec.training.runs import differences
from rayrec.training.windows import stages


class Whole(NamedTuple):
    """What of a training's weights a checkpoint holds, however they are spread over workers. For the first worker."""

    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    learner: dict[str, Any]


class Place(NamedTuple):
    """Where in a training: after an epoch of a stage, or `within` one."""

    stage: str
    epoch: int
    within: Progress | None = None


class SoFar(NamedTuple):
    """What a training has told, and taken, until now: a line for each epoch, CPU seconds."""

    history: list[dict[str, Any]]
    cpu_s: float


class Worker(Protocol):
    """Which of the workers this is."""

    @property
    def rank(self) -> int:
        """Its number."""

    @property
    def world(self) -> int:
        """How many there are."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""


@dataclass(frozen=True)
class Keeper:
    """One worker's share in the checkpoints of a training. dataset: its path; fingerprint: of what is there."""

    config: Config
    dataset: str
    fingerprint: str
    worker: Worker
    parts: Parts
    model: Recommender | PaperModel

    def whole(self, learner: Learner, best: dict[str, Tensor]) -> Whole:
        """Called by every worker at the same place."""
        return Whole(
            self.parts.whole(self.model.state_dict()),
            self.parts.whole(best),
            self.parts.whole_learner(learner.state()),
        )

    def save(self, folder: Path, place: Place, whole: Whole, stopper: EarlyStop, so_far: SoFar) -> None:
        """All that a training needs to go on from a place, but for what each worker has of its own.

        "at" grows from checkpoint to checkpoint: stage, epochs done, steps of the next one.
        """
        save_file(_savable(whole.weights), folder / "model.safetensors")
        save_file(_savable(whole.best), folder / "best.safetensors")
        torch.save(whole.learner, folder / "learner.pt")
        stage, epoch, within = place
        finished = _before(stage, self.config)
        state = {
            "at": [len(finished), epoch + (within is None), within.steps if within else 0],
            "stage": stage,
            "epoch": epoch,
            "within": asdict(within) if within else None,
            "workers": self.worker.world,
            "stopper": [stopper.best, stopper.epochs_since],
            "finished": finished,
        }
        self._write(folder, state, so_far)

    def save_own(self, folder: Path, progress: Progress) -> None:
        """What this worker has of its own in the middle of an epoch."""
        state = {"cpu": torch.get_rng_state(), "model": self.model.passing(), "progress": asdict(progress)}
        if self.worker.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.worker.device)
        torch.save(state, folder / f"worker-{self.worker.rank}.pt")

    def save_finished(self, folder: Path, weights: dict[str, Tensor], vector_ND: np.ndarray, so_far: SoFar) -> None:
        """What a bundle is made from: whole weights, and the vector of each item."""
        save_file(_savable(weights), folder / "model.safetensors")
        np.save(folder / "vectors.npy", vector_ND, allow_pickle=False)
        done = stages(self.config)
        self._write(folder, {"at": [len(done), 0, 0], "stage": "done", "within": None, "finished": done}, so_far)

    def _write(self, folder: Path, state: dict[str, Any], so_far: SoFar) -> None:
        of_all = {"config": self.config.model_dump(mode="json"), "dataset": self.fingerprint}
        (folder / STATE).write_text(json.dumps({**state, **so_far._asdict(), **of_all}))

    def restore(self, folder: Path) -> dict[str, Any]:
        """The state that a checkpoint holds, with its weights put into the model.

        Raises UsageError for the checkpoint of another training: of other settings, or another dataset.
        """
        saved: dict[str, Any] = json.loads((folder / STATE).read_text())
        self._refuse_another(saved)
        self.model.load_state_dict(self.parts.own(load_file(folder / "model.safetensors")))
        if saved["stage"] == "done":
            return saved
        saved["best"] = self.parts.own(load_file(folder / "best.safetensors"))
        learner = torch.load(folder / "learner.pt", map_location=self.worker.device, weights_only=True)
        saved["learner"] = self.parts.own_learner(learner)
        if saved["within"]:
            saved["worker"] = self._own(folder, saved["workers"])
            saved["within"] = saved["worker"]["progress"]
        return saved

    def _refuse_another(self, saved: dict[str, Any]) -> None:
        if others := differences(saved["config"], self.config):
            raise UsageError(f"the checkpoint is of a training with other settings: {'; '.join(others)}")
        if saved["dataset"] and self.fingerprint and saved["dataset"] != self.fingerprint:
            raise UsageError(f"the checkpoint is of a training on another dataset than {self.dataset} is now")

    def _own(self, folder: Path, workers: int) -> dict[str, Any]:
        """What this worker has of its own, out of a checkpoint of `workers`.

        Of fewer or more workers than there are now it takes what all have alike. The rest of the epoch is then shared
        out anew: as many batches are passed over as were learned from, but not the very same.
        """
        rank, world = self.worker.rank, self.worker.world
        ranks = [rank] if workers == world else range(workers)
        states = [torch.load(folder / f"worker-{one}.pt", map_location="cpu", weights_only=True) for one in ranks]
        if workers == world:
            return dict(states[0])
        steps = states[0]["progress"]["steps"]
        sums = {name: sum(state["progress"][name] for state in states) for name in states[0]["progress"]}
        means = {name: total / workers for name, total in sums.items()}
        shared = {**means, "steps": steps, "samples": sums["samples"] // world}
        return {"model": states[rank % workers]["model"], "progress": shared}

    def take_up(self, state: dict[str, Any]) -> None:
        """Be as a worker was in the middle of an epoch: `restore`'s "worker"."""
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.worker.device)
        self.model.take_up(state["model"])


def _savable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _before(stage: str, config: Config) -> list[str]:
    order = stages(config)
    return list(order[: order.index(stage)])
