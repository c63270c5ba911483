"""`rayrec bench ids`: a step of the first stage with a large table of ids, under each optimiser of that table.

In: how many items, steps, rounds, settings. Out: seconds of a step, by the clock and of CPU, and bytes of the table,
its gradient and its optimiser's state. Negatives are sampled, as they are from 50,000 items on. Models and batches are
the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch

from rayrec.bench.dataset_made import make_items
from rayrec.bench.made_shop import draw_items
from rayrec.catalogue import Catalogue
from rayrec.config import Config, TrainConfig, preset
from rayrec.history import encode_history
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.recommender import SAMPLED_NEGATIVES, NextItems, Recommender, build
from rayrec.progress import step
from rayrec.schema import ACTION_CODE
from rayrec.settings import with_settings
from rayrec.training.loop import Learner

OPTIMIZERS: tuple[str, ...] = get_args(TrainConfig.model_fields["id_optimizer"].annotation)
CPU = torch.device("cpu")


def run(items: int, steps: int, rounds: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Time `steps` steps under each optimiser, `rounds` times in turn; prints and answers medians.

    settings: `path=value` of every model.
    """
    base = with_settings(preset("small"), ["model.use_image=false", f"train.negatives={SAMPLED_NEGATIVES}", *settings])
    rng = np.random.default_rng(0)
    catalogue = Catalogue.from_table(make_items(1 + np.bincount(draw_items(items, items, rng), minlength=items)))
    batches = [_batch(items, base, rng) for _ in range(steps)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in OPTIMIZERS}
    for round_ in range(rounds):
        for name, runs in found.items():
            runs.append(_steps(with_settings(base, [f"train.id_optimizer={name}"]), catalogue, batches))
            step(f"round {round_ + 1}: {describe(name, runs[-1])}")
    median = {name: {k: statistics.median(one[k] for one in runs) for k in runs[0]} for name, runs in found.items()}
    for name, one in median.items():
        step(f"median:  {describe(name, one)}")
    return {
        "bench": "ids", "items": items, "width": base.model.width, "threads": torch.get_num_threads(),
        "rounds": found, "median": median,
    }  # fmt: skip


def describe(name: str, one: dict[str, float]) -> str:
    """One run, or the median, in a line."""
    sizes = ", ".join(f"{part} {one[f'{part}_bytes'] / 1e6:.1f} MB" for part in ("table", "gradient", "state"))
    return f"{name:<16}{1000 * one['step_s']:8.1f} ms a step, CPU {1000 * one['step_cpu_s']:.1f}; {sizes}"


def _batch(items: int, config: Config, rng: np.random.Generator) -> NextItems:
    """Full histories of a heavy-tailed catalogue."""
    rows, length = config.train.batch_size, config.model.max_len
    event_BL = 1 + draw_items(items, rows * (length + 1), rng).reshape(rows, length + 1)
    n = rows * length
    history = encode_history(
        event_BL[:, :-1].ravel(), np.full(n, ACTION_CODE["view"]), np.arange(n) * 60_000,
        np.arange(rows + 1) * length, max_len=length, clock="time",
    )  # fmt: skip
    return NextItems(HistoryTensors.of(history, CPU), torch.from_numpy(event_BL[:, 1:].copy()))


def _steps(config: Config, catalogue: Catalogue, batches: Sequence[NextItems]) -> dict[str, float]:
    torch.manual_seed(0)
    model = build(config, catalogue)
    assert isinstance(model, Recommender)
    assert model.item_encoder.id is not None
    table = model.item_encoder.id.weight
    learner = Learner(
        model, list(model.stage_parameters("retrieval")), config.train, len(batches), CPU,
        tables=model.sparse_parameters(),
    )  # fmt: skip
    model.train()
    learner.train_step(batches[0])  # makes AdamW's state
    started, started_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        learner.train_step(batch)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    state = (learner.rowwise or learner.optimizer).state[table]
    assert table.grad is not None
    grad = table.grad.coalesce() if table.grad.is_sparse else table.grad
    parts = (grad.indices(), grad.values()) if grad.is_sparse else (grad,)
    return {
        "step_s": seconds / len(batches),
        "step_cpu_s": cpu_s / len(batches),
        "table_bytes": table.nbytes,
        "gradient_bytes": sum(part.nbytes for part in parts),
        "state_bytes": sum(value.nbytes for value in state.values() if value.dim()),
    }
