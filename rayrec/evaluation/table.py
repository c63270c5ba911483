"""An evaluation as a few lines of text. In: the body of `evaluate`. Out: lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {"metrics": "new item", "next": "any item", "cart": "cart", "purchase": "purchase", "cold": "cold item"}
SEVERAL = 0.01
"""Share of the items from which those without a training event are worth a word."""


def table_lines(result: dict[str, Any], oracles: Mapping[str, dict[str, Any]] | None = None) -> list[str]:
    """Every ranker's NDCG@10 and HR@10 in each protocol; `oracles` are figures by protocol, by the oracle's name."""
    rows = {**(oracles or {}), "model": result}
    rows |= {name: {"metrics": floor, **floor} for name, floor in result["floors"].items()}
    sampled = " (a sample)" if result["settings"]["sampled_users"] else ""
    lines = [f"{result['users']} test users{sampled}, {result['items']} items; NDCG@10 (HR@10) of the next"]
    width = max(10, *(len(name) + 1 for name in rows))
    lines.append(" " * width + "".join(f"{title:>18}" for title in COLUMNS.values()))
    for name, body in rows.items():
        cells = [_cell((body or {}).get(protocol, {})) for protocol in COLUMNS]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    return lines + [f"note: {caveat}" for caveat in caveats(result)]


def caveats(result: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know: whether the catalogue is made of its log."""
    catalogue = result["catalogue"]
    if catalogue["cold"] < SEVERAL * result["items"] or catalogue["cold_met_later"] < catalogue["cold"]:
        return []
    return [
        f"all {catalogue['cold']} items without a training event have a later one, as where a catalogue is made of its "
        "log: figures of such items are not those of a shop's new ones"
    ]


def _cell(figures: dict[str, Any]) -> str:
    if figures.get("ndcg@10") is None:
        return "-"
    return f"{figures['ndcg@10']:.4f} ({figures['hr@10']:.4f})"
