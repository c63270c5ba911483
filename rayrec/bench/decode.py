"""`rayrec bench decode`: the pictures of a catalogue through prepare, against the same function in one plain process.

In: how many pictures, how many rounds. Out: pictures a second of both. A prepare of the same shop without pictures is
timed as well, and taken off: what it costs to start Ray and to read the log is not the pictures'.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from PIL import Image

from rayrec.bench.measure import measured
from rayrec.progress import step

SIDE = 512
"""Pixels of a picture's side, as shops have them."""
COARSE = 32
EVENTS_AN_ITEM = 5

_PLAIN = """
import json, sys, time
from pathlib import Path
from rayrec.config import ImageConfig
from rayrec.data.images import decode
paths, config = sorted(Path(sys.argv[1]).iterdir()), ImageConfig()
began = time.perf_counter()
for path in paths:
    decode(path.read_bytes(), config)
print(json.dumps({"pictures": len(paths), "seconds": time.perf_counter() - began}))
"""


def run(pictures: int, rounds: int) -> dict[str, Any]:
    """Decode them both ways `rounds` times in turn; prints and answers medians.

    Raises RuntimeError where prepare does not keep them all.
    """
    found: dict[str, list[float]] = {"rayrec": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        step(f"painting {pictures} pictures")
        with_, without = (write_shop(Path(folder) / name, pictures, n) for name, n in (("a", pictures), ("b", 0)))
        for round_ in range(rounds):
            seconds = {}
            for raw, kept in ((with_, pictures), (without, 0)):
                command = [sys.executable, "-m", "rayrec", "prepare", str(raw), f"{raw}-{round_}", "--json"]
                one = measured(command)
                seconds[kept] = one.wall_s
                if (said := json.loads(one.output.splitlines()[-1])["images"]["kept"]) != kept:
                    raise RuntimeError(f"prepare kept {said} of {kept} pictures")
            found["rayrec"].append(pictures / (seconds[pictures] - seconds[0]))
            found["plain"].append(_plain(with_ / "images"))
            step(f"round {round_ + 1}: prepare {found['rayrec'][-1]:.0f} pictures/s, plain {found['plain'][-1]:.0f}")
    ratios = [ours / plain for ours, plain in zip(found["rayrec"], found["plain"], strict=True)]
    median = {name: statistics.median(rates) for name, rates in found.items()}
    ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
    step(
        f"{pictures} pictures of {SIDE}x{SIDE}: prepare {median['rayrec']:.0f} a second, a plain process "
        f"{median['plain']:.0f}; {ratio:.2f} times ({low:.2f} to {high:.2f})"
    )
    return {
        "bench": "decode",
        "pictures": pictures,
        "cpus": os.cpu_count(),
        "rounds": found,
        "pictures_per_s": median,
        "ratio": round(ratio, 2),
    }


def _plain(folder: Path) -> float:
    command = [sys.executable, "-c", _PLAIN, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout)
    return float(said["pictures"] / said["seconds"])


def write_shop(raw: Path, items: int, pictures: int) -> Path:
    """A raw folder: a log of `items` items, and pictures of the first so many. Smooth ones, as photographs are."""
    rng = np.random.default_rng(0)
    (raw / "images").mkdir(parents=True)
    n = items * EVENTS_AN_ITEM
    log = {
        "user_id": pa.array([f"u{user}" for user in rng.integers(0, max(1, n // 20), n).tolist()]),
        "item_id": pa.array([f"i{item:06d}" for item in rng.permutation(np.repeat(np.arange(items), EVENTS_AN_ITEM))]),
        "action": pa.array(["view"] * n),
        "timestamp": pa.array(1_700_000_000 + np.sort(rng.integers(0, 30 * 86_400, n))),
    }
    pacsv.write_csv(pa.table(log), raw / "events.csv")
    for item in range(pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (COARSE, COARSE, 3), np.uint8))
        written = io.BytesIO()
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(written, "JPEG", quality=85)
        (raw / "images" / f"i{item:06d}.jpg").write_bytes(written.getvalue())
    return raw
