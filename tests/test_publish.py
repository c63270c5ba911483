"""From a finished training to a bundle that serves the same scores."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pyarrow.feather
import pytest
import tinyshop
from PIL import Image

from rayrec.bundle import Bundle, versions
from rayrec.config import PRESETS
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.history import encode_history
from rayrec.model.scorer import Scorer
from rayrec.serving.scorer import load_scorer
from rayrec.training.fit import Fit
from rayrec.training.local import train_alone
from rayrec.training.publish import model_card, new_version, write_bundle


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset", users=30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def fit(dataset: Dataset, checkpoint: Path) -> Fit:
    return train_alone(dataset, tinyshop.tiny("train.epochs=1"), checkpoint)


@pytest.fixture(scope="module")
def bundle(fit: Fit, dataset: Dataset, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundles = tmp_path_factory.mktemp("bundles")
    config = tinyshop.tiny("train.epochs=1")
    return write_bundle(checkpoint, str(bundles), dataset, dataset.catalogue(), config, fit.job.followers)


def test_it_opens_and_is_live(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path.parent)
    assert opened.version == bundle.version
    assert opened.config == tinyshop.tiny("train.epochs=1")
    assert opened.clock == "time"
    assert opened.manifest["items"] == tinyshop.N_ITEMS


def test_it_serves_the_scores_of_the_trained_model(bundle: Bundle, fit: Fit, dataset: Dataset) -> None:
    vectors_ND = fit.model.encode_items().numpy()
    trained = Scorer(fit.model, dataset.catalogue(), vectors_ND, fit.job.followers, "time")
    served = load_scorer(Bundle.open(bundle.path))
    items = [1, 2, 3, 21, 22]
    history = encode_history(items, [1] * 5, np.arange(5) * 1000, [0, 3, 5], max_len=10, clock="time")
    for head in trained.heads:
        np.testing.assert_allclose(served.rank_all(history, head), trained.rank_all(history, head), atol=1e-5)


def test_it_holds_all_that_its_readers_expect(bundle: Bundle, fit: Fit) -> None:
    wanted = (
        *(
            "model.safetensors",
            "config.json",
            "vectors.npy",
            "metrics.json",
            "MODEL_CARD.md",
            "curves.png",
            "lineage.json",
        ),
        *("items/items.parquet", "vocab/categories.json", "vocab/brands.json", "images/thumbnails.arrow"),
        *(f"cooccurrence/{kind}/{part}.npy" for kind in ("next", "near") for part in ("data", "indices", "indptr")),
    )
    assert set(wanted) <= set(bundle.manifest["files"])
    assert bundle.json("metrics.json")["training"] == fit.history
    assert bundle.json("vocab/brands.json") == ["", "even", "odd"]


def test_thumbnails_show_the_pictures(bundle: Bundle) -> None:
    table = pyarrow.feather.read_table(bundle.path / "images" / "thumbnails.arrow")
    assert table["item_index"].to_pylist() == [n for n in range(1, tinyshop.N_ITEMS + 1) if n % 7]
    with Image.open(io.BytesIO(table["jpeg"][0].as_py())) as picture:
        mean = np.asarray(picture, float).mean((0, 1))
    np.testing.assert_allclose(mean, tinyshop.COLOURS["red"], atol=15)


def test_the_card_says_what_was_learned_and_how_well(bundle: Bundle, fit: Fit) -> None:
    card = (bundle.path / "MODEL_CARD.md").read_text()
    assert "- items: 40, of which 35 with a picture and 4 without a training event" in card
    assert f"| retrieval | 1 | {fit.history[0]['loss']:.4f} |" in card


def test_unpublished_it_is_not_live(fit: Fit, dataset: Dataset, checkpoint: Path, tmp_path: Path) -> None:
    config = tinyshop.tiny("train.epochs=1")
    one = write_bundle(checkpoint, str(tmp_path), dataset, dataset.catalogue(), config, fit.job.followers, live=False)
    assert versions(tmp_path) == [one.version]
    with pytest.raises(UsageError, match="no version is published"):
        Bundle.open(tmp_path)


def test_versions_sort_by_their_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2030, 1, 2, 3, 4, 5, 0, 0, 0)))
    made = []
    for _ in range(3):
        made.append(new_version(str(tmp_path)))
        (tmp_path / made[-1]).mkdir()
        (tmp_path / made[-1] / "manifest.json").write_text("{}")
    assert made == ["20300102-030405", "20300102-030405-001", "20300102-030405-002"]
    assert made == sorted(made)


def test_the_papers_card_says_what_it_cannot_do(dataset: Dataset) -> None:
    assert "every visitor gets the same order" in model_card(PRESETS["paper"], dataset, dataset.catalogue(), [])
