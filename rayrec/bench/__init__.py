"""Comparisons with a plain way of doing the same, measured side by side on this machine. Nothing is imported early."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def _bench(module: str) -> Callable[[int, int], dict[str, Any]]:
    def run(events: int, rounds: int) -> dict[str, Any]:
        result: dict[str, Any] = import_module(f"rayrec.bench.{module}").run(events, rounds)
        return result

    return run


BENCHES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "prepare": _bench("prepare"),
    "train": _bench("training"),
    "images": _bench("pictures"),
}
"""What `rayrec bench NAME` runs: events and rounds in, figures out."""
