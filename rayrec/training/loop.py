"""The epoch loop, in plain torch: batches in, weights out. It must not know Ray; one process runs it as it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rayrec.config import TrainConfig


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

    slow: those of `parameters` that learn at `image_lr` times the rate.
    """

    module: nn.Module
    parameters: list[nn.Parameter]
    config: TrainConfig
    total_steps: int
    device: torch.device
    slow: Sequence[nn.Parameter] = ()
    step: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # fused: one pass over the parameters instead of many.
        slow = {id(parameter) for parameter in self.slow}
        groups = [
            {"params": [p for p in self.parameters if (id(p) in slow) == is_slow], "share": share}
            for is_slow, share in ((False, 1.0), (True, self.config.image_lr))
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True,
        )  # fmt: skip

    def train_step(self, batch: Any) -> float:
        """One step on one batch; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self._rate() * group["share"]
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            loss: Tensor = self.module(batch)
        loss.backward()
        if self.config.clip_norm:
            self._clip(self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _clip(self, longest: float) -> None:
        """Shorten the gradient where it is longer. `clip_grad_norm_` writes all of it anew at every step."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if norm > longest:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, longest, norm)

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
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


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


def train_epoch(
    learner: Learner,
    stage: str,
    epoch: int,
    batches: Iterable[Any],
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> EpochStats:
    """Train on every batch once. `on_step` hears the step within the epoch and the running mean loss."""
    learner.module.train()
    started, total_loss, steps, samples, wait_s = time.perf_counter(), 0.0, 0, 0, 0.0
    for batch, waited_s in timed(batches):
        wait_s += waited_s
        total_loss += learner.train_step(batch)
        steps, samples = steps + 1, samples + len(batch)
        on_step(steps, total_loss / steps)
    seconds = time.perf_counter() - started
    return EpochStats(stage, epoch, total_loss / max(1, steps), steps, samples, seconds, wait_s)


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
