"""The runs of `rayrec bench serve` as medians, Markdown and a picture. In: runs. Out: JSON values, text, a PNG."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrec.bench.server_runs import TRIVIAL

US, BARE, ONE_BY_ONE = "rayrec serve", "uvicorn", "uvicorn, one by one"
LISTS = "lists"
GROWTH = {"items": "items", "history": "events of a visitor", "users": "visitors"}
Run = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What a figure of ours ("rate", "p50", "p99") should be at so many clients; than: as a ratio to another's."""

    figure: str
    clients: int
    wanted: float
    than: str | None = None

    def __str__(self) -> str:
        of = {"rate": "req/s", "p50": "p50, ms", "p99": "p99, ms"}[self.figure]
        return f"{of} at {self.clients}" + (f", times {self.than}" if self.than else "")

    def met(self, found: float) -> bool:
        """Rates are to be reached, times to stay below."""
        return found >= self.wanted if self.figure == "rate" else found < self.wanted


TARGETS = (
    Target("rate", 8, 1.5, ONE_BY_ONE),
    Target("rate", 1, 0.95, ONE_BY_ONE),
    *(Target("rate", clients, 1.5, peer) for peer in ("LitServe", "BentoML") for clients in (8, 32)),
    Target("rate", 32, 2000),
    Target("p99", 32, 30),
    Target("p50", 1, 1.3),
    Target("p99", 1, 4),
)


# ---------------------------------------------------------------- medians


def summary(runs: Sequence[Run], recall: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds of every part. recall: by how many items, as text."""
    servers = [_row(of_name, recall) for of_name in _together(runs, lambda run: run["part"] == "servers")]
    growth = [_row(of_name, recall) for of_name in _together(runs, lambda run: run["part"] in GROWTH)]
    layers = [run for run in runs if run["part"] == "layers"]
    return {
        "servers": servers,
        "targets": [target_row(target, runs) for target in TARGETS],
        "growth": growth,
        "layers": layer_rows(layers, servers) if layers else [],
        "ramp": ramp_row([run for run in runs if run["part"] == "ramp"]),
        "shares": _medians([run["shares"] for run in layers]),
        "candidates": statistics.median(run["candidates"] for run in layers) if layers else None,
    }


def _together(runs: Sequence[Run], chosen: Callable[[Run], bool]) -> list[list[Run]]:
    """The rounds of each run."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if chosen(run):
            found.setdefault((run["part"], run["name"]), []).append(run)
    return list(found.values())


def _row(rounds: Sequence[Run], recall: dict[str, dict[str, Any]]) -> dict[str, Any]:
    points = []
    for at, first in enumerate(rounds[0]["points"]):
        of_round = [run["points"][at] for run in rounds]
        answers = sum(point["answers"] for point in of_round)
        points.append(
            {
                "mix": first["mix"],
                "clients": first["clients"],
                "rate": statistics.median(point["rate"] for point in of_round),
                "rates": [point["rate"] for point in of_round],
                "p50": _median(point["ms"]["p50"] for point in of_round),
                "p99": _median(point["ms"]["p99"] for point in of_round),
                "failed": sum(sum(point["failed"].values()) for point in of_round),
                "cpu_s_per_1000": 1000 * sum(point["cpu_s"] for point in of_round) / max(answers, 1),
                "generator_cpu_s_per_1000": 1000
                * sum(point["generator_cpu_s"] for point in of_round)
                / max(answers, 1),
            }
        )
    first = rounds[0]
    grown_mib = [
        1000 * (run["mib"][1] - run["mib"][0]) / max(1, sum(point["answers"] for point in run["points"]))
        for run in rounds
    ]
    return {
        "part": first["part"],
        "name": first["name"],
        "shop": first["shop"],
        "rounds": len(rounds),
        "ready_s": statistics.median(run["ready_s"] for run in rounds),
        "mib": statistics.median(run["mib"][1] for run in rounds),
        "mib_per_1000": statistics.median(grown_mib),
        **({"recall": recall[first["name"]]} if first["part"] == "items" else {}),
        "points": points,
    }


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each name, over the rows that have it; the greatest first."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: statistics.median(row[name] for row in rows if name in row) for name in names}
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def target_row(target: Target, runs: Sequence[Run]) -> dict[str, Any]:
    """What was found of a target: medians over rounds, of a ratio those of the ratios within each; and their range."""
    ours, theirs = (_by_round(runs, name, target) for name in (US, target.than))
    values = list(ours.values())
    if target.than is not None:
        values = [ours[round_] / theirs[round_] for round_ in ours if theirs.get(round_)]
    found = statistics.median(values) if values else None
    return {
        "target": str(target),
        "wanted": target.wanted,
        "found": found,
        "range": [min(values), max(values)] if values else None,
        "met": None if found is None else target.met(found),
    }


def _by_round(runs: Sequence[Run], name: str | None, target: Target) -> dict[int, float]:
    found = {}
    for run in runs:
        if run["part"] == "servers" and run["name"] == name:
            for point in run["points"]:
                value = point["rate"] if target.figure == "rate" else point["ms"][target.figure]
                if (point["mix"], point["clients"]) == (LISTS, target.clients) and value is not None:
                    found[run["round"]] = value
    return found


def layer_rows(layers: Sequence[Run], servers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each layer adds, in ms, from the inside out: medians over rounds."""
    ms = _medians([run["ms"] for run in layers])
    stages = [(name.removeprefix("stage "), ms[name]) for name in layers[0]["ms"] if name.startswith("stage ")]
    rows = [{"layer": f"rank: {stage}", "ms": spent} for stage, spent in stages if stage != "log"]
    rows.append({"layer": "rank: check, and log what is shown", "ms": ms["stage log"]})
    rows.append({"layer": "service: queue, thread, counters, body", "ms": ms["service"] - ms["rank"]})
    rows.append({"layer": "JSON in, validated", "ms": ms["json in"]})
    rows.append({"layer": "JSON out", "ms": ms["json out"]})
    rows.append(
        {"layer": "application: routes, guard", "ms": ms["app"] - ms["service"] - ms["json in"] - ms["json out"]}
    )
    one = {name: _p50_alone(servers, name) for name in (BARE, US)}
    if one[BARE] is not None:
        rows.append({"layer": "HTTP: uvicorn, sockets, client", "ms": one[BARE] - ms["app"]})
        if one[US] is not None:
            rows.append({"layer": "Ray Serve and HAProxy", "ms": one[US] - one[BARE]})
    return rows


def _p50_alone(servers: Sequence[dict[str, Any]], name: str) -> Any:
    points = [point for row in servers if row["name"] == name for point in row["points"]]
    return next((point["p50"] for point in points if (point["mix"], point["clients"]) == (LISTS, 1)), None)


def ramp_row(rounds: Sequence[Run]) -> dict[str, Any] | None:
    """Medians over rounds of a crowd that comes and goes; failures of all. None if there is none."""
    if not rounds:
        return None
    parts = []
    for at, first in enumerate(rounds[0]["parts"]):
        of_round = [run["parts"][at] for run in rounds]
        figures = ("rate", "cpu_s_per_1000", "generator_cpu_s_per_1000", "mib", "replicas")
        row = {name: statistics.median(part[name] for part in of_round) for name in figures}
        row |= {name: _median(part["ms"][name] for part in of_round) for name in ("p50", "p99")}
        parts.append({"part": first["part"], **row, "failed": sum(part["failed"] for part in of_round)})
    grown = [1000 * (run["parts"][-1]["mib"] - run["parts"][0]["mib"]) / max(1, run["requests"]) for run in rounds]
    return {
        "replicas": rounds[0]["replicas"],
        "clients": rounds[0]["clients"],
        **{way: _medians([run[way] for run in rounds]) for way in ("up_s", "down_s")},
        "requests": sum(run["requests"] for run in rounds),
        "failed": sum(run["failed"] for run in rounds),
        "mib_per_1000": statistics.median(grown),
        "parts": parts,
    }


# ---------------------------------------------------------------- text


def table(result: dict[str, Any]) -> str:
    """All parts as Markdown."""
    shop = result["shop"]
    parts = [
        f"{result['date']}, {result['cpus']} CPUs, Python {result['python']}; {result['rounds']} rounds in turn of "
        f"{result['seconds']:g} s, medians. Untrained model of preset small, {shop['items']:,} items, "
        f"{shop['users']:,} visitors with {shop['events']} events each, ten items a list"
        + (f", {result['candidates']:.0f} candidates" if result["candidates"] else "")
        + "; server and clients on the same CPUs, one thread for the model.\n"
    ]
    if result["servers"] or result["trouble"]:
        parts += ["## Servers\n", servers_table(result["servers"], result["trouble"])]
        parts += ["## Targets\n", targets_table(result["targets"])]
    if result["growth"]:
        parts += ["## Growth\n", growth_table(result["growth"])]
    if result["layers"]:
        parts += ["## Where the time of one request goes\n", layers_table(result["layers"], result["shares"])]
    if result["ramp"]:
        parts += ["## A crowd comes and goes\n", ramp_table(result["ramp"])]
    return "\n".join(parts)


def servers_table(rows: Sequence[dict[str, Any]], trouble: dict[str, str]) -> str:
    """Each server at each number of clients."""
    counts = list(dict.fromkeys(point["clients"] for row in rows for point in row["points"]))
    at = " / ".join(map(str, counts))
    head = ("server", f"req/s at {at} clients", "p50 ms", "p99 ms", "failed", "CPU s per 1,000", "MiB (PSS)",
            "MiB more per 1,000", "ready after, s")  # fmt: skip
    lines = [_line(head), _line("---" for _ in head)]
    for row in rows:
        for mix in dict.fromkeys(point["mix"] for point in row["points"]):
            points = [point for point in row["points"] if point["mix"] == mix]
            cells = [
                row["name"] + ("" if mix == LISTS else f", {mix}"),
                _each(points, "rate", 0), _each(points, "p50", 2), _each(points, "p99", 2),
                str(sum(point["failed"] for point in points)), _each(points, "cpu_s_per_1000", 2),
                f"{row['mib']:.0f}", f"{row['mib_per_1000']:.2f}", f"{row['ready_s']:.1f}",
            ]  # fmt: skip
            lines.append(_line(cells))
    lines += [_line([name, *[""] * (len(head) - 2), why]) for name, why in trouble.items()]
    limit = next((row for row in rows if row["name"] == TRIVIAL), None)
    note = ""
    if limit:
        asking = _each(limit["points"], "generator_cpu_s_per_1000", 3)
        note = f"\nThe load generator against {TRIVIAL} is its own limit; asking costs it {asking} CPU s per 1,000.\n"
    return "\n".join(lines) + "\n" + note


def targets_table(rows: Sequence[dict[str, Any]]) -> str:
    """Ours beside what it should be."""
    lines = [_line(("rayrec serve, one replica", "wanted", "found", "range over rounds", "met")), _line(["---"] * 5)]
    for row in rows:
        low, high = row["range"] or (None, None)
        spread = "" if low is None else f"{low:.2f} to {high:.2f}"
        met = {None: "not measured", True: "yes", False: "no"}[row["met"]]
        wanted = f"{'at least' if not row['target'].startswith('p') else 'below'} {row['wanted']:g}"
        lines.append(_line([row["target"], wanted, _number(row["found"], 2), spread, met]))
    return "\n".join(lines) + "\n"


def growth_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each size beside the first of its kind."""
    head = ("what grows", "to", "p50 ms, 1 client", "times the first", "req/s, 8 clients", "times the first", "recall",
            "MiB (PSS)", "ready after, s")  # fmt: skip
    lines = [_line(head), _line("---" for _ in head)]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        begin = first.setdefault(row["part"], row)
        (alone, many), (alone_1, many_1) = row["points"], begin["points"]
        recall = row.get("recall")
        cells = [
            row["part"], f"{int(row['name']):,}", _number(alone["p50"], 2), _ratio(alone["p50"], alone_1["p50"]),
            _number(many["rate"], 0), _ratio(many["rate"], many_1["rate"]),
            f"{recall['recall']:.3f} at {recall['at']}" if recall else "", f"{row['mib']:.0f}", f"{row['ready_s']:.1f}",
        ]  # fmt: skip
        lines.append(_line(cells))
    shops = {part: row["shop"] for part, row in first.items()}
    notes = [
        f"{part}: " + ", ".join(f"{name} {shop[name]:,}" for name in ("items", "users", "events") if name != _of(part))
        + (", all visitors alike" if shop["even"] else "")
        for part, shop in shops.items()
    ]  # fmt: skip
    return "\n".join(lines) + "\n\nThe rest of each shop: " + "; ".join(notes) + ".\n"


def _of(part: str) -> str:
    return "events" if part == "history" else part


def layers_table(rows: Sequence[dict[str, Any]], shares: dict[str, float]) -> str:
    """Layers from the inside out, and the functions that the ranker spends its time in."""
    whole = sum(row["ms"] for row in rows)
    lines = [_line(("layer", "ms", "share")), _line(["---"] * 3)]
    lines += [_line([row["layer"], f"{row['ms']:.3f}", f"{row['ms'] / whole:.1%}"]) for row in rows]
    lines += [_line(["all", f"{whole:.3f}", ""]), ""]
    lines += [_line(("function, with all that it calls", "share of the ranker's time")), _line(["---"] * 2)]
    lines += [_line([name, f"{share:.1%}"]) for name, share in shares.items()]
    return "\n".join(lines) + "\n"


def ramp_table(ramp: dict[str, Any]) -> str:
    """The seconds each way, and what each part of the ramp cost."""
    head = ("part", "replicas at its end", "req/s", "p50 ms", "p99 ms", "failed", "CPU s per 1,000", "MiB (PSS)")
    lines = [_line(head), _line("---" for _ in head)]
    for row in ramp["parts"]:
        cells = [
            row["part"], f"{row['replicas']:.0f}", _number(row["rate"], 0), _number(row["p50"], 1),
            _number(row["p99"], 1), str(row["failed"]), f"{row['cpu_s_per_1000']:.2f}", f"{row['mib']:.0f}",
        ]  # fmt: skip
        lines.append(_line(cells))
    up, down = ramp["up_s"], ramp["down_s"]
    asking = max(row["generator_cpu_s_per_1000"] for row in ramp["parts"])
    return "\n".join(lines) + (
        f"\n\n{ramp['clients']} clients come: {up['first']:.1f} s to the first extra replica, {up['all']:.1f} s to all "
        f"{ramp['replicas']}. They go: {down['first']:.1f} s until the first is gone, {down['all']:.1f} s until one is "
        f"left. {ramp['requests']:,} requests, {ramp['failed']} failed; {ramp['mib_per_1000']:.2f} MiB more per 1,000 "
        f"from beginning to end; asking costs at most {asking:.2f} CPU s per 1,000.\n"
    )


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:,.{places}f}"


def _each(points: Sequence[dict[str, Any]], name: str, places: int) -> str:
    return " / ".join(_number(point[name], places) or "–" for point in points)


def _ratio(value: float | None, first: float | None) -> str:
    return f"{value / first:.2f}" if value and first else ""


# ---------------------------------------------------------------- picture


def draw(result: dict[str, Any], path: Path) -> None:
    """Answers a second of each server, and the time of a list over each size, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = {part: [row for row in result["growth"] if row["part"] == part] for part in GROWTH}
    measured = [part for part, rows in sizes.items() if rows]
    figure = Figure(figsize=(4.6 + 2.8 * len(measured), 4), layout="constrained")
    FigureCanvasAgg(figure)
    bars, *panels = figure.subplots(1, 1 + len(measured), width_ratios=[1.6, *[1] * len(measured)], squeeze=False)[0]
    _bars(bars, [row for row in result["servers"] if row["name"] != TRIVIAL][::-1])
    for axis, part in zip(panels, measured, strict=True):
        names = [int(row["name"]) for row in sizes[part]]
        axis.plot(names, [row["points"][0]["p50"] for row in sizes[part]], "o-", color="#2a6f97")
        axis.set_title(GROWTH[part])
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if panels:
        panels[0].set_ylabel("p50 of a list, ms, one client")
    figure.savefig(str(path), dpi=110)


def _bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        points = [point for point in row["points"] if point["mix"] == LISTS]
        for n, point in enumerate(points):
            at = rows.index(row) + 0.8 * ((len(points) - 1) / 2 - n) / max(1, len(points))
            axis.barh(at, point["rate"], 0.75 / len(points), color="#c44e00" if row["name"] == US else "#8a8f98")
            axis.annotate(f" {point['rate']:.0f} at {point['clients']}", (point["rate"], at), va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.margins(x=0.2)
    axis.set_title("lists a second, by clients")
