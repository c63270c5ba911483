"""The bench of cold items: each variant once, cold items among cold, and what pictures add to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tinyshop

from rayrec.bench import cold
from rayrec.bench.cold import chance, run, variants
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError

SETTINGS = (*tinyshop.TINY, "train.epochs=3", "train.fusion_epochs=1")
PICTURES = "image (scratch) + attributes"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("tiny") / "shop", users=80)


def test_what_was_run_is_kept_and_told(shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ["id", "attributes", PICTURES]
    given = {"share": 0.3, "seeds": 2, "backbones": ["scratch"], "only": only, "settings": SETTINGS}
    result = run(shop.path, tmp_path, **given)
    assert [row["variant"] for row in result["rows"]] == only
    assert result["withheld"] == round(0.3 * 36)
    assert result["cold_items"] == result["withheld"] + len(tinyshop.COLD)
    by = {row["variant"]: row for row in result["rows"]}
    # Of cold items an id says nothing; their words tell their colour.
    assert by["attributes"]["cold"]["ndcg@10"] > by["id"]["cold"]["ndcg@10"]
    assert by["attributes"]["cold"]["ndcg@10"] > result["chance"]
    assert by["id"]["cold"]["users"] == by["id"]["cold_in_all"]["users"] > 0
    (pictures,) = result["pictures"]
    assert (pictures["variant"], pictures["without"]) == (PICTURES, "attributes")
    difference = by[PICTURES]["cold"]["ndcg@10"] - by["attributes"]["cold"]["ndcg@10"]
    assert pictures["cold"]["difference"] == pytest.approx(difference)
    assert json.loads((tmp_path / "cold.json").read_text()) == result
    assert f"| {PICTURES} | 2 |" in (tmp_path / "cold.md").read_text()

    monkeypatch.setattr(cold, "trained", lambda *_, **__: pytest.fail("trained again"))
    assert run(shop.path, tmp_path, **given) == result


def test_each_backbone_has_its_variants() -> None:
    names = [variant.name for variant in variants(["scratch", "some/net.safetensors"])]
    assert len(names) == len(set(names)) == 9
    assert "image (net.safetensors) + id + attributes" in names
    for variant in variants(["scratch"]):
        assert variant.without is None or variant.without in names


def test_usage(shop: Dataset, tmp_path: Path) -> None:
    given = {"share": 0.3, "seeds": 1, "backbones": ["scratch"], "settings": SETTINGS}
    with pytest.raises(UsageError, match=r"unknown variant pictures: choose among id, attributes, id \+ attributes"):
        run(shop.path, tmp_path / "out", only=["pictures"], **given)
    other = tinyshop.write(tmp_path / "other", users=20)
    cold.Shop.open(shop.path, tmp_path / "out", 0.3, tinyshop.tiny())
    with pytest.raises(UsageError, match="name another folder"):
        run(other.path, tmp_path / "out", only=["id"], **given)


def test_chance_is_what_random_orders_give() -> None:
    rng = np.random.default_rng(0)
    rank = rng.integers(1, 31, 20_000)
    gain = np.where(rank <= 10, 1 / np.log2(1 + rank), 0).mean()
    assert chance(30) == pytest.approx(gain, abs=0.01)
    assert chance(0) == 0
