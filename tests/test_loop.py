"""The epoch loop: what it counts, its schedule, its checkpoints, and when it stops."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rayrec.config import TrainConfig
from rayrec.training.loop import EarlyStop, EpochStats, Learner, rate, timed, train_epoch


class Line(nn.Module):
    """Learns y = 3 x - 1 from batches [[x], [y]]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch: Tensor) -> Tensor:
        return ((self.layer(batch[:, :1]) - batch[:, 1:]) ** 2).mean()


def batches(n: int, seed: int = 0) -> list[Tensor]:
    x = torch.randn(n, 8, 1, generator=torch.Generator().manual_seed(seed))
    return list(torch.cat([x, 3 * x - 1], 2))


def learner(total_steps: int = 100, **settings: object) -> Learner:
    torch.manual_seed(0)
    line = Line()
    config = TrainConfig.model_validate({"lr": 0.1, "weight_decay": 0.0, **settings})
    return Learner(line, list(line.parameters()), config, total_steps, torch.device("cpu"))


def test_an_epoch_learns_and_counts() -> None:
    one = learner()
    heard: list[tuple[int, float]] = []
    stats = train_epoch(one, "retrieval", 4, batches(100), lambda step, loss: heard.append((step, loss)))
    assert (stats.stage, stats.epoch, stats.steps, stats.samples) == ("retrieval", 4, 100, 800)
    assert [step for step, _ in heard] == list(range(1, 101))
    assert heard[-1][1] == pytest.approx(stats.loss)
    assert stats.loss < heard[0][1]
    assert one.module.layer.weight.item() == pytest.approx(3, abs=0.2)
    assert stats.samples_per_s == pytest.approx(800 / stats.seconds)


def test_an_epoch_without_batches_is_empty() -> None:
    stats = train_epoch(learner(), "fusion", 0, [])
    assert (stats.loss, stats.steps, stats.samples) == (0.0, 0, 0)


def test_waiting_for_data_is_told_from_work() -> None:
    def slow() -> Iterator[Tensor]:
        for batch in batches(3):
            time.sleep(0.05)
            yield batch

    stats = train_epoch(learner(), "retrieval", 0, slow())
    assert 0.14 < stats.wait_s <= stats.seconds
    assert [waited < 0.04 for _, waited in timed([1, 2])] == [True, True]


def test_the_rate_climbs_then_falls() -> None:
    rates = [rate(step, 100, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert all(before >= after for before, after in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.01)
    assert rate(10_000, 100, 0.1) == pytest.approx(0.01), "more steps than foreseen"
    assert rate(0, 100, 0.0) == 1.0
    assert all(0 < rate(step, 1, 0.1) <= 1 for step in range(3))


def test_a_restored_learner_goes_on_as_if_nothing_had_happened() -> None:
    whole, data = learner(), batches(40)
    for batch in data:
        whole.train_step(batch)
    first = learner()
    for batch in data[:20]:
        first.train_step(batch)
    state, weights = copy.deepcopy(first.state()), copy.deepcopy(first.module.state_dict())
    second = learner()
    second.module.load_state_dict(weights)
    second.restore(state)
    for batch in data[20:]:
        second.train_step(batch)
    assert second.step == 40
    for ours, theirs in zip(second.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_gradients_are_clipped() -> None:
    one = learner()
    one.train_step(batches(1)[0] * 1e4)
    norm = torch.stack([p.grad.norm() for p in one.parameters if p.grad is not None]).norm()
    assert norm == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision(precision: str, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []
    one = learner(precision=precision)
    one.module.layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    assert math.isfinite(one.train_step(batches(1)[0]))
    assert seen == [dtype]


def test_it_stops_when_patience_is_over() -> None:
    stopper = EarlyStop(patience=2)
    assert [stopper.better(score) for score in (0.1, 0.3, 0.3, 0.2)] == [True, True, False, False]
    assert stopper.stop
    assert stopper.best == 0.3


def test_a_better_score_starts_patience_anew_and_nan_is_never_better() -> None:
    stopper = EarlyStop(patience=2)
    assert not stopper.better(math.nan)
    assert stopper.better(0.0)
    assert not stopper.better(math.nan)
    assert stopper.better(0.1)
    assert not stopper.stop


def test_the_rate_of_samples_of_no_time_is_finite() -> None:
    assert math.isfinite(EpochStats("retrieval", 0, 0.0, 0, 5, 0.0, 0.0).samples_per_s)
