"""Trackers hear every epoch; the curves are drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinyshop
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayrec.errors import UsageError
from rayrec.training.tracking import draw_curves, open_trackers


def line(stage: str, epoch: int, loss: float) -> dict[str, Any]:
    return {"stage": stage, "epoch": epoch, "loss": loss, "samples": 10, "valid_next_ndcg@10": 0.1 * epoch}


LINES = [line("retrieval", 0, 3.0), line("retrieval", 1, 2.5), line("fusion", 0, 4.0)]


def test_tensorboard_holds_every_epoch_by_stage(tmp_path: Path) -> None:
    (tracker,) = open_trackers(["tensorboard"], str(tmp_path), "run-1", tinyshop.tiny())
    for one in LINES:
        tracker.epoch(one)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run-1"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("retrieval/loss")] == [(0, 3.0), (1, 2.5)]
    assert {"fusion/loss", "fusion/samples", "retrieval/valid_next_ndcg@10"} <= set(events.Tags()["scalars"])


def test_mlflow_gets_settings_and_epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heard: list[tuple[str, Any]] = []

    def hear(name: str) -> Any:
        return lambda *given, **named: heard.append((name, given or named))

    names = ("set_experiment", "start_run", "log_params", "end_run")
    fake = SimpleNamespace(
        **{name: hear(name) for name in names},
        log_metrics=lambda metrics, step: heard.append(("log_metrics", (step, metrics))),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    (tracker,) = open_trackers(["mlflow"], str(tmp_path), "run-1", tinyshop.tiny())
    tracker.epoch(LINES[1])
    tracker.close()
    assert ("start_run", {"run_name": "run-1"}) in heard
    params = {name: value for kind, (one,) in (h for h in heard if h[0] == "log_params") for name, value in one.items()}
    assert params["model.width"] == 16
    assert params["train.lr"] == 0.02
    step, metrics = next(given for kind, given in heard if kind == "log_metrics")
    assert step == 1
    assert metrics == {"retrieval.loss": 2.5, "retrieval.samples": 10, "retrieval.valid_next_ndcg_at_10": 0.1}
    assert heard[-1][0] == "end_run"


def test_a_tracker_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match=r"pip install 'rayrec\[mlflow\]'"):
        open_trackers(["mlflow"], str(tmp_path), "run-1", tinyshop.tiny())


@pytest.mark.parametrize(("history", "stages"), [(LINES, 2), (LINES[:2], 1), ([], 1)])
def test_curves_have_a_column_for_each_stage(history: list[dict[str, Any]], stages: int, tmp_path: Path) -> None:
    draw_curves(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == pytest.approx(495 * stages, abs=2)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
