"""The report: one HTML file that opens anywhere, without the network.

In: the body of `evaluate`, and facts to show beside it. Out: a file. It must not know how anything was measured.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rayrec.errors import UsageError
from rayrec.evaluation.metrics import Figures
from rayrec.evaluation.table import caveats

COLOURS = {"model": "#2457d6", "markov": "#e08a1e", "popular": "#8a8f98", "chosen": "#1d9a6c"}
LABELS = {"model": "model", "markov": "Markov floor", "popular": "popularity floor", "chosen": "what users chose"}
COLUMNS = {
    "hr@10": "HR@10",
    "ndcg@10": "NDCG@10",
    "recall@20": "Recall@20",
    "mrr@10": "MRR@10",
    "coverage@10": "Coverage@10",
    "diversity@10": "Diversity@10",
    "popularity@10": "Popularity@10",
}
COMPARED = ("hr@10", "ndcg@10", "recall@20", "mrr@10")
"""Columns in which more is better, whatever the shop wants."""
PROTOCOL_TEXT = {
    "metrics": ("The next new item", "among the items the user has not met yet; seen ones are masked"),
    "next": ("The next item", "whatever it is, among all items; nothing is masked"),
    "cart": ("The next item put into the cart", "given all events before it, among all items; nothing is masked"),
    "purchase": ("The next purchase", "given all events before it, among all items; nothing is masked"),
    "cold": ("The next new item, where it has no training event", "among such items; seen ones are masked"),
}
SLICE_TEXT = {
    "new_items": "right item has no training event",
    "cold_items": "right item has fewer than 5 training events",
    "warm_items": "right item has 5 or more training events",
    "cold_users": "fewer than 5 events before",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and it follows the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ac",
    "axes.labelcolor": "#4a505a",
    "xtick.color": "#4a505a",
    "ytick.color": "#4a505a",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e8ec",
    "axes.axisbelow": True,
}


def write_report(result: dict[str, Any], path: Path, facts: dict[str, Any], *, now: datetime | None = None) -> None:
    """Write `result` (of `evaluate`) as HTML to `path`, whole or not at all.

    facts: shown as tables: a dictionary under its name, other values together under "run".
    Raises UsageError if the file cannot be written.
    """
    text = render(result, facts, now or datetime.now(timezone.utc))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: the report cannot be written there ({error.strerror})") from None


def render(result: dict[str, Any], facts: dict[str, Any], now: datetime) -> str:
    """The report as HTML text."""
    environment = Environment(
        loader=PackageLoader("rayrec.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["figure"] = figure_text
    return environment.get_template("report.html").render(
        result=result,
        verdict=verdict(result),
        caveats=caveats(result),
        protocols=[(name, *text, table(result, name)) for name, text in PROTOCOL_TEXT.items() if name in result],
        pointwise=[(label, body) for _, label, body in rankers(result, "pointwise")],
        slices=[(name.replace("_", " "), SLICE_TEXT.get(name, ""), body) for name, body in result["slices"].items()],
        columns=list(COLUMNS.values()),
        labels=LABELS,
        plots=plots(result),
        facts=grouped({**facts, "settings": result["settings"]}),
        date=now.strftime("%Y-%m-%d %H:%M %Z"),
    )


def figure_text(value: float | None) -> str:
    """A figure for people: four digits after the point, a dash for none."""
    return "–" if value is None else f"{value:.4f}"


def rankers(result: dict[str, Any], protocol: str) -> list[tuple[str, str, Figures]]:
    """Name, label and figures of the model and the floors under a protocol."""
    if protocol not in result:
        return []
    floors = {name: body if protocol == "metrics" else body[protocol] for name, body in result["floors"].items()}
    bodies = {"model": result[protocol], **floors}
    return [(name, LABELS[name], body) for name, body in bodies.items()]


def table(result: dict[str, Any], protocol: str) -> list[tuple[str, list[tuple[str, bool]], str]]:
    """Rows of a protocol's table: label, its cells and whether each is the column's best, the 95% interval."""
    found = rankers(result, protocol)
    rows = []
    for _, label, body in found:
        cells = []
        for column in COLUMNS:
            values = [other[column] for _, _, other in found if other[column] is not None]
            best = column in COMPARED and bool(values) and body[column] == max(values) > 0
            cells.append((figure_text(body[column]), best))
        interval = body["ndcg@10_95"]
        rows.append((label, cells, "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"))
    return rows


def verdict(result: dict[str, Any]) -> str:
    """The first line anyone should read: the model against the better floor."""
    found = {name: body["ndcg@10"] for name, _, body in rankers(result, "metrics")}
    model = found.pop("model", None)
    floors = {name: value for name, value in found.items() if value is not None}
    if model is None:
        return "Nobody could be asked for the next new item: there is nothing to compare."
    share = f"The right item is among the first ten for {result['metrics']['hr@10']:.1%} of users"
    if not floors:
        return f"{share}; no floor was measured beside it."
    best = max(floors, key=lambda name: floors[name])
    low, high = result["metrics"]["ndcg@10_95"]
    if floors[best] < low:
        word = "beats"
    elif floors[best] > high:
        word = "loses to"
    else:
        word = "cannot be told from"
    return f"{share}. By NDCG@10 the model ({model:.4f}) {word} the {LABELS[best]} ({floors[best]:.4f})."


def grouped(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts as titled lists of name and text."""
    loose = {name: value for name, value in facts.items() if not isinstance(value, dict)}
    groups = {"run": loose, **{name: value for name, value in facts.items() if isinstance(value, dict)}}
    return [(title, [(str(k), fact_text(v)) for k, v in group.items()]) for title, group in groups.items() if group]


def fact_text(value: Any) -> str:
    """A fact for people: thousands set apart, lists joined."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {fact_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact_text(part) for part in value)
    return str(value)


# ---------------------------------------------------------------- plots


def plots(result: dict[str, Any]) -> list[tuple[str, str, Markup]]:
    """Title, explanation and SVG of each plot that there are figures for."""
    if not result["detail"] or not result["metrics"]["users"]:
        return []
    drawn = [
        ("Hit rate by length of list", "share of users whose right item is among the first k", _draw_hits),
        ("Where the right item stood", "share of users by rank, each step twice as wide", _draw_ranks),
        ("NDCG@10 by length of history", "events before the right item", _draw_history),
        (
            "What is shown, by popularity",
            "share of shown items from each tenth of the catalogue, the best known on the right",
            _draw_exposure,
        ),
    ]
    return [(title, text, svg(title, partial(draw, result))) for title, text, draw in drawn]


def svg(title: str, draw: Callable[[Axes], None]) -> Markup:
    """One plot as an inline SVG element."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):  # ids: fixed, and apart from other plots'
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.legend(frameon=False, fontsize=9)
        out = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])  # drawn here, from numbers and fixed labels


def _lines(axes: Axes, x: Sequence[int], series: dict[str, list[float]]) -> None:
    for name, values in series.items():
        style = "--" if name == "chosen" else "-"
        above = 3 if name == "model" else 2
        axes.plot(x, values, style, color=COLOURS[name], label=LABELS[name], marker="o", markersize=3, zorder=above)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)


def _draw_hits(result: dict[str, Any], axes: Axes) -> None:
    series = result["detail"]["hr_at"]
    _lines(axes, range(1, len(series["model"]) + 1), series)
    axes.set_xlabel("k")


def _draw_ranks(result: dict[str, Any], axes: Axes) -> None:
    series = result["detail"]["ranks"]
    bins = len(series["model"])
    _lines(axes, range(bins), series)
    names = ["1", "2", *(f"{2 ** (n - 1) + 1}–{2**n}" for n in range(2, bins))]
    axes.set_xticks(range(bins), names[:bins], rotation=45, ha="right", fontsize=8)
    axes.set_xlabel("rank")


def _draw_history(result: dict[str, Any], axes: Axes) -> None:
    parts = {name: body for name, body in result["slices"].items() if name.startswith("history_") and body["n"]}
    series = {"model": list(parts.values())}
    for floor in result["floors"]:
        series[floor] = [body["floors"][floor] for body in parts.values()]
    width = 0.8 / len(series)
    for n, (name, bodies) in enumerate(series.items()):
        places = [place + (n - (len(series) - 1) / 2) * width for place in range(len(bodies))]
        heights = [body["ndcg@10"] for body in bodies]
        axes.bar(places, heights, width * 0.92, color=COLOURS[name], label=LABELS[name])
    names = [f"{name.removeprefix('history_')}\n(n {body['n']:,})" for name, body in parts.items()]
    axes.set_xticks(range(len(parts)), names)


def _draw_exposure(result: dict[str, Any], axes: Axes) -> None:
    series = result["detail"]["exposure"]
    _lines(axes, range(1, len(series["model"]) + 1), series)
    axes.set_xlabel("tenth of the catalogue by training events")
