"""Mixed precision, and the same training on a CUDA device where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tinyshop import tiny, write

from rayrec.data.dataset import Dataset
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu(tmp_path: Path) -> None:
    dataset: Dataset = write(tmp_path / "dataset")
    config = tiny("train.gpu=true", "train.precision=auto")
    facts = survey(dataset, len(dataset.catalogue()), config)
    peers = Alone(tmp_path, device=torch.device("cuda"))
    fit = Fit(Job(config, dataset.path, facts.first_stage, facts.rows), LocalFeed(dataset, config), peers)
    fit.run()
    retrieval = [line["loss"] for line in fit.history if line["stage"] == "retrieval"]
    assert retrieval[-1] < retrieval[0]
    assert next(fit.model.parameters()).is_cuda
