"""`rayrec bench prepare`: our prepare against a plain pandas script that does the same cleaning in one process.

In: how many events, how many rounds. Out: seconds and peak memory of both, from interleaved runs, each in a process of
its own from start to finish (imports and the start of Ray included). It must not know how either cleans.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from rayrec.bench.measure import Measured, measured
from rayrec.progress import step

EVENTS_PER_USER = 20
N_ITEMS = 20_000
BLOCK_EVENTS = 1_000_000

_PANDAS = """
import json, sys
from rayrec.bench.prepare_pandas import prepare
print(json.dumps(prepare(sys.argv[1], sys.argv[2])))
"""


def run(events: int, rounds: int) -> dict[str, Any]:
    """Run both `rounds` times in turn on the same log of `events` rows; prints and answers the medians.

    Raises RuntimeError if the two do not keep the same number of rows.
    """
    runs: dict[str, list[Measured]] = {"rayrec": [], "pandas": []}
    kept: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        raw = Path(folder) / "raw"
        step(f"writing {events} events")
        write_log(raw, events)
        for round_ in range(rounds):
            for name, command in (("rayrec", ["-m", "rayrec", "prepare"]), ("pandas", ["-c", _PANDAS])):
                out = str(Path(folder) / f"{name}-{round_}")
                one = measured([sys.executable, *command, str(raw), out, "--json"])
                runs[name].append(one)
                answer = json.loads(one.output.splitlines()[-1])
                kept[name] = {what: answer.get("events", answer)[what] for what in ("kept", "collapsed")}
                cost = f"{one.wall_s:7.1f} s, of CPU {one.cpu_s:7.1f} s, {one.peak_mib:6.0f} MiB"
                step(f"round {round_ + 1}: {name} {cost}")
            if kept["rayrec"] != kept["pandas"]:
                raise RuntimeError(f"the two do not agree: {kept}")
    median_s = {name: statistics.median(one.wall_s for one in each) for name, each in runs.items()}
    cpu_s = {name: statistics.median(one.cpu_s for one in each) for name, each in runs.items()}
    ratio = median_s["rayrec"] / median_s["pandas"]
    step(f"{events} events: rayrec {median_s['rayrec']:.1f} s, pandas {median_s['pandas']:.1f} s, ratio {ratio:.2f}")
    return {
        "bench": "prepare",
        "events": events,
        "cpus": os.cpu_count(),
        "median_s": median_s,
        "cpu_s": cpu_s,
        "ratio": round(ratio, 3),
        "peak_pss_mib": {name: max(one.peak_mib for one in each) for name, each in runs.items()},
        "kept": kept["rayrec"],
        "runs": {name: [one.figures() for one in each] for name, each in runs.items()},
    }


def write_log(raw: Path, events: int) -> None:
    """Write `raw/events.csv`: views to purchases of a heavy-tailed catalogue, and one row in a hundred is dirty."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (raw / "events.csv").open("wb") as stream:
        for start in range(0, events, BLOCK_EVENTS):
            block = _some_events(min(BLOCK_EVENTS, events - start), max(1, events // EVENTS_PER_USER), rng)
            options = pacsv.WriteOptions(include_header=start == 0, quoting_style="none")
            pacsv.write_csv(block, stream, options)


def _some_events(n: int, n_users: int, rng: np.random.Generator) -> pa.Table:
    actions = np.array(["pv", "cart", "fav", "buy", "cancel"], object)
    columns: dict[str, Any] = {
        "user_id": pa.array([f"u{user:08d}" for user in rng.integers(0, n_users, n).tolist()]),
        "item_id": pa.array([f"{item:06d}" for item in np.minimum(rng.pareto(1.1, n) * 40, N_ITEMS - 1).astype(int)]),
        "timestamp": pa.array(rng.integers(1_700_000_000, 1_708_000_000, n).astype(str)),
        "action": pa.array(rng.choice(actions, n, p=[0.8, 0.08, 0.04, 0.075, 0.005])),
        "price": pa.array(np.round(rng.gamma(2, 20, n), 2)).cast(pa.string()),
        "quantity": pa.array(rng.integers(1, 4, n).astype(str)),
    }
    dirt = {"user_id": "", "item_id": "", "timestamp": "yesterday", "action": "dance", "price": "-1.0"}
    for name, bad in dirt.items():
        columns[name] = pa.array(np.where(rng.random(n) < 0.001, bad, columns[name].to_numpy(zero_copy_only=False)))
    table = pa.table(columns)
    repeats = rng.integers(0, max(1, n - n // 200), n // 200)
    return pa.concat_tables([table.slice(0, n - len(repeats)), table.take(repeats)])
