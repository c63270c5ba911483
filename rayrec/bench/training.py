"""`rayrec bench train`: workers of Ray Train, fed by Ray Data, against the same loop under torchrun.

In: how many events, rounds and workers. Out: rows a second of both, how long workers wait for data, the time from the
command to the first step, and how much of a step is arithmetic. Each run is a command of its own, in turn and in
changing order, with the same threads and settings of the allocator. What is compared is the epoch loop: start,
validation and checkpoints are outside on both sides.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrec.bench.dataset_made import make_dataset
from rayrec.bench.measure import torchrun
from rayrec.progress import step
from rayrec.training.trainer import ALLOCATOR

EPOCHS = 4
IMAGE_SIZE = 32
SETTINGS = (
    f"train.epochs={EPOCHS}",
    f"train.patience={EPOCHS}",
    "train.fusion_epochs=0",
    "train.refit_epochs=0",
    "train.tracker=[]",
    "train.valid_users=100",
)
FIRST_EPOCH = "  retrieval 1: loss"
"""How both sides begin the line that they print after it."""

# Ray gives its workers a low priority; with it whatever else the machine does would count against one side alone.
ENVIRONMENT = {**ALLOCATOR, "RAY_worker_niceness": "0"}

_RAY = """
import json, sys
from rayrec.config import preset
from rayrec.settings import with_settings
from rayrec.training.trainer import train
config = with_settings(preset("small"), sys.argv[2:])
bundle = train(sys.argv[1], sys.argv[1] + "-bundles", config, publish=False)
print(json.dumps(bundle.json("metrics.json")["training"]))
"""
_FLOPS = """
import json, sys, torch
from rayrec.bench.flops import run
from rayrec.config import preset
from rayrec.data.dataset import Dataset
from rayrec.settings import with_settings
from rayrec.training.group import cores
torch.set_num_threads(cores())
print(json.dumps(run(Dataset.open(sys.argv[1]), with_settings(preset("small"), sys.argv[2:]))))
"""


def run(events: int, rounds: int, workers: int) -> dict[str, Any]:
    """Train both ways `rounds` times in turn on the same dataset; prints and answers medians and ratios.

    The first epoch is told apart: it streams the rows that the next ones keep.
    """
    from rayrec.bench.flops import table

    settings = [*SETTINGS, f"train.workers={workers}"]
    commands = {"ray": ["-c", _RAY], "torchrun": torchrun("rayrec.bench.torchrun", workers)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        step(f"making a dataset of {events} events")
        dataset = make_dataset(Path(folder) / "dataset", events, IMAGE_SIZE).path
        for round_ in range(rounds):
            for name in list(commands)[:: 1 if round_ % 2 == 0 else -1]:  # neither is always the first of a round
                words = [sys.executable, *commands[name], dataset, *settings]
                found[name].append(figures(*_watched(words), workers))
                step(f"round {round_ + 1}: {describe(name, found[name][-1])}")
        arithmetic = json.loads(_watched([sys.executable, "-c", _FLOPS, dataset, *settings])[0])
    result: dict[str, Any] = {"bench": "train", "events": events, "workers": workers}
    result |= {"cpus": os.cpu_count(), "epochs": EPOCHS, "rounds": found, **compared(found), "arithmetic": arithmetic}
    for name, one in result["median"].items():
        step(f"median:  {describe(name, one)}")
    low, high = result["ratio_range"]
    step(
        f"Ray Train / torchrun {result['ratio']:.3f} of the rows a second (rounds {low:.3f} to {high:.3f}; first epoch "
        f"{result['first_epoch_ratio']:.3f})"
    )
    step(table(arithmetic))
    return result


def compared(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides; the median of the rounds' ratios and between which they lie."""
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()
    }

    def ratios(key: str) -> list[float]:
        return [ours[key] / theirs[key] for ours, theirs in zip(found["ray"], found["torchrun"], strict=True)]

    later, first = ratios("rows_per_s"), ratios("first_epoch_rows_per_s")
    return {
        "median": medians,
        "ratio": round(statistics.median(later), 3),
        "ratio_range": [round(min(later), 3), round(max(later), 3)],
        "first_epoch_ratio": round(statistics.median(first), 3),
    }


def describe(name: str, one: dict[str, float]) -> str:
    """One run, or the median, in a line."""
    return (
        f"{name:<9}{one['rows_per_s']:7.0f} rows/s, {100 * one['wait_share']:4.1f}% waiting; first step after "
        f"{one['first_step_s']:.1f} s; first epoch {one['first_epoch_rows_per_s']:.0f} rows/s"
    )


def figures(said: str, first_epoch_s: float, workers: int) -> dict[str, float]:
    """Rows a second and share of waiting, of the first epoch and of all later ones together.

    said: what a run printed, its epochs by the first worker last. first_epoch_s: when the first of them was told.
    """
    lines: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
    first, later = lines[0], lines[1:]
    seconds = sum(line["seconds"] for line in later)
    return {
        "rows_per_s": workers * sum(line["samples"] for line in later) / seconds,
        "wait_share": sum(line["wait_s"] for line in later) / seconds,
        "first_epoch_rows_per_s": workers * first["samples"] / first["seconds"],
        "first_epoch_wait_share": first["wait_s"] / first["seconds"],
        "first_step_s": first_epoch_s - first["seconds"],
    }


def _watched(command: Sequence[str]) -> tuple[str, float]:
    """Run a command: what it printed, and how long after its start it told of its first epoch.

    Raises RuntimeError if it fails.
    """
    began = time.monotonic()
    said: list[str] = []
    lines, first_epoch_s = [], float("nan")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        reader = threading.Thread(target=lambda: said.append(running.stdout.read()))  # type: ignore[union-attr]
        reader.start()
        for line in running.stderr:
            lines.append(line)
            if line.startswith(FIRST_EPOCH):
                first_epoch_s = time.monotonic() - began
        reader.join()
    if running.returncode:
        told = "".join(lines[-20:])
        raise RuntimeError(f"{' '.join(command[:4])} failed with exit code {running.returncode}: {told}")
    return said[0], first_epoch_s
