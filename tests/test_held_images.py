"""Which pictures a worker holds: as its model reads them, all or its share, and never all as they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinyshop

from rayrec.config import Config
from rayrec.data.dataset import Dataset, Images
from rayrec.errors import UsageError
from rayrec.model.encoders import shrink
from rayrec.training.held_images import held_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("tiny") / "shop", image_size=32)


def held(dataset: Dataset, config: Config, rank: int = 0, world: int = 1) -> Images:
    images = held_images(dataset, config, rank, world)
    assert images is not None
    return images


def test_they_are_as_small_as_the_model_reads_them(dataset: Dataset) -> None:
    ours, whole = held(dataset, tinyshop.tiny(), 1, 2), dataset.images()
    np.testing.assert_array_equal(ours.item_M, whole.item_M)
    np.testing.assert_array_equal(ours.pixels_MHWC, shrink(whole.pixels_MHWC, 16).permute(0, 2, 3, 1).numpy())


def test_shares_are_disjoint_and_all_of_them(dataset: Dataset) -> None:
    config = tinyshop.tiny("train.image_held=share")
    shares = [held(dataset, config, rank, 3) for rank in range(3)]
    assert len(shares[2].item_M) == 0, "there are two shards"
    whole = held(dataset, config)
    np.testing.assert_array_equal(np.concatenate([share.item_M for share in shares]), whole.item_M)
    np.testing.assert_array_equal(np.concatenate([share.pixels_MHWC for share in shares]), whole.pixels_MHWC)


def test_only_the_shards_of_a_share_are_read(tmp_path: Path) -> None:
    shop = tinyshop.write(tmp_path / "shop")
    (tmp_path / "shop/images/1.parquet").write_bytes(b"not for the first worker")
    assert len(held(shop, tinyshop.tiny("train.image_held=share"), 0, 2).item_M) == 18


def test_without_pictures_there_are_none(dataset: Dataset, tmp_path: Path) -> None:
    assert held_images(dataset, tinyshop.tiny("model.use_image=false"), 0, 1) is None
    shop = tinyshop.write(tmp_path / "shop")
    for shard in (tmp_path / "shop/images").iterdir():
        shard.unlink()
    assert held(shop, tinyshop.tiny()).pixels_MHWC.shape == (0, 16, 16, 3)
    assert shop.images().pixels_MHWC.shape == (0, 16, 16, 3)


def test_what_must_see_all_pictures_refuses_a_share() -> None:
    for setting in ("model.image_backbone=efficientnet_lite0", "model.kind=paper"):
        with pytest.raises(UsageError, match="image_held=share: only where"):
            tinyshop.tiny("train.image_held=share", setting)
