"""The runs of `rayrec bench quality` as a table and a picture. In: rows. Out: JSON, Markdown, a PNG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrec.bench.peer_runs import SPLITS, Settings
from rayrec.evaluation.metrics import ndcg
from rayrec.evaluation.paired import Gains, interval, p_value, ratio_interval
from rayrec.evaluation.replay import Split

HEAD = (
    "set", "model", "seeds", "NDCG@10", "95% of users", "HR@10", "validation", "rayrec is", "95%, paired", "p",
    "CPU s", "wall s", "MiB", "ms a list", "ns an item", "best after, CPU s", "rayrec there, CPU s", "note",
)  # fmt: skip
COSTS = ("cpu_s", "wall_s", "peak_mib", "list_ms")


@dataclass(frozen=True)
class Run:
    """One training judged: NDCG@10 and HR@10 on both splits, what it cost, and each test user's rank.

    rank_U: in the order of the users' ids; a rank beyond the lists' length is only known to be beyond.
    """

    settings: Settings
    seed: int
    figures: dict[str, dict[str, float]]
    cost: dict[str, Any]
    rank_U: npt.NDArray[np.int64]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """CPU seconds of training, and NDCG@10 of some validation users by then; empty if it is not known."""
        return self.cost.get("curve") or []


@dataclass
class Row:
    """A model on a data set: its runs with the settings chosen, or why there are none; and what we are to it."""

    shop: str
    n_items: int
    model: str
    runs: list[Run]
    note: str = ""
    ahead: dict[str, Any] = field(default_factory=dict)

    def mean(self, figure: str, split: Split = "test") -> float:
        """Over seeds."""
        return statistics.fmean(run.figures[split][figure] for run in self.runs)

    def gain_U(self) -> Gains:
        """Each test user's NDCG@10, mean over seeds. [U]"""
        return np.mean([ndcg(run.rank_U, 10) for run in self.runs], axis=0)

    def best_after_s(self) -> float | None:
        """CPU seconds of training until validation was at its best, the median over seeds; None if it is not known."""
        curves = [run.curve for run in self.runs if run.curve]
        return statistics.median(max(curve, key=lambda point: point[1])[0] for curve in curves) if curves else None

    def reaches_s(self, level: float) -> float | None:
        """CPU seconds of training until validation was at `level`, the median over seeds; None where one never is."""
        first = [next((spent for spent, found in run.curve if found >= level), None) for run in self.runs]
        known = [spent for spent in first if spent is not None]
        return statistics.median(known) if len(known) == len(self.runs) else None

    def body(self) -> dict[str, Any]:
        """As JSON."""
        if not self.runs:
            return {"shop": self.shop, "model": self.model, "trouble": self.note}
        cost = {name: _median(self.runs, name) for name in COSTS}
        cost["item_ns"] = None if cost["list_ms"] is None else 1e6 * cost["list_ms"] / max(1, self.n_items)
        return {
            "shop": self.shop,
            "model": self.model,
            "settings": self.runs[0].settings,
            "seeds": [run.seed for run in self.runs],
            **{f"{split}_{name}": self.mean(name, split) for split in SPLITS for name in ("ndcg@10", "hr@10")},
            "spread": spread(self.runs),
            "interval": interval(self.gain_U()),
            "cost": cost,
            "best_after_s": self.best_after_s(),
            "note": self.note,
            **self.ahead,
        }


def compare(rows: Sequence[Row], us: str) -> None:
    """Ours over each of the others: the ratio of NDCG@10, its interval by users drawn in pairs, and a paired test."""
    for row in rows:
        ours = next((one for one in rows if one.shop == row.shop and one.model == us), None)
        if ours and ours.runs and row.runs and row is not ours:
            ours_U, theirs_U = ours.gain_U(), row.gain_U()
            row.ahead = {
                "ratio": ours.mean("ndcg@10") / max(row.mean("ndcg@10"), 1e-12),
                "ratio_interval": ratio_interval(ours_U, theirs_U),
                "p": p_value(ours_U, theirs_U),
                "ours_there_s": ours.reaches_s(row.mean("ndcg@10", "valid")),
            }


def spread(runs: Sequence[Run]) -> float:
    """Standard deviation of NDCG@10 over seeds; 0 of one."""
    return statistics.stdev(run.figures["test"]["ndcg@10"] for run in runs) if len(runs) > 1 else 0.0


def _median(runs: Sequence[Run], name: str) -> float | None:
    known = [run.cost[name] for run in runs if run.cost.get(name) is not None]
    return statistics.median(known) if known else None


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        if not row.runs:
            cells = [row.shop, row.model, *[""] * (len(HEAD) - 3), row.note]
            lines.append(f"| {' | '.join(cells)} |")
            continue
        body = row.body()
        low, high = body["interval"]
        cells = [
            row.shop, row.model, str(len(row.runs)),
            f"{body['test_ndcg@10']:.4f}" + (f" ± {body['spread']:.4f}" if len(row.runs) > 1 else ""),
            f"{low:.4f} to {high:.4f}", f"{body['test_hr@10']:.4f}", f"{body['valid_ndcg@10']:.4f}",
            f"{body['ratio']:.2f} times" if "ratio" in body else "",
            "{:.2f} to {:.2f}".format(*body["ratio_interval"]) if "ratio" in body else "",
            f"{body['p']:.4f}" if "p" in body else "",
            *(_figure(body["cost"][name], places) for name, places in
              (("cpu_s", 0), ("wall_s", 0), ("peak_mib", 0), ("list_ms", 2), ("item_ns", 0))),
            _figure(body["best_after_s"], 0), _figure(body.get("ours_there_s"), 0),
            row.note,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def draw(rows: Sequence[Row], us: str, path: Path) -> None:
    """NDCG@10 of every model with its interval over users, a panel for each data set, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shops = list(dict.fromkeys(row.shop for row in rows))
    figure = Figure(figsize=(6 * max(1, len(shops)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, shop in zip(figure.subplots(1, max(1, len(shops)), squeeze=False)[0], shops, strict=False):
        chosen = [row for row in rows if row.shop == shop and row.runs][::-1]
        means = np.array([row.mean("ndcg@10") for row in chosen])
        edges = np.array([interval(row.gain_U()) for row in chosen]).reshape(-1, 2).T
        colours = ["#c44e00" if row.model == us else "#8a8f98" for row in chosen]
        axis.barh([row.model for row in chosen], means, xerr=np.abs(edges - means), color=colours, capsize=3)
        axis.set_title(f"{shop}: NDCG@10, test")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(str(path), dpi=110)
