"""`rayrec bench add`: one day of thirty added to the dataset of the others, against a run over all thirty.

In: how many events, how many rounds. Out: seconds of both, from interleaved runs, each in a process of its own from
start to finish, and what a dataset keeps for it, in bytes. It must not know how either is done.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from rayrec.bench.measure import Measured, measured
from rayrec.bench.prepare import write_log
from rayrec.progress import step

DAYS = 30
PREPARE = [sys.executable, "-m", "rayrec", "prepare"]


def run(events: int, rounds: int) -> dict[str, Any]:
    """Run both `rounds` times in turn over `events` rows; prints and answers the medians.

    Raises RuntimeError if the two do not report the same.
    """
    runs: dict[str, list[Measured]] = {"add": [], "full": []}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as name:
        folder = Path(name)
        step(f"writing {events} events, {DAYS} days")
        write_days(folder / "days", events)
        raw = folder / "raw"
        raw.mkdir()
        *before, newest = sorted((folder / "days").iterdir())
        for file in before:
            shutil.copy2(file, raw)
        measured([*PREPARE, str(raw), str(folder / "before")])
        shutil.copy2(newest, raw)
        for round_ in range(rounds):
            reports = {}
            for way, options in (("add", ["--add"]), ("full", [])):
                dataset = folder / way
                shutil.rmtree(dataset, ignore_errors=True)
                if way == "add":
                    shutil.copytree(folder / "before", dataset)
                one = measured([*PREPARE, str(raw), str(dataset), "--json", *options])
                runs[way].append(one)
                reports[way] = {**json.loads(one.output.splitlines()[-1]), "seconds": 0}
                step(f"round {round_ + 1}: {way} {one.wall_s:.1f} s, of CPU {one.cpu_s:.1f} s")
            if reports["add"] != reports["full"]:
                raise RuntimeError("the two reports differ")
        kept_bytes, all_bytes = (_bytes(folder / "full" / part) for part in ("intake", "."))
    median_s = {way: statistics.median(one.wall_s for one in each) for way, each in runs.items()}
    cpu_s = {way: statistics.median(one.cpu_s for one in each) for way, each in runs.items()}
    ratio, cpu_ratio = (median["add"] / median["full"] for median in (median_s, cpu_s))
    step(
        f"{events} events: add {median_s['add']:.1f} s, full {median_s['full']:.1f} s: {ratio:.2f}; CPU {cpu_ratio:.2f}"
    )
    step(f"kept for it: {kept_bytes / events:.1f} bytes an event of {all_bytes / events:.1f}")
    return {
        "bench": "add",
        "events": events,
        "cpus": os.cpu_count(),
        "median_s": median_s,
        "cpu_s": cpu_s,
        "ratio": round(ratio, 3),
        "cpu_ratio": round(cpu_ratio, 3),
        "bytes_an_event": {"intake": kept_bytes / events, "dataset": all_bytes / events},
        "runs": {way: [one.figures() for one in each] for way, each in runs.items()},
    }


def write_days(folder: Path, events: int) -> None:
    """The log of `rayrec bench prepare`, one file a day; rows without a time are on the first."""
    write_log(folder / "whole", events)
    text = {name: pa.string() for name in ("user_id", "item_id", "timestamp", "action", "price", "quantity")}
    convert = pacsv.ConvertOptions(column_types=text)
    table = pacsv.read_csv(folder / "whole" / "events.csv", convert_options=convert)
    shutil.rmtree(folder / "whole")
    timed = pc.match_substring_regex(table["timestamp"], r"^\d+$")
    seconds = pc.if_else(timed, table["timestamp"], None).cast(pa.int64())
    start, end = pc.min(seconds).as_py(), pc.max(seconds).as_py()
    day = pc.fill_null(pc.divide(pc.multiply(pc.subtract(seconds, start), DAYS), end - start + 1), 0)
    for n in range(DAYS):
        rows = table.filter(pc.equal(day, n))
        pacsv.write_csv(rows, folder / f"events-{n:02d}.csv", pacsv.WriteOptions(quoting_style="none"))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
