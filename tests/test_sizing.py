"""What a shop needs, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrec.bench.sizing import Rates, Shop, changed, needs, table
from rayrec.config import Config, preset
from rayrec.errors import UsageError
from rayrec.settings import with_settings

PAGE = Path(__file__).resolve().parents[1] / "jobs" / "README.md"


def test_by_hand() -> None:
    shop = Shop(8640, 1e6, events_a_day=1e6, lists_a_user=10, pictures=0.5, peak=2, days_kept=10, epochs=3)
    rates = Rates(
        prepare_events_s=1000, pictures_s=100, train_events_s=500, dataset_bytes=10, state_bytes=100, list_s=0.01,
        list_growth=2, replica_bytes=1000, busy=0.5, gpu_flops=1e9, gpu_bytes=1e9,
    )  # fmt: skip
    config = with_settings(Config(), ["model.width=8", "model.hidden_width=16", "model.image_size=10"])
    amount = {need.what: need.amount for need in needs(shop, rates, config)}
    assert amount["prepare a day"] == pytest.approx(1000 / 3600)
    assert amount["dataset of a day"] == pytest.approx(0.01)
    assert amount["decode all pictures, once"] == pytest.approx(5000 / 3600)
    assert amount["pictures, decoded"] == pytest.approx(0.15)
    assert amount["arithmetic an event"] == pytest.approx(3 * (8 * 16 * 24 + 16 * 2048) / 1e6)
    assert amount["train a day on CPUs"] == pytest.approx(6000 / 3600)
    assert amount["table of item ids in training"] == pytest.approx(0.128)
    assert amount["the same by rows"] == pytest.approx(0.036)
    assert amount["of a GPU's memory"] == pytest.approx(0.128)
    assert amount["cores for them"] == pytest.approx(2 * 0.02 / 0.5)
    assert amount["memory of a replica"] == pytest.approx(1.0)
    assert amount["state"] == pytest.approx(1e-3)


def test_the_page_shows_what_the_command_says() -> None:
    assert table(needs(Shop(), Rates(), preset("small"))) in PAGE.read_text()


@pytest.mark.parametrize(
    ("given", "told"),
    [("user=3", "there are users"), ("users=many", "no number"), ("users=0", "above 0"), ("users=inf", "above 0")],
)
def test_what_cannot_be_set_is_told(given: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        changed([given])


def test_what_is_set_changes_the_sums() -> None:
    shop, rates = changed(["users=5", "list_s=0.5"])
    assert (shop.users, rates.list_s) == (5, 0.5)
