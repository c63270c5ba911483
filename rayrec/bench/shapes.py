"""`rayrec bench shapes`: prepare on logs of awkward shapes, and on the same rows in a plain one.

In: how many events, how many rounds, which shapes. Out: seconds and peak memory of each shape, from interleaved runs,
each in a process of its own: a log in many files, the same in one huge file, in one of a single row group and in
thousands of tiny ones; a robot that has most rows (within a day, or over a year, which is no robot by its pace). It
must not know how prepare copes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rayrec.bench.measure import Measured, measured
from rayrec.errors import UsageError
from rayrec.progress import step

N_USERS = 10_000
N_ITEMS = 5_000
MANY, TINY = 20, 5_000
"""Files of a log."""
BEGIN_S, DAY_S, YEAR_S = 1_700_000_000, 86_400, 365 * 86_400


def run(events: int, rounds: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Prepare each shape `rounds` times in turn; prints and answers the medians.

    only: these shapes; all if empty. Raises UsageError for one that is none; RuntimeError if a shape does not keep the
    rows that it must.
    """
    if unknown := sorted(set(only) - set(SHAPES)):
        raise UsageError(f"--only {unknown[0]}: there is no such shape; there are {', '.join(SHAPES)}")
    runs: dict[str, list[Measured]] = {name: [] for name in only or SHAPES}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        table = log(events, np.random.default_rng(0))
        for name in runs:
            step(f"writing {name}")
            SHAPES[name](Path(folder) / name, table)
        sizes = {name: written(Path(folder) / name) for name in runs}
        del table
        for round_ in range(rounds):
            for name in runs:
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
            **sizes[name],
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


def written(folder: Path) -> dict[str, int]:
    """How many files a log is, and the size of the largest."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"files": len(sizes), "largest_bytes": max(sizes)}


def one_file(folder: Path, table: pa.Table) -> None:
    """One CSV file."""
    folder.mkdir(parents=True)
    pacsv.write_csv(table, folder / "events.csv")


def files(n: int) -> Callable[[Path, pa.Table], None]:
    """`n` CSV files of as many rows each."""

    def write(folder: Path, table: pa.Table) -> None:
        (folder / "events").mkdir(parents=True)
        rows = -(-len(table) // n)
        for number, start in enumerate(range(0, len(table), rows)):
            pacsv.write_csv(table.slice(start, rows), folder / "events" / f"part-{number:06d}.csv")

    return write


def robot(span_s: int) -> Callable[[Path, pa.Table], None]:
    """Five rows in six are one visitor's, within `span_s`."""

    def write(folder: Path, table: pa.Table) -> None:
        n = len(table) * 5 // 6
        time = np.linspace(BEGIN_S, BEGIN_S + span_s, n).astype(np.int64).astype(str)
        own = table.slice(0, n).set_column(0, "user_id", pa.array(["robot"] * n)).set_column(2, "timestamp", [time])
        one_file(folder, pa.concat_tables([own, table.slice(n)]))

    return write


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
    "many files": files(MANY),
    "one file": one_file,
    "one group": one_group,
    "tiny files": files(TINY),
    "fast robot": robot(DAY_S),
    "slow robot": robot(YEAR_S),
}
