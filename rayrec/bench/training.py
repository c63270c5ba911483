"""`rayrec bench train`: one worker of Ray Train, fed by Ray Data, against the same loop in plain torch.

In: how many events, how many rounds. Out: rows a second of both, and how long the worker waits for data. Each run is
a process of its own, in turn and in changing order, with the same threads and settings of the allocator. What is
compared is the epoch loop: start, validation and checkpoints are outside on both sides.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rayrec.bench.dataset_made import make_dataset
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
)

# Ray gives its workers a low priority; with it whatever else the machine does would count against one side alone.
ENVIRONMENT = {**ALLOCATOR, "RAY_worker_niceness": "0"}

_BEGIN = """
import json, sys
from pathlib import Path
from rayrec.config import preset
from rayrec.settings import with_settings
config = with_settings(preset("small"), [*sys.argv[3:], "train.valid_users=100"])
"""
_RAY = f"""{_BEGIN}
from rayrec.training.trainer import train
bundle = train(sys.argv[1], sys.argv[2], config, publish=False)
print(json.dumps(bundle.json("metrics.json")["training"]))
"""
_PLAIN = f"""{_BEGIN}
import torch
from rayrec.data.dataset import Dataset
from rayrec.training.local import train_alone
from rayrec.training.workers import cores
torch.set_num_threads(cores())
Path(sys.argv[2]).mkdir()
print(json.dumps(train_alone(Dataset.open(sys.argv[1]), config, Path(sys.argv[2])).history))
"""


def run(events: int, rounds: int) -> dict[str, Any]:
    """Train both ways `rounds` times in turn on the same dataset; prints and answers medians and ratios.

    The first epoch is told apart: it streams the rows that the next ones keep.
    """
    found: dict[str, list[dict[str, float]]] = {"ray": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        step(f"making a dataset of {events} events")
        dataset = make_dataset(Path(folder) / "dataset", events, IMAGE_SIZE)
        for round_ in range(rounds):
            sides = [("ray", _RAY), ("plain", _PLAIN)]
            for name, code in sides if round_ % 2 == 0 else sides[::-1]:  # neither is always the first of a round
                lines = _train(code, dataset.path, f"{folder}/{name}-{round_}")
                found[name].append(figures(lines))
                step(f"round {round_ + 1}: {describe(name, found[name][-1])}")
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()
    }
    ratio = medians["ray"]["rows_per_s"] / medians["plain"]["rows_per_s"]
    first = medians["ray"]["first_epoch_rows_per_s"] / medians["plain"]["first_epoch_rows_per_s"]
    wait = medians["ray"]["wait_share"]
    for name, one in medians.items():
        step(f"median:  {describe(name, one)}")
    step(
        f"Ray Train / plain torch {ratio:.3f} (first epoch {first:.3f}); waiting for data {100 * wait:.1f}% of the time"
    )
    return {
        "bench": "train",
        "events": events,
        "cpus": os.cpu_count(),
        "epochs": EPOCHS,
        "rounds": found,
        "median": medians,
        "ratio": round(ratio, 3),
        "first_epoch_ratio": round(first, 3),
        "wait_share": round(wait, 4),
    }


def describe(name: str, one: dict[str, float]) -> str:
    """One run, or the median, in a line."""
    return (
        f"{name:<6}{one['rows_per_s']:7.0f} rows/s, {100 * one['wait_share']:4.1f}% waiting; "
        f"first epoch {one['first_epoch_rows_per_s']:.0f} rows/s"
    )


def figures(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Rows a second and share of waiting, of the first epoch and of all later ones together."""
    first, later = lines[0], lines[1:]
    seconds = sum(line["seconds"] for line in later)
    return {
        "rows_per_s": sum(line["samples"] for line in later) / seconds,
        "wait_share": sum(line["wait_s"] for line in later) / seconds,
        "first_epoch_rows_per_s": first["samples"] / first["seconds"],
        "first_epoch_wait_share": first["wait_s"] / first["seconds"],
    }


def _train(code: str, dataset: str, out: str) -> list[dict[str, Any]]:
    """One training in a process of its own: a line for each epoch."""
    command = [sys.executable, "-c", code, dataset, out, *SETTINGS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}, check=False)
    if done.returncode:
        raise RuntimeError(f"the training in {out} failed with exit code {done.returncode}")
    lines: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return lines
