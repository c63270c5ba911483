"""`rayrec bench prepare`: our prepare against a plain pandas script that does the same cleaning in one process.

In: how many events, how many rounds. Out: seconds and peak memory of both, from interleaved runs, each in a process of
its own from start to finish (imports and the start of Ray included). It must not know how either cleans.
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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from rayrec.progress import step

EVENTS_PER_USER = 20
N_ITEMS = 20_000
BLOCK_EVENTS = 1_000_000
SAMPLE_EVERY_S = 0.25

_OURS = """
import json, sys
from rayrec.config import PrepareConfig
from rayrec.data.pipelines import prepare
report = prepare(sys.argv[1], sys.argv[2], PrepareConfig())
print(json.dumps({"kept": report["events"]["kept"], "collapsed": report["events"]["collapsed"]}))
"""
_PANDAS = """
import json, sys
from rayrec.bench.prepare_pandas import prepare
print(json.dumps(prepare(sys.argv[1], sys.argv[2])))
"""


def run(events: int, rounds: int) -> dict[str, Any]:
    """Run both `rounds` times in turn on the same log of `events` rows; prints and answers the medians.

    Raises RuntimeError if the two do not keep the same number of rows.
    """
    seconds: dict[str, list[float]] = {"rayrec": [], "pandas": []}
    peak_mib: dict[str, list[float]] = {"rayrec": [], "pandas": []}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        raw = Path(folder) / "raw"
        step(f"writing {events} events")
        write_log(raw, events)
        for round_ in range(rounds):
            kept = {}
            for name, code in (("rayrec", _OURS), ("pandas", _PANDAS)):
                out = Path(folder) / f"{name}-{round_}"
                took_s, mib, kept[name] = _measured([sys.executable, "-c", code, str(raw), str(out)])
                seconds[name].append(round(took_s, 2))
                peak_mib[name].append(round(mib))
                step(f"round {round_ + 1}: {name:<6} {took_s:7.1f} s {mib:7.0f} MiB")
            if kept["rayrec"] != kept["pandas"]:
                raise RuntimeError(f"the two do not agree: {kept}")
    median_s = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = median_s["rayrec"] / median_s["pandas"]
    step(f"{events} events: rayrec {median_s['rayrec']:.1f} s, pandas {median_s['pandas']:.1f} s, ratio {ratio:.2f}")
    return {
        "bench": "prepare",
        "events": events,
        "cpus": os.cpu_count(),
        "seconds": seconds,
        "median_s": median_s,
        "ratio": round(ratio, 3),
        "peak_pss_mib": {name: max(values) for name, values in peak_mib.items()},
        "kept": kept["rayrec"],
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


# ---------------------------------------------------------------- measuring


def _measured(command: list[str]) -> tuple[float, float, dict[str, int]]:
    """Seconds, peak PSS in MiB of the process and all its descendants, and the last line it printed, as JSON."""
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_kib = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak_kib
        while not done.wait(SAMPLE_EVERY_S):
            peak_kib = max(peak_kib, sum(_pss_kib(pid) for pid in _family(child.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output, _ = child.communicate()
    finally:
        done.set()
        watcher.join()
        child.kill()
    if child.returncode:
        raise RuntimeError(f"{command[2][:40]}... failed with exit code {child.returncode}")
    return time.monotonic() - started, peak_kib / 1024, json.loads(output.splitlines()[-1])


def _family(root: int) -> set[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    family, waiting = set(), [root]
    while waiting:
        pid = waiting.pop()
        family.add(pid)
        waiting += children.get(pid, [])
    return family


def _pss_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
