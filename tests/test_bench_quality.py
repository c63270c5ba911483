"""The bench of quality: every model before one judge, each run once, settings chosen on validation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tinyshop

from rayrec.bench import peer_runs, quality
from rayrec.bench.peer_runs import Peer, environment, export
from rayrec.bench.quality import run
from rayrec.bench.quality_table import Row, Run, compare, table
from rayrec.data.dataset import Dataset
from rayrec.errors import UsageError
from rayrec.evaluation.judge import evaluate, floor_makers
from rayrec.evaluation.metrics import ndcg
from rayrec.evaluation.paired import interval, p_value, ratio_interval

# Recommends the items of train.parquet by their counts; "reverse" turns them around. Notes each call.
SCRIPT = """
import json, sys
from pathlib import Path
import pandas as pd
data, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
with open(settings["log"], "a") as log:
    log.write(json.dumps(settings) + "\\n")
if settings.get("break"):
    sys.exit("no | luck")
counts = pd.read_parquet(data / "train.parquet")["item"].value_counts()
items = sorted(counts.index, key=lambda item: (-counts[item], item))
if settings["reverse"]:
    items = items[::-1]
for split in ("valid", "test"):
    asked = pd.read_parquet(data / f"ask-{split}.parquet")
    lists = [[item for item in items if item not in set(past)][:100] for past in asked["items"]]
    scores = [[float(counts[item]) for item in one] for one in lists]
    table = pd.DataFrame({"user_id": asked["user_id"], "items": lists, "scores": scores})
    table.to_parquet(out / f"lists-{split}.parquet")
(out / "facts.json").write_text(json.dumps({
    "version": "by-count 1", "train_cpu_s": 1.5, "lists_s": 2.0, "curve": [(10.0, 0.1), (20.0, 0.3), (30.0, 0.2)],
}))
"""


@pytest.fixture
def shop(tmp_path: Path) -> Dataset:
    return tinyshop.write(tmp_path / "tiny")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the peer `by-count` notes its calls. It runs in this environment."""
    script, log = tmp_path / "by_count.py", tmp_path / "calls"
    script.write_text(SCRIPT)
    grid = tuple({"reverse": reverse, "log": str(log)} for reverse in (True, False))
    peers = {
        "by-count": Peer(str(script.with_suffix("")), (), grid),
        "broken": Peer(str(script.with_suffix("")), (), ({"break": True, "log": str(log)},)),
        "by-sight": Peer(str(script.with_suffix("")), (), grid[1:], pictures=True),
    }
    monkeypatch.setattr(quality, "PEERS", peers)
    monkeypatch.setattr(peer_runs, "environment", lambda folder, peer: Path(sys.executable))
    return log


def test_a_peer_is_judged_as_a_floor_of_the_same_mind(shop: Dataset, calls: Path, tmp_path: Path) -> None:
    result = run([shop.path], tmp_path / "out", ["popular", "markov", "by-count"], seeds=2, minutes=0)
    popular, markov, peer, mixed = result["rows"]
    judged = evaluate(
        floor_makers(shop.sequences(), shop.catalogue())["markov"],
        shop, max_len=50, parallel=False, floors=False, protocols=("metrics",),
    )  # fmt: skip
    assert markov["test_ndcg@10"] == pytest.approx(judged["metrics"]["ndcg@10"])
    assert markov["test_hr@10"] == pytest.approx(judged["metrics"]["hr@10"])
    # Equal counts are ties, which the judge decides against a floor; a list has none.
    assert peer["test_ndcg@10"] >= popular["test_ndcg@10"]
    assert peer["settings"]["reverse"] is False, "chosen on validation"
    assert peer["seeds"] == [0, 1]
    assert [json.loads(line)["seed"] for line in calls.read_text().splitlines()] == [0, 0, 1]
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "| tiny | by-count | 2 |" in (tmp_path / "out" / "table.md").read_text()
    assert peer["cost"]["list_ms"] == pytest.approx(1000 * 2.0 / (2 * 60), rel=0.2)
    assert markov["cost"]["list_ms"] > 0
    assert (peer["best_after_s"], markov["best_after_s"]) == (20.0, None)
    assert mixed["model"] == "by-count + markov"
    assert mixed["seeds"] == [0, 1]
    assert mixed["valid_ndcg@10"] > max(peer["valid_ndcg@10"], 0.9 * markov["valid_ndcg@10"])


def test_what_was_run_is_not_run_again(shop: Dataset, calls: Path, tmp_path: Path) -> None:
    first = run([shop.path], tmp_path / "out", ["by-count"], seeds=1, minutes=0)
    n = len(calls.read_text().splitlines())
    assert run([shop.path], tmp_path / "out", ["by-count"], seeds=1, minutes=0) == first
    assert len(calls.read_text().splitlines()) == n
    run([shop.path], tmp_path / "out", ["by-count"], seeds=1, minutes=1)
    assert len(calls.read_text().splitlines()) > n, "another limit of time is another run"


def test_a_peer_that_fails_is_told_in_the_table_and_ends_nothing(shop: Dataset, calls: Path, tmp_path: Path) -> None:
    broken, popular = run([shop.path], tmp_path / "out", ["broken", "popular"], seeds=1, minutes=0)["rows"]
    assert broken["trouble"] == "failed with exit code 1: no / luck", "no bar ends a cell"
    assert broken["trouble"] in (tmp_path / "out" / "table.md").read_text()
    assert popular["test_ndcg@10"] > 0


def test_a_peer_that_cannot_be_installed_is_a_row_with_the_reason(
    shop: Dataset, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Peer("by_count", ("--no-index", "--find-links", "/nowhere", "nothing-of-this-name"), ({},))
    monkeypatch.setattr(quality, "PEERS", {"lost": lost})
    monkeypatch.setattr(peer_runs, "environment", environment)
    (row,) = run([shop.path], tmp_path / "out", ["lost"], seeds=1, minutes=0)["rows"]
    assert row["trouble"].startswith("cannot install")
    assert "nothing-of-this-name" in row["trouble"].partition(": ")[2]


def test_a_peer_of_pictures_needs_some(shop: Dataset, calls: Path, tmp_path: Path, monkeypatch) -> None:
    (row, _) = run([shop.path], tmp_path / "out", ["by-sight"], seeds=1, minutes=0)["rows"]
    assert row["test_ndcg@10"] > 0
    monkeypatch.setattr(Dataset, "has", lambda self, folder: False)
    (row,) = run([shop.path], tmp_path / "other", ["by-sight"], seeds=1, minutes=0)["rows"]
    assert row["trouble"] == "learns from pictures, and this set has none"


def test_the_others_may_have_fewer_seeds(shop: Dataset, calls: Path, tmp_path: Path) -> None:
    row, _ = run([shop.path], tmp_path / "out", ["by-count"], seeds=3, minutes=0, settings=1, peer_seeds=1)["rows"]
    assert row["seeds"] == [0]


def test_at_most_so_many_settings(shop: Dataset, calls: Path, tmp_path: Path) -> None:
    row, _ = run([shop.path], tmp_path / "out", ["by-count"], seeds=1, minutes=0, settings=1)["rows"]
    assert row["settings"]["reverse"] is True
    assert len(calls.read_text().splitlines()) == 1


def test_kept_ranks_are_those_that_were_judged(shop: Dataset, tmp_path: Path) -> None:
    (markov,) = run([shop.path], tmp_path / "out", ["markov"], seeds=1, minutes=0)["rows"]
    (kept,) = (tmp_path / "out" / "tiny").glob("*.parquet")
    rank_U = pq.read_table(kept)["rank"].to_numpy()
    assert np.where(rank_U <= 10, 1 / np.log2(1.0 + rank_U), 0).mean() == pytest.approx(markov["test_ndcg@10"])


def test_the_time_that_we_took_beyond_the_limit_is_told(shop: Dataset, tmp_path: Path) -> None:
    ours = quality.Run({}, 0, {}, {"cpu_s": 90.0}, np.ones(1, np.int64))
    assert quality._note("rayrec", [ours], minutes=1) == "took 1.5 minutes of CPU; the others trained for 1 at most"
    assert quality._note("rayrec", [ours], minutes=2) == ""
    assert quality._note("rayrec", [ours], minutes=0) == ""


def test_when_we_are_where_another_ends() -> None:
    def row(*curves: list[tuple[float, float]]) -> Row:
        figures = {split: {"ndcg@10": 0.25, "hr@10": 0.5} for split in ("valid", "test")}
        runs = [Run({}, 0, figures, {"curve": curve}, np.array([1, 2, 3])) for curve in curves]
        return Row("shop", 3, "rayrec", runs)

    ours = row([(10.0, 0.1), (20.0, 0.3)], [(12.0, 0.3), (24.0, 0.2)])
    other = Row("shop", 3, "other", row([(50.0, 0.25), (60.0, 0.2)]).runs)
    compare([ours, other], "rayrec")
    assert other.ahead["ours_there_s"] == 16.0, "the median over seeds"
    assert other.best_after_s() == 50.0
    assert ours.reaches_s(0.35) is None
    assert row([(10.0, 0.1)], [(10.0, 0.3)]).reaches_s(0.25) is None, "not with every seed"


def test_we_are_compared_user_by_user(shop: Dataset, calls: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "US", "markov")
    rows = run([shop.path], tmp_path / "out", ["markov", "popular"], seeds=1, minutes=0)["rows"]
    markov, popular = rows
    assert "ratio" not in markov
    assert popular["ratio"] == pytest.approx(markov["test_ndcg@10"] / popular["test_ndcg@10"])
    low, high = popular["ratio_interval"]
    assert low < popular["ratio"] < high
    assert popular["p"] < 0.01


def test_a_paired_interval_knows_that_users_are_the_same() -> None:
    gain_U = np.random.default_rng(0).random(400)
    low, high = ratio_interval(1.1 * gain_U, gain_U)
    assert low == pytest.approx(1.1)
    assert high == pytest.approx(1.1)
    low, high = interval(gain_U)
    assert low < gain_U.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * gain_U.std() / 20, rel=0.15)


def test_a_paired_test_knows_chance_from_a_gain() -> None:
    rng = np.random.default_rng(0)
    gain_U, noise_U = rng.random(300), rng.normal(0, 0.1, 300)
    assert p_value(gain_U, gain_U) == 1.0
    assert p_value(gain_U + noise_U - noise_U.mean(), gain_U) > 0.9
    assert p_value(gain_U + noise_U - noise_U.mean() + 0.05, gain_U) < 0.001
    # Three users ahead of none: of the 8 ways to flip them 2 are as great.
    assert p_value(np.array([1.0, 1.0, 1.0, 0.0]), np.zeros(4)) == pytest.approx(0.25, abs=0.02)


def test_a_peer_sees_training_events_and_histories_only(shop: Dataset, tmp_path: Path) -> None:
    sequences = shop.sequences()
    export(sequences, tmp_path / "data")
    train = pq.read_table(tmp_path / "data" / "train.parquet").to_pandas()
    trained = {user: rows["item"].tolist() for user, rows in train.groupby("user_id")}
    asked = {
        split: {row["user_id"]: row["items"] for row in pq.read_table(path).to_pylist()}
        for split in ("valid", "test")
        if (path := tmp_path / "data" / f"ask-{split}.parquet")
    }
    valid = pq.read_table(tmp_path / "data" / "ask-valid.parquet").to_pylist()
    target = {row["user_id"]: row["target"] for row in valid}
    assert pq.read_schema(tmp_path / "data" / "ask-test.parquet").names == ["user_id", "items"], "no targets"
    for row in sequences.to_pylist():
        if row["valid_at"] > 0:
            assert asked["valid"][row["user_id"]] == row["item"][: row["valid_at"]]
            assert target[row["user_id"]] == row["item"][row["valid_at"]]
        if row["test_at"] > 0:
            assert asked["test"][row["user_id"]] == row["item"][: row["test_at"]]
        withheld = {row["purchase_valid_at"], row["purchase_test_at"]}
        of_training = [item for place, item in enumerate(row["item"][: row["n_train"]]) if place not in withheld]
        assert trained.get(row["user_id"], []) == of_training


def test_results_that_are_kept_in_the_repository_are_whole() -> None:
    kept = sorted((Path(__file__).parent.parent / "rayrec/bench/results/quality").glob("*/*.json"))
    assert kept
    for path in kept:
        body, rank_U = json.loads(path.read_text()), pq.read_table(path.with_suffix(".parquet"))["rank"].to_numpy()
        assert len(rank_U) == body["users"]
        assert ndcg(rank_U.astype(int), 10).mean() == pytest.approx(body["figures"]["test"]["ndcg@10"])


def test_usage(shop: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model nonsense: choose among rayrec, popular, markov, implicit-bm25"):
        run([shop.path], tmp_path / "out", ["nonsense"], seeds=1, minutes=0)
    with pytest.raises(UsageError, match="give each its own"):
        run([shop.path, shop.path], tmp_path / "out", ["popular"], seeds=1, minutes=0)
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        run([shop.path], tmp_path / "out", ["popular"], seeds=1, minutes=0, ours=["train.epoch=1"])


def test_a_table_of_nothing_has_a_head() -> None:
    assert table([]).startswith("| set | model |")
