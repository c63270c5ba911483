"""A model that starts from another: rows move by name, whatever their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tinyshop
import torch

from rayrec.bundle import Bundle
from rayrec.catalogue import Catalogue
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.followers import Followers
from rayrec.model.recommender import Recommender, build
from rayrec.schema import ITEM_SCHEMA
from rayrec.training.fit import Fit, Job
from rayrec.training.local import Alone, LocalFeed, train_alone
from rayrec.training.publish import write_bundle
from rayrec.training.warm_start import moved, warm_start

VOCAB = {"categories": ["", "grey", "red", "lilac", "green", "blue"], "brands": ["", "odd", "even"]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("old")
    dataset: Dataset = tinyshop.write(folder / "dataset", users=20)
    config = tinyshop.tiny("train.epochs=1", "train.fusion_epochs=0")
    (folder / "checkpoint").mkdir()
    train_alone(dataset, config, folder / "checkpoint")
    nothing = sp.csr_array((tinyshop.N_ITEMS + 1,) * 2)
    followers = Followers(nothing, nothing)
    return write_bundle(folder / "checkpoint", str(folder / "bundles"), dataset, dataset.catalogue(), config, followers)


def renumbered(catalogue: Catalogue) -> Catalogue:
    """The items in reverse, the first five of them gone, and a new one ahead; categories and brands renumbered."""
    rows = list(reversed(catalogue.table.to_pylist()))[:-5]
    new = {**rows[0], "item_id": "lilac-0", "category": "lilac", "n_train": 3}
    rows = [new, *rows]
    for n, row in enumerate(rows, start=1):
        row |= {"item_index": n, "category_codes": [VOCAB["categories"].index(row["category"])]}
        row["brand_code"] = VOCAB["brands"].index(row["brand"])
    return Catalogue.from_table(pa.Table.from_pylist(rows, schema=ITEM_SCHEMA))


def test_items_that_were_renumbered_keep_their_vectors(bundle: Bundle) -> None:
    catalogue = renumbered(bundle.catalogue)
    torch.manual_seed(7)
    model = build(bundle.config, catalogue)
    assert isinstance(model, Recommender)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    assert warm_start(model, catalogue, VOCAB, bundle) == tinyshop.N_ITEMS - 5
    old = bundle.tensors()
    for name, row in catalogue.index.items():
        now = model.item_encoder.id.weight[row]
        before = bundle.catalogue.index.get(name)
        expected = old["item_encoder.id.weight"][before] if before else fresh["item_encoder.id.weight"][row]
        torch.testing.assert_close(now, expected, atol=0, rtol=0, msg=name)
    words = {"category": ("categories", ["", *tinyshop.COLOURS]), "brand": ("brands", ["", "even", "odd"])}
    for table, (vocab, before) in words.items():
        name = f"item_encoder.{table}.weight"
        for row, word in enumerate(VOCAB[vocab]):
            expected = old[name][before.index(word)] if word in before else fresh[name][row]
            torch.testing.assert_close(model.state_dict()[name][row], expected, atol=0, rtol=0, msg=word)
    torch.testing.assert_close(
        model.behaviour.encoder.layers.weight_ih_l0, old["behaviour.encoder.layers.weight_ih_l0"], atol=0, rtol=0
    )


def test_a_cold_item_and_a_warm_one_keep_their_content_vectors(bundle: Bundle) -> None:
    """Without pictures, which a bundle does not hold, what is left is id and attributes: equal for every known item."""
    catalogue = renumbered(bundle.catalogue)
    model = build(bundle.config, catalogue)
    warm_start(model, catalogue, VOCAB, bundle)
    old = build(bundle.config, bundle.catalogue, weights=bundle.tensors())
    old_ND, new_ND = old.encode_items(), model.encode_items()
    for name, row in catalogue.index.items():
        if name in bundle.catalogue.index:
            torch.testing.assert_close(
                new_ND[row], old_ND[bundle.catalogue.index[name]], atol=1e-6, rtol=1e-5, msg=name
            )


def test_another_shape_is_refused_by_name(bundle: Bundle) -> None:
    model = build(tinyshop.tiny("model.hidden_width=12"), bundle.catalogue)
    with pytest.raises(UsageError, match=r"another shape \(behaviour"):
        warm_start(model, bundle.catalogue, VOCAB, bundle)


def test_training_starts_from_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    dataset = tinyshop.write(tmp_path / "dataset", users=20)
    job = Job(bundle.config, dataset.path, sp.csr_array((tinyshop.N_ITEMS + 1,) * 2), {}, str(bundle.path))
    fit = Fit(job, LocalFeed(dataset, bundle.config), Alone(tmp_path))
    weights = bundle.tensors()
    assert all(torch.equal(value, weights[name]) for name, value in fit.model.state_dict().items())


def test_rows_move_by_name_and_the_rest_stays() -> None:
    old = torch.arange(8.0).view(4, 2)
    fresh = -torch.ones(4, 2)
    out = moved(old, ["", "a", "b", "c"], ["", "c", "new", "a"], fresh)
    assert out.tolist() == [[-1, -1], [6, 7], [-1, -1], [2, 3]]


@pytest.mark.parametrize(
    ("old_rows", "rows", "expected"),
    [
        (2, 3, [0, 0, 1]),  # the old table ends before its names: b has no row
        (3, 2, [0, 2]),  # the new one does: a has none
    ],
)
def test_tables_may_end_before_their_names(old_rows: int, rows: int, expected: list[int]) -> None:
    """A table has rows up to the greatest code that an item bears."""
    old = torch.arange(float(old_rows))[:, None]
    out = moved(old, ["", "a", "b"], ["", "b", "a"], torch.zeros(rows, 1))
    assert np.array_equal(out.squeeze(1).numpy(), expected)


def test_no_names_move_nothing() -> None:
    fresh = torch.randn(3, 2)
    assert torch.equal(moved(torch.ones(3, 2), [""], [""], fresh), fresh)
