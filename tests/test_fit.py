"""A whole training in this process: it learns, keeps its golden trace, and resumes as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tinyshop
import torch
from safetensors.torch import load_file

from rayrec.config import Config, preset
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError, UsageError
from rayrec.evaluation import ReplaySettings, replay, summarise
from rayrec.followers import Followers
from rayrec.model.recommender import Recommender, build
from rayrec.model.scorer import Scorer
from rayrec.schema import HEADS, SEQUENCE_SCHEMA
from rayrec.settings import with_settings
from rayrec.training.batches import history_of
from rayrec.training.calibrate import _platt, calibrate
from rayrec.training.checkpoints import seal
from rayrec.training.fit import EndedError, Fit, Job, Stage
from rayrec.training.local import Alone, LocalFeed, train_alone
from rayrec.training.survey import survey
from rayrec.training.tracking import describe
from rayrec.training.windows import examples

GOLDEN = Path(__file__).parent / "golden"
PAPER = with_settings(
    preset("paper"), ["train.epochs=1", "train.max_samples=8", "train.batch_size=4", "model.max_len=5"]
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset")


def trained(dataset: Dataset, config: Config, folder: Path) -> Fit:
    folder.mkdir()
    return train_alone(dataset, config, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit") / "whole"


@pytest.fixture(scope="module")
def fit(dataset: Dataset, folder: Path) -> Fit:
    return trained(dataset, tinyshop.tiny(), folder)


def losses(fit: Fit, stage: str) -> list[float]:
    return [line["loss"] for line in fit.history if line["stage"] == stage]


def test_the_loss_falls(fit: Fit) -> None:
    falling = losses(fit, "retrieval")
    assert falling[-1] < falling[0] - 0.5


def test_it_ranks_far_better_than_chance(fit: Fit, folder: Path, dataset: Dataset) -> None:
    catalogue = dataset.catalogue()
    model = build(tinyshop.tiny(), catalogue, weights=load_file(folder / "model.safetensors"))
    vectors_ND = np.load(folder / "vectors.npy")
    scorer = Scorer(model, catalogue, vectors_ND, survey(dataset, len(catalogue), tinyshop.tiny()).everything, "time")
    settings = ReplaySettings("test", len(catalogue), "time", max_len=10, protocols=("metrics", "next"))
    body = summarise(replay({"model": scorer}, dataset.sequences(), settings), catalogue, settings)
    uniform = sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / tinyshop.N_ITEMS
    assert body["next"]["ndcg@10"] > 4 * uniform
    assert body["metrics"]["ndcg@10"] > 4 * uniform


def test_the_golden_trace(fit: Fit) -> None:
    """Who changes these numbers on purpose writes the file anew and says in the commit how the model gained."""
    golden = json.loads((GOLDEN / "tiny_losses.json").read_text())
    assert {stage: losses(fit, stage) for stage in golden} == {
        stage: pytest.approx(trace, abs=1e-3) for stage, trace in golden.items()
    }


def test_the_seed_decides(dataset: Dataset, fit: Fit, tmp_path: Path) -> None:
    again = trained(dataset, tinyshop.tiny("train.seed=1", "train.epochs=1", "train.fusion_epochs=0"), tmp_path / "a")
    assert losses(again, "retrieval") != losses(fit, "retrieval")[:1]


def test_the_last_checkpoint_is_the_model(fit: Fit, folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in fit.model.state_dict().items())
    np.testing.assert_array_equal(np.load(folder / "vectors.npy"), fit.model.encode_items().numpy())
    state = json.loads((folder / "state.json").read_text())
    assert (state["stage"], state["history"]) == ("done", fit.history)


def test_the_refit_teaches_what_was_withheld_and_leaves_the_fusion_alone(dataset: Dataset, tmp_path: Path) -> None:
    settings = ("train.epochs=1", "train.fusion_holdout=0.999", "train.weight_decay=0", "model.id_dropout=0")
    without = trained(dataset, tinyshop.tiny(*settings, "train.refit_epochs=0"), tmp_path / "without")
    refitted = trained(dataset, tinyshop.tiny(*settings), tmp_path / "with")
    for name, weight in without.model.fusion.state_dict().items():
        assert torch.equal(refitted.model.fusion.state_dict()[name], weight), name
    before, after = (fit.model.item_encoder.id.weight for fit in (without, refitted))
    assert not torch.equal(before, after)
    assert losses(refitted, "refit")[-1] < losses(refitted, "refit")[0]
    rows = {stage: without.job.rows[stage] for stage in ("retrieval", "fusion")}
    assert refitted.job.rows | rows == refitted.job.rows
    assert refitted.job.rows["refit"] >= rows["retrieval"]


def test_a_refit_that_harms_is_not_kept(dataset: Dataset, tmp_path: Path) -> None:
    without = trained(dataset, tinyshop.tiny("train.refit_epochs=0"), tmp_path / "without")
    harmed = trained(dataset, tinyshop.tiny("train.refit_epochs=1", "train.refit_lr=0.5"), tmp_path / "with")
    before, line = harmed.history[-2:]
    assert line["valid_next_ndcg@10"] < 0.9 * before["valid_next_ndcg@10"]
    assert not line["kept"]
    assert describe(line).endswith("not kept")
    for name, weight in without.model.state_dict().items():
        assert torch.equal(harmed.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([0.5, 0.48], [True]),  # within a twentieth
        ([0.5, 0.47], [False]),
        ([0.5, float("nan")], [False]),
        ([0.0, 0.0], [True]),  # nobody was asked
        ([0.5, 0.6, 0.5], [True, False]),
        ([0.5, 0.1, 0.49], [False, True]),
    ],
)
def test_a_refit_may_lose_a_little(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], kept: list[bool]
) -> None:
    seen: list[Any] = []

    def validate(fit: Fit, stage: Stage) -> dict[str, float]:
        if stage.name != "refit":
            return {"valid_next_ndcg@10": 0.3}
        seen.append(fit.model.state_dict()["item_encoder.id.weight"].clone())
        return {"valid_next_ndcg@10": scores[len(seen) - 1]}

    monkeypatch.setattr(Fit, "_validate", validate)
    short = ("train.epochs=1", "train.fusion_epochs=0", f"train.refit_epochs={len(kept)}")
    fit = trained(dataset, tinyshop.tiny(*short), tmp_path / "out")
    assert [line["kept"] for line in fit.history if line["stage"] == "refit"] == kept
    last = max((n for n, one in enumerate(kept, 1) if one), default=0)
    assert torch.equal(fit.model.state_dict()["item_encoder.id.weight"], seen[last])


# ---------------------------------------------------------------- resume


class PowerOutError(Exception):
    pass


def interrupted(
    dataset: Dataset, config: Config, folder: Path, stage: str, epoch: int, step: int | None = None
) -> None:
    """Train until just after the checkpoint of this epoch, or of this step of it."""
    folder.mkdir()

    class Unlucky(Alone):
        def report(self, metrics: dict[str, Any], save: Any) -> None:
            super().report(metrics, save)
            if step is None and (metrics["stage"], metrics.get("epoch")) == (stage, epoch):
                raise PowerOutError

        def keep(self, place: dict[str, Any], save: Any) -> None:
            super().keep(place, save)
            if (place["stage"], place["epoch"], place["step"]) == (stage, epoch, step):
                raise PowerOutError

    facts = survey(dataset, len(dataset.catalogue()), config)
    job = Job(config, dataset.path, facts.first_stage, facts.rows)
    with pytest.raises(PowerOutError):
        Fit(job, LocalFeed(dataset, config), Unlucky(folder)).run()


def equal(ours: Path, theirs: Path) -> None:
    """Bit by bit."""
    one, other = (load_file(path / "model.safetensors") for path in (ours, theirs))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=0, rtol=0, msg=name)
    np.testing.assert_array_equal(*(np.load(path / "vectors.npy") for path in (ours, theirs)))


@pytest.mark.parametrize(("stage", "epoch"), [("retrieval", 0), ("retrieval", 2), ("fusion", 0), ("refit", 0)])
def test_a_resumed_training_ends_with_the_same_weights(
    dataset: Dataset, fit: Fit, folder: Path, tmp_path: Path, stage: str, epoch: int
) -> None:
    interrupted(dataset, tinyshop.tiny(), tmp_path / "first", stage, epoch)
    (tmp_path / "second").mkdir()
    lines: list[dict[str, Any]] = []
    again = train_alone(dataset, tinyshop.tiny(), tmp_path / "second", resume=tmp_path / "first", on_epoch=lines.append)
    order = [("retrieval", 0), ("retrieval", 1), ("retrieval", 2), ("fusion", 0), ("refit", 0), ("refit", 1)]
    rest = order[order.index((stage, epoch)) + 1 :]
    assert [(line["stage"], line["epoch"]) for line in lines[:-1]] == rest
    assert [(line["stage"], line["epoch"]) for line in again.history] == order
    equal(folder, tmp_path / "second")


MIDWAY = ("train.fusion_epochs=3", "train.fusion_steps=20", "train.epochs=2", "train.refit_epochs=1",
          "train.image_budget=6", "train.image_refresh=3", "train.negatives=8", "model.event_dropout=0.1")  # fmt: skip
"""All that is drawn, and what lives between steps: negatives, dropout, pictures encoded anew, lists that are kept."""


@pytest.fixture(scope="module")
def midway(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a training that nobody interrupted, and that wrote no checkpoint within an epoch."""
    folder = tmp_path_factory.mktemp("midway") / "whole"
    trained(dataset, tinyshop.tiny(*MIDWAY), folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "epoch", "step"),
    [
        ("retrieval", 0, 1),
        ("retrieval", 1, 3),
        ("retrieval", 1, 4),
        ("fusion", 0, 2),
        ("fusion", 0, 5),  # the second time through the lists, three batches each time
        ("fusion", 1, 5),
        ("fusion", 2, 1),
        ("refit", 0, 2),
    ],
)
def test_a_training_resumed_within_an_epoch_ends_with_the_same_weights(
    dataset: Dataset, midway: Path, tmp_path: Path, stage: str, epoch: int, step: int
) -> None:
    every_step = tinyshop.tiny(*MIDWAY, "train.checkpoint_steps=1")
    interrupted(dataset, every_step, tmp_path / "first", stage, epoch, step)
    (tmp_path / "second").mkdir()
    torch.manual_seed(1234)
    again = train_alone(dataset, tinyshop.tiny(*MIDWAY), tmp_path / "second", resume=tmp_path / "first")
    equal(midway, tmp_path / "second")
    whole = json.loads((midway / "state.json").read_text())["history"]
    names = ("stage", "epoch", "loss", "steps", "samples", "valid_next_ndcg@10")
    assert [[line[name] for name in names] for line in again.history] == [
        [line[name] for name in names] for line in whole
    ]


@pytest.mark.parametrize(("stage", "epoch", "step"), [("retrieval", 1, 2), ("fusion", 0, 1), ("fusion", 0, 4)])
def test_one_worker_goes_on_where_two_were_in_the_middle_of_an_epoch(
    dataset: Dataset, tmp_path: Path, stage: str, epoch: int, step: int
) -> None:
    """With as many steps in all, of as many batches; a loss that is the mean of both so far, and all their rows."""
    config = tinyshop.tiny(*MIDWAY, "train.workers=2", "train.checkpoint_steps=1")
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    interrupted(dataset, config, first, stage, epoch, step)
    own = torch.load(first / "worker-0.pt", weights_only=True)
    assert own["progress"]["steps"] == step
    other = {**own["progress"], "total_loss": own["progress"]["total_loss"] + 2.0, "samples": 1000}
    torch.save({**own, "progress": other}, first / "worker-1.pt")
    state = json.loads((first / "state.json").read_text())
    (first / "state.json").write_text(json.dumps({**state, "workers": 2}))
    seal(first)
    taken = train_alone(dataset, config, second, resume=first)
    in_peace = train_alone(dataset, config, second)
    assert [line["steps"] for line in taken.history] == [line["steps"] for line in in_peace.history]
    place = [(line["stage"], line["epoch"]) for line in taken.history].index((stage, epoch))
    line, whole = taken.history[place], in_peace.history[place]
    assert line["samples"] == 1000 + whole["samples"]
    assert line["loss"] == pytest.approx(whole["loss"] + 1.0 / whole["steps"], abs=0.2)


def test_few_lists_are_gone_through_until_the_fusion_has_its_steps(dataset: Dataset, tmp_path: Path) -> None:
    short = ("train.epochs=1", "train.fusion_epochs=2", "train.refit_epochs=0", "train.patience=9")

    def fusion(steps: int) -> list[int]:
        config = tinyshop.tiny(*short, f"train.fusion_steps={steps}")
        lines = trained(dataset, config, tmp_path / f"{steps}").history
        return [line["steps"] for line in lines if line["stage"] == "fusion"]

    once, once_again = fusion(0)
    assert once == once_again
    assert fusion(2 * once) == [once] * 2
    assert fusion(2 * once + 1) == [2 * once] * 2


def test_the_papers_model_goes_on_within_an_epoch(tmp_path: Path) -> None:
    """Which pairs come after a step does not depend on whether those before it were made."""
    shop = tinyshop.write(tmp_path / "dataset", image_size=128, users=4)
    rows = {"pairs": len(examples(shop.sequences(), 5))}
    nothing = sp.csr_array((tinyshop.N_ITEMS + 1,) * 2)
    fit = Fit(Job(PAPER, shop.path, Followers(nothing, nothing), rows), LocalFeed(shop, PAPER), Alone(tmp_path))
    whole = list(fit._pairs(np.random.default_rng(0), 0))
    for skip in (1, 5, 7):
        rest = list(fit._pairs(np.random.default_rng(0), skip))
        assert len(rest) == len(whole) - skip
        for ours, theirs in zip(rest, whole[skip:], strict=True):
            assert torch.equal(ours.item_P, theirs.item_P)
            assert torch.equal(ours.history.item_BL, theirs.history.item_BL)


def test_checkpoints_within_an_epoch_come_by_time_and_a_short_one_has_none(dataset: Dataset, tmp_path: Path) -> None:
    kept: list[int] = []

    class Counting(Alone):
        def keep(self, place: dict[str, Any], save: Any) -> None:
            kept.append(place["step"])

        def report(self, metrics: dict[str, Any], save: Any) -> None:
            pass

    short = ("train.epochs=1", "train.fusion_epochs=0", "train.refit_epochs=0")
    facts = survey(dataset, tinyshop.N_ITEMS, tinyshop.tiny())
    for setting, expected in (("300", []), ("0.0001", [1, 2, 3, 4, 5])):
        config = tinyshop.tiny(*short, f"train.checkpoint_s={setting}")
        job = Job(config, dataset.path, facts.first_stage, facts.rows)
        Fit(job, LocalFeed(dataset, config), Counting(tmp_path)).run()
        assert kept == expected


def test_who_asks_it_to_end_loses_no_step(dataset: Dataset, midway: Path, tmp_path: Path) -> None:
    class Asked(Alone):
        asked = 0

        def ending(self) -> bool:
            self.asked += 1
            return self.asked == 7

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    config = tinyshop.tiny(*MIDWAY)
    facts = survey(dataset, tinyshop.N_ITEMS, config)
    job = Job(config, dataset.path, facts.first_stage, facts.rows)
    with pytest.raises(EndedError, match="retrieval 2, step 1"):
        Fit(job, LocalFeed(dataset, config), Asked(tmp_path / "first")).run()
    train_alone(dataset, config, tmp_path / "second", resume=tmp_path / "first")
    equal(midway, tmp_path / "second")


def test_a_checkpoint_of_another_training_is_refused(dataset: Dataset, fit: Fit, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"other settings: train[.]lr was 0[.]02 and is 0[.]5"):
        train_alone(dataset, tinyshop.tiny("train.lr=0.5"), tmp_path, resume=folder)
    other = tinyshop.write(tmp_path / "dataset", users=20)
    with pytest.raises(UsageError, match="another dataset"):
        train_alone(other, tinyshop.tiny(), tmp_path, resume=folder)


def test_a_worker_that_finds_another_dataset_says_so(dataset: Dataset, tmp_path: Path) -> None:
    other = tinyshop.write(tmp_path / "dataset", users=20)
    facts = survey(dataset, tinyshop.N_ITEMS, tinyshop.tiny())
    job = Job(tinyshop.tiny(), other.path, facts.first_stage, facts.rows, fingerprint=dataset.fingerprint())
    with pytest.raises(DataError, match="worker 0 finds another dataset there"):
        Fit(job, LocalFeed(other, tinyshop.tiny()), Alone(tmp_path))


def test_a_training_that_was_done_is_handed_over_again(
    dataset: Dataset, fit: Fit, folder: Path, tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = []
    train_alone(dataset, tinyshop.tiny(), tmp_path, resume=folder, on_epoch=lines.append)
    assert [line["stage"] for line in lines] == ["done"]
    for name in ("model.safetensors", "vectors.npy"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# ---------------------------------------------------------------- stages and limits


def test_it_stops_early_and_keeps_the_best_epoch(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge likes the second epoch best; with a patience of two the fourth is the last."""
    scores = iter([0.2, 0.9, 0.5, 0.4, 0.0])
    monkeypatch.setattr(Fit, "_validate", lambda fit, stage: {"valid_next_ndcg@10": next(scores)})
    config = tinyshop.tiny("train.epochs=9", "train.patience=2", "train.fusion_epochs=0", "train.refit_epochs=0")
    weights: list[torch.Tensor] = []

    class Watching(Alone):
        def report(self, metrics: dict[str, Any], save: Any) -> None:
            weights.append(fit.model.behaviour.project.weight.detach().clone())

    facts = survey(dataset, len(dataset.catalogue()), config)
    fit = Fit(Job(config, dataset.path, facts.first_stage, facts.rows), LocalFeed(dataset, config), Watching(tmp_path))
    fit.run()
    *epochs, final = weights
    assert len(epochs) == len(fit.history) == 4
    assert torch.equal(final, epochs[1])
    assert not torch.equal(final, epochs[3])


def test_max_samples_bounds_an_epoch(dataset: Dataset, tmp_path: Path) -> None:
    sizes = ("train.batch_size=10", "train.fusion_batch_size=10")
    config = tinyshop.tiny("train.max_samples=20", "train.epochs=1", *sizes)
    fit = trained(dataset, config, tmp_path / "a")
    assert [line["steps"] for line in fit.history] == [2, 2, 2, 2]
    assert all(line["samples"] <= 20 for line in fit.history)


def test_the_papers_model_trains_and_counts_pairs(tmp_path: Path) -> None:
    class Forgetful(Alone):
        def report(self, metrics: dict[str, Any], save: Any) -> None:
            """A checkpoint of this model is a gigabyte."""

    shop = tinyshop.write(tmp_path / "dataset", image_size=128, users=4)
    rows = {"pairs": len(examples(shop.sequences(), 5))}
    nothing = sp.csr_array((tinyshop.N_ITEMS + 1,) * 2)
    job = Job(PAPER, shop.path, Followers(nothing, nothing), rows)
    fit = Fit(job, LocalFeed(shop, PAPER), Forgetful(tmp_path))
    fit.run()
    assert [(line["stage"], line["samples"], line["steps"]) for line in fit.history] == [("pairs", 8, 2)]
    assert np.isfinite(losses(fit, "pairs")).all()
    fit.job = dataclasses.replace(job, config=with_settings(PAPER, ["train.max_samples=0"]))
    stage = Stage("pairs", 1, PAPER.train.batch_size, PAPER.train.lr)
    assert fit._steps(stage) == -(-rows["pairs"] * 5 // 4), "four negatives a positive, in batches of four"


def test_visitors_too_short_to_teach_the_fusion(tmp_path: Path) -> None:
    """Nobody is chosen for the fusion: the first stage is all there is."""
    table = tinyshop.sequence_table(users=30)
    config = tinyshop.tiny("train.fusion_holdout=0.001", "train.epochs=1")
    assert len(examples(table, 10, 0.001)) == 0
    shop = tinyshop.write(tmp_path / "dataset", sequences=table)
    fit = trained(shop, config, tmp_path / "out")
    assert isinstance(fit.model, Recommender)
    assert fit.model.fusion.calibration_H2.tolist() == [[1.0, 0.0]] * len(HEADS)


def test_a_shop_without_pictures_trains(tmp_path: Path) -> None:
    shop = tinyshop.write(tmp_path / "dataset", users=20)
    for path in (tmp_path / "dataset" / "images").iterdir():
        path.unlink()
    fit = trained(shop, tinyshop.tiny("train.epochs=1", "train.fusion_epochs=0"), tmp_path / "out")
    assert np.isfinite(losses(fit, "retrieval")).all()


def test_nothing_to_learn_from_is_said(tmp_path: Path) -> None:
    lonely = tinyshop.sequence_table(users=3).to_pylist()
    for row in lonely:
        row |= {name: row[name][:1] for name in ("item", "action", "time_ms")}
        row |= {"n_train": 1, **{name: -1 for name in SEQUENCE_SCHEMA.names if name.endswith("_at")}}
    shop = tinyshop.write(tmp_path / "dataset", sequences=pa.Table.from_pylist(lonely, schema=SEQUENCE_SCHEMA))
    with pytest.raises(DataError, match="nothing to learn from"):
        survey(shop, tinyshop.N_ITEMS, tinyshop.tiny())


def test_a_shard_that_cannot_be_read_is_named_and_left_out_if_so_wished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shop = tinyshop.write(tmp_path / "dataset", users=20)
    bad = tmp_path / "dataset" / "sequences" / "1.parquet"
    bad.write_bytes(bad.read_bytes()[:-200])
    config = tinyshop.tiny("train.epochs=1", "train.fusion_epochs=1")
    with pytest.raises(DataError, match=r"sequences/1[.]parquet: this shard cannot be read.*bad_shards=skip"):
        survey(shop, tinyshop.N_ITEMS, config)
    fit = trained(shop, with_settings(config, ["train.bad_shards=skip"]), tmp_path / "out")
    assert np.isfinite(losses(fit, "retrieval")).all()
    assert fit.judged is not None
    assert len(fit.judged) == 10
    assert "1.parquet: this shard cannot be read" in capfd.readouterr().err


# ---------------------------------------------------------------- calibration


def test_calibration_keeps_the_order_and_lowers_the_log_loss(fit: Fit, dataset: Dataset) -> None:
    model = fit.model
    assert isinstance(model, Recommender)
    scorer = Scorer(model, dataset.catalogue(), model.encode_items().numpy(), fit.job.followers, "time")
    rows = examples(dataset.sequences(), 10, 0.3)
    history = history_of(rows, 10, "time")
    target_B1 = np.asarray(rows["target"], np.int64)[:, None]
    rng = np.random.default_rng(9)
    candidate_BC = np.concatenate([target_B1, rng.integers(1, tinyshop.N_ITEMS + 1, (len(rows), 100))], 1)
    label_BC = np.zeros(candidate_BC.shape)
    label_BC[:, 0] = 1

    def log_loss(probability_BC: np.ndarray) -> float:
        clipped = np.clip(probability_BC, 1e-7, 1 - 1e-7)
        return float(-np.mean(label_BC * np.log(clipped) + (1 - label_BC) * np.log(1 - clipped)))

    for head in scorer.heads:
        model.fusion.calibration_H2.copy_(torch.tensor([[1.0, 0.0]] * len(HEADS)))
        before = scorer.score(history, candidate_BC, head)
        calibrate(model, scorer, [rows[:50], rows[50:]], seed=0)
        after = scorer.score(history, candidate_BC, head)
        assert log_loss(after) < 0.8 * log_loss(before)
        assert (model.fusion.calibration_H2[:, 0] > 0).all()
        order = np.argsort(before, axis=1, kind="stable")
        assert (np.diff(np.take_along_axis(after, order, 1), axis=1) > -1e-6).all()
    share = scorer.score(history, candidate_BC, "next").mean()
    assert share == pytest.approx(1 / 101, rel=0.3), "on average the chance of being the right one"


def test_calibration_of_logits_that_are_wrong_makes_no_ties() -> None:
    """The right items score lowest: the best scale would be none at all."""
    logit_BC = np.random.default_rng(0).normal(size=(50, 101))
    logit_BC[:, 0] = -5
    scale, shift = _platt(logit_BC)
    probability_BC = torch.sigmoid(torch.from_numpy(logit_BC).float() * scale + shift)
    assert len(probability_BC[0].unique()) == 101
    assert probability_BC.mean() == pytest.approx(1 / 101, rel=0.3)
