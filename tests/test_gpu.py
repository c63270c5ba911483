"""Mixed precision, and the same training on a CUDA device where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_rowwise import weights_of_one_with_both, weights_of_two_workers
from tinyshop import tiny, write

from rayrec.data.dataset import Dataset
from rayrec.model.recommender import build
from rayrec.training.fit import Fit, Job
from rayrec.training.local import Alone, LocalFeed, train_alone
from rayrec.training.survey import survey


def test_mixed_precision_learns_as_full_does(tmp_path: Path) -> None:
    dataset = write(tmp_path / "dataset")
    losses = {}
    for precision in ("fp32", "bf16"):
        (tmp_path / precision).mkdir()
        fit = train_alone(dataset, tiny(f"train.precision={precision}"), tmp_path / precision)
        losses[precision] = [line["loss"] for line in fit.history]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
    assert losses["bf16"] != losses["fp32"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
LARGE = (
    "train.id_optimizer=rowwise_adagrad",
    "train.id_lr=3",
    "train.negatives=8",
    "train.image_budget=all",
    "train.image_recompute=8",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", [(), LARGE])
def test_training_on_a_gpu(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """In mixed precision, of batches in pinned memory."""
    dataset: Dataset = write(tmp_path / "dataset")
    config = tiny("train.gpu=true", "train.precision=auto", *settings)
    facts = survey(dataset, len(dataset.catalogue()), config)
    peers = Alone(tmp_path, device=torch.device("cuda"))
    fit = Fit(Job(config, dataset.path, facts.first_stage, facts.rows), LocalFeed(dataset, config), peers)
    fit.run()
    retrieval = [line["loss"] for line in fit.history if line["stage"] == "retrieval"]
    assert retrieval[-1] < retrieval[0]
    assert next(fit.model.parameters()).is_cuda


@pytest.mark.gpu
@needs_gpu
def test_activations_computed_again_take_less_of_a_gpus_memory(tmp_path: Path) -> None:
    dataset = write(tmp_path / "dataset", image_size=64)
    images, peaks, gradients = dataset.images(), [], []
    for recompute in (0, 8):
        torch.manual_seed(0)
        config = tiny(f"train.image_recompute={recompute}", "model.image_size=64")
        model = build(config, dataset.catalogue(), images.item_M, images.pixels_MHWC).to("cuda")
        item_M = torch.from_numpy(images.item_M).repeat(20).to("cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        model.item_encoder.images(model.items, item_M).square().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append(model.item_encoder.cnn.project.weight.grad)
    assert peaks[1] < peaks[0] / 3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@needs_two
def test_two_gpus_take_the_steps_of_one_with_both_batches() -> None:
    """By nccl, which has no sums of sparse tensors."""
    first, second = weights_of_two_workers("nccl")
    for ours, theirs, whole in zip(first, second, weights_of_one_with_both(), strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-3)
