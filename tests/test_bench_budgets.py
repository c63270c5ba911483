"""The bench of picture budgets: its runs are kept, and the naive form has the very gradient of a budget of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinyshop
import torch

from rayrec.bench import budgets
from rayrec.bench.budgets import NAIVE, WITHOUT, Shop, beside_rows, pace, run
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.model.recommender import Recommender, build

SETTINGS = (*tinyshop.TINY, "train.epochs=1", "train.fusion_epochs=0", "train.refit_epochs=0")
QUIET = ("model.dropout=0", "model.id_dropout=0", "train.image_budget=all")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("tiny") / "shop")


def model_of(shop: Shop, *settings: str) -> Recommender:
    torch.manual_seed(0)
    model = build(tinyshop.tiny(*settings), shop.catalogue, shop.pictures.item_M, shop.pictures.pixels_MHWC)
    assert isinstance(model, Recommender)
    return model.train()


@pytest.mark.parametrize("negatives", [0, 8])
def test_the_naive_form_is_a_budget_of_all_and_encodes_more(dataset: Dataset, tmp_path: Path, negatives: int) -> None:
    shop = Shop.open(dataset.path, tmp_path)
    ours = model_of(shop, *QUIET, f"train.negatives={negatives}")
    naive = beside_rows(ours, shop.catalogue)
    (batch,) = shop._batches(ours.config, 1)
    encoded: list[int] = []
    for model in (ours, naive):
        model.item_encoder.cnn.register_forward_hook(lambda module, given, out: encoded.append(len(out)))  # type: ignore[union-attr]
        torch.manual_seed(1)
        model(batch).backward()
    for (name, p), q in zip(ours.named_parameters(), naive.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert encoded[1] > 1.5 * encoded[0]


def test_what_was_run_is_kept_and_told(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"budgets": ["0", "all"], "steps": 2, "rounds": 1, "settings": SETTINGS}
    result = run(dataset.path, tmp_path, **given)
    by = {row["variant"]: row for row in result["rows"]}
    assert list(by) == [WITHOUT, "0", "all", NAIVE]
    assert by[WITHOUT]["taught"] == by["0"]["taught"] == by["0"]["refreshed"] == 0
    assert by[NAIVE]["taught"] > by["all"]["taught"] > 0
    assert all(row["rows_per_s"] > 0 for row in by.values())
    assert by["all"]["known"]["users"] > 0
    assert json.loads((tmp_path / "budgets.json").read_text()) == result
    assert "| naive |" in (tmp_path / "budgets.md").read_text()

    monkeypatch.setattr(budgets, "trained", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(budgets, "pace", lambda *_: pytest.fail("timed again"))
    assert run(dataset.path, tmp_path, **given) == result


def test_a_budget_is_what_is_taught_a_step_and_the_refresh_comes_beside_it(dataset: Dataset, tmp_path: Path) -> None:
    shop = Shop.open(dataset.path, tmp_path)
    found = pace(model_of(shop, "train.image_budget=6", "train.image_refresh=4"), shop._batches(tinyshop.tiny(), 4))
    assert 3 < found.taught <= 6
    assert found.refreshed == 4


def test_usage(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a number from 0 on, or all"):
        run(dataset.path, tmp_path, budgets=["few"])
    with pytest.raises(UsageError, match="it has no budget"):
        run(dataset.path, tmp_path, settings=["model.kind=paper"])
    for shard in Path(dataset.path, "images").iterdir():
        shard.unlink()
    with pytest.raises(UsageError, match="has no pictures"):
        run(dataset.path, tmp_path)
