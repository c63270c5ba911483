"""Trackers of experiments: TensorBoard by default, MLflow as an extra, and a picture of the curves.

In: lines of epochs. Out: what those tools read. It must not know how a model is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rayrec.config import Config
from rayrec.errors import UsageError
from rayrec.progress import step

LOGS = "tensorboard"


class Tracker(Protocol):
    """Hears of every finished epoch."""

    def epoch(self, line: dict[str, Any]) -> None:
        """One epoch of one stage; see `fit.Fit.history`."""

    def close(self) -> None:
        """No more epochs."""


def open_trackers(names: Sequence[str], bundles: str, run: str, config: Config) -> list[Tracker]:
    """The trackers called `names`. TensorBoard's logs lie in BUNDLES/tensorboard (here, if BUNDLES is remote).

    Raises UsageError if one is not installed.
    """
    return [(_TensorBoard if name == "tensorboard" else _MLflow)(bundles, run, config) for name in names]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if isinstance(value, (int, float)) and name != "epoch"}


class _TensorBoard:
    def __init__(self, bundles: str, run: str, config: Config) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = Path(LOGS if "://" in bundles else f"{bundles}/{LOGS}") / run
        step(f"train: curves in TensorBoard: tensorboard --logdir {folder.parent}")
        self._writer: Any = SummaryWriter(str(folder))

    def epoch(self, line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(f"{line['stage']}/{name}", value, line["epoch"])

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, bundles: str, run: str, config: Config) -> None:
        try:
            import mlflow
        except ImportError:
            raise UsageError("the tracker mlflow is not installed: pip install 'rayrec[mlflow]'") from None
        self._mlflow = mlflow
        mlflow.set_experiment("rayrec")
        mlflow.start_run(run_name=run)
        for group in ("model", "train"):
            mlflow.log_params({f"{group}.{k}": v for k, v in getattr(config, group).model_dump().items()})

    def epoch(self, line: dict[str, Any]) -> None:
        names = {f"{line['stage']}.{name}".replace("@", "_at_"): value for name, value in _numbers(line).items()}
        self._mlflow.log_metrics(names, step=line["epoch"])

    def close(self) -> None:
        self._mlflow.end_run()


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and validation scores of every stage, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(line["stage"] for line in history))
    figure = Figure(figsize=(4.5 * max(1, len(stages)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, max(1, len(stages)), squeeze=False)
    for column, stage in enumerate(stages):
        lines = [line for line in history if line["stage"] == stage]
        epochs = [line["epoch"] + 1 for line in lines]
        axes[0][column].plot(epochs, [line["loss"] for line in lines], marker="o")
        axes[0][column].set_title(f"{stage}: training loss")
        for name in sorted(key for key in lines[0] if key.startswith("valid_")):
            label = name.removeprefix("valid_").replace("_", " ")
            axes[1][column].plot(epochs, [line[name] for line in lines], marker="o", label=label)
        axes[1][column].set_title(f"{stage}: validation")
        axes[1][column].set_xlabel("epoch")
        axes[1][column].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(str(path), dpi=110)


def describe(epoch: dict[str, Any]) -> str:
    """An epoch in one line."""
    scores = "  ".join(f"{name[6:]} {value:.4f}" for name, value in epoch.items() if name.startswith("valid_"))
    return (
        f"  {epoch['stage']} {epoch['epoch'] + 1}: loss {epoch['loss']:.4f}  {scores}  "
        f"{epoch['samples_per_s']:.0f} rows/s, {100 * epoch['wait_share']:.1f}% waiting for data"
        f"{'' if epoch.get('kept', True) else '; worse on validation: not kept'}"
    )
