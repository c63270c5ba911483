"""The benches of training compare like with like: the same loss both ways, the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tinyshop
import torch

from rayrec.bench import flops
from rayrec.bench.dataset_made import N_ITEMS, make_dataset
from rayrec.bench.pictures import SIZE, WantsByPicture, log_rows, with_pixels
from rayrec.bench.training import compared, figures, run
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


def test_figures_tell_the_first_epoch_apart_and_count_all_workers() -> None:
    lines = [
        {"samples": 100, "seconds": 10.0, "wait_s": 5.0},
        {"samples": 100, "seconds": 2.0, "wait_s": 0.1},
        {"samples": 100, "seconds": 3.0, "wait_s": 0.1},
    ]
    assert figures(f"hello\n{json.dumps(lines)}\n", 25.0, workers=2) == pytest.approx(
        {
            "rows_per_s": 80,
            "wait_share": 0.04,
            "first_epoch_rows_per_s": 20,
            "first_epoch_wait_share": 0.5,
            "first_step_s": 15.0,
        }
    )


def test_ratios_are_taken_within_a_round() -> None:
    def one(rate: float) -> dict[str, float]:
        return {"rows_per_s": rate, "first_epoch_rows_per_s": rate / 2}

    found = compared({"ray": [one(90), one(9), one(99)], "torchrun": [one(100), one(10), one(100)]})
    assert (found["ratio"], found["ratio_range"], found["first_epoch_ratio"]) == (0.9, [0.9, 0.99], 0.9)
    assert found["median"]["ray"]["rows_per_s"] == 90


def test_arithmetic_is_counted_as_by_hand(tmp_path: Path) -> None:
    """Of ids alone there is little else than the recurrence and the products of the softmax."""
    dataset = make_dataset(tmp_path / "dataset", 4000, 16)
    config = tinyshop.tiny("model.use_image=false", "model.use_attributes=false", "train.batch_size=8")
    found = flops.run(dataset, config)
    batches = flops._batches(dataset, config, flops.UNTIMED + flops.STEPS)[flops.UNTIMED :]
    events = sum(int((batch.history.item_BL > 0).sum()) for batch in batches) / len(batches)
    targets = sum(int((batch.target_BL > 0).sum()) for batch in batches) / len(batches)
    width, hidden = config.model.width, config.model.hidden_width
    recurrent = 3 * events * 8 * hidden * (width + hidden)
    softmax = 3 * 2 * targets * int((dataset.catalogue().n_train > 0).sum()) * width
    assert 1e9 * found["gflop_a_step"] == pytest.approx(recurrent + softmax, rel=0.2)
    assert 0 < found["share_of_peak"] < 1
    assert sum(one["share"] for one in found["operators"]) == pytest.approx(1)
    assert "GFLOP a step" in flops.table(found)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_both_sides_learn_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(2000, rounds=1, workers=2)
    (ray,), (torchrun,) = found["rounds"]["ray"], found["rounds"]["torchrun"]
    for side in (ray, torchrun):
        assert side["rows_per_s"] > 0
        assert 0 < side["first_step_s"] < 300
    assert ray["first_step_s"] > torchrun["first_step_s"]
    assert found["arithmetic"]["gflop_per_s"] > 0
