"""A shop where carts follow another rule than views: each head learns its own, and weights mix them.

Visitors of the tiny shop look at one item of a colour after the other, and now and then put the partner of the item
that they have just looked at into the cart: the item at the same place in the next colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tinyshop

from rayrec.data.dataset import Dataset
from rayrec.evaluation import ReplaySettings, replay, summarise
from rayrec.history import HistoryBatch, encode_history
from rayrec.model.scorer import Scorer
from rayrec.schema import ACTION_CODE, ACTIONS, SEQUENCE_SCHEMA
from rayrec.settings import with_settings
from rayrec.training.local import LocalFeed, train_alone
from rayrec.training.survey import survey
from rayrec.training.windows import only_read

VIEW, CART = ACTION_CODE["view"], ACTION_CODE["cart"]
LAST_SEEN = np.array([item for item in range(1, tinyshop.N_ITEMS + 1) if item not in tinyshop.COLD])
USERS = 200
CONFIG = tinyshop.tiny(
    *("train.epochs=6", "train.fusion_epochs=8", "train.patience=9", "train.fusion_holdout=0.5"),
    *("train.valid_users=20", "model.use_image=false"),
)


def partner(item: int) -> int:
    """What is put into the cart after a look at `item`."""
    return (item + tinyshop.PER_COLOUR - 1) % tinyshop.N_ITEMS + 1


def walk(user: int, rng: np.random.Generator) -> dict[str, Any]:
    events = [(int(rng.choice(LAST_SEEN)), VIEW)]
    at = events[0][0]
    for _ in range(int(rng.integers(9, 15))):
        if events[-1][1] == VIEW and rng.random() < 0.4:
            events.append((partner(at), CART))
        else:
            at = tinyshop.after(at)
            events.append((at, VIEW))
    carts = [-1, -1, *(place for place, (_, action) in enumerate(events) if action == CART)]
    return {
        "user_id": f"u{user}",
        "item": [item for item, _ in events],
        "action": [action for _, action in events],
        "time_ms": [tinyshop.START_MS + 60_000 * place for place in range(len(events))],
        "n_train": len(events) - 2,
        "valid_at": len(events) - 2,
        "test_at": len(events) - 1,
        **dict.fromkeys(("purchase_valid_at", "purchase_test_at"), -1),
        "cart_valid_at": carts[-2],
        "cart_test_at": carts[-1],
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(0)
    table = pa.Table.from_pylist([walk(user, rng) for user in range(USERS)], schema=SEQUENCE_SCHEMA)
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset", sequences=table)


def trained(dataset: Dataset, folder: Path, *settings: str) -> Scorer:
    config = with_settings(CONFIG, settings)
    model = train_alone(dataset, config, folder).model
    catalogue = dataset.catalogue()
    everything = survey(dataset, len(catalogue), config).everything
    return Scorer(model, catalogue, model.encode_items().numpy(), everything, dataset.clock)


@pytest.fixture(scope="module")
def scorer(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return trained(dataset, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def looks() -> HistoryBatch:
    """For each item that was ever met, a visitor who looked at the one before it and then at it."""
    before = {tinyshop.after(item): item for item in LAST_SEEN.tolist()}
    items = [part for item in LAST_SEEN.tolist() for part in (before[item], item)]
    times = tinyshop.START_MS + 60_000 * np.arange(len(items))
    return encode_history(
        items, np.full(len(items), VIEW), times, np.arange(0, len(items) + 1, 2), max_len=10, clock="time"
    )


def prefers_the_cart_rule(scorer: Scorer, looks: HistoryBatch, heads: dict[str, float]) -> float:
    """Share of the visitors for whom the partner is above the item that comes next on the walk."""
    pair_BC = np.array([(partner(item), tinyshop.after(item)) for item in LAST_SEEN.tolist()])
    score_BC = scorer.fuse(looks, scorer.user_vectors(looks), pair_BC, heads)
    return float((score_BC[:, 0] > score_BC[:, 1]).mean())


def test_each_head_ranks_by_the_rule_of_its_action(scorer: Scorer, looks: HistoryBatch) -> None:
    assert prefers_the_cart_rule(scorer, looks, {"cart": 1.0}) > 0.95
    assert prefers_the_cart_rule(scorer, looks, {"view": 1.0}) < 0.05


def test_weights_mix_the_rules(scorer: Scorer, looks: HistoryBatch) -> None:
    assert prefers_the_cart_rule(scorer, looks, {"view": 0.02, "cart": 0.98}) > 0.9
    assert prefers_the_cart_rule(scorer, looks, {"view": 0.98, "cart": 0.02}) < 0.1


def test_a_head_whose_action_never_occurs_answers_as_next(scorer: Scorer, looks: HistoryBatch) -> None:
    candidate_BC = np.tile(np.arange(1, tinyshop.N_ITEMS + 1), (len(looks), 1))
    expected_BC = scorer.score(looks, candidate_BC, "next")
    assert expected_BC.std() > 0.01
    for head in ("favorite", "purchase"):
        np.testing.assert_array_equal(scorer.score(looks, candidate_BC, head), expected_BC)
    assert not np.allclose(scorer.score(looks, candidate_BC, "cart"), expected_BC, atol=0.01)


def test_what_is_not_read_teaches_nothing(dataset: Dataset, tmp_path: Path) -> None:
    """Counts and rows are those of a shop that never logged it."""
    config = with_settings(CONFIG, ["model.actions=[cart]"])
    bare = tinyshop.write(tmp_path / "dataset", sequences=only_read(dataset.sequences(), ["cart"]))
    found, expected = (survey(one, tinyshop.N_ITEMS, config) for one in (dataset, bare))
    assert found.rows == expected.rows
    assert 0 < found.rows["fusion"] < survey(dataset, tinyshop.N_ITEMS, CONFIG).rows["fusion"]
    for counts in ("first_stage", "everything"):
        for kind in ("next", "near"):
            matrix, same = (getattr(getattr(one, counts), kind).toarray() for one in (found, expected))
            np.testing.assert_array_equal(matrix, same)
    for stage in ("retrieval", "fusion"):
        parts = (LocalFeed(one, config).chunks(stage, np.random.default_rng(0)) for one in (dataset, bare))
        rows, same_rows = (pa.concat_tables(part).to_pylist() for part in parts)
        assert rows == same_rows


def judged(scorer: Scorer, dataset: Dataset) -> dict[str, Any]:
    catalogue = dataset.catalogue()
    settings = ReplaySettings("test", len(catalogue), dataset.clock, scorer.max_len, protocols=("next", "cart"))
    return summarise(replay({"model": scorer}, dataset.sequences(), settings), catalogue, settings)


def test_the_judge_asks_the_cart_head(scorer: Scorer, dataset: Dataset) -> None:
    body = judged(scorer, dataset)
    assert body["cart"]["users"] > 0.9 * USERS
    assert body["cart"]["ndcg@10"] > 0.8


def test_without_the_views_the_rule_of_the_cart_cannot_be_seen(
    scorer: Scorer, dataset: Dataset, tmp_path: Path
) -> None:
    """The same users and targets, and the views not read: of a partner nothing is left but the colour."""
    assert scorer.actions == ACTIONS
    blind = trained(dataset, tmp_path, "model.actions=[cart]")
    seeing, guessing = judged(scorer, dataset), judged(blind, dataset)
    assert guessing["cart"]["users"] == seeing["cart"]["users"]
    assert guessing["cart"]["hr@1"] < 0.4 < 0.6 < seeing["cart"]["hr@1"]
