"""`rayrec bench shapes`: prepare on logs of awkward shapes, and on the same rows in a plain one.

In: how many events, how many rounds. Out: seconds and peak memory of each shape, from interleaved runs, each in a
process of its own: a robot that has most rows (within a day, or over a year, which is no robot by its pace), thousands
of tiny files, one huge file of a single row group. It must not know how prepare copes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rayrec.bench.measure import Measured, measured
from rayrec.progress import step

N_USERS = 10_000
N_ITEMS = 5_000
TINY_ROWS = 40
BEGIN_S, DAY_S, YEAR_S = 1_700_000_000, 86_400, 365 * 86_400


def run(events: int, rounds: int) -> dict[str, Any]:
    """Prepare each shape `rounds` times in turn; prints and answers the medians.

    Raises RuntimeError if a shape does not keep the rows that it must.
    """
    runs: dict[str, list[Measured]] = {name: [] for name in SHAPES}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        for name, write in SHAPES.items():
            step(f"writing {name}")
            write(Path(folder) / name, log(events, np.random.default_rng(0)))
        for round_ in range(rounds):
            for name in SHAPES:
                out = Path(folder) / "out"
                shutil.rmtree(out, ignore_errors=True)
                one = measured([sys.executable, "-m", "rayrec", "prepare", f"{folder}/{name}", str(out), "--json"])
                runs[name].append(one)
                answer = json.loads(one.output.splitlines()[-1])
                require_whole(name, events, answer)
                cost = f"{one.wall_s:7.1f} s, of CPU {one.cpu_s:6.1f} s, {one.peak_mib:6.0f} MiB"
                step(f"round {round_ + 1}: {name:<12}{cost}")
    figures = {
        name: {
            "wall_s": statistics.median(one.wall_s for one in each),
            "cpu_s": statistics.median(one.cpu_s for one in each),
            "peak_mib": max(one.peak_mib for one in each),
        }
        for name, each in runs.items()
    }
    return {"bench": "shapes", "events": events, "cpus": os.cpu_count(), "shapes": figures}


def require_whole(name: str, events: int, report: dict[str, Any]) -> None:
    """Raise RuntimeError unless every row of a shape was read, and a robot's rows, and no others, went."""
    found = report["events"]
    bots = found["rejected"].get("bot", 0)
    if found["read"] != events or (bots > 0) != (name == "fast robot") or sum(found["rejected"].values()) != bots:
        raise RuntimeError(f"{name}: {events} events became {found}")


def log(n: int, rng: np.random.Generator) -> pa.Table:
    """`n` events of N_USERS visitors over a year, as text."""
    return pa.table(
        {
            "user_id": pa.array([f"u{user:05d}" for user in rng.integers(0, N_USERS, n).tolist()]),
            "item_id": pa.array([f"i{i:04d}" for i in np.minimum(rng.pareto(1.1, n) * 40, N_ITEMS - 1).astype(int)]),
            "timestamp": pa.array(rng.integers(BEGIN_S, BEGIN_S + YEAR_S, n).astype(str)),
            "action": pa.array(rng.choice(np.array(["view", "cart", "purchase"], object), n, p=[0.8, 0.1, 0.1])),
        }
    )


def plain(folder: Path, table: pa.Table) -> None:
    """One CSV file."""
    folder.mkdir(parents=True)
    pacsv.write_csv(table, folder / "events.csv")


def robot(span_s: int) -> Callable[[Path, pa.Table], None]:
    """Five rows in six are one visitor's, within `span_s`."""

    def write(folder: Path, table: pa.Table) -> None:
        n = len(table) * 5 // 6
        time = np.linspace(BEGIN_S, BEGIN_S + span_s, n).astype(np.int64).astype(str)
        own = table.slice(0, n).set_column(0, "user_id", pa.array(["robot"] * n)).set_column(2, "timestamp", [time])
        plain(folder, pa.concat_tables([own, table.slice(n)]))

    return write


def tiny_files(folder: Path, table: pa.Table) -> None:
    """TINY_ROWS rows a file."""
    (folder / "events").mkdir(parents=True)
    for n, start in enumerate(range(0, len(table), TINY_ROWS)):
        pacsv.write_csv(table.slice(start, TINY_ROWS), folder / "events" / f"part-{n:06d}.csv")


def one_group(folder: Path, table: pa.Table) -> None:
    """One Parquet file which cannot be cut, for it has a single row group."""
    folder.mkdir(parents=True)
    codes = {name: pc.dictionary_encode(table[name]) for name in ("user_id", "item_id", "action")}
    pq.write_table(
        pa.table({**codes, "timestamp": table["timestamp"].cast(pa.int64())}).select(table.column_names),
        folder / "events.parquet",
        row_group_size=max(1, len(table)),
    )


SHAPES: dict[str, Callable[[Path, pa.Table], None]] = {
    "plain": plain,
    "fast robot": robot(DAY_S),
    "slow robot": robot(YEAR_S),
    "tiny files": tiny_files,
    "one group": one_group,
}
