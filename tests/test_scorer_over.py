"""A scorer after a shop's edits: as if the whole model had been built for the edited catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
import tinyshop
import torch

from rayrec.catalogue import Catalogue
from rayrec.config import Config, preset
from rayrec.followers import Followers
from rayrec.history import HistoryBatch, encode_history
from rayrec.model.recommender import build
from rayrec.model.scorer import Scorer
from rayrec.schema import ACTION_CODE, ITEM_SCHEMA
from rayrec.settings import with_settings

SIZE = 16
CONFIGS = {
    "default": tinyshop.tiny("model.candidates=10"),
    "without pictures": tinyshop.tiny("model.use_image=false"),
    "without attributes": tinyshop.tiny("model.use_attributes=false"),
    "paper": with_settings(preset("paper"), ["model.max_len=10"]),
}
TABLE = tinyshop.item_table(tinyshop.sequence_table())
PICTURED = np.array([item for item, has in enumerate(TABLE["has_image"].to_pylist(), 1) if has])
RED, NEW = 3, tinyshop.N_ITEMS + 1


def pixels_of(table: Any, size: int) -> npt.NDArray[np.uint8]:
    rows = tinyshop.image_table(table, size)["pixels"].to_pylist()
    return np.stack([np.frombuffer(row, np.uint8).reshape(size, size, 3) for row in rows])


def catalogue_with(change: dict[int, dict[str, Any]]) -> Catalogue:
    """The tiny shop with other facts of some rows; a row that it has not is a copy of RED without events."""
    rows = TABLE.to_pylist()
    while len(rows) < max(change, default=0):
        rows.append(rows[RED - 1] | {"item_index": len(rows) + 1, "item_id": f"new-{len(rows)}", "n_train": 0})
    for row, facts in change.items():
        rows[row - 1] |= facts
    return Catalogue.from_table(tinyshop.pa.Table.from_pylist(rows, ITEM_SCHEMA))


@pytest.fixture(scope="module", params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scorer(kind: str) -> Scorer:
    """As it is served: its weights and vectors, without the pictures."""
    whole = whole_model(CONFIGS[kind], Catalogue.from_table(TABLE), PICTURED, pixels_of(TABLE, size(kind)))
    vectors_ND = whole.encode_items().numpy()
    served = build(CONFIGS[kind], Catalogue.from_table(TABLE), weights=whole.state_dict())
    return Scorer(served, Catalogue.from_table(TABLE), vectors_ND, followers(), "time")


def size(kind: str) -> int:
    return 128 if kind == "paper" else SIZE


def whole_model(config: Config, catalogue: Catalogue, item_M: Any, pixels_MHWC: Any) -> Any:
    torch.manual_seed(5)
    return build(config, catalogue, item_M, pixels_MHWC)


def followers() -> Followers:
    follows = sp.lil_array((tinyshop.N_ITEMS + 1, tinyshop.N_ITEMS + 1), dtype=np.float32)
    follows[1, 2] = follows[2, 3] = 4
    return Followers(sp.csr_array(follows), sp.csr_array(follows))


def history(*items: int) -> HistoryBatch:
    actions = np.full(len(items), ACTION_CODE["view"])
    return encode_history(
        items, actions, np.arange(len(items)) * 60_000, np.array([0, len(items)]), max_len=10, clock="time"
    )


def test_where_nothing_new_is_said_nothing_changes(scorer: Scorer) -> None:
    later = scorer.over(scorer.catalogue, np.array([RED, 7]), {})
    np.testing.assert_allclose(later.vectors_ND, scorer.vectors_ND, atol=1e-6)
    np.testing.assert_allclose(
        later.rank_all(history(1, 2), "next")[:, 1:], scorer.rank_all(history(1, 2), "next")[:, 1:], atol=1e-5
    )


def test_changed_attributes_are_encoded_and_the_picture_stays(scorer: Scorer, kind: str) -> None:
    changed = catalogue_with({RED: {"price_bucket": 9, "brand_code": 2, "title_codes": [4]}})
    later = scorer.over(changed, np.array([RED]), {})
    whole = whole_model(CONFIGS[kind], changed, PICTURED, pixels_of(TABLE, size(kind)))
    np.testing.assert_allclose(later.vectors_ND, whole.encode_items().numpy(), atol=1e-5)
    assert (kind in ("paper", "without attributes")) == np.allclose(later.vectors_ND[RED], scorer.vectors_ND[RED])


def test_a_new_item_has_the_vector_that_the_whole_model_gives_it(scorer: Scorer, kind: str) -> None:
    grown = catalogue_with({NEW: {"price_bucket": 9}, NEW + 1: {"has_image": False}})
    picture = np.full((size(kind), size(kind), 3), 200, np.uint8)
    later = scorer.over(grown, np.array([NEW, NEW + 1]), {NEW: picture})
    pixels = np.concatenate([pixels_of(TABLE, size(kind)), picture[None]])
    whole = whole_model(CONFIGS[kind], Catalogue.from_table(TABLE), PICTURED, pixels[:-1])
    full = build(CONFIGS[kind], grown, np.append(PICTURED, NEW), pixels)
    weights = whole.state_dict()
    if "item_encoder.id.weight" in weights:
        weights["item_encoder.id.weight"] = torch.nn.functional.pad(weights["item_encoder.id.weight"], (0, 0, 0, 2))
    full.load_state_dict(weights)
    np.testing.assert_allclose(later.vectors_ND, full.encode_items().numpy(), atol=1e-5)
    scores_BN = later.rank_all(history(1, NEW, 2), "next")
    assert scores_BN.shape == (1, NEW + 2)
    assert np.isfinite(scores_BN[:, 1:]).all()
    fused_BC = later.fuse(history(1, 2), later.user_vectors(history(1, 2)), np.array([[NEW, RED]]), {"next": 1.0})
    assert ((fused_BC > 0) & (fused_BC < 1)).all()


def test_another_picture_takes_the_place_of_the_old_one(scorer: Scorer, kind: str) -> None:
    picture = np.full((size(kind), size(kind), 3), 30, np.uint8)
    pixels = pixels_of(TABLE, size(kind))
    pixels[PICTURED.tolist().index(RED)] = picture
    later = scorer.over(scorer.catalogue, np.array([RED]), {RED: picture})
    whole = whole_model(CONFIGS[kind], scorer.catalogue, PICTURED, pixels)
    np.testing.assert_allclose(later.vectors_ND, whole.encode_items().numpy(), atol=1e-5)


def test_edit_upon_edit_adds_up(scorer: Scorer, kind: str) -> None:
    picture = np.full((size(kind), size(kind), 3), 90, np.uint8)
    first = scorer.over(catalogue_with({NEW: {}}), np.array([NEW]), {NEW: picture})
    second = first.over(catalogue_with({NEW: {"price_bucket": 2}}), np.array([NEW]), {})
    at_once = scorer.over(catalogue_with({NEW: {"price_bucket": 2}}), np.array([NEW]), {NEW: picture})
    np.testing.assert_allclose(second.vectors_ND, at_once.vectors_ND, atol=1e-5)


def test_measures_of_all_items_stay_those_of_training(scorer: Scorer) -> None:
    before = scorer.model.items
    many = catalogue_with({row: {} for row in range(NEW, NEW + 30)})
    after = scorer.over(many, np.arange(NEW, NEW + 30), {}).model.items
    for name in ("log_popularity_N", "price_z_N", "category_rarity_NK", "title_rarity_NK"):
        torch.testing.assert_close(getattr(after, name)[:NEW], getattr(before, name))


def test_a_code_that_training_never_met_is_unknown(scorer: Scorer) -> None:
    later = scorer.over(catalogue_with({NEW: {"category_codes": [10_000], "brand_code": 77}}), np.array([NEW]), {})
    assert int(later.model.items.category_NK[NEW].max()) == int(later.model.items.brand_N[NEW]) == 0
