"""The verdict on a candidate, what both bundles are asked, and that the current one is asked fairly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tinyshop

from rayrec.bundle import Bundle
from rayrec.data.dataset import Dataset
from rayrec.evaluation.replay import ReplaySettings, replay
from rayrec.followers import Followers
from rayrec.retrain.comparison import (
    CANDIDATE,
    CURRENT,
    DAY_MS,
    Renumbered,
    Rule,
    asked_since,
    gains,
    scorer_for,
    target_times,
    verdict,
)
from rayrec.schema import SEQUENCE_SCHEMA
from rayrec.serving.scorer import load_scorer
from rayrec.training.local import train_alone
from rayrec.training.publish import write_bundle

HALF = np.array([0.5, 0.5, 0.0, 1.0])


@pytest.mark.parametrize(
    ("gain", "margin", "passed"),
    [(0.0, 0.0, True), (-0.01, 0.0, False), (-0.01, 0.02, True), (-0.011, 0.02, False), (0.3, 0.0, True)],
)
def test_a_candidate_may_lack_the_margin_and_no_more(gain: float, margin: float, passed: bool) -> None:
    found = verdict(HALF + gain, HALF, margin)  # the mean of HALF is a half: a hundredth is two per cent of it
    assert (found["passed"], found["users"]) == (passed, 4)
    assert found["difference"] == pytest.approx(gain)
    low, high = found["difference_95"]
    assert low <= gain + 1e-9
    assert high >= gain - 1e-9


def test_the_interval_is_over_the_same_visitors() -> None:
    found = verdict(np.array([1.0, 0.0] * 50), np.array([0.0, 1.0] * 50), 0.0)
    assert found["difference"] == 0
    assert found["difference_95"][0] < -0.1 < 0.1 < found["difference_95"][1]


def test_without_a_question_nobody_passes() -> None:
    assert verdict(np.empty(0), np.empty(0), 1.0) == {
        "passed": False, "users": 0, "reason": "nobody has a question to judge by",
    }  # fmt: skip


def test_both_without_a_hit_pass() -> None:
    assert verdict(np.zeros(3), np.zeros(3), 0.0)["passed"]


@pytest.mark.parametrize(
    ("rule", "since"),
    [
        (Rule(days=1.0, least=1), 2 * DAY_MS),
        (Rule(days=1.0, least=3), DAY_MS + 5),  # two in the newest day: a third from the day before
        (Rule(days=0.0, least=1), 3 * DAY_MS),
        (Rule(days=9.0, least=1), -6 * DAY_MS),
        (Rule(days=1.0, least=99), 7),  # all there are
    ],
)
def test_the_newest_day_is_asked_about_or_the_newest_targets(rule: Rule, since: int) -> None:
    times = np.array([7, 3 * DAY_MS, DAY_MS + 5, 2 * DAY_MS])
    assert asked_since(times, rule) == since
    assert asked_since(times[:0], rule) is None


# ---------------------------------------------------------------- the current bundle before a dataset that grew


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("old")
    dataset: Dataset = tinyshop.write(folder / "dataset", users=20)
    config = tinyshop.tiny("train.epochs=1", "train.fusion_epochs=1", "train.refit_epochs=0")
    (folder / "checkpoint").mkdir()
    train_alone(dataset, config, folder / "checkpoint")
    nothing = sp.csr_array((tinyshop.N_ITEMS + 1,) * 2)
    followers = Followers(nothing, nothing)
    return write_bundle(folder / "checkpoint", str(folder / "bundles"), dataset, dataset.catalogue(), config, followers)


def test_items_that_are_numbered_otherwise_get_the_same_ranks(bundle: Bundle) -> None:
    scorer = load_scorer(bundle)
    order = np.random.default_rng(0).permutation(tinyshop.N_ITEMS) + 1
    theirs = np.concatenate([[0], order])  # the new number n is their order[n - 1]
    sequences = tinyshop.sequence_table(20, seed=3)
    ours = np.argsort(theirs)
    lists = sequences["item"].combine_chunks()
    items = pa.ListArray.from_arrays(lists.offsets, pa.array(ours[np.asarray(lists.flatten())], pa.int32()))
    renumbered = sequences.set_column(1, SEQUENCE_SCHEMA.field("item"), items)
    settings = ReplaySettings("test", tinyshop.N_ITEMS, "time", bundle.config.model.max_len)
    straight = replay({"model": scorer}, sequences, settings).select(["protocol", "user_id", "rank"])
    around = replay({"model": Renumbered(scorer, theirs)}, renumbered, settings).select(["protocol", "user_id", "rank"])
    assert around.sort_by([("protocol", "ascending"), ("user_id", "ascending")]).equals(
        straight.sort_by([("protocol", "ascending"), ("user_id", "ascending")])
    )


def test_an_item_that_it_never_met_is_ranked_by_what_the_catalogue_says(bundle: Bundle, tmp_path: Path) -> None:
    dataset = tinyshop.write(tmp_path / "dataset", users=5)
    stranger = dataset.catalogue().table.to_pylist()[4]  # told anew under another id
    items = [*dataset.catalogue().table.to_pylist(), {**stranger, "item_id": "red-new", "item_index": 41, "n_train": 0}]
    table = pa.Table.from_pylist(items, dataset.catalogue().table.schema)
    for shard in (tmp_path / "dataset" / "items").iterdir():
        shard.unlink()
    pa.parquet.write_table(table, tmp_path / "dataset" / "items" / "0.parquet")
    scorer = scorer_for(str(bundle.path), dataset.path)
    assert scorer.theirs_N.tolist() == list(range(42))
    vectors = scorer.scorer.vectors_ND
    assert np.linalg.norm(vectors[41]) > 0
    own_colour, other = vectors[41] @ vectors[10], vectors[41] @ vectors[20]  # both cold: attributes and pictures alone
    assert own_colour > other


def test_what_is_asked_can_be_restricted_to_the_newest(tmp_path: Path) -> None:
    dataset = tinyshop.write(tmp_path / "dataset", users=12)
    times = np.sort(target_times(dataset))
    assert len(times) == 12

    class Flat:
        heads, actions = ("next",), tinyshop.tiny().model.actions

        def rank_all(self, history: object, head: str) -> np.ndarray:
            return np.tile(np.arange(tinyshop.N_ITEMS + 1.0), (len(history), 1))  # type: ignore[arg-type]

        def score(self, history: object, candidates_BC: np.ndarray, head: str) -> np.ndarray:
            return candidates_BC / 100

    settings = ReplaySettings(
        "test", tinyshop.N_ITEMS, "time", 10, protocols=("next", "metrics", "cart", "purchase"), since_ms=int(times[-4])
    )
    answers = replay({CANDIDATE: Flat(), CURRENT: Flat()}, dataset.sequences(), settings)
    found = gains(answers)
    assert len(found["next"][CANDIDATE]) == 4
    assert found["next"][CANDIDATE].tolist() == found["next"][CURRENT].tolist()
    assert len(found["metrics"][CURRENT]) <= 4
    assert len(found["purchase"][CURRENT]) <= 4
