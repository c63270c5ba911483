"""How much of a step is arithmetic: model FLOP/s against the greatest that this machine shows, and where time goes.

In: a dataset, settings. Out: figures of steps of the first stage in this process. It must not know Ray.
"""

from __future__ import annotations

import statistics
import time
from itertools import islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from rayrec.bench.first_stage import batches
from rayrec.config import Config
from rayrec.data.dataset import Dataset
from rayrec.model.recommender import NextItems, Recommender, build
from rayrec.training.loop import Learner

UNTIMED, STEPS, ROUNDS = 3, 15, 5
SIDE = 2048
"""Of the square matrices whose product is the yardstick: large enough for the best that BLAS can do."""
TOLD = 8


def run(dataset: Dataset, config: Config) -> dict[str, Any]:
    """Time steps and products in turn; medians, the share of the peak, and the operators that take most of a step."""
    model, drawn = _model(dataset, config), _batches(dataset, config, UNTIMED + STEPS)
    learner = Learner(model, list(model.stage_parameters("retrieval")), config.train, len(drawn), torch.device("cpu"))
    model.train()
    model.refresh()
    for batch in drawn[:UNTIMED]:
        learner.train_step(batch)
    with FlopCounterMode(display=False) as counter:
        for batch in drawn[UNTIMED:]:
            learner.train_step(batch)
    flops = counter.get_total_flops() + sum(_recurrent(batch, config) for batch in drawn[UNTIMED:])
    peaks, rates = [], []
    for _ in range(ROUNDS):
        peaks.append(_peak())
        began = time.perf_counter()
        for batch in drawn[UNTIMED:]:
            learner.train_step(batch)
        rates.append(flops / (time.perf_counter() - began))
    peak, rate = statistics.median(peaks), statistics.median(rates)
    return {
        "threads": torch.get_num_threads(),
        "gflop_a_step": flops / STEPS / 1e9,
        "gflop_per_s": rate / 1e9,
        "peak_gflop_per_s": peak / 1e9,
        "share_of_peak": rate / peak,
        "operators": _operators(learner, drawn[UNTIMED:]),
    }


def _model(dataset: Dataset, config: Config) -> Recommender:
    torch.manual_seed(0)
    images = dataset.images() if config.model.use_image else None
    pictures = (images.item_M, images.pixels_MHWC) if images else (None, None)
    model = build(config, dataset.catalogue(), *pictures)
    assert isinstance(model, Recommender)
    return model


def _batches(dataset: Dataset, config: Config, n: int) -> list[NextItems]:
    return list(islice(batches(dataset.sequences(), dataset.clock, config), n))


def _recurrent(batch: NextItems, config: Config) -> float:
    """FLOPs of the LSTM or GRU forward and back, which torch's counter passes over: three times the forward ones."""
    gates = {"lstm": 4, "gru": 3, "transformer": 0}[config.model.encoder]
    width, hidden = config.model.width, config.model.hidden_width
    events = float((batch.history.item_BL > 0).sum())
    first = 2 * gates * hidden * (width + hidden)
    later = 2 * gates * hidden * 2 * hidden * (config.model.layers - 1)
    return 3 * events * (first + later)


def _peak() -> float:
    """FLOP/s of a product of two matrices."""
    left, right = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    left @ right
    began = time.perf_counter()
    left @ right
    return 2 * SIDE**3 / (time.perf_counter() - began)


def _operators(learner: Learner, drawn: list[NextItems]) -> list[dict[str, Any]]:
    """Which operators take the most of the steps' time of their own; the rest together."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for batch in drawn:
            learner.train_step(batch)
    averages = sorted(seen.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in averages)
    told = [{"operator": one.key, "share": one.self_cpu_time_total / whole} for one in averages[:TOLD]]
    return [*told, {"operator": "all others", "share": 1 - sum(one["share"] for one in told)}]


def table(found: dict[str, Any]) -> str:
    """The figures in lines of text."""
    lines = [
        f"{found['gflop_a_step']:.2f} GFLOP a step, {found['gflop_per_s']:.1f} GFLOP/s, "
        f"{100 * found['share_of_peak']:.0f}% of the {found['peak_gflop_per_s']:.1f} that a product of matrices shows "
        f"({found['threads']} threads)"
    ]
    return "\n".join([*lines, *(f"  {100 * one['share']:5.1f}%  {one['operator']}" for one in found["operators"])])
