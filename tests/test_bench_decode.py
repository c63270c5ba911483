"""The shop of `rayrec bench decode` has the pictures that it says, and prepare keeps them all."""

from __future__ import annotations

from pathlib import Path

import pyarrow.csv as pacsv
import pytest

from rayrec.bench.decode import SIDE, _plain, run, write_shop
from rayrec.config import ImageConfig
from rayrec.data.images import decode


def test_a_shop_with_and_without_pictures(tmp_path: Path) -> None:
    raw = write_shop(tmp_path / "raw", items=6, pictures=4)
    assert sorted(path.stem for path in (raw / "images").iterdir()) == [f"i{n:06d}" for n in range(4)]
    rows = pacsv.read_csv(raw / "events.csv").to_pydict()
    assert len(set(rows["item_id"])) == 6
    config = ImageConfig()
    pixels = decode((raw / "images" / "i000000.jpg").read_bytes(), config)
    assert pixels.shape == (config.size, config.size, 3)
    assert pixels.std() > 10, "not one colour"
    assert config.size < SIDE, "it is made smaller, as a shop's pictures are"
    assert _plain(raw / "images") > 0


@pytest.mark.ray
@pytest.mark.slow
def test_prepare_keeps_them_all() -> None:
    found = run(60, rounds=1)
    assert found["pictures_per_s"]["plain"] > 0
    assert found["rounds"]["plain"]
