from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluation_shop import (
    CART,
    PURCHASE,
    ScoreTable,
    catalogue,
    counted_items,
    item_table,
    maker,
    random_shop,
    sequence_table,
    write_dataset,
)

from rayrec.catalogue import Catalogue
from rayrec.evaluation.judge import evaluate, floor_makers, summarise
from rayrec.evaluation.metrics import SHOWN
from rayrec.evaluation.replay import NEGATIVES, ReplaySettings, replay
from rayrec.evaluation.table import table_lines
from rayrec.history import HistoryBatch

BUY = lambda item: (item, PURCHASE)  # noqa: E731
PUT = lambda item: (item, CART)  # noqa: E731


def settings(n_items: int, **changes: Any) -> ReplaySettings:
    return ReplaySettings(**{"split": "test", "n_items": n_items, "clock": "time", "max_len": 10, **changes})


def ask(ranker: object, sequences: pa.Table, n_items: int, **changes: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Answers by (protocol, user)."""
    answers = replay({"model": ranker}, sequences, settings(n_items, **changes))  # type: ignore[dict-item]
    return {(row["protocol"], row["user_id"]): row for row in answers.to_pylist()}


def test_each_protocol_asks_its_own_question() -> None:
    descending = ScoreTable(next=[5, 4, 3, 2, 1])
    found = ask(
        descending,
        sequence_table(
            [1, 2, 4],  # new: behind 3 once 1 and 2 are masked
            [1, 2, 1],  # not new
            [1, BUY(3), 2, 5],  # the last purchase stands before the test target
            [3, PUT(1), PUT(4), 2, 2],  # and so does the last cart
            [4, 5],  # too short to be tested
        ),
        n_items=5,
    )
    ranks = {key: row["rank"] for key, row in found.items() if key[0] != "pointwise"}
    assert ranks == {
        ("metrics", "u0"): 2,
        ("metrics", "u2"): 2,
        ("next", "u0"): 4,
        ("next", "u1"): 1,
        ("next", "u2"): 5,
        ("next", "u3"): 2,
        ("purchase", "u2"): 3,
        ("cart", "u3"): 4,
    }
    assert found["metrics", "u0"]["shown"][:4] == [3, 4, 5, 0]
    assert found["next", "u0"]["shown"][:6] == [1, 2, 3, 4, 5, 0]
    assert found["purchase", "u2"]["history"] == 1
    assert (found["cart", "u3"]["history"], found["cart", "u3"]["target"]) == (2, 4)
    assert {key[1] for key in found if key[0] == "pointwise"} == {"u0", "u1", "u2", "u3"}


def test_masking_reads_the_whole_history_not_the_newest_events() -> None:
    found = ask(ScoreTable(next=[5, 4, 3]), sequence_table([1, 1, 1, 2, 3]), n_items=3, max_len=1)
    assert found["metrics", "u0"]["rank"] == 1


def test_validation_asks_one_event_earlier() -> None:
    found = ask(ScoreTable(next=[5, 4, 3]), sequence_table([1, 2, 3]), n_items=3, split="valid")
    assert found["next", "u0"]["target"] == 2
    assert found["next", "u0"]["history"] == 1


def test_carts_and_purchases_are_asked_of_their_heads() -> None:
    ranker = ScoreTable(next=[1, 2, 3], purchase=[3, 2, 1], cart=[1, 3, 2])
    found = ask(ranker, sequence_table([2, PUT(3), BUY(1)]), n_items=3)
    assert found["next", "u0"]["rank"] == 3
    assert found["purchase", "u0"]["rank"] == 1
    assert found["cart", "u0"]["rank"] == 2
    assert ranker.calls == [("cart", 1), ("next", 1), ("purchase", 1)]


def test_a_question_that_protocols_share_is_ranked_once() -> None:
    ranker = ScoreTable(next=[1, 2, 3])
    ask(ranker, sequence_table([2, 3, BUY(1)], [1, BUY(2), 3]), n_items=3)
    assert ranker.calls == [("next", 3)]  # u0 once for all, u1 before its purchase and before its last event


def test_nan_scores_are_worst_and_never_shown() -> None:
    found = ask(ScoreTable(next=[float("nan"), 1, float("nan")]), sequence_table([2, 2, 1]), n_items=3)
    assert found["next", "u0"]["rank"] == 3
    assert found["metrics", "u0"]["rank"] == 2
    assert found["next", "u0"]["shown"][:2] == [2, 0]


def test_what_a_ranker_reads_is_the_history_before_the_target() -> None:
    class Spy(ScoreTable):
        def rank_all(self, history: HistoryBatch, head: str) -> np.ndarray:
            self.read, self.since_s = history.item_BL.tolist(), history.since_s_B.tolist()
            return super().rank_all(history, head)

    spy, sequences = Spy(next=[1, 2, 3, 4]), sequence_table([1, 2, 3, 4])
    minutes = pa.array([[0, 60_000, 120_000, 120_000 + 9 * 60_000]], pa.list_(pa.int64()))
    sequences = sequences.set_column(sequences.schema.get_field_index("time_ms"), "time_ms", minutes)
    ask(spy, sequences, n_items=4, max_len=2, protocols=("next",))
    assert spy.read == [[2, 3]]
    assert spy.since_s == [8 * 60], "it is told when the target came, in steps"


def test_a_ranker_that_reads_some_actions_is_asked_about_the_same_targets() -> None:
    class Spy(ScoreTable):
        actions = ("purchase",)

        def rank_all(self, history: HistoryBatch, head: str) -> np.ndarray:
            self.read = history.item_BL[:, :2].tolist()
            return super().rank_all(history, head)

    spy, sequences = Spy(next=[4, 1, 2, 3]), sequence_table([BUY(1), 2, BUY(3), 4], [2, 3, 1])
    found = ask(spy, sequences, n_items=4)
    assert spy.read == [[1, 0], [1, 3], [0, 0]]  # before a purchase, and before the two last events
    everything = ask(ScoreTable(next=[4, 1, 2, 3]), sequences, n_items=4)
    assert found == everything  # targets, ranks, and what is masked because it was seen


def test_scores_of_the_wrong_shape_and_foreign_items_are_errors() -> None:
    with pytest.raises(ValueError, match="shape"):
        ask(ScoreTable(next=[1, 2]), sequence_table([1, 2, 3]), n_items=3)
    with pytest.raises(ValueError, match="items from 1 to 2"):
        ask(ScoreTable(next=[1, 2]), sequence_table([1, 2, 3]), n_items=2)


def test_sampled_candidates_are_distinct_others_and_seeded() -> None:
    class Spy(ScoreTable):
        def score(self, history: HistoryBatch, candidates_BC: np.ndarray, head: str) -> np.ndarray:
            self.asked = candidates_BC
            return super().score(history, candidates_BC, head)

    def asked(n_items: int, seed: int) -> list[int]:
        spy = Spy(next=[0.0] * n_items)
        ask(spy, sequence_table([1, 2, 3]), n_items=n_items, seed=seed, protocols=("pointwise",))
        return list(spy.asked[0].tolist())

    drawn = asked(500, 0)
    assert drawn[0] == 3
    assert len(set(drawn)) == NEGATIVES + 1
    assert set(drawn) <= set(range(1, 501))
    assert drawn == asked(500, 0) != asked(500, 1)
    assert sorted(asked(5, 0)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("split", ["test", "valid"])
def test_batches_and_shards_change_nothing(split: str) -> None:
    sequences, items = random_shop(0, users=60, n_items=30)
    shop = Catalogue.from_table(items)
    rankers = {name: make() for name, make in floor_makers(sequences, shop).items()}

    def judged(parts: list[pa.Table], batch: int) -> dict[str, Any]:
        how = settings(30, split=split, batch=batch)
        answers = pa.concat_tables([replay({"model": rankers["markov"], **rankers}, part, how) for part in parts])
        return summarise(answers, shop, how, ("model", *rankers))

    whole = judged([sequences], 256)
    assert whole["users"] > 20
    assert judged([sequences], 7) == whole
    assert judged([sequences.slice(40), sequences.slice(0, 13), sequences.slice(13, 27)], 16) == whole


def test_the_ranks_equal_a_plain_loop() -> None:
    sequences, _ = random_shop(1, users=40, n_items=12)
    score = np.random.default_rng(0).integers(0, 4, 13)  # few levels: many ties
    found = ask(ScoreTable(next=score[1:].tolist()), sequences, n_items=12)
    checked = 0
    for row in sequences.to_pylist():
        for protocol in ("next", "metrics", "purchase", "cart"):
            at = row[f"{protocol}_test_at" if protocol in ("purchase", "cart") else "test_at"]
            if at < 0:
                continue
            seen, target = set(row["item"][:at]), row["item"][at]
            if protocol == "metrics" and target in seen:
                assert (protocol, row["user_id"]) not in found
                continue
            rivals = set(range(1, 13)) - {target} - (seen if protocol == "metrics" else set())
            rank = 1 + sum(score[rival] >= score[target] for rival in rivals)
            assert found[protocol, row["user_id"]]["rank"] == rank
            checked += 1
    assert checked > 50


# ---------------------------------------------------------------- the JSON body


def test_evaluate_gives_the_contract(tmp_path: Path) -> None:
    sequences, items = random_shop(2, users=80, n_items=40)
    dataset = write_dataset(tmp_path / "shop", sequences, items)
    result = evaluate(maker(ScoreTable(next=range(40))), dataset, "test", max_len=10, parallel=False)
    assert {"split", "users", "items", "metrics", "next", "cart", "purchase", "pointwise"} <= set(result)
    assert {"floors", "slices"} <= set(result)
    assert (result["split"], result["items"]) == ("test", 40)
    tested = int((np.asarray(sequences["test_at"]) >= 0).sum())
    assert result["users"] == result["next"]["users"] == result["pointwise"]["users"] == tested
    assert result["metrics"]["users"] == tested - result["not_new"] > 0 < result["not_new"]
    for floor in ("popular", "markov"):
        body = result["floors"][floor]
        assert {"hr@10", "ndcg@10", "recall@20", "mrr@10", "coverage@10", "diversity@10"} <= set(body)
        assert set(body["next"]) == set(body["cart"]) == set(result["cart"]) == set(result["next"])
        assert set(body["pointwise"]) == {"users", "auc", "gauc", "logloss"}
    assert result["floors"]["markov"]["next"]["ndcg@10"] > result["floors"]["popular"]["next"]["ndcg@10"]
    for body in result["slices"].values():
        assert set(body) == {"n", "hr@10", "ndcg@10", "mrr@10", "floors"}
    histories = [body["n"] for name, body in result["slices"].items() if name.startswith("history_")]
    assert sum(histories) == result["metrics"]["users"]


def test_a_perfect_ranker_is_perfect_and_a_slice_tells_cold_from_warm(tmp_path: Path) -> None:
    sequences = sequence_table([1, 2, 3], [2, 1, 3], [1, 2, 4])
    items = item_table([9, 9, 9, 0])
    dataset = write_dataset(tmp_path / "shop", sequences, items)
    result = evaluate(maker(ScoreTable(next=[1, 1, 3, 2])), dataset, "test", max_len=5, parallel=False, floors=False)
    assert result["metrics"]["hr@1"] == pytest.approx(2 / 3)
    assert result["slices"]["warm_items"] == {"n": 2, "hr@10": 1.0, "ndcg@10": 1.0, "mrr@10": 1.0, "floors": {}}
    assert result["slices"]["new_items"]["n"] == result["slices"]["cold_items"]["n"] == 1
    assert result["slices"]["cold_items"]["mrr@10"] == 0.5
    assert result["floors"] == {}
    assert result["detail"]["hr_at"]["model"][:2] == [pytest.approx(2 / 3), 1.0]


@pytest.mark.parametrize("nobody_met", [0, 1])
def test_a_catalogue_that_is_made_of_its_log_is_told(tmp_path: Path, nobody_met: int) -> None:
    sequences = sequence_table([1, 2, 3], [2, 1, 3])  # the third is only ever asked for
    dataset = write_dataset(tmp_path / "shop", sequences, item_table([2, 2, 0, *[0] * nobody_met]))
    ranker = maker(ScoreTable(next=range(3 + nobody_met)))
    result = evaluate(ranker, dataset, max_len=5, parallel=False)
    assert result["catalogue"] == {"cold": 1 + nobody_met, "cold_met_later": 1}
    told = "all 1 items without a training event have a later one" in table_lines(result)[-1]
    assert told == (nobody_met == 0)


def test_only_the_protocols_asked_for(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "shop", sequence_table([1, 2, 3]), item_table([1, 1, 1]))
    ranker = ScoreTable(next=[1, 2, 3])
    result = evaluate(maker(ranker), dataset, "valid", max_len=5, parallel=False, floors=False, protocols=("next",))
    assert result["next"]["users"] == 1
    assert not {"metrics", "cart", "purchase", "pointwise"} & set(result)


def test_a_sample_of_users_is_seeded_and_of_the_size_asked_for(tmp_path: Path) -> None:
    sequences, items = random_shop(3, users=80, n_items=20)
    dataset = write_dataset(tmp_path / "shop", sequences, items)

    def sampled(users: int, seed: int) -> dict[str, Any]:
        ranker = maker(ScoreTable(next=range(20)))
        return evaluate(ranker, dataset, "test", max_len=5, users=users, seed=seed, parallel=False, floors=False)

    assert sampled(10, 0)["next"]["users"] == sampled(10, 0)["settings"]["sampled_users"] == 10
    assert sampled(10, 0) == sampled(10, 0)
    assert sampled(10, 0)["next"] != sampled(10, 1)["next"]
    everybody = sampled(10_000, 0)["next"]["users"]
    assert everybody == int((np.asarray(sequences["test_at"]) >= 0).sum())
    assert sampled(0, 0)["users"] == 0


def test_nobody_to_ask(tmp_path: Path) -> None:
    sequences = sequence_table([1, 2], [3])
    dataset = write_dataset(tmp_path / "shop", sequences, counted_items(sequences, 3))
    result = evaluate(maker(ScoreTable(next=[1, 2, 3])), dataset, "test", max_len=5, parallel=False)
    assert (result["users"], result["not_new"]) == (0, 0)
    assert result["metrics"]["ndcg@10"] is None
    assert result["floors"]["markov"]["purchase"]["hr@10"] is None
    assert all(body["n"] == 0 for body in result["slices"].values())


def test_a_catalogue_of_one_item() -> None:
    answers = replay({"model": ScoreTable(next=[1])}, sequence_table([1, 1, 1]), settings(1))
    result = summarise(answers, catalogue(([], 0, 3)), settings(1), ["model"])
    assert result["next"]["hr@1"] == 1.0
    assert result["metrics"]["users"] == 0
    assert result["pointwise"]["auc"] is None
    assert len(answers.to_pylist()[0]["shown"]) == SHOWN


# ---------------------------------------------------------------- cold items among cold items


def test_a_cold_target_is_ranked_among_cold_items_alone() -> None:
    # Items 3 to 6 are cold. u0: 6 is ahead of 4, 3 was seen, 5 ties and counts against us. u1's target is warm.
    scores = ScoreTable(next=[9, 8, 7, 2, 2, 3])
    found = ask(scores, sequence_table([1, 3, 4], [3, 4, 1]), n_items=6, cold=(3, 4, 5, 6), protocols=("cold",))
    assert set(found) == {("cold", "u0")}
    assert found["cold", "u0"]["rank"] == 3
    assert found["cold", "u0"]["shown"][:4] == [6, 4, 5, 0]


def test_a_cold_target_that_was_met_before_is_not_asked_for() -> None:
    assert not ask(ScoreTable(next=[1, 2]), sequence_table([2, 1, 2]), n_items=2, cold=(2,), protocols=("cold",))
    assert not ask(ScoreTable(next=[1, 2]), sequence_table([1, 1, 2]), n_items=2, cold=(), protocols=("cold",))


def test_cold_items_are_those_without_a_training_event(tmp_path: Path) -> None:
    sequences = sequence_table([1, 2, 3], [2, 1, 4], [1, 2, 4])
    dataset = write_dataset(tmp_path / "shop", sequences, item_table([9, 9, 0, 0]))
    result = evaluate(maker(ScoreTable(next=[9, 9, 1, 2])), dataset, "test", max_len=5, parallel=False)
    assert result["cold"]["users"] == 3
    assert result["cold"]["hr@1"] == pytest.approx(2 / 3)
    assert result["cold"]["mrr@10"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert result["floors"]["popular"]["cold"]["hr@1"] == 0, "all cold items tie"
