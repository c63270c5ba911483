"""What a shop needs, by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from rayrec.bench.sizing import (
    ASSUMED,
    LEFT_OUT,
    Prices,
    Rates,
    Shop,
    changed,
    cost_table,
    costs,
    needs,
    rates_table,
    table,
)
from rayrec.config import Config, preset
from rayrec.errors import UsageError
from rayrec.settings import with_settings

PAGE = Path(__file__).resolve().parents[1] / "jobs" / "README.md"


def test_by_hand() -> None:
    shop = Shop(8640, 1e6, events_a_day=1e6, lists_a_user=10, pictures=0.5, peak=2, days_kept=10, epochs=3)
    rates = Rates(
        prepare_events_s=1000, pictures_s=100, picture_packed=0.5, train_events_s=500, dataset_bytes=10,
        state_bytes=100, list_s=0.01, list_growth=2, replica_bytes=1000, busy=0.5, gpu_flops=1e9, gpu_bytes=1e9,
    )  # fmt: skip
    config = with_settings(
        Config(),
        [
            "model.width=8", "model.hidden_width=16", "model.max_len=10", "model.image_size=10",
            "model.cnn_channels=[4]", "train.batch_size=10", "train.image_budget=5", "train.image_refresh=10",
        ],
    )  # fmt: skip
    amount = {need.what: need.amount for need in needs(shop, rates, config)}
    assert amount["prepare a day"] == pytest.approx(1000 / 3600)
    assert amount["dataset of a day"] == pytest.approx(0.01)
    assert amount["decode all pictures, once"] == pytest.approx(5000 / 3600)
    assert amount["pictures as prepare stores them"] == pytest.approx(0.5 * 0.5e6 * 128 * 128 * 3 / 1e9)
    assert amount["pictures in a training worker"] == pytest.approx(0.15)
    cnn = (2 * 27 * 4 * 5 * 5 + 2 * 8 * 8) * (3 * 5 + 10) / 100
    assert amount["of which the CNN"] == pytest.approx(cnn / 1e6)
    assert amount["arithmetic an event"] == pytest.approx((3 * (8 * 16 * 24 + 16 * 2048) + cnn) / 1e6)
    assert amount["train a day on CPUs"] == pytest.approx(6000 / 3600)
    assert amount["table of item ids in training"] == pytest.approx(0.128)
    assert amount["the same by rows"] == pytest.approx(0.036)
    assert amount["of a GPU's memory"] == pytest.approx(0.128)
    assert amount["cores for them"] == pytest.approx(2 * 0.02 / 0.5)
    assert amount["memory of a replica"] == pytest.approx(1.0)
    assert amount["state"] == pytest.approx(1e-3)

    prices = Prices(core_hour=36, gpu_hour=60, gb_month=30, core_gb=0.5)
    paid = {cost.what: cost.a_day for cost in costs(shop, rates, prices, config)}
    assert paid["prepare"] == pytest.approx(10)
    assert paid["train, on CPUs"] == pytest.approx(60)
    assert paid["serve"] == pytest.approx(0.08 * 1.0 / 0.5 * 24 * 36), "memory binds"
    assert paid["store"] == pytest.approx(0.01 * 10 + 0.5 * 0.5e6 * 128 * 128 * 3 / 1e9 + 1)
    assert paid["all of it"] == pytest.approx(sum(paid[one] for one in ("prepare", "train, on CPUs", "serve", "store")))
    assert paid["instead of CPUs, GPUs"] == pytest.approx(amount["train a day by arithmetic alone"])
    (serve,) = [one for one in costs(shop, rates, replace(prices, core_gb=2), config) if one.what == "serve"]
    assert serve.a_day == pytest.approx(0.08 * 24 * 36), "cores bind"


def test_without_pictures_there_is_no_cnn() -> None:
    for given in ("model.use_image=false", "train.image_budget=all"):
        found = needs(Shop(), Rates(), with_settings(preset("small"), [given]))
        (cnn,) = [need.amount for need in found if need.what == "of which the CNN"]
        assert (cnn > 0) == (given == "train.image_budget=all")


def test_each_rate_says_where_it_comes_from() -> None:
    for one in (*fields(Rates), *fields(Prices)):
        source = one.metadata["source"]
        assert source.startswith(("`rayrec ", ASSUMED)), one.name


def test_the_page_shows_what_the_command_says() -> None:
    config, page = preset("small"), PAGE.read_text()
    assert table(needs(Shop(), Rates(), config)) in page
    assert cost_table(costs(Shop(), Rates(), Prices(), config)) in page
    assert rates_table(Rates(), Prices()) in page
    assert LEFT_OUT in page


@pytest.mark.parametrize(
    ("given", "told"),
    [("user=3", "there are users"), ("users=many", "no number"), ("users=0", "above 0"), ("users=inf", "above 0")],
)
def test_what_cannot_be_set_is_told(given: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        changed([given])


def test_what_is_set_changes_the_sums() -> None:
    shop, rates, prices = changed(["users=5", "list_s=0.5", "core_hour=0.1"])
    assert (shop.users, rates.list_s, prices.core_hour) == (5, 0.5, 0.1)
