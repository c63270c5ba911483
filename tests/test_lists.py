"""Recorded lists get the ranks that the same lists get when a ranker is asked."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute
import tinyshop

from rayrec.evaluation.lists import LIST_SCHEMA, answers_of_lists
from rayrec.evaluation.metrics import top
from rayrec.evaluation.replay import Question, ReplaySettings, Visitors, replay, target_places
from rayrec.history import HistoryBatch
from rayrec.schema import ACTIONS

SEQUENCES = tinyshop.sequence_table()
SETTINGS = ReplaySettings("test", tinyshop.N_ITEMS, "time", 10, protocols=("metrics",))


class Fixed:
    """Scores that depend on the visitor's history alone."""

    heads = ("next",)
    actions = ACTIONS

    def rank_all(self, history: HistoryBatch, head: str) -> np.ndarray:
        """See `floors.Ranker`."""
        seeds = (history.item_BL * np.arange(1, history.item_BL.shape[1] + 1)).sum(1)
        return np.stack([np.random.default_rng(seed).permutation(tinyshop.N_ITEMS + 1) for seed in seeds]).astype(float)

    def score(self, history: HistoryBatch, candidates_BC: np.ndarray, head: str) -> np.ndarray:
        """See `floors.Ranker`."""
        return np.take_along_axis(self.rank_all(history, head), candidates_BC, 1)


def lists_of(length: int) -> pa.Table:
    """What `Fixed` would show, with what was seen still in it."""
    visitors = Visitors.of(SEQUENCES)
    place_U = target_places(SEQUENCES, visitors, SETTINGS)["metrics"]
    rows = np.flatnonzero(place_U >= 0)
    question = Question.ask(visitors, rows, place_U[rows], SETTINGS)
    items = top(Fixed().rank_all(question.history, "next"), length)
    return pa.table([visitors.user_U[rows].tolist(), items.tolist()], schema=LIST_SCHEMA)


def test_lists_of_everything_get_the_answers_of_their_ranker() -> None:
    asked = replay({"model": Fixed()}, SEQUENCES, SETTINGS)
    recorded = answers_of_lists({"model": lists_of(tinyshop.N_ITEMS)}, SEQUENCES, SETTINGS)
    assert len(recorded) > 10
    assert recorded.sort_by("user_id").equals(asked.sort_by("user_id"))


def test_a_target_beyond_the_list_is_last() -> None:
    whole = answers_of_lists({"model": lists_of(tinyshop.N_ITEMS)}, SEQUENCES, SETTINGS)["rank"].to_numpy()
    short = answers_of_lists({"model": lists_of(12)}, SEQUENCES, SETTINGS)["rank"].to_numpy()
    known = short < tinyshop.N_ITEMS
    assert 0 < known.sum() < len(known)
    assert (short[known] == whole[known]).all()
    assert (whole[~known] > 12 - 10).all()


def test_a_user_without_a_list_is_counted_and_nonsense_is_taken_out() -> None:
    (first, *_), lists = lists_of(5)["user_id"].to_pylist(), lists_of(tinyshop.N_ITEMS)
    good = lists.filter(pa.compute.equal(lists["user_id"], first))
    (items,) = good["items"].to_pylist()
    noisy = pa.table([[first, "nobody"], [[0, items[0], items[0], *items], [1]]], schema=LIST_SCHEMA)
    judged = answers_of_lists({"good": good, "noisy": noisy}, SEQUENCES, SETTINGS)
    of = {name: judged.filter(pa.compute.equal(judged["ranker"], name)) for name in ("good", "noisy")}
    assert of["good"]["rank"].equals(of["noisy"]["rank"])
    others = of["good"].filter(pa.compute.not_equal(of["good"]["user_id"], first))
    assert len(others) > 5
    assert set(others["rank"].to_pylist()) == {tinyshop.N_ITEMS}
