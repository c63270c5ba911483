"""Cold items on purpose: nothing of them is learned, everybody else's events and targets stay where they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinyshop
from evaluation_shop import PURCHASE, sequence_table

from rayrec.data.dataset import Dataset
from rayrec.data.training_events import TrainingEvents
from rayrec.data.withheld import TARGETS, withhold, without_training_events
from rayrec.errors import DataError


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("tiny") / "shop")


def rows(*histories: list[int | tuple[int, int]], cold: list[int]) -> list[dict[str, object]]:
    return without_training_events(sequence_table(*histories), np.array(cold)).to_pylist()


def test_events_go_and_places_move() -> None:
    (row,) = rows([5, 1, 5, 2, 3, 5], cold=[5])
    assert row["item"] == [1, 2, 3, 5], "the test target stays"
    assert (row["n_train"], row["valid_at"], row["test_at"]) == (2, 2, 3)
    assert row["time_ms"] == [1000, 3000, 4000, 5000]


def test_a_purchase_target_moves_or_is_gone_with_its_event() -> None:
    (row,) = rows([5, 1, (2, PURCHASE), 5, (3, PURCHASE), 4, 4], cold=[5])
    assert (row["item"][row["purchase_valid_at"]], row["item"][row["purchase_test_at"]]) == (2, 3)
    (row,) = rows([5, 1, (5, PURCHASE), 1, (3, PURCHASE), 4, 4], cold=[5])
    assert (row["purchase_valid_at"], row["item"][row["purchase_test_at"]]) == (-1, 3)


def test_a_target_without_a_history_is_none_and_nobody_is_left_without_events() -> None:
    one, two = rows([5, 5, 1, 2], [5, 5], [1, 2, 3], cold=[5])
    assert one["item"] == [1, 2]
    assert (one["n_train"], one["valid_at"], one["test_at"]) == (0, -1, 1)
    assert two["item"] == [1, 2, 3]
    assert rows([5, 5], cold=[5]) == []


def test_without_cold_items_nothing_changes(shop: Dataset) -> None:
    sequences = shop.sequences()
    assert without_training_events(sequences, np.array([], np.int64)).equals(sequences)


def test_the_derived_dataset(shop: Dataset, tmp_path: Path) -> None:
    derived = withhold(shop, tmp_path / "derived", 0.25, seed=3)
    before, after = shop.catalogue(), derived.catalogue()
    cold = [after.index[name] for name in derived.manifest["withheld"]["items"]]
    assert len(cold) == round(0.25 * (before.n_train > 0).sum())
    assert (before.n_train[cold] > 0).all()
    assert not after.n_train[cold].any()
    others = np.setdiff1d(np.arange(1, len(after) + 1), cold)
    lost = _purchase_targets(shop) - _purchase_targets(derived)  # without a history none any more: now learned from
    assert 0 <= (after.n_train[others] - before.n_train[others]).sum() <= lost
    assert not np.isin(TrainingEvents.of(derived.sequences()).item_E, cold).any()
    assert np.array_equal(derived.images().pixels_MHWC, shop.images().pixels_MHWC)
    assert derived.vocab("brands") == shop.vocab("brands")
    targets = {
        (row["user_id"], row["item"][row[place]]) for row in shop.sequences().to_pylist() for place in TARGETS[:2]
    }
    for row in derived.sequences().to_pylist():
        assert not set(row["item"][: row["n_train"]]) & set(cold)
        for place in TARGETS[:2]:
            assert row[place] < 0 or (row["user_id"], row["item"][row[place]]) in targets


def _purchase_targets(dataset: Dataset) -> int:
    return sum(int((np.asarray(dataset.sequences()[name]) >= 0).sum()) for name in TARGETS[2:])


def test_the_choice_is_seeded(shop: Dataset, tmp_path: Path) -> None:
    names = [
        withhold(shop, tmp_path / f"{n}", 0.2, seed).manifest["withheld"]["items"] for n, seed in enumerate((1, 1, 2))
    ]
    assert names[0] == names[1] != names[2]


def test_a_share_of_no_item_is_refused(shop: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no item"):
        withhold(shop, tmp_path / "derived", 0.001, seed=0)
    assert not (tmp_path / "derived").exists()
