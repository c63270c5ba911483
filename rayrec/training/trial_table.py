"""What came of a search's trials, as a table and a picture. In: trials. Out: Markdown, a PNG. It must not know Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """An epoch of a trial: CPU seconds since its start, and its score by validation."""

    stage: str
    cpu_s: float
    score: float


@dataclass(frozen=True)
class Trial:
    """A trial: what it set (nothing: the preset as it is), what it came to, and how it ended."""

    number: int
    settings: tuple[str, ...]
    epochs: Sequence[Epoch]
    ended: bool
    error: str | None = None

    @property
    def best(self) -> float:
        """Its best score; for a trial with epochs."""
        return max(epoch.score for epoch in self.epochs)

    @property
    def fate(self) -> str:
        """How it ended, in a word or two."""
        if self.error:
            return f"failed: {self.error}"
        return "to its end" if self.ended else "stopped early"

    def body(self) -> dict[str, Any]:
        """As JSON."""
        best = self.best if self.epochs else None
        return {**asdict(self), "settings": list(self.settings), "best": best, "fate": self.fate}


def table(trials: Sequence[Trial]) -> str:
    """Trials as a Markdown table, the best first; those that came to no epoch last."""
    rows = sorted(trials, key=lambda trial: -trial.best if trial.epochs else 1.0)
    lines = [
        "| trial | settings | validation NDCG@10 | epochs | CPU s | ended |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trial in rows:
        figures = ["", "0", ""]
        if trial.epochs:
            figures = [f"{trial.best:.4f}", str(len(trial.epochs)), f"{trial.epochs[-1].cpu_s:.0f}"]
        told = trial.fate.replace("|", "/")
        lines.append(
            f"| {trial.number} | {' '.join(trial.settings) or 'the preset'} | {' | '.join(figures)} | {told} |"
        )
    return "\n".join(lines) + "\n"


def draw(trials: Sequence[Trial], path: Path) -> None:
    """Scores over CPU seconds, a line for each trial, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    judged = [trial for trial in trials if trial.epochs]
    best = max(judged, key=lambda trial: trial.best)
    for trial in judged:
        seconds, scores = [epoch.cpu_s for epoch in trial.epochs], [epoch.score for epoch in trial.epochs]
        if trial is best:
            axis.plot(
                seconds, scores, marker="o", color="C1", linewidth=2.5, label=f"best: trial {trial.number}", zorder=3
            )
        elif not trial.settings:
            axis.plot(seconds, scores, marker="o", color="C0", linewidth=2, label="the preset")
        else:
            axis.plot(seconds, scores, marker=".", color="0.6", linewidth=1)
    axis.set(xlabel="CPU seconds", ylabel="validation NDCG@10", title="Trials")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(str(path), dpi=110)
