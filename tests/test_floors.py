from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from evaluation_shop import counted_items, leave_one_out, sequence_table

from rayrec.catalogue import Catalogue
from rayrec.data.training_events import TrainingEvents
from rayrec.evaluation.floors import TIE_BREAK, Markov, Popular, against_even
from rayrec.evaluation.judge import floor_makers, summarise
from rayrec.evaluation.replay import ReplaySettings, replay
from rayrec.history import HistoryBatch, encode_history


def history(*items: list[int], max_len: int = 8) -> HistoryBatch:
    flat = [item for row in items for item in row]
    offsets = np.cumsum([0, *map(len, items)])
    return encode_history(flat, [1] * len(flat), range(len(flat)), offsets, max_len=max_len, clock="order")


def markov_of(*histories: list[int], n_items: int) -> Markov:
    """Counted from whole histories: two events are added that nobody trains on."""
    events = TrainingEvents.of(sequence_table(*[[*items, 1, 1] for items in histories]))
    return Markov.count(events, np.bincount(events.item_E, minlength=n_items + 1))


def test_popular_scores_by_training_events_for_everybody() -> None:
    popular = Popular(np.array([0, 3, 1, 0]))
    assert popular.rank_all(history([1], []), "next").tolist() == [[0, 3, 1, 0], [0, 3, 1, 0]]


def test_popular_probability_is_bayes_rule_by_hand() -> None:
    popular = Popular(np.array([0, 3, 1, 0]))  # shares 4/7, 2/7, 1/7
    one_of_two = popular.score(history([1]), np.array([[1, 3]]), "next")
    np.testing.assert_allclose(one_of_two, [[(4 / 7) / (4 / 7 + 1 / 3), (1 / 7) / (1 / 7 + 1 / 3)]])


def test_markov_weighs_steps_back_by_half() -> None:
    markov = markov_of([1, 2, 1, 3, 1, 2], [4, 5], n_items=5)
    popular = TIE_BREAK * np.array([0, 3, 2, 1, 1, 1]) / 3
    scores = markov.rank_all(history([4, 1], [1, 4], [5]), "next")
    np.testing.assert_allclose(scores[0] - popular, [0, 0, 2 / 3, 1 / 3, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(scores[1] - popular, [0, 0, 1 / 3, 1 / 6, 0, 1], atol=1e-6)
    np.testing.assert_allclose(scores[2], popular, atol=1e-6)


def test_markov_reads_five_steps_back() -> None:
    markov = markov_of([1, 2], n_items=3)
    near, far = markov.rank_all(history([1, 3, 3, 3, 3], [1, 3, 3, 3, 3, 3]), "next")
    assert near[2] - far[2] == pytest.approx(0.5**4, abs=1e-6)
    short = markov.rank_all(history([1, 3, 3], max_len=2), "next")
    np.testing.assert_allclose(short[0], far, atol=1e-6)


def test_empty_history_and_unknown_items_fall_back_on_popularity() -> None:
    markov = markov_of([1, 2, 2], n_items=2)
    scores = markov.rank_all(history([], [0, 0]), "next")
    assert (scores[:, 2] > scores[:, 1]).all()
    assert (scores[0] == scores[1]).all()


def test_floors_are_defined_without_training_events() -> None:
    nothing = Markov.count(TrainingEvents.of(sequence_table([1])), np.zeros(3, np.int64))
    for floor in (nothing, Popular(np.zeros(3, np.int64))):
        assert np.isfinite(floor.rank_all(history([1], []), "next")).all()
        score = floor.score(history([1], []), np.array([[1, 2], [2, 1]]), "next")
        assert ((score > 0) & (score < 1)).all()


def test_probabilities_lie_between_zero_and_one_and_follow_the_scores() -> None:
    markov = markov_of([1, 2, 1, 3, 1, 2], [4, 5], n_items=5)
    batch, every = history([4, 1]), np.arange(1, 6)[None]
    score = markov.score(batch, every, "next")
    assert ((score > 0) & (score < 1)).all()
    assert np.argsort(-score[0])[:3].tolist() == np.argsort(-markov.rank_all(batch, "next")[0, 1:])[:3].tolist()


def test_one_candidate_alone_is_the_one() -> None:
    assert against_even(np.array([[0.2]]), 5).tolist() == [[1.0]]


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "markov", "popular_hr"), [("beauty", (0.0739, 0.0471), 0.0110), ("ml1m_posters", (0.2440, 0.1420), 0.0369)]
)
def test_floors_on_real_logs(
    shared_data: Callable[[str], Path], name: str, markov: tuple[float, float], popular_hr: float
) -> None:
    """Against an independent count of the same floors: .0741/.0472 on beauty, .2440/.1420 on ml1m_posters."""
    folder = shared_data(name)
    csv = folder / "events.csv"
    events = pacsv.read_csv(csv) if csv.exists() else pq.read_table(folder / "events.parquet")
    sequences, n_items = leave_one_out(events)
    catalogue = Catalogue.from_table(counted_items(sequences, n_items))
    rankers = {name: make() for name, make in floor_makers(sequences, catalogue).items()}
    rankers["model"] = rankers.pop("markov")
    settings = ReplaySettings("test", n_items, "order", max_len=5, protocols=("metrics",))
    result = summarise(replay(rankers, sequences, settings), catalogue, settings, tuple(rankers))
    assert result["not_new"] == 0
    assert result["metrics"]["hr@10"] == pytest.approx(markov[0], abs=5e-4)
    assert result["metrics"]["ndcg@10"] == pytest.approx(markov[1], abs=5e-4)
    assert result["floors"]["popular"]["hr@10"] == pytest.approx(popular_hr, abs=5e-4)
