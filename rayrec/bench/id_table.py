"""`rayrec bench ids`: a step of the first stage with a large table of ids, under each optimiser of that table.

In: how many items, steps, rounds, workers, settings. Out: seconds of a step, by the clock and of CPU, and bytes of the
table, its gradient and its optimiser's state, all of one worker. Workers are processes as `torchrun` starts them, and
may share the table. Negatives are sampled, as they are of many items. Models and batches are the same.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed

from rayrec.bench.dataset_made import make_items
from rayrec.bench.made_shop import draw_items
from rayrec.bench.measure import torchrun
from rayrec.catalogue import Catalogue
from rayrec.config import Config, TrainConfig, preset
from rayrec.history import encode_history
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.recommender import NextItems, Recommender, build
from rayrec.progress import step
from rayrec.schema import ACTION_CODE
from rayrec.settings import from_dict, with_settings
from rayrec.training.group import Group
from rayrec.training.loop import Learner
from rayrec.training.parts import Parts

OPTIMIZERS: tuple[str, ...] = get_args(TrainConfig.model_fields["id_optimizer"].annotation)
SHARED = "by rows, shared"
NEGATIVES = 1024  # whatever a training of so many items takes: of this bench's kept figures
CPU = torch.device("cpu")


def run(items: int, steps: int, rounds: int, settings: Sequence[str] = (), workers: int = 1) -> dict[str, Any]:
    """Time `steps` steps under each optimiser, `rounds` times in turn; prints and answers medians.

    settings: `path=value` of every model. Raises RuntimeError if a worker fails.
    """
    base = with_settings(preset("small"), ["model.use_image=false", f"train.negatives={NEGATIVES}", *settings])
    if workers == 1:
        found = time_ways(items, steps, rounds, base, Group(0, 1, CPU))
    else:
        found = _by_torchrun(items, steps, rounds, base, workers)
    median = {name: {k: statistics.median(one[k] for one in runs) for k in runs[0]} for name, runs in found.items()}
    for name, one in median.items():
        step(f"median:  {describe(name, one)}")
    return {
        "bench": "ids", "items": items, "workers": workers, "width": base.model.width,
        "rounds": found, "median": median,
    }  # fmt: skip


def time_ways(items: int, steps: int, rounds: int, base: Config, peers: Group) -> dict[str, list[dict[str, float]]]:
    """This worker's runs of each way. Every worker calls it with the same numbers and settings."""
    rng = np.random.default_rng(0)
    catalogue = Catalogue.from_table(make_items(1 + np.bincount(draw_items(items, items, rng), minlength=items)))
    own = np.random.default_rng([1, peers.rank])
    batches = [_batch(items, base, own) for _ in range(steps)]
    ways = {name: [f"train.id_optimizer={name}"] for name in OPTIMIZERS}
    if peers.world > 1:
        ways[SHARED] = ["train.id_optimizer=rowwise_adagrad", "train.id_held=share"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for round_ in range(rounds):
        for name, way in ways.items():
            found[name].append(_steps(with_settings(base, way), catalogue, batches, peers))
            if peers.rank == 0:
                step(f"round {round_ + 1}: {describe(name, found[name][-1])}")
    return found


def _by_torchrun(items: int, steps: int, rounds: int, base: Config, workers: int) -> dict[str, list[dict[str, float]]]:
    """The first worker's runs."""
    words = [*torchrun("rayrec.bench.id_table", workers), *map(str, (items, steps, rounds)), base.model_dump_json()]
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))}
    done = subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **threads}
    )
    if done.returncode:
        raise RuntimeError(f"workers failed ({done.returncode}): {' '.join(words[:-1])}")
    found: dict[str, list[dict[str, float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


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


def _steps(config: Config, catalogue: Catalogue, batches: Sequence[NextItems], peers: Group) -> dict[str, float]:
    torch.manual_seed(0)
    model = build(config, catalogue)
    assert isinstance(model, Recommender)
    shared = config.train.id_held == "share"
    parts = Parts(peers, model.share_ids(peers.rank, peers.world, peers.send) if shared else None)
    assert model.item_encoder.id is not None
    table, tables = model.item_encoder.id.weight, model.sparse_parameters()
    learner = Learner(
        peers.wrap(model, tables), list(model.stage_parameters("retrieval")), config.train, len(batches), CPU,
        tables=tables, average=parts.average, norm_of_all=parts.norm_of_all,
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
    held = (grad.indices(), grad.values()) if grad.is_sparse else (grad,)
    return {
        "step_s": seconds / len(batches),
        "step_cpu_s": cpu_s / len(batches),
        "table_bytes": table.nbytes,
        "gradient_bytes": sum(part.nbytes for part in held),
        "state_bytes": sum(value.nbytes for value in state.values() if value.dim()),
    }


def _worker(words: Sequence[str]) -> None:
    items, steps, rounds = map(int, words[:3])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    try:
        found = time_ways(items, steps, rounds, from_dict(Config, json.loads(words[3])), Group(rank, world, CPU))
    finally:
        torch.distributed.destroy_process_group()
    if rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    _worker(sys.argv[1:])
