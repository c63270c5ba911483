"""Dials: how they are read, and which turns a search tries."""

from __future__ import annotations

import numpy as np
import pytest

from rayrec.config import PRESETS, Config
from rayrec.errors import UsageError
from rayrec.settings import with_settings
from rayrec.training.dials import PAPER_DIALS, SMALL_DIALS, parse, turns


@pytest.mark.parametrize(
    ("text", "start", "middle", "end"),
    [
        ("train.lr=1e-3..1e-1", "train.lr=0.001", "train.lr=0.01", "train.lr=0.1"),  # steep: in the logarithm
        ("model.dropout=0.1..0.5", "model.dropout=0.1", "model.dropout=0.3", "model.dropout=0.5"),
        ("train.epochs=2..8", "train.epochs=2", "train.epochs=5", "train.epochs=8"),
        ("model.width=16, 32,64", "model.width=16", "model.width=32", "model.width=64"),
        ("model.encoder=gru", "model.encoder=gru", "model.encoder=gru", "model.encoder=gru"),
    ],
)
def test_a_dial_turns_from_its_start_to_its_end(text: str, start: str, middle: str, end: str) -> None:
    dial = parse(text, Config())
    assert [dial.turned(share) for share in (0.0, 0.5, 1.0)] == [start, middle, end]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train.lr", "write it as path=LOW..HIGH"),
        ("train.lr=", "write it as path=LOW..HIGH"),
        ("train.lr=a..1", "must be numbers"),
        ("train.lr=1..nan", "must be below"),
        ("train.lr=1e-2..1e-3", "must be below"),
        ("train.lrr=1..2", "train.lr"),
        ("model.dropout=0.5..1.5", "model.dropout"),
        ("model.encoder=lstm,rnn", "model.encoder"),
    ],
)
def test_what_cannot_be_a_dial_is_told(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse(text, Config())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_dials_of_each_preset_can_be_turned(preset: str) -> None:
    dials = PAPER_DIALS if preset == "paper" else SMALL_DIALS
    for settings in turns([parse(text, PRESETS[preset]) for text in dials], 20, seed=0):
        with_settings(PRESETS[preset], settings)


def test_the_preset_is_the_first_trial_and_each_dial_is_tried_all_along() -> None:
    dials = [parse("model.dropout=0..0.9", Config()), parse("model.width=8,16,32", Config())]
    tried = turns(dials, 10, seed=3)
    assert tried[0] == []
    dropout = sorted(float(settings[0].split("=")[1]) for settings in tried[1:])
    assert np.floor(np.array(dropout) / 0.1).tolist() == list(range(9))
    widths = [settings[1] for settings in tried[1:]]
    assert {width: widths.count(width) for width in widths} == {f"model.width={n}": 3 for n in (8, 16, 32)}
    assert turns(dials, 10, seed=3) == tried != turns(dials, 10, seed=4)


def test_one_trial_is_the_preset_alone() -> None:
    assert turns([parse("model.width=8,16", Config())], 1, seed=0) == [[]]
