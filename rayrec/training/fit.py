"""The story of a training: stages, epochs, validation, early stop, checkpoints. One worker's view.

In: a `Job`, the worker's `Feed` of rows and its `Peers`. Out: reports; the last one carries the finished model.
It must not know Ray: alone in one process it runs as it is.

A training that goes on from a checkpoint, of the end of an epoch or of a step within one, ends with the weights of one
that was never interrupted: an epoch's rows and what is drawn in it follow from seed, stage, epoch and rank. With
fewer or more workers than before it goes on with as many batches a step; which rows are in them differs then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from rayrec.bundle import Bundle
from rayrec.catalogue import Catalogue
from rayrec.config import Config
from rayrec.evaluation import ReplaySettings, replay, summarise
from rayrec.followers import Followers
from rayrec.model.paper import PaperModel
from rayrec.model.recommender import Recommender, build
from rayrec.model.scorer import Scorer
from rayrec.training.batches import (
    PAPER_NEGATIVES,
    KeptBatches,
    ListCollate,
    NextItemCollate,
    PairCollate,
    minibatches,
)
from rayrec.training.calibrate import calibrate
from rayrec.training.held_images import held_images
from rayrec.training.keeper import Keeper, Place, SoFar
from rayrec.training.loop import EarlyStop, EpochStats, Learner, Progress, dealt, train_epoch
from rayrec.training.opening import opened_by_all
from rayrec.training.parts import Parts, Sharing
from rayrec.training.validation import judged_visitors, score
from rayrec.training.warm_start import warm_start

MAY_LOSE = 0.05
"""Share of the best validation so far, the one before it included, that an epoch may lose which teaches what validation
does not ask."""

LOOK_S = 5.0
"""How often workers ask together whether a machine is about to be taken away."""


@dataclass(frozen=True)
class Job:
    """What every worker of a training is told.

    followers: counts of the first stage. rows: rows of each stage in the whole dataset.
    start_from: a bundle whose weights to start from. keep: a folder for what is computed of pictures, for other
    trainings on the same ones. fingerprint: of the dataset (`Dataset.fingerprint`), which every worker must find.
    shards: of sequences, if not all of them can be read.
    """

    config: Config
    dataset: str
    followers: Followers
    rows: dict[str, int]
    start_from: str | None = None
    keep: Path | None = None
    fingerprint: str = ""
    shards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """How a stage is trained.

    lr: at its highest. by_validation: its best epoch counts, and it stops where there is none for a while; else the
    last one that loses no more than MAY_LOSE, if any, for what validation does not ask. passes: times that an epoch
    goes through the rows.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    by_validation: bool = True
    passes: int = 1


Batches = Callable[[np.random.Generator, int], Iterator[Any]]
"""An epoch's batches, by its randomness, without the first so many."""


class EndedError(Exception):
    """The training was asked to end, and did so after a checkpoint, from which it can go on."""

    def __init__(self, stage: str, epoch: int, step: int) -> None:
        super().__init__(f"{stage} {epoch + 1}, step {step}")


class Feed(Protocol):
    """Where a worker's rows come from."""

    def chunks(self, table: str, rng: np.random.Generator) -> Iterator[pa.Table]:
        """This worker's rows for a stage of `windows.stages`, once over, in chunks to be shuffled.

        The first epoch's, or the later ones', are the same in every training for the same `rng`.
        """

    def catch_up(self, table: str) -> None:
        """Be as after the first epoch of `table`: for a training that goes on in a later one."""


class Peers(Sharing, Protocol):
    """What a worker shares with the others."""

    rank: int
    device: torch.device

    def wrap(self, model: nn.Module, apart: Sequence[nn.Parameter] = ()) -> nn.Module:
        """The module whose backward pass averages gradients over the workers, but for those of `apart`."""

    def exchange(self, row_R: Tensor, value_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that the workers give, and what they give of each, of all workers one after the other."""

    def agree(self, value: dict[str, Any] | None) -> dict[str, Any]:
        """The value that the first worker gives, on every worker."""

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Called by every worker after each epoch; `save` writes the first worker's checkpoint into a folder."""

    def keep(self, place: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Called by every worker within an epoch; `save` writes this worker's part of a checkpoint into a folder."""

    def step(self, stage: str, epoch: int, steps: int, step: int, loss: float) -> None:
        """Show how far this worker is."""

    def ending(self) -> bool:
        """Whether this worker, or the training, was asked to end."""

    def warned(self) -> bool:
        """Whether a worker's machine is about to be taken away, and was not when it was asked before.

        Called by every worker at the same step.
        """


@dataclass
class Fit:
    """One worker's training. `history` holds a line for each epoch of every stage.

    A line's "cpu_s" counts from the start of the training, of the worker that reports it; "kept", of a refit alone, is
    whether its weights were.
    """

    job: Job
    feed: Feed
    peers: Peers
    resume: Path | None = None

    def __post_init__(self) -> None:
        config = self.job.config
        assert self.peers.world <= config.train.workers, "a step's batches are those of `train.workers` at most"
        torch.manual_seed(config.train.seed)
        self.dataset = opened_by_all(self.job.dataset, self.job.fingerprint, self.peers)
        self.catalogue: Catalogue = self.dataset.catalogue()
        images = held_images(self.dataset, config, self.peers.rank, self.peers.world)
        item_M, pixels_MHWC = (images.item_M, images.pixels_MHWC) if images else (None, None)
        model = build(config, self.catalogue, item_M, pixels_MHWC, device=self.peers.device, keep=self.job.keep)
        if self.job.start_from and self.resume is None:
            vocab = {name: self.dataset.vocab(name) for name in ("categories", "brands")}
            warm_start(model, self.catalogue, vocab, Bundle.open(self.job.start_from))
        if config.train.image_held == "share" and isinstance(model, Recommender):
            model.exchange = self.peers.exchange
        self.parts = Parts(self.peers)
        if config.train.id_held == "share" and isinstance(model, Recommender):
            self.parts = Parts(self.peers, model.share_ids(self.peers.rank, self.peers.world, self.peers.send))
        self.model = model.to(self.peers.device)
        self.keeper = Keeper(config, self.job.dataset, self.job.fingerprint, self.peers, self.parts, self.model)
        self.history: list[dict[str, Any]] = []
        self.spent_s = -time.process_time()  # CPU seconds of the training, of this process and those that it resumes
        self.saved_at = self.looked_at = time.monotonic()
        self.judged = judged_visitors(self.dataset, config.train, self.job.shards) if self.peers.rank == 0 else None

    def run(self) -> None:
        """Run every stage that is not done yet, then hand over the finished model."""
        train = self.job.config.train
        saved = self.keeper.restore(self.resume) if self.resume else None
        if saved:
            self.history = saved["history"]
            self.spent_s += saved["cpu_s"]
        if isinstance(self.model, PaperModel):
            self._stage(Stage("pairs", train.epochs, train.batch_size, train.lr), saved, self._pairs)
        else:
            self._three_stages(self.model, saved)
        vector_ND = self.model.encode_items().cpu().numpy()
        weights = self.parts.whole(self.model.state_dict())
        self.peers.report(
            {"stage": "done"}, lambda folder: self.keeper.save_finished(folder, weights, vector_ND, self._so_far())
        )

    def _three_stages(self, model: Recommender, saved: dict[str, Any] | None) -> None:
        """Retrieval, the fusion over what it returns, and retrieval once more with what was withheld for the fusion."""
        train, device = self.job.config.train, self.peers.device
        windows = NextItemCollate(model.config.model.max_len, self.dataset.clock, device, device.type == "cuda")
        retrieval = Stage("retrieval", train.epochs, train.batch_size, train.lr)
        self._stage(retrieval, saved, self._rows_to(windows, retrieval))
        if not (saved and "fusion" in saved["finished"]):
            fusion = self._long_enough(Stage("fusion", train.fusion_epochs, train.fusion_batch_size, train.lr))
            model.vector_ND = vector_ND = model.encode_items()
            made = self._rows_to(ListCollate(self._scorer(vector_ND), device), fusion)
            kept = KeptBatches(lambda rng: made(rng, 0), fusion.passes)
            # Batches that were not asked for to their end cannot be kept: which they are would depend on when.
            self._stage(fusion, saved, made if train.max_samples else kept)
            withheld = self.feed.chunks("fusion", np.random.default_rng(train.seed))
            calibrate(model, self._scorer(vector_ND), withheld, train.seed)  # the refit will know them by heart
            model.vector_ND = None
        refit = Stage("refit", train.refit_epochs, train.batch_size, train.refit_lr, by_validation=False)
        self._stage(refit, saved, self._rows_to(windows, refit))

    def _long_enough(self, fusion: Stage) -> Stage:
        """The stage, with an epoch's passes so that it has `fusion_steps`: as many steps as a good one takes.

        More epochs instead would end early: a few steps make no better epoch.
        """
        train = self.job.config.train
        if train.max_samples or not fusion.epochs:
            return fusion
        return replace(fusion, passes=max(1, -(-train.fusion_steps // (fusion.epochs * self._steps(fusion)))))

    def _stage(self, stage: Stage, saved: dict[str, Any] | None, batches: Batches) -> None:
        """Train one stage to its end, and leave its best weights in the model."""
        if not stage.epochs or (saved and stage.name in saved["finished"]):
            return
        train = self.job.config.train.model_copy(update={"lr": stage.lr})
        parameters = list(self.model.stage_parameters(stage.name))
        chosen = {id(parameter) for parameter in parameters}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        steps, tables = self._steps(stage), self.model.sparse_parameters()
        learner = Learner(
            self.peers.wrap(self.model, tables), parameters, train, stage.epochs * steps, self.peers.device,
            slow=self.model.slow_parameters(), tables=tables,
            average=self.parts.average, norm_of_all=self.parts.norm_of_all,
        )  # fmt: skip
        stopper, first, so_far = EarlyStop(train.patience), 0, None
        best = self._weights()
        if saved and saved["stage"] == stage.name:
            learner.restore(saved["learner"])
            stopper, best, within = EarlyStop(train.patience, *saved["stopper"]), saved["best"], saved["within"]
            first, so_far = saved["epoch"] + (within is None), Progress(**within) if within else None
            if first:
                self._catch_up(stage, batches)
        elif stage.name in ("fusion", "refit"):
            stopper.better(score(self._validate(stage)))  # the fusion must beat plain retrieval, the refit not harm it
        self.model.refresh()
        for epoch in range(first, stage.epochs):
            if stopper.stop and stage.by_validation:
                break
            rng = self._rng(stage, epoch)
            torch.manual_seed(int(rng.integers(2**31)))
            done, all_ = (self._dealt(n * train.batches_a_step) for n in (so_far.steps if so_far else 0, steps))
            given = islice(batches(rng, done), all_ - done if train.max_samples else None)
            if saved and so_far:
                self.keeper.take_up(saved["worker"])
            keep = partial(self._keep, stage, epoch, learner, stopper, best)
            stats = train_epoch(
                learner, stage.name, epoch, given, partial(self.peers.step, stage.name, epoch, steps),
                together=self.peers, so_far=so_far, wishes=self._wishes, heed=keep,
            )  # fmt: skip
            so_far = None
            metrics = self._validate(stage)
            least = stopper.best * (1 - MAY_LOSE)
            kept = stopper.better(score(metrics)) or (not stage.by_validation and score(metrics) >= least)
            if kept:
                best = self._weights()
            self._report(stats, metrics if stage.by_validation else {**metrics, "kept": kept}, learner, stopper, best)
        self.model.load_state_dict(best)

    def _weights(self) -> dict[str, Tensor]:
        """A copy in main memory: a GPU has better use for room for another table of ids."""
        return {name: value.to("cpu", copy=True) for name, value in self.model.state_dict().items()}

    def _dealt(self, n: int) -> int:
        return dealt(n, self.peers.world, self.peers.rank)

    def _rng(self, stage: Stage, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.job.config.train.seed, len(stage.name), epoch, self.peers.rank])

    def _catch_up(self, stage: Stage, batches: Batches) -> None:
        """Have what a first epoch leaves behind for the later ones."""
        if isinstance(batches, KeptBatches):
            first = self._rng(stage, 0)
            first.integers(2**31)  # as the first epoch did
            batches.catch_up(first)
        self.feed.catch_up(stage.name)

    # ---------------------------------------------------------------- within an epoch

    def _wishes(self, progress: Progress) -> Sequence[float]:
        """After the next step: a checkpoint, the end, a look at whether a machine goes away."""
        train, now = self.job.config.train, time.monotonic()
        due = train.checkpoint_s and now - self.saved_at >= train.checkpoint_s
        due = due or (train.checkpoint_steps and (progress.steps + 1) % train.checkpoint_steps == 0)
        first = self.peers.rank == 0  # one clock decides
        return float(first and bool(due)), float(self.peers.ending()), float(first and now - self.looked_at >= LOOK_S)

    def _keep(
        self,
        stage: Stage,
        epoch: int,
        learner: Learner,
        stopper: EarlyStop,
        best: dict[str, Tensor],
        progress: Progress,
        wished: Sequence[float],
    ) -> None:
        """Write a checkpoint after a step, if any worker wished for one. Raises EndedError if one wished to end."""
        if stage.name != "fusion" and isinstance(self.model, Recommender):
            self.model.share_pictures()
        due, end, look = (wish > 0 for wish in wished)
        if look:
            self.looked_at = time.monotonic()
            due = self.peers.warned() or due
        if due or end:
            whole = self.keeper.whole(learner, best)

            def save(folder: Path) -> None:
                if self.peers.rank == 0:
                    self.keeper.save(folder, Place(stage.name, epoch, progress), whole, stopper, self._so_far())
                self.keeper.save_own(folder, progress)

            self.peers.keep({"stage": stage.name, "epoch": epoch, "step": progress.steps}, save)
            self.saved_at = time.monotonic()
        if end:
            raise EndedError(stage.name, epoch, progress.steps)

    # ---------------------------------------------------------------- rows and batches

    def _rows_to(self, collate: Callable[[pa.Table], Any], stage: Stage) -> Batches:
        """What turns the stage's rows into its batches."""

        def batches(rng: np.random.Generator, skip: int) -> Iterator[Any]:
            rows = minibatches(self.feed.chunks(stage.name, rng), stage.batch_size, rng)
            return map(collate, islice(rows, skip, None))

        return batches

    def _pairs(self, rng: np.random.Generator, skip: int) -> Iterator[Any]:
        config = self.job.config
        collate = PairCollate(
            config.model.max_len, self.dataset.clock, len(self.catalogue), config.train.negatives, self.peers.device
        )
        each = 1 + collate.negatives
        for rows in minibatches(self.feed.chunks("pairs", rng), config.train.batch_size, rng, bucket=False):
            own = np.random.default_rng(rng.integers(2**63))  # so that what is skipped need not be drawn
            if skip < each:
                yield from islice(collate(rows, own), skip, None)
            skip = max(0, skip - each)

    def _steps(self, stage: Stage) -> int:
        """Steps of an epoch with all workers: for the schedule and, with `max_samples`, the limit."""
        train = self.job.config.train
        samples = self.job.rows[stage.name] // train.workers
        if stage.name == "pairs":
            samples *= 1 + (train.negatives or PAPER_NEGATIVES)
        if train.max_samples:
            samples = min(samples, -(-train.max_samples // train.workers))
        return max(1, -(-samples // (stage.batch_size * train.accumulate))) * stage.passes

    def _scorer(self, vector_ND: Tensor, fused: bool = True) -> Scorer:
        return Scorer(
            *(self.model, self.catalogue, vector_ND.cpu().numpy(), self.job.followers, self.dataset.clock),
            fused=fused, vectors_on=torch.device("cpu") if self.parts.ids else None,
        )  # fmt: skip

    def _validate(self, stage: Stage) -> dict[str, float]:
        """The first worker's judgement of the model as it stands, on every worker."""
        found = None
        # Of every worker: it brings the table of pictures up to date. While the fusion learns no vector moves.
        vector_ND = self.model.encode_items()
        if self.peers.rank == 0:
            scorer = self._scorer(vector_ND, fused=stage.name != "retrieval")
            settings = ReplaySettings(
                split="valid",
                n_items=len(self.catalogue),
                clock=self.dataset.clock,
                max_len=scorer.max_len,
                protocols=("metrics", "next"),
            )
            body = summarise(replay({"model": scorer}, self.judged, settings), self.catalogue, settings)
            found = {f"valid_{protocol}_ndcg@10": body[protocol]["ndcg@10"] or 0.0 for protocol in settings.protocols}
        return self.peers.agree(found)

    def _so_far(self) -> SoFar:
        return SoFar(self.history, self.spent_s + time.process_time())

    def _report(
        self,
        stats: EpochStats,
        metrics: dict[str, Any],
        learner: Learner,
        stopper: EarlyStop,
        best: dict[str, Tensor],
    ) -> None:
        line = {
            **asdict(stats),
            "cpu_s": self.spent_s + time.process_time(),
            "samples_per_s": stats.samples_per_s,
            "wait_share": stats.wait_s / max(stats.seconds, 1e-9),
            **metrics,
        }
        self.history.append(line)
        whole, place = self.keeper.whole(learner, best), Place(stats.stage, stats.epoch)
        self.peers.report(line, lambda folder: self.keeper.save(folder, place, whole, stopper, self._so_far()))
        self.saved_at = time.monotonic()
