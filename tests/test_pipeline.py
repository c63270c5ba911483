"""The whole answer, on a shop and a scorer whose answers are known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from shopfake import FakeScorer, catalogue

from rayrec.config import SceneConfig, ServeConfig
from rayrec.errors import StateError, UsageError
from rayrec.history import HistoryBatch
from rayrec.ranking.pipeline import Ranker
from rayrec.ranking.requests import Answer, Request, UnknownItemError, UnknownSceneError
from rayrec.ranking.rules import Filters
from rayrec.ranking.trends import Trend
from rayrec.schema import ACTION_CODE
from rayrec.state import State, open_state
from rayrec.state.protocol import Act, Event, History, Shown
from rayrec.state.sqlite import SqliteState

PLAIN = ServeConfig(diversity=0.0)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    yield state
    state.close()


@pytest.fixture
def scorer() -> FakeScorer:
    return FakeScorer()


@pytest.fixture
def ranker(scorer: FakeScorer) -> Ranker:
    return Ranker(scorer, PLAIN, model="m1", rng=np.random.default_rng(0))


class Spy(FakeScorer):
    """Keeps the histories that it was given last, and every weighing of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.weighed: list[dict[str, float]] = []

    def fuse(
        self, history: HistoryBatch, user_BD: np.ndarray, candidates_BC: np.ndarray, heads: Mapping[str, float]
    ) -> np.ndarray:
        self.read = history
        self.weighed.append(dict(heads))
        return super().fuse(history, user_BD, candidates_BC, heads)


def ids(answer: Answer) -> list[str]:
    return [item.item_id for item in answer.items]


def styles(answer: Answer) -> set[str]:
    return {item_id.split("-")[0] for item_id in ids(answer)}


def saw(state: State, visitor: str, *acts: tuple[str, str]) -> None:
    state.append_events([Event(visitor, item_id, action, n + 1) for n, (item_id, action) in enumerate(acts)])


def test_an_event_changes_the_next_list(ranker: Ranker, state: State) -> None:
    before = ranker.recommend([Request("u")], state)[0]
    saw(state, "u", ("green-7", "click"))
    after = ranker.recommend([Request("u")], state)[0]
    assert styles(before) == {"red", "green", "blue"}
    assert styles(after) == {"green"}
    assert ids(after) == [f"green-{n}" for n in range(10)]
    assert (before.served_by, after.served_by) == ("popular", "model")


def test_unknown_visitors_get_what_is_popular(ranker: Ranker, state: State) -> None:
    for visitor in ("never-seen", "session:new", None):
        answer = ranker.recommend([Request(visitor, k=3)], state)[0]
        assert ids(answer) == ["blue-0", "green-0", "red-0"]
        assert answer.served_by == "popular"


def test_a_user_without_events_is_known_by_their_session(ranker: Ranker, state: State) -> None:
    saw(state, "session:s", ("green-1", "view"))
    saw(state, "known", ("red-1", "view"))
    fresh = ranker.recommend([Request("fresh", session="session:s", k=3)], state)[0]
    known = ranker.recommend([Request("known", session="session:s", k=3)], state)[0]
    assert (styles(fresh), fresh.served_by) == ({"green"}, "model")
    assert styles(known) == {"red"}
    assert len(state.user("fresh").shown) == 1


def test_events_of_unknown_items_do_not_count_yet(ranker: Ranker, state: State) -> None:
    saw(state, "u", ("not-in-the-catalogue", "view"))
    assert ranker.recommend([Request("u")], state)[0].served_by == "popular"


def test_events_sent_along_are_used_and_not_stored(ranker: Ranker, state: State) -> None:
    now_ms = time.time_ns() // 1_000_000
    answer = ranker.recommend([Request("u", events=(Act("red-3", "view", now_ms),), store=False)], state)[0]
    assert styles(answer) == {"red"}
    assert state.counts() == {"events": 0, "shown": 0, "erased": 0}


def test_events_sent_along_are_placed_by_their_time(ranker: Ranker, state: State) -> None:
    state.append_events([Event("u", "blue-1", "view", 1000)])
    older = ranker.recommend([Request("u", k=3, events=(Act("red-1", "view", 500),))], state)[0]
    newer = ranker.recommend([Request("u", k=3, events=(Act("red-1", "view", 1500),))], state)[0]
    assert (styles(older), styles(newer)) == ({"blue"}, {"red"})


def test_the_item_at_hand_counts_and_is_not_shown(ranker: Ranker, state: State) -> None:
    answer = ranker.recommend([Request(None, scene="item", item_id="red-2", k=19)], state)[0]
    assert "red-2" not in ids(answer)
    assert styles(answer) == {"red"}
    assert answer.removed == {"context": 1}
    assert answer.served_by == "model"


def test_the_scene_of_the_cart_shows_what_goes_with_it(ranker: Ranker, state: State) -> None:
    answer = ranker.recommend([Request(None, scene="cart", cart=("red-0", "red-4"), k=18)], state)[0]
    assert styles(answer) == {"green", "blue"}, "what is of a kind with the cart would take its place"
    assert answer.removed == {"context": 2, "substitute": 18}
    assert answer.served_by == "model"
    (full,) = ranker.recommend([Request(None, scene="cart", cart=("red-0",), k=50)], state)
    assert styles(full) == {"red", "green", "blue"}, "but it is better than a short list"


class Away(SqliteState):
    """A state whose reads, or writes, fail."""

    failing: tuple[str, ...] = ()

    def histories(self, visitors: Sequence[str], limit: int) -> list[History]:
        if "histories" in self.failing:
            raise StateError("away")
        return super().histories(visitors, limit)

    def log_shown(self, lists: Sequence[Shown]) -> None:
        if "log_shown" in self.failing:
            raise StateError("away")
        super().log_shown(lists)


def test_a_state_that_is_away_costs_the_history_and_no_answer(ranker: Ranker, tmp_path: Path) -> None:
    state = Away(tmp_path / "away.db")
    saw(state, "u", ("green-7", "click"))
    assert ranker.recommend([Request("u")], state)[0].without == ()
    state.failing = ("histories",)
    lost, here = ranker.recommend([Request("u"), Request("u", events=(Act("red-1", "view", 1),))], state)
    assert (lost.served_by, lost.without) == ("popular", ("state",))
    assert (here.served_by, styles(here)) == ("context", {"red"})
    state.failing = ("log_shown",)
    unlogged = ranker.recommend([Request("u")], state)[0]
    assert (unlogged.served_by, unlogged.without) == ("model", ("log",))
    assert len(state.user("u").shown) == 3


def test_what_is_popular_keeps_to_the_rules(scorer: FakeScorer) -> None:
    scenes = {"home": SceneConfig(never=({"category": ("red",)},))}
    ranker = Ranker(scorer, ServeConfig(scenes=scenes))
    answer = ranker.popular(Request("u", k=3, item_id="blue-0", filters=Filters(exclude=("green-0",))))
    assert styles(answer) == {"blue", "green"}
    assert not {"blue-0", "green-0"} & set(ids(answer))
    assert (answer.served_by, answer.without) == ("popular", ("time",))
    with pytest.raises(UnknownSceneError):
        ranker.popular(Request("u", scene="attic"))


def test_search_shows_what_is_meant_and_nothing_else(ranker: Ranker, state: State) -> None:
    answer = ranker.recommend([Request(None, scene="search", query="gren thing", k=50)], state)[0]
    assert ids(answer)[0].startswith("green")
    assert {source for item in answer.items for source in item.sources} == {"query"}
    assert answer.served_by == "query"
    nothing = ranker.recommend([Request("u", scene="search", query="zebra")], state)[0]
    assert ids(nothing) == []


def test_search_is_blended_with_taste(ranker: Ranker, state: State) -> None:
    saw(state, "r", ("red-0", "view"))
    saw(state, "g", ("green-0", "view"))
    searches = [Request(visitor, scene="search", query="thing", k=5) for visitor in ("r", "g")]
    of_red, of_green = ranker.recommend(searches, state)
    assert (styles(of_red), styles(of_green)) == ({"red"}, {"green"}), "all things fit alike"
    assert of_red.served_by == "model"
    exact = ranker.recommend([replace(searches[0], query="blue 7", k=1)], state)[0]
    assert ids(exact) == ["blue-7"], "what is asked for comes before what is liked"
    scores = [item.score for item in of_red.items]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] <= scores[0] <= 1


def test_search_keeps_to_the_filters(ranker: Ranker, state: State) -> None:
    request = Request("u", scene="search", query="thing", k=50, filters=Filters(category=("blue",), price_max=3))
    answer = ranker.recommend([request], state)[0]
    assert sorted(ids(answer)) == ["blue-0", "blue-1", "blue-2"]


@pytest.mark.parametrize("query", [None, "", "  "])
def test_a_search_needs_a_query(ranker: Ranker, state: State, query: str | None) -> None:
    with pytest.raises(UsageError, match=r"say what for, in context\.query"):
        ranker.recommend([Request("u", scene="search", query=query)], state)


def test_what_goes_together_comes_first(scorer: FakeScorer, state: State) -> None:
    scenes = {"cart": SceneConfig(sources=("together",))}
    ranker = Ranker(scorer, ServeConfig(scenes=scenes, diversity=0))
    answer = ranker.recommend([Request(None, scene="cart", cart=("red-0", "red-4"), k=2)], state)[0]
    assert sorted(ids(answer)) == ["red-1", "red-5"]
    assert answer.items[0].sources == ["together"]


def test_a_scene_without_a_cart_is_answered_all_the_same(ranker: Ranker, state: State) -> None:
    assert len(ranker.recommend([Request(None, scene="cart")], state)[0].items) == 10


def test_what_the_history_put_in_the_cart_is_put_there_once(state: State) -> None:
    """The shop sends the cart as events and as context: the model reads each once, at its time."""
    spy = Spy()
    saw(state, "u", ("red-1", "cart"), ("red-2", "cart"), ("red-3", "view"))
    Ranker(spy, PLAIN).recommend([Request("u", scene="cart", cart=("red-1", "red-2", "blue-0"))], state)
    numbers = [spy.catalogue.index[item_id] for item_id in ("red-1", "red-2", "red-3", "blue-0")]
    assert spy.read.item_BL[0].tolist() == [*numbers, 0, 0, 0, 0]
    assert spy.read.action_BL[0, 3] == ACTION_CODE["cart"]


def test_the_model_is_given_the_actions_that_it_reads(state: State) -> None:
    spy = Spy()
    spy.actions = ("cart",)
    saw(state, "u", ("red-1", "cart"), ("green-2", "view"))
    Ranker(spy, PLAIN).recommend([Request("u", scene="item", item_id="blue-3")], state)
    assert spy.read.item_BL[0].tolist() == [spy.catalogue.index["red-1"], *[0] * 7]


def test_a_scene_weighs_the_heads(state: State) -> None:
    spy = Spy()
    Ranker(spy, ServeConfig()).recommend(
        [Request(None, scene="cart", cart=("red-0",)), Request("u", item_id="red-0")], state
    )
    assert spy.weighed == [{"cart": 0.5, "purchase": 0.5}, {"next": 1.0}]


def test_what_is_in_the_cart_is_not_shown(ranker: Ranker, state: State) -> None:
    answer = ranker.recommend([Request(None, cart=("red-0", "red-1"), k=5)], state)[0]
    assert ids(answer) == ["red-2", "red-3", "red-4", "red-5", "red-6"]


def test_bought_hidden_and_seen_items(scorer: FakeScorer, state: State) -> None:
    scenes = {"home": SceneConfig(), "fresh": SceneConfig(hide_seen=True, hide_purchased=False)}
    ranker = Ranker(scorer, ServeConfig(scenes=scenes, diversity=0))
    saw(state, "u", ("red-0", "purchase"), ("red-1", "hide"), ("red-2", "view"), ("red-3", "dislike"))
    home, fresh = ranker.recommend([Request("u", k=3), Request("u", k=3, scene="fresh")], state)
    assert ids(home) == ["red-2", "red-4", "red-5"]
    assert home.removed == {"hidden": 2, "bought": 1}
    assert ids(fresh) == ["red-4", "red-5", "red-6"]
    assert fresh.removed == {"hidden": 2, "seen": 2}


def test_a_narrow_filter_still_fills_the_list(scorer: FakeScorer, state: State) -> None:
    ranker = Ranker(scorer, ServeConfig(per_source=3, diversity=0))
    saw(state, "u", ("red-0", "view"))
    answer = ranker.recommend([Request("u", k=5, filters=Filters(category=("blue",), brand=("odd",)))], state)[0]
    assert ids(answer) == ["blue-1", "blue-3", "blue-5", "blue-7", "blue-9"]
    assert answer.removed["category"] > 0


def test_fewer_are_returned_when_fewer_are_left(ranker: Ranker, state: State) -> None:
    answer = ranker.recommend([Request("u", k=10, filters=Filters(category=("red",), price_max=3))], state)[0]
    assert sorted(ids(answer)) == ["red-0", "red-1", "red-2"]
    assert ids(ranker.recommend([Request("u", filters=Filters(category=("none",)))], state)[0]) == []


def test_all_items_can_be_asked_for(ranker: Ranker, state: State) -> None:
    answer = ranker.recommend([Request("u", k=200)], state)[0]
    assert len(set(ids(answer))) == len(ids(answer)) == 60


@pytest.mark.parametrize("k", [0, -1, 201])
def test_k_is_1_to_200(ranker: Ranker, state: State, k: int) -> None:
    with pytest.raises(UsageError, match="1 to 200"):
        ranker.recommend([Request("u", k=k)], state)


def test_unknown_scene_and_item_are_named(ranker: Ranker, state: State) -> None:
    with pytest.raises(UnknownSceneError, match="'attic'; there are: cart, home, item, search"):
        ranker.recommend([Request("u", scene="attic")], state)
    with pytest.raises(UnknownItemError, match="'nothing'"):
        ranker.recommend([Request("u", item_id="nothing")], state)
    with pytest.raises(UnknownItemError, match="'nothing'"):
        ranker.recommend([Request("u", cart=("red-0", "nothing"))], state)


def test_an_unknown_source_is_refused_at_the_start(scorer: FakeScorer) -> None:
    with pytest.raises(UsageError, match="unknown source 'magic'"):
        Ranker(scorer, ServeConfig(scenes={"home": SceneConfig(sources=("model", "magic"))}))


@pytest.mark.parametrize("heads", [{}, {"next": 0.0}, {"next": 1.0, "purchase": -0.5}])
def test_heads_need_weights(scorer: FakeScorer, heads: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="weights of its heads"):
        Ranker(scorer, ServeConfig(scenes={"home": SceneConfig(heads=heads)}))


def test_an_empty_catalogue_gives_an_empty_list(state: State) -> None:
    ranker = Ranker(FakeScorer(catalogue(per_style=0)), PLAIN)
    assert ids(ranker.recommend([Request("u")], state)[0]) == []


def test_neighbours_in_a_batch_do_not_change_an_answer(ranker: Ranker, state: State) -> None:
    saw(state, "r", ("red-1", "view"))
    saw(state, "g", ("green-1", "cart"), ("green-2", "purchase"))
    requests = [
        Request("r", k=4),
        Request("g", k=50, diversity=0.7),
        Request(None, k=2, scene="item", item_id="blue-5"),
        Request("nobody", k=200),
        Request("r", k=7, diversity=0.3),
    ]
    together = ranker.recommend(requests, state)
    alone = [ranker.recommend([request], state)[0] for request in requests]
    assert [ids(answer) for answer in together] == [ids(answer) for answer in alone]
    assert [answer.removed for answer in together] == [answer.removed for answer in alone]
    assert [answer.served_by for answer in together] == [answer.served_by for answer in alone]


def test_diversity_mixes_styles(ranker: Ranker, state: State) -> None:
    saw(state, "u", ("red-1", "view"))
    plain, mixed = ranker.recommend([Request("u", k=6), Request("u", k=6, diversity=0.9)], state)
    assert styles(plain) == {"red"}
    assert styles(mixed) == {"red", "green", "blue"}


def test_exploration_is_logged_with_its_propensity(ranker: Ranker, state: State) -> None:
    saw(state, "u", ("red-1", "view"))
    calm = ranker.recommend([Request("u", k=5)], state)[0]
    assert [item.propensity for item in calm.items] == [1.0] * 5
    bold = ranker.recommend([Request("u", k=5, explore=1.0)], state)[0]
    assert [item.propensity for item in bold.items] == pytest.approx([1 / left for left in (50, 49, 48, 47, 46)])
    logged = state.user("u").shown[-1]
    assert logged.item_ids == tuple(ids(bold))
    assert logged.propensities == tuple(item.propensity for item in bold.items)
    assert (logged.request_id, logged.scene, logged.model, logged.served_by) == (bold.request_id, "home", "m1", "model")


def test_nothing_is_kept_of_a_request_that_says_so(ranker: Ranker, state: State) -> None:
    ranker.recommend([Request("u", store=False), Request("v")], state)
    assert state.counts()["shown"] == 1
    assert state.user("u").shown == []


# ---------------------------------------------------------------- scores and failures


class NaNScorer(FakeScorer):
    def fuse(self, *args: object, **kwargs: object) -> np.ndarray:
        scores = super().fuse(*args, **kwargs)  # type: ignore[arg-type]
        scores[args[2] == self.catalogue.index["red-0"]] = np.nan  # type: ignore[index]
        return scores


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_a_nan_score_ranks_last_and_shows_as_zero(state: State, diversity: float) -> None:
    ranker = Ranker(NaNScorer(), PLAIN)
    saw(state, "u", ("red-1", "view"))
    answer = ranker.recommend([Request("u", k=60, diversity=diversity)], state)[0]
    assert len(answer.items) == 60
    assert answer.items[-1].item_id == "red-0"
    assert answer.items[-1].score == 0.0


def test_a_failing_index_is_done_without(ranker: Ranker, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("the index is not there")

    saw(state, "u", ("red-1", "view"))
    request = Request("u", k=3)
    assert ranker.recommend([request], state)[0].without == ()
    monkeypatch.setattr(ranker.retriever._nearest, "search", fails)
    (answer,) = ranker.recommend([request], state)
    assert (answer.served_by, answer.without) == ("model", ("index",)), "it still scores what other sources propose"
    sources = {source for item in answer.items for source in item.sources}
    assert "model" not in sources
    assert "cooccurrence" in sources
    monkeypatch.setattr(ranker._text, "search", fails)
    (found,) = ranker.recommend([Request("u", scene="search", query="red", k=3)], state)
    assert (len(found.items), found.without) == (3, ("index",))
    monkeypatch.setattr(ranker.retriever._alike, "search", fails)
    (alike,) = ranker.recommend([Request("u", scene="item", item_id="red-2", k=3)], state)
    assert (len(alike.items), alike.without) == (3, ("index",))


@pytest.mark.parametrize("broken", ["user_vectors", "fuse"])
def test_a_failing_model_is_replaced_by_cooccurrence_then_popularity(
    ranker: Ranker, scorer: FakeScorer, state: State, broken: str
) -> None:
    scorer.broken = broken
    saw(state, "u", ("red-4", "view"))
    known, unknown = ranker.recommend([Request("u", k=3), Request("nobody", k=3)], state)
    assert (known.served_by, known.without) == ("cooccurrence", ("model",)), "and it is counted"
    assert ids(known)[0] == "red-5"
    assert ids(known)[1:] == ["blue-0", "green-0"]
    assert unknown.served_by == "popular"
    assert ids(unknown) == ["blue-0", "green-0", "red-0"]
    scorer.broken = None
    assert ranker.recommend([Request("u")], state)[0].served_by == "model"


def test_scores_are_between_0_and_1_and_ordered(ranker: Ranker, scorer: FakeScorer, state: State) -> None:
    saw(state, "u", ("red-4", "view"))
    for broken in (None, "fuse"):
        scorer.broken = broken
        scores = [item.score for item in ranker.recommend([Request("u", k=60)], state)[0].items]
        assert scores == sorted(scores, reverse=True)
        assert 0 <= scores[-1] <= scores[0] <= 1


class Recording(FakeScorer):
    history: HistoryBatch

    def user_vectors(self, history: HistoryBatch) -> np.ndarray:
        self.history = history
        return super().user_vectors(history)


def test_dates_have_no_hour_in_serving_either(state: State) -> None:
    scorer = Recording()
    scorer.clock = "date"
    day_ms = 86_400_000
    state.append_events([Event("u", "red-1", "view", 5 * day_ms + 1234), Event("u", "red-2", "view", 7 * day_ms + 99)])
    Ranker(scorer, PLAIN).recommend([Request("u")], state)
    assert scorer.history.gap_s_BL[0, :2].tolist() == [0.0, 2 * 86_400.0]
    assert scorer.history.hour_BL[0, :2].tolist() == [-1.0, -1.0]
    assert scorer.history.now_hour_B.tolist() == [-1.0]


def test_it_is_told_how_long_after_the_last_event_a_visitor_asks(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, times = Spy(), (10**12, 10**12 + 50_000, 10**12 + 5 * 3_600_000)
    ranker = Ranker(scorer, PLAIN)
    state.append_events([Event("u", "red-1", "view", 10**12)])
    asked = []
    for now_ms in times:
        monkeypatch.setattr("rayrec.ranking.reading.time.time_ns", lambda now_ms=now_ms: now_ms * 1_000_000)
        ranker.recommend([Request("u")], state)
        asked.append((scorer.read.since_s_B.tolist(), scorer.read.now_hour_B.tolist()))
    assert asked == [([0.0], [1.0]), ([0.0], [1.0]), ([256 * 60.0], [6.0])]  # 2001-09-09 01:46:40 UTC


def test_the_item_on_the_page_is_looked_at_now(state: State) -> None:
    scorer = Recording()
    state.append_events([Event("u", "red-1", "view", 10**12)])
    Ranker(scorer, PLAIN).recommend([Request("u", item_id="red-2")], state)
    assert scorer.history.since_s_B.tolist() == [0.0]


def test_history_is_encoded_like_in_training(state: State) -> None:
    scorer = Recording()
    saw(state, "u", ("red-1", "view"), ("nowhere", "view"), ("red-1", "cart"))
    Ranker(scorer, PLAIN).recommend([Request("u")], state)
    index = scorer.catalogue.index["red-1"]
    assert scorer.history.item_BL[0, :3].tolist() == [index, index, 0]
    assert scorer.history.action_BL[0, :3].tolist() == [1, 3, 0]
    assert scorer.history.seen_BL[0, :2].tolist() == [False, True]


# ---------------------------------------------------------------- reasons


def test_reasons_are_given_when_asked(ranker: Ranker, state: State) -> None:
    saw(state, "u", ("red-4", "view"))
    asked = Request("u", k=60, reasons=True)
    reasons = {item.item_id: item.reasons for item in ranker.recommend([asked], state)[0].items}
    assert reasons["red-5"][0] == "Often follows Red thing 4"
    assert reasons["red-7"][0] == "Fits your interest in Red thing 4"
    assert "New in the shop" in reasons["red-19"]
    assert all(item.reasons == [] for item in ranker.recommend([replace(asked, reasons=False)], state)[0].items)


def test_reasons_know_what_visitors_do_now(ranker: Ranker, state: State) -> None:
    saw(state, "u", ("red-4", "view"))
    row, n = ranker.catalogue.index, len(ranker.catalogue) + 1
    follows = sp.csr_matrix(([5.0], ([row["red-4"]], [row["blue-2"]])), shape=(n, n), dtype=np.float32)
    ranker.retriever.trend = Trend(np.empty(0, np.int64), follows)
    answer = ranker.recommend([Request("u", k=60, reasons=True)], state)[0]
    reasons = {item.item_id: item.reasons for item in answer.items}
    assert reasons["blue-2"][0] == "Often follows Red thing 4"


def test_reasons_on_an_item_page_are_about_the_item(ranker: Ranker, state: State) -> None:
    saw(state, "u", ("blue-4", "view"))
    request = Request("u", scene="item", item_id="red-2", reasons=True, k=20)
    reasons = {item.item_id: item.reasons for item in ranker.recommend([request], state)[0].items}
    assert reasons["red-3"][0] == "Often follows Red thing 2"
    assert reasons["red-9"][0] == "Similar to Red thing 2"


def test_sources_and_timings_are_told(ranker: Ranker, state: State) -> None:
    saw(state, "u", ("red-4", "view"))
    answer = ranker.recommend([Request("u", k=1)], state)[0]
    assert set(answer.timing_ms) == {"history", "retrieve", "filter", "score", "rerank", "explain"}
    assert all(ms >= 0 for ms in answer.timing_ms.values())
    assert answer.items[0].sources == ["model", "popular"]
