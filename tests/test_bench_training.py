"""The benches of training compare like with like: the same loss both ways, the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinyshop
import torch

from rayrec.bench.dataset_made import N_ITEMS, make_dataset
from rayrec.bench.pictures import SIZE, WantsByPicture, log_rows, with_pixels
from rayrec.bench.training import figures
from rayrec.training.local import train_alone


def test_both_ways_of_the_pixels_give_the_same_loss_and_gradients() -> None:
    rng = np.random.default_rng(0)
    pixels_MHWC = rng.integers(0, 256, (N_ITEMS, SIZE, SIZE, 3), np.uint8)
    table = log_rows(64, rng)
    rows = {name: table[name].to_numpy() for name in table.column_names}
    naive = {name: torch.tensor(column) for name, column in with_pixels(rows, pixels_MHWC).items()}
    ours = {name: torch.tensor(column) for name, column in rows.items()}
    assert len(ours["item"].unique()) < 64
    torch.manual_seed(0)
    model = WantsByPicture()
    grads = []
    for loss in (
        model.beside_rows(naive),
        model.once_each(ours, torch.from_numpy(pixels_MHWC).permute(0, 3, 1, 2)),
    ):
        model.zero_grad()
        loss.backward()
        grads.append((loss.detach(), model.cnn.layers[0].weight.grad.clone()))
    for naively, once in zip(*grads, strict=True):
        torch.testing.assert_close(naively, once, atol=1e-6, rtol=1e-4)


def test_the_made_dataset_trains(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", 400, 16)
    (tmp_path / "out").mkdir()
    config = tinyshop.tiny("train.epochs=1", "train.fusion_epochs=0")
    fit = train_alone(dataset, config, tmp_path / "out")
    assert fit.history[0]["samples"] == 400 // 20 * 2  # 15 or 17 inputs in windows of 10


def test_figures_tell_the_first_epoch_apart() -> None:
    lines = [
        {"samples": 100, "seconds": 10.0, "wait_s": 5.0},
        {"samples": 100, "seconds": 2.0, "wait_s": 0.1},
        {"samples": 100, "seconds": 3.0, "wait_s": 0.1},
    ]
    assert figures(lines) == pytest.approx(
        {"rows_per_s": 40, "wait_share": 0.04, "first_epoch_rows_per_s": 10, "first_epoch_wait_share": 0.5}
    )
