"""What a shop asks of a scene: items that are never shown, lifted, limited, or pinned to a place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shopfake import FakeScorer, catalogue

from rayrec.config import ItemsConfig, SceneConfig, ServeConfig
from rayrec.errors import UsageError
from rayrec.ranking.pipeline import Ranker
from rayrec.ranking.policy import Policy
from rayrec.ranking.requests import Answer, Request
from rayrec.ranking.rerank import capped, with_pinned
from rayrec.ranking.rules import Rules
from rayrec.settings import with_settings
from rayrec.state import State, open_state
from rayrec.state.protocol import Event

SHOP = catalogue(per_style=4, new_per_style=1)  # red-0..3 are 1..4, green 5..8, blue 9..12; item n costs n + 1
DAY_MS = 86_400_000


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    now_ms = time.time_ns() // 1_000_000
    state.append_events(
        [
            Event("u", "red-0", "purchase", now_ms - 10 * DAY_MS),
            Event("u", "red-1", "purchase", now_ms - 2 * DAY_MS),
            Event("u", "red-2", "view", now_ms),
        ]
    )
    yield state
    state.close()


def shown(state: State, k: int = 5, scorer: FakeScorer | None = None, **scene: Any) -> Answer:
    """The list of a visitor who likes red, in a scene with these settings."""
    config = ServeConfig(scenes={"home": SceneConfig(**{"hide_purchased": False, **scene})}, diversity=0)
    return Ranker(scorer or FakeScorer(), config, rng=np.random.default_rng(0)).recommend([Request("u", k=k)], state)[0]


def ids(answer: Answer) -> list[str]:
    return [item.item_id for item in answer.items]


@pytest.mark.parametrize(
    ("items", "meant"),
    [
        ({"category": ("red",)}, "red-0 red-1 red-2 red-3"),
        ({"category": ("red", "blue|things"), "brand": ("odd",)}, "red-1 red-3 blue-1 blue-3"),
        ({"item": ("red-2", "none")}, "red-2"),
        ({"price_min": 3, "price_max": 3.5}, "red-2 green-2 blue-2"),
        ({"new": True}, "red-3 green-3 blue-3"),
        ({"new": False, "category": ("green",)}, "green-0 green-1 green-2"),
        ({"category": ("none",)}, ""),
    ],
)
def test_items_that_are_meant(items: dict[str, Any], meant: str) -> None:
    meant_N = Policy(SceneConfig(), Rules(SHOP)).meant(ItemsConfig(**items))
    assert SHOP.ids[meant_N].tolist() == meant.split()
    assert not meant_N[0]


def test_only_and_never_count_what_they_remove(state: State) -> None:
    answer = shown(state, only={"brand": ("odd",)}, never=({"item": ("red-3",)}, {"category": ("blue",)}))
    assert ids(answer) == ["red-1", "red-5", "red-7", "red-9", "red-11"]
    assert answer.removed == {"only": 30, "never": 11}
    assert ids(shown(state, only={"category": ("none",)})) == []


def test_what_was_bought_comes_back_after_so_many_days(state: State) -> None:
    assert ids(shown(state, hide_purchased=True))[:3] == ["red-2", "red-3", "red-4"]
    late = shown(state, hide_purchased=True, hide_purchased_days=5)
    assert ids(late)[:3] == ["red-0", "red-2", "red-3"]
    assert late.removed == {"bought": 1}


def test_boosts_lift_and_bury(state: State) -> None:
    assert ids(shown(state))[:2] == ["red-0", "red-1"]
    lifted = shown(state, boost=({"item": ("red-7",), "factor": 2.0}, {"brand": ("even",), "factor": 0.5}))
    assert ids(lifted)[:3] == ["red-7", "red-1", "red-3"]
    assert all(0 <= item.score <= 1 for item in lifted.items), "what is told is the model's"


def test_limits_leave_room_for_others(state: State) -> None:
    answer = shown(state, k=6, max_per_category=2)
    assert ids(answer) == ["red-0", "red-1", "green-0", "blue-0", "green-1", "blue-1"]
    assert answer.removed["max_per_category"] == 54
    both = shown(state, k=6, max_per_category=2, max_per_brand=3)
    assert len(both.items) == 6
    with_diversity = shown(state, k=6, max_per_category=2, diversity=0.5, explore=0.5)
    assert sorted(item.split("-")[0] for item in ids(with_diversity)) == ["blue"] * 2 + ["green"] * 2 + ["red"] * 2


def test_pinned_items_have_their_places(state: State) -> None:
    answer = shown(state, pinned={1: "blue-9", 3: "red-0", 9: "red-5", 4: "no-such-item"})
    assert ids(answer) == ["blue-9", "red-1", "red-0", "red-2", "red-3"]
    assert [item.propensity for item in answer.items] == [1.0] * 5
    assert "pinned" in answer.items[0].sources
    explored = shown(state, pinned={1: "blue-9"}, explore=1.0)
    assert ids(explored)[0] == "blue-9"
    assert explored.items[0].propensity == 1.0
    assert explored.items[1].propensity < 0.1


def test_what_may_not_be_shown_is_not_pinned(state: State) -> None:
    scene = {"pinned": {1: "red-1", 2: "blue-3"}, "hide_purchased": True, "never": ({"item": ("blue-3",)},)}
    assert ids(shown(state, **scene))[0] == "red-2"
    assert not {"red-1", "blue-3"} & set(ids(shown(state, **scene)))


def test_a_scene_has_its_own_diversity(state: State) -> None:
    styles = {item.split("-")[0] for item in ids(shown(state, k=6, diversity=0.9))}
    assert styles == {"red", "green", "blue"}


@given(st.lists(st.integers(1, 12), min_size=0, max_size=12, unique=True), st.integers(1, 4), st.integers(1, 4))
def test_no_limit_is_ever_passed(items: list[int], per_style: int, per_brand: int) -> None:
    style_N, brand_N = np.array([0, *[1] * 4, *[2] * 4, *[3] * 4]), np.array([0, *[1, 2] * 6])
    places, removed = capped(np.array(items, np.int64), {"s": (style_N, per_style), "b": (brand_N, per_brand)})
    chosen = np.array(items, np.int64)[places]
    assert max(np.bincount(style_N[chosen], minlength=1)) <= per_style
    assert max(np.bincount(brand_N[chosen], minlength=1)) <= per_brand
    assert sum(removed.values()) + len(places) == len(items)
    assert places.tolist() == sorted(places.tolist())


def test_items_of_no_group_have_no_limit() -> None:
    places, removed = capped(np.array([1, 2, 3]), {"s": (np.array([0, 0, 0, 0]), 1)})
    assert (places.tolist(), removed) == ([0, 1, 2], {})


def test_a_pinned_item_beyond_the_list_comes_last() -> None:
    assert with_pinned(np.array([7, 8]), [(5, 1)], 10).tolist() == [7, 8, 1]
    assert with_pinned(np.array([7, 8, 9]), [(0, 8)], 2).tolist() == [8, 7]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("scenes.home.never=[{}]", "a rule of 'never' names no items"),
        ("scenes.home.boost=[{factor: 2}]", "a rule of 'boost' names no items"),
        ("scenes.home.boost=[{brand: [a], facter: 2}]", "did you mean 'factor'"),
        ("scenes.home.pinned={0: a}", "places count from 1"),
        ("scenes.home.max_per_brand=-1", "greater than or equal to 0"),
    ],
)
def test_wrong_rules_are_named(setting: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        with_settings(ServeConfig(), [setting])
