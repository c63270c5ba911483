"""Runs that are kept, so that a bench of hours can be stopped and gone on with: JSON for each, and maybe a table.

In: a folder, what names a run, how to make it. Out: the run, from its files if they are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Made = tuple[dict[str, Any], pa.Table]


def kept(folder: Path, name: str, key: Any, seed: int, make: Callable[[], Made]) -> Made:
    """The run `name` with what `key` says (JSON) and `seed`: its body and answers. The body is written last."""
    stem = _stem(folder, name, key, seed)
    if not stem.with_suffix(".json").exists():
        body, answers = make()
        pq.write_table(answers, stem.with_suffix(".parquet"), compression="zstd")
        stem.with_suffix(".json").write_text(json.dumps(body, indent=1) + "\n")
    return json.loads(stem.with_suffix(".json").read_text()), pq.read_table(stem.with_suffix(".parquet"))


def kept_body(folder: Path, name: str, key: Any, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """As `kept`, of a run that has no answers to keep."""
    file = _stem(folder, name, key, seed).with_suffix(".json")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(make(), indent=1) + "\n")
        part.replace(file)
    body: dict[str, Any] = json.loads(file.read_text())
    return body


def _stem(folder: Path, name: str, key: Any, seed: int) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{name}-{digest}-{seed}"
