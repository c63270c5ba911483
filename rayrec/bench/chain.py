"""`rayrec bench chain`: sample, prepare, train and evaluate on many events, and what each of them costs.

In: how many events, a folder. Out: seconds, CPU seconds and peak memory of each command, in a process of its own. It
trains one epoch of a small model: the question is whether the data has to fit into memory, not how good the model is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rayrec.bench.kept import kept_body
from rayrec.bench.measure import measured
from rayrec.progress import step

EVENTS_PER_USER = 20
N_ITEMS = 20_000
ASKED = 5_000
"""Visitors to evaluate on: to ask about all of them says nothing more, and takes hours where they are millions."""
SETTINGS = (
    "train.epochs=1",
    "train.fusion_epochs=0",
    "train.refit_epochs=0",
    "train.batch_size=256",
    "train.negatives=256",
    "train.tracker=[]",
    "model.use_image=false",
    "model.width=16",
    "model.hidden_width=16",
)


def run(events: int, out: Path, settings: list[str]) -> dict[str, Any]:
    """Run all four commands in `out`; prints and answers what each took. Those that `out` has are not run again."""
    users = max(1, events // EVENTS_PER_USER)
    raw, dataset, bundles = (str(out / name) for name in ("raw", "dataset", "bundles"))
    chosen = [word for one in (*SETTINGS, *settings) for word in ("--set", one)]
    commands: dict[str, list[str]] = {
        "sample": [raw, "--users", str(users), "--items", str(N_ITEMS), "--events", str(events)],
        "prepare": [raw, dataset],
        "train": [dataset, bundles, *chosen],
        "evaluate": [bundles, dataset, "--users", str(ASKED)],
    }
    made = {"sample": raw, "prepare": dataset, "train": bundles}
    steps: dict[str, dict[str, Any]] = {}
    for name, words in commands.items():

        def measure(name: str = name, words: list[str] = words) -> dict[str, Any]:
            if name in made:
                shutil.rmtree(made[name], ignore_errors=True)  # what was begun and not measured to its end
            one = measured([sys.executable, "-m", "rayrec", name, *words, "--json"])
            return {**one.figures(), "said": _said(name, json.loads(one.output.splitlines()[-1]))}

        steps[name] = kept_body(out / "runs", name, [events, words], 0, measure)
        one = steps[name]
        step(f"{name:<9}{one['wall_s']:8.0f} s, of CPU {one['cpu_s']:7.0f} s, peak {one['peak_mib']:6.0f} MiB")
    return {"bench": "chain", "events": events, "users": users, "items": N_ITEMS, "cpus": os.cpu_count(), **steps}


def _said(name: str, answer: dict[str, Any]) -> Any:
    """Of what a command answered, what shows that it did all of its work."""
    if name == "train":
        return [
            {key: line[key] for key in ("stage", "samples", "loss", "samples_per_s")} for line in answer["training"]
        ]
    picked = {"sample": "rows", "prepare": "events", "evaluate": "next"}[name]
    found = answer[picked]
    return {key: value for key, value in found.items() if key != "files"} if isinstance(found, dict) else found
