"""Settings: presets, `--set`, and what a mistaken one is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rayrec.config import (
    BEFORE_IT_WAS_A_SETTING,
    DEFAULT_SCENES,
    PRESETS,
    Config,
    PrepareConfig,
    ServeConfig,
    preset,
    saved_config,
)
from rayrec.errors import UsageError
from rayrec.settings import Settings, from_dict, with_file, with_settings


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_being_saved(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert from_dict(Config, json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("kind", [PrepareConfig, Config, ServeConfig])
def test_defaults_survive_being_saved(kind: type[Settings]) -> None:
    assert from_dict(kind, json.loads(kind().model_dump_json())) == kind()
    assert from_dict(kind, {}) == kind()


@pytest.mark.parametrize(
    ("group", "name", "meant"),
    [(group, name, meant) for group, settings in BEFORE_IT_WAS_A_SETTING.items() for name, meant in settings.items()],
)
def test_what_was_saved_before_there_was_a_setting_means_what_it_did(group: str, name: str, meant: object) -> None:
    tree = Config().model_dump(mode="json")
    assert getattr(getattr(saved_config(tree), group), name) == tree[group].pop(name) != meant
    assert getattr(getattr(saved_config(tree), group), name) == meant


def test_paper_is_the_founding_model_to_the_letter() -> None:
    paper = preset("paper")
    assert (paper.model.kind, paper.model.image_size, paper.model.max_len) == ("paper", 128, 50)
    assert (paper.train.epochs, paper.train.batch_size) == (10, 32)


def test_an_unknown_preset_names_the_others() -> None:
    with pytest.raises(UsageError, match="unknown preset 'big': choose one of small, wide, base, paper"):
        preset("big")


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        Config().train.epochs = 3


@pytest.mark.parametrize(
    ("config", "setting", "read", "expected"),
    [
        (Config(), "train.epochs=3", lambda c: c.train.epochs, 3),
        (Config(), " train.epochs = 3 ", lambda c: c.train.epochs, 3),
        (Config(), "train.lr=1e-4", lambda c: c.train.lr, 1e-4),  # to YAML 1.1 this is text
        (Config(), "model.use_image=false", lambda c: c.model.use_image, False),
        (Config(), "model.cnn_channels=[8, 16]", lambda c: c.model.cnn_channels, (8, 16)),
        (Config(), "train.tracker=[]", lambda c: c.train.tracker, ()),
        (PrepareConfig(), "sequences.actions=[view,cart]", lambda c: c.sequences.actions, ("view", "cart")),
        (Config(), "model.actions=[cart,purchase]", lambda c: c.model.actions, ("cart", "purchase")),
        (PrepareConfig(), "clean.after=2017-11-25", lambda c: c.clean.after, "2017-11-25"),
        (PrepareConfig(), "split=time:0.1", lambda c: c.split, "time:0.1"),
        (PrepareConfig(), "brand.constant=a=b", lambda c: c.brand.constant, "a=b"),
        (ServeConfig(), "scenes.home.hide_seen=true", lambda c: c.scenes["home"].hide_seen, True),
        (ServeConfig(), "scenes.home.heads.purchase=2", lambda c: c.scenes["home"].heads["purchase"], 2.0),
        (
            ServeConfig(),
            "scenes.cart.heads.next=1",
            lambda c: c.scenes["cart"].heads,
            {"cart": 0.5, "purchase": 0.5, "next": 1.0},
        ),
        (ServeConfig(), "scenes.gift.sources=[new]", lambda c: c.scenes["gift"].sources, ("new",)),
    ],
)
def test_set(config: Settings, setting: str, read: Any, expected: object) -> None:
    assert read(with_settings(config, [setting])) == expected


def test_set_leaves_everything_else_as_it_was() -> None:
    changed = with_settings(preset("base"), ["train.epochs=3", "train.seed=7"])
    expected = preset("base").model_dump()
    expected["train"] |= {"epochs": 3, "seed": 7}
    assert changed.model_dump() == expected
    assert preset("base").train.epochs == 30
    assert ServeConfig().scenes == DEFAULT_SCENES


def test_the_last_of_two_wins() -> None:
    assert with_settings(Config(), ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


@pytest.mark.parametrize(
    ("config", "setting", "message"),
    [
        (Config(), "train.epoch=3", "no setting 'train.epoch'; did you mean 'epochs'?"),
        (Config(), "tran.epochs=3", "no setting 'tran'; did you mean 'train'?"),
        (Config(), "zzz=3", "no setting 'zzz'; known here: model, preset, train"),
        (Config(), "train.epochs.more=3", "no setting 'train.epochs.more'"),
        (Config(), "train.=3", "no setting 'train.'"),
        (ServeConfig(), "scenes.home.hide_sen=true", "no setting 'scenes.home.hide_sen'; did you mean 'hide_seen'?"),
        (ServeConfig(), "scenes.gift.sorces=[new]", "no setting 'scenes.gift.sorces'; did you mean 'sources'?"),
        (Config(), "train.epochs", "write it as path=value"),
        (Config(), "train.epochs=[1", "cannot read the value"),
        (Config(), "train.epochs=many", "setting train.epochs:"),
        (Config(), "train.epochs=2.5", "setting train.epochs:"),
        (Config(), "train.epochs=0", "greater than or equal to 1"),
        (Config(), "train.epochs=yes", "setting train.epochs: must be a number (got True)"),
        (Config(), "train.lr=.nan", "setting train.lr:"),
        (Config(), "train.lr=.inf", "setting train.lr:"),
        (Config(), "train.lr=", "setting train.lr:"),
        (Config(), "train=3", "setting train:"),
        (Config(), "model.use_image=3", "setting model.use_image:"),
        (Config(), "model.kind=transformer", "'paper' or 'fusion'"),
        (
            with_settings(Config(), ["model.encoder=transformer"]),
            "model.width=65",
            "setting model: model.width 65 must be a multiple of model.heads 2",
        ),
        (Config(), "model.actions=[]", "setting model.actions: none: choose among view, click"),
        (Config(), "model.actions=[view,buy]", "setting model.actions: buy: choose among view, click"),
        (ServeConfig(), "scenes.home.heads.purchas=2", "there is no head 'purchas': choose among next, view, cart"),
        (PrepareConfig(), "split=half", "setting split: must be 'loo' or 'time:<fraction below 0.5>'"),
        (PrepareConfig(), "split=time:0.5", "setting split: must be"),
        (PrepareConfig(), "images.size=4", "greater than or equal to 8"),
    ],
)
def test_a_mistaken_setting_is_told_what_is_wrong(config: Settings, setting: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        with_settings(config, [setting])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_an_unknown_name_in_a_saved_config_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no setting 'train\.epoch'; did you mean 'epochs'"):
        from_dict(Config, {"train": {"epoch": 3}})


# ---------------------------------------------------------------- files


def test_a_file_adds_a_scene_and_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text(
        """
        diversity: 0.2
        scenes:
          home: {max_per_brand: 2}
          cart: {heads: {purchase: 1}}
          gift: {sources: [new, popular], only: {price_max: 20}, never: [{brand: [x]}], pinned: {1: a}}
        """
    )
    config = with_file(ServeConfig(), tmp_path / "shop.yaml")
    assert sorted(config.scenes) == ["cart", "gift", "home", "item", "search"]
    assert config.scenes["home"] == DEFAULT_SCENES["home"].model_copy(update={"max_per_brand": 2})
    assert config.scenes["cart"].heads == {"purchase": 1}
    assert config.scenes["cart"].sources == DEFAULT_SCENES["cart"].sources
    assert config.scenes["gift"].only.price_max == 20
    assert (config.diversity, config.batch_size) == (0.2, ServeConfig().batch_size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scenes: {home: {max_per_bran: 2}}", r"shop.yaml: .*did you mean 'max_per_brand'"),
        ("scenes: [home]", "scenes"),
        ("- a\n- b", "name: value"),
        ("a: [", "is not YAML"),
        ("diversity: 2", "diversity"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "shop.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        with_file(ServeConfig(), tmp_path / "shop.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        with_file(ServeConfig(), tmp_path / "none.yaml")
