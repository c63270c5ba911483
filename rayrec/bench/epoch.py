"""`rayrec bench epoch`: how many events a second rayrec and the sequence models of other libraries learn from.

In: a dataset, rounds, a folder. Out: medians and ratios, of one epoch. All see ids alone, as wide and with
histories as long, with the same threads and settings of the allocator; each as its own command or library trains, in
turn and in changing order. Peers learn by the softmax over all items; so does rayrec, and a second time by one over
sampled items, which is what it has for many. An event counts where the model has to tell it from those before. Where
the machine is shared, ratios of CPU seconds are the ones to go by.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rayrec.bench.first_stage import batches
from rayrec.bench.kept import kept_body
from rayrec.bench.measure import measured
from rayrec.bench.peer_runs import PEERS, Settings, run_peer
from rayrec.config import Config, preset
from rayrec.data.dataset import Dataset
from rayrec.progress import step
from rayrec.settings import with_settings
from rayrec.training.trainer import ALLOCATOR

WIDTH, LENGTH = 64, 50
EPOCHS = 2
"""The last one counts: in the first, rows stream through Ray Data for the later ones."""
OURS = (
    "model.use_image=false",
    "model.use_attributes=false",
    f"model.width={WIDTH}",
    f"model.max_len={LENGTH}",
    f"train.epochs={EPOCHS}",
    "train.fusion_epochs=0",
    "train.refit_epochs=0",
    "train.tracker=[]",
    "train.valid_users=100",
)
WAYS = {"rayrec": "train.full_softmax_below=100000000", "rayrec-sampled": "train.negatives=1024"}
"""By name of the row: how the softmax is taken."""
THEIRS: dict[str, tuple[str, Settings]] = {
    "recbole-gru4rec": (
        "recbole-gru4rec",
        {"model": "GRU4Rec", "embedding_size": WIDTH, "MAX_ITEM_LIST_LENGTH": LENGTH, "epochs": 1},
    ),
    "rectools-sasrec": (
        "rectools-sasrec",
        {"n_factors": WIDTH, "session_max_len": LENGTH, "lr": 1e-3, "epochs": EPOCHS},
    ),
    "rectools-sasrec-200": (
        "rectools-sasrec",
        {"n_factors": WIDTH, "session_max_len": 4 * LENGTH, "lr": 1e-3, "epochs": EPOCHS},
    ),
}
"""By name of the row: a peer, and its settings. RecTools leaves out of a training what is before so many newest events;
the last one learns from more of them. RecBole's one epoch takes longer than all others together."""


def run(path: str, out: Path, rounds: int, settings: list[str]) -> dict[str, Any]:
    """Train all of them `rounds` times; prints and answers events a second. Goes on where it was stopped."""
    dataset = Dataset.open(path)
    ours = {name: [*OURS, way, *settings] for name, way in WAYS.items()}
    configs = {name: with_settings(preset("small"), chosen) for name, chosen in ours.items()}
    os.environ.update(ALLOCATOR)  # of the peers' processes; our command gives it to its workers by itself
    names = [*WAYS, *THEIRS]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:

            def make(name: str = name, seed: int = round_) -> dict[str, float]:
                if name in WAYS:
                    return _ours(dataset, configs[name], ours[name])
                return _theirs(name, dataset, out, seed)

            key = [dataset.fingerprint(), configs[name].model_dump(mode="json") if name in WAYS else THEIRS[name][1]]
            found[name].append(kept_body(out / "runs", f"epoch-{name}", key, round_, make))
            step(f"round {round_ + 1}: {describe(name, found[name][-1])}")
    rows = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    ratios = {us: {it: _ratios(found[us], found[it]) for it in THEIRS} for us in WAYS}
    for name, row in rows.items():
        times = [f"{us} {ratios[us][name]['events_per_cpu_s']:.2f} times as many" for us in WAYS if name in THEIRS]
        step(f"median:  {describe(name, row)}{'; by CPU ' if times else ''}{', '.join(times)}")
    return {"bench": "epoch", "cpus": os.cpu_count(), "rounds": found, "median": rows, "ratio": ratios}


def _ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the rounds' ratios."""
    return {
        key: round(statistics.median(us[key] / it[key] for us, it in zip(ours, theirs, strict=True)), 2)
        for key in ("events_per_s", "events_per_cpu_s")
    }


def describe(name: str, one: dict[str, float]) -> str:
    """One run, or the median, in a line."""
    return (
        f"{name:<20}{one['events_per_s']:8.0f} events/s, {one['events_per_cpu_s']:8.0f} a CPU second; "
        f"an epoch tells {one['events']:.0f}"
    )


def _ours(dataset: Dataset, config: Config, settings: list[str]) -> dict[str, float]:
    """`rayrec train`, as a user types it."""
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        chosen = [word for one in settings for word in ("--set", one)]
        command = [sys.executable, "-m", "rayrec", "train", dataset.path, f"{folder}/bundles", *chosen, "--json"]
        *_, before, last = json.loads(measured(command).output.splitlines()[-1])["training"]
    # CPU seconds with those of the validation, which is kept small.
    return _pace(targets(dataset, config), last["seconds"], last["cpu_s"] - before["cpu_s"])


def targets(dataset: Dataset, config: Config) -> int:
    """How many events an epoch of the first stage has to tell."""
    drawn = batches(dataset.sequences(), dataset.clock, config)
    return sum(int((batch.target_BL > 0).sum()) for batch in drawn)


def _theirs(name: str, dataset: Dataset, out: Path, seed: int) -> dict[str, float]:
    """A peer's own training, without a limit of minutes."""
    peer, chosen = THEIRS[name]
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        settings = {**chosen, "seed": seed, "minutes": 0}
        log = out / "logs" / f"epoch-{name}-{seed}.log"
        _, cost = run_peer(PEERS[peer], dataset, dataset.sequences(), settings, out / "environments", Path(folder), log)
    return _pace(*cost["paces"][-1])


def _pace(events: float, seconds: float, cpu_s: float) -> dict[str, float]:
    return {"events": events, "events_per_s": events / seconds, "events_per_cpu_s": events / cpu_s}
