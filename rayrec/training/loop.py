"""The epoch loop, in plain torch: batches in, weights out. It must not know Ray; one process runs it as it is.

Workers take each step together, however many batches each of them has left, and a step's gradient is that of the mean
over the targets of all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rayrec.config import TrainConfig
from rayrec.training.rowwise import RowwiseAdagrad, dense_part


@dataclass(frozen=True)
class EpochStats:
    """One epoch of one stage. `wait_s` of its `seconds` were spent waiting for data."""

    stage: str
    epoch: int
    loss: float
    steps: int
    samples: int
    seconds: float
    wait_s: float

    @property
    def samples_per_s(self) -> float:
        """Training rows, or pairs of the paper's model, a second."""
        return self.samples / max(self.seconds, 1e-9)


@dataclass
class Learner:
    """Weights, optimiser and schedule of one stage, and the state that a checkpoint needs.

    slow: those of `parameters` that learn at a share of the rate, and which. tables: those with sparse gradients, which
    learn by row-wise Adagrad. average: a sparse gradient of this worker's, or None, to the mean over all workers'.
    norm_of_all: from the norm of the tables' gradients here to that over all workers, where each has a part of them.
    """

    module: nn.Module
    parameters: list[nn.Parameter]
    config: TrainConfig
    total_steps: int
    device: torch.device
    slow: tuple[Sequence[nn.Parameter], float] = ((), 1.0)
    tables: Sequence[nn.Parameter] = ()
    average: Callable[[nn.Parameter], Tensor | None] = lambda table: table.grad
    norm_of_all: Callable[[Tensor], Tensor] = lambda norm: norm
    step: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)
    rowwise: RowwiseAdagrad | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        slow, tables = ({id(parameter) for parameter in some} for some in (self.slow[0], self.tables))
        dense = [p for p in self.parameters if id(p) not in tables]
        groups = [
            {"params": [p for p in dense if (id(p) in slow) == is_slow], "share": share}
            for is_slow, share in ((False, 1.0), (True, self.slow[1]))
        ]
        # fused: one pass over the parameters instead of many.
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True,
        )  # fmt: skip
        self.tables = [p for p in self.parameters if id(p) in tables]
        if self.tables:
            self.rowwise = RowwiseAdagrad(self.tables, self.config.lr, self.config.weight_decay)

    def train_step(self, batch: Any) -> float:
        """One step on one batch; its loss."""
        return self.step_on([(batch, None)])

    def step_on(self, weighted: Sequence[tuple[Any, Tensor | None]]) -> float:
        """One step on the sum of what `weighted` batches lose; that sum. See `weigh`."""
        optimizers = [self.optimizer, *([self.rowwise] if self.rowwise else [])]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * self._rate() * group.get("share", self.config.id_lr)
            optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for place, (batch, scale_K) in enumerate(weighted, 1):
            # The workers' gradients are averaged once, in the last backward pass.
            apart = getattr(self.module, "no_sync", nullcontext) if place < len(weighted) else nullcontext
            with apart():
                with self._precision():
                    loss: Tensor = self.module(batch) if scale_K is None else self.module(batch, scale_K)
                loss.backward()
            total += float(loss.detach())
        for table in self.tables:
            grad = self.average(table)
            table.grad = None if grad is None else grad.coalesce()
        if self.config.clip_norm:
            self._clip(self.config.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        self.step += 1
        return total

    def targets(self, batch: Any) -> Tensor:
        """Over how much each of the means that make up the loss is taken: [K] float32, zeros for no batch."""
        whole: Any = getattr(self.module, "module", self.module)  # within a data-parallel wrapper
        targets_K: Tensor = whole.targets(batch)
        return targets_K

    def _clip(self, longest: float) -> None:
        """Shorten the gradient where it is longer. `clip_grad_norm_` writes all of it anew at every step."""
        tables = {id(table) for table in self.tables}
        norms = [
            torch.nn.utils.get_total_norm(
                [dense_part(p.grad) for p in self.parameters if p.grad is not None and (id(p) in tables) == of_tables]
            )
            for of_tables in (False, True)
        ]
        norm = torch.hypot(norms[0].to(self.device), self.norm_of_all(norms[1].to(self.device)))
        if norm > longest:
            torch.nn.utils.clip_grads_with_norm_([p for p in self.parameters if id(p) not in tables], longest, norm)
            for table in self.tables:
                if table.grad is not None:
                    dense_part(table.grad).mul_(longest / (norm + 1e-6))  # as the line above does

    def _rate(self) -> float:
        if self.config.schedule == "constant":
            return 1.0
        return rate(self.step, self.total_steps, self.config.warmup)

    def _precision(self) -> Any:
        wanted = self.config.precision
        if wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on as if nothing had happened."""
        rowwise = {"rowwise": self.rowwise.state_dict()} if self.rowwise else {}
        return {"step": self.step, "optimizer": self.optimizer.state_dict(), **rowwise}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.rowwise:
            self.rowwise.load_state_dict(state["rowwise"])


def rate(step: int, total_steps: int, warmup: float) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to a hundredth.

    >>> [round(rate(step, 10, 0.2), 2) for step in (0, 1, 2, 10)]
    [0.5, 1.0, 1.0, 0.01]
    """
    warm_steps = max(1, round(warmup * total_steps))
    if warmup and step < warm_steps:
        return (step + 1) / warm_steps
    progress = min(1.0, (step - warm_steps) / max(1, total_steps - warm_steps)) if warmup else step / total_steps
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def dealt(n: int, world: int, rank: int) -> int:
    """How many of the first `n` batches are this worker's, where they are dealt out in turn.

    A step takes the next `TrainConfig.batches_a_step` of them, so that it learns from as many, and at the same rate,
    whether all workers are there or fewer; and these run out of batches together.

    >>> [dealt(4, 3, rank) for rank in range(3)], [dealt(8, 3, rank) - dealt(4, 3, rank) for rank in range(3)]
    ([2, 1, 1], [1, 2, 1])
    """
    return (n + world - 1 - rank) // world


class Together(Protocol):
    """The workers that take each step together."""

    world: int
    rank: int

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of `values`, summed over the workers; every worker calls it at the same place."""


class OneWorker:
    """Nobody else."""

    world = 1
    rank = 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values themselves."""
        return list(values)


@dataclass(frozen=True)
class Progress:
    """How far an epoch is; what a training that goes on in the middle of it must know."""

    steps: int = 0
    samples: int = 0
    total_loss: float = 0.0
    seconds: float = 0.0
    wait_s: float = 0.0


def train_epoch(
    learner: Learner,
    stage: str,
    epoch: int,
    batches: Iterable[Any],
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    *,
    together: Together | None = None,
    so_far: Progress | None = None,
    wishes: Callable[[Progress], Sequence[float]] = lambda progress: (),
    heed: Callable[[Progress, Sequence[float]], None] = lambda progress, wished: None,
) -> EpochStats:
    """Train on every batch once. `on_step` hears the step within the epoch and the running mean loss.

    so_far: what was done before, if `batches` are the rest of an epoch.
    wishes: what this worker would like after the next step, as numbers; `heed` hears their sums over the workers after
    it, on all of them.
    """
    learner.module.train()
    workers = together or OneWorker()
    progress = so_far or Progress()
    began = time.perf_counter() - progress.seconds
    waiting = timed(batches)
    all_of_step = learner.config.batches_a_step
    while True:
        had, has = (dealt(n * all_of_step, workers.world, workers.rank) for n in (progress.steps, progress.steps + 1))
        given = list(islice(waiting, has - had))
        weighted, others, wished = weigh(learner, [batch for batch, _ in given], workers, wishes(progress))
        if not given and not others:
            break
        loss = learner.step_on(weighted)
        progress = replace(
            progress,
            steps=progress.steps + 1,
            samples=progress.samples + sum(len(batch) for batch, _ in given),
            total_loss=progress.total_loss + loss,
            wait_s=progress.wait_s + sum(waited_s for _, waited_s in given),
            seconds=time.perf_counter() - began,
        )
        on_step(progress.steps, progress.total_loss / progress.steps)
        heed(progress, wished)
    mean_loss = workers.sum([progress.total_loss])[0] / workers.world / max(1, progress.steps)
    seconds = time.perf_counter() - began
    return EpochStats(stage, epoch, mean_loss, progress.steps, progress.samples, seconds, progress.wait_s)


def weigh(
    learner: Learner, batches: Sequence[Any], workers: Together, wishes: Sequence[float]
) -> tuple[list[tuple[Any, Tensor | None]], bool, list[float]]:
    """A step's batches with the weights of their losses, whether others have any, and the sums of all wishes.

    Workers' gradients are averaged. A mean over few targets would then weigh as much as one over many; so each of the
    means that make up a loss is scaled by its share of all targets, times the number of workers. A worker that has
    fewer batches than others may have takes part with none (None) in their place, and the rest do not wait for it.
    """
    if workers.world == 1 and len(batches) <= 1:
        return [(batch, None) for batch in batches], False, list(workers.sum(wishes))
    most = -(-learner.config.batches_a_step // workers.world) if workers.world > 1 else 1
    padded = [*batches, *[None] * (most - len(batches))]
    own_BK = [learner.targets(batch) for batch in padded]
    own_K = torch.stack(own_BK).sum(0)
    *sums, others = workers.sum([*own_K.tolist(), *wishes, float(bool(batches))])
    all_K = torch.tensor(sums[: len(own_K)], device=own_K.device)
    scales = [workers.world * one_K / all_K.clamp(min=1) for one_K in own_BK]
    return list(zip(padded, scales, strict=True)), others > 0, sums[len(own_K) :]


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    iterator = iter(batches)
    while True:
        asked = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch, time.perf_counter() - asked


@dataclass
class EarlyStop:
    """Keeps the best score and says when there was no better one for `patience` epochs."""

    patience: int
    best: float = -math.inf
    epochs_since: int = 0

    def better(self, score: float) -> bool:
        """Record an epoch's score (NaN is never better); whether it is the best so far."""
        if score > self.best:
            self.best, self.epochs_since = score, 0
            return True
        self.epochs_since += 1
        return False

    @property
    def stop(self) -> bool:
        """Whether to stop now."""
        return self.epochs_since >= self.patience
