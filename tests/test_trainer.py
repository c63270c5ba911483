"""Training on Ray: one worker, two that stay equal, one that is interrupted and goes on, and too many."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import tinyshop
import torch

from rayrec.bundle import Bundle, publish, versions
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError, ResourceError, UsageError
from rayrec.evaluation import ReplaySettings, replay, summarise
from rayrec.serving.scorer import load_scorer
from rayrec.training import trainer
from rayrec.training.runs import Runs
from rayrec.training.trainer import ALLOCATOR, train, worker_resources
from rayrec.training.windows import next_item_windows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

SETTINGS = tinyshop.tiny("train.epochs=3", "train.patience=3", "train.refit_epochs=1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset")


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "ALLOCATOR", {**ALLOCATOR, "GLOO_SOCKET_IFNAME": "lo"})
        yield monkeypatch


def witness(folder: Path, fail_at: tuple[int, ...] = ()) -> Callable[[dict[str, Any]], None]:
    """A worker that writes down each epoch that it reports, and its weights; it fails once at each of these epochs."""
    folder.mkdir(parents=True, exist_ok=True)

    def worker(given: dict[str, Any]) -> None:
        import os

        from rayrec.training import workers

        class Witness(workers.RayPeers):
            def wrap(self, model: torch.nn.Module, apart: Any = ()) -> torch.nn.Module:
                self.model = model
                return super().wrap(model, apart)

            def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
                epoch, stage = metrics.get("epoch", 0), metrics["stage"]
                failed = folder / f"failed-{epoch}"
                if stage == "retrieval" and epoch in fail_at and not failed.exists():
                    failed.touch()
                    raise RuntimeError("the power went out")
                told = {"metrics": metrics, "weights": self.model.state_dict(), "env": dict(os.environ)}
                told["alike"] = torch.are_deterministic_algorithms_enabled()
                torch.save(told, folder / f"{stage}-{epoch}-of-{self.rank}-{time.time_ns()}.pt")
                super().report(metrics, save)

        workers.RayPeers = Witness  # type: ignore[misc]
        workers.train_worker(given)

    return worker


def told(folder: Path, stage: str) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """What witnesses wrote, by epoch and rank."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"{stage}-*.pt")):
        _, epoch, _, rank, _ = path.stem.split("-")
        found.setdefault((int(epoch), int(rank)), []).append(torch.load(path, weights_only=False))
    return found


# ---------------------------------------------------------------- one worker, interrupted


@pytest.fixture(scope="module")
def interrupted(
    dataset: Dataset, patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A training that died in its second epoch, before another failure of a worker in the third: what was resumed."""
    bundles, first, second = (tmp_path_factory.mktemp(name) for name in ("bundles", "first", "second"))
    once = ray.train.FailureConfig
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "train_worker", witness(first, fail_at=(1,)))
        monkeypatch.setattr(ray.train, "FailureConfig", lambda max_failures: once(max_failures=0))
        with pytest.raises(ray.train.TrainingFailedError, match="the power went out"):
            train(dataset.path, str(bundles), SETTINGS)
    assert versions(bundles) == []
    assert (bundles / ".runs" / "OPEN").exists()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "train_worker", witness(second, fail_at=(2,)))
        train(dataset.path, str(bundles), SETTINGS, resume=True)
    return bundles, first, second


@pytest.fixture(scope="module")
def bundles(interrupted: tuple[Path, Path, Path]) -> Path:
    return interrupted[0]


@pytest.fixture(scope="module")
def alone(bundles: Path) -> Bundle:
    """What came of it."""
    return Bundle.open(bundles)


def test_a_resumed_training_repeats_no_epoch(interrupted: tuple[Path, Path, Path]) -> None:
    bundles, first, second = interrupted
    assert [epoch for epoch, _ in told(first, "retrieval")] == [0]
    reports = told(second, "retrieval")
    assert {epoch: len(found) for (epoch, _), found in reports.items()} == {1: 1, 2: 1}
    assert (second / "failed-2").exists(), "a worker failed on the way"
    history = Bundle.open(bundles).json("metrics.json")["training"]
    assert [line["epoch"] for line in history if line["stage"] == "retrieval"] == [0, 1, 2]


def test_a_resumed_training_goes_on_from_the_weights_it_had(interrupted: tuple[Path, Path, Path]) -> None:
    bundles, _, _ = interrupted
    loss = [line["loss"] for line in Bundle.open(bundles).json("metrics.json")["training"]][:3]
    assert loss[0] > loss[1] > loss[2]


def test_the_bundle_opens_verifies_and_is_live(alone: Bundle, bundles: Path, dataset: Dataset) -> None:
    (version,) = versions(bundles)
    opened = Bundle.open(bundles)
    assert opened.path == alone.path == bundles / version
    assert opened.config == SETTINGS
    assert opened.catalogue.ids.tolist() == dataset.catalogue().ids.tolist()
    assert opened.vectors_ND.shape == (tinyshop.N_ITEMS + 1, 16)


def test_it_learned_what_follows_what(alone: Bundle, dataset: Dataset) -> None:
    settings = ReplaySettings("test", tinyshop.N_ITEMS, dataset.clock, max_len=10, protocols=("metrics", "next"))
    answers = replay({"model": load_scorer(alone)}, dataset.sequences(), settings)
    body = summarise(answers, dataset.catalogue(), settings)
    uniform = sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / tinyshop.N_ITEMS
    assert body["next"]["ndcg@10"] > 3 * uniform


def test_every_epoch_is_in_the_bundle_and_in_tensorboard(alone: Bundle, bundles: Path) -> None:
    history = alone.json("metrics.json")["training"]
    assert [(line["stage"], line["epoch"]) for line in history] == [
        *[("retrieval", n) for n in range(3)],
        ("fusion", 0),
        ("refit", 0),
    ]
    assert (alone.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    logs = list((bundles / "tensorboard").rglob("events.out.tfevents.*"))
    assert len(logs) == 2, "of the training that died, and of the one that went on"
    assert all(b"retrieval/loss" in log.read_bytes() for log in logs)


def test_a_finished_run_leaves_no_checkpoints_and_nothing_to_resume(alone: Bundle, bundles: Path) -> None:
    assert list((bundles / ".runs").iterdir()) == []
    assert Runs(str(bundles)).unfinished(SETTINGS) is None


# ---------------------------------------------------------------- two workers


@pytest.fixture(scope="module")
def together(
    alone: Bundle, dataset: Dataset, bundles: Path, patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Path]:
    """Two workers that start from the first bundle, unpublished."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "train_worker", witness(folder))
        config = tinyshop.tiny("train.workers=2", "train.epochs=2", "train.refit_epochs=0")
        bundle = train(dataset.path, str(bundles), config, start_from=str(bundles), publish=False)
    return bundle, folder


def test_two_workers_share_the_rows_and_end_with_equal_weights(together: tuple[Bundle, Path]) -> None:
    reports = told(together[1], "retrieval")
    assert set(reports) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for epoch in (0, 1):
        (first,), (second,) = reports[epoch, 0], reports[epoch, 1]
        assert first["metrics"]["samples"] == second["metrics"]["samples"] > 20
        rows = len(next_item_windows(tinyshop.sequence_table(), 10, SETTINGS.train.fusion_holdout))
        assert first["metrics"]["samples"] == rows // 2, "each has rows of its own"
        assert first["metrics"]["loss"] == second["metrics"]["loss"], "it is over the targets of both"
        for name, weight in first["weights"].items():
            torch.testing.assert_close(weight, second["weights"][name], atol=1e-6, rtol=1e-5, msg=name)
    fused = told(together[1], "fusion")
    for name, weight in fused[0, 0][0]["weights"].items():
        torch.testing.assert_close(weight, fused[0, 1][0]["weights"][name], atol=1e-6, rtol=1e-5, msg=name)


def test_workers_keep_freed_memory_and_add_up_alike(together: tuple[Bundle, Path]) -> None:
    worker = told(together[1], "retrieval")[0, 0][0]
    assert ALLOCATOR.items() <= worker["env"].items()
    assert worker["alike"]


def test_without_publishing_the_live_version_stays(together: tuple[Bundle, Path], alone: Bundle, bundles: Path) -> None:
    assert Bundle.open(bundles).version == alone.version
    assert set(versions(bundles)) == {alone.version, together[0].version}
    assert Bundle.open(together[0].path).config.train.workers == 2


def test_started_from_a_bundle_it_begins_where_that_ended(together: tuple[Bundle, Path], alone: Bundle) -> None:
    before, after = (bundle.json("metrics.json")["training"] for bundle in (alone, together[0]))
    assert after[0]["loss"] < before[0]["loss"] - 0.5


# ---------------------------------------------------------------- what cannot be


def test_too_many_workers_are_refused_at_once_and_leave_no_trace(dataset: Dataset, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"64 worker\(s\) need 64 CPU\(s\) and the cluster has 2 CPU"):
        train(dataset.path, str(tmp_path / "bundles"), tinyshop.tiny("train.workers=64"))
    assert time.monotonic() - started < 10
    assert not (tmp_path / "bundles").exists()


def test_more_workers_than_there_is_to_learn_from(tmp_path: Path) -> None:
    lonely = tinyshop.write(tmp_path / "dataset", users=1)
    with pytest.raises(UsageError, match=r"1 row\(s\) to learn from cannot be shared by 2 workers"):
        train(lonely.path, str(tmp_path / "bundles"), tinyshop.tiny("train.workers=2", "train.fusion_holdout=0.001"))
    assert not (tmp_path / "bundles").exists()


def test_a_shard_that_breaks_after_the_survey_is_named(
    tmp_path: Path, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = tinyshop.write(tmp_path / "dataset")
    bad = tmp_path / "dataset" / "sequences" / "1.parquet"
    survey, once = trainer.survey, ray.train.FailureConfig

    def breaking(*given: Any) -> Any:
        found = survey(*given)
        content = bad.read_bytes()
        bad.write_bytes(
            content[:100] + bytes(len(content) - 600) + content[-500:]
        )  # its end, what Ray looks at, is whole
        return found

    monkeypatch.setattr(trainer, "survey", breaking)
    monkeypatch.setattr(ray.train, "FailureConfig", lambda max_failures: once(max_failures=0))
    with pytest.raises(DataError, match=r"sequences/1[.]parquet: this shard cannot be read"):
        train(shop.path, str(tmp_path / "bundles"), tinyshop.tiny("train.epochs=1"))


SHARDS, BAD = 24, 20
"""How many there are, and which of them breaks, the first being 0."""

BRIEF = ("train.workers=2", "train.epochs=2", "train.fusion_epochs=0", "train.refit_epochs=0", "train.batch_size=4")


@pytest.fixture
def breaks_midway(
    tmp_path: Path, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Dataset, list[str]]:
    """A shop in many shards, one of which breaks after the first step that two workers take, and what is said then."""
    shop = tinyshop.write(tmp_path / "dataset", users=120)
    folder, stepped = tmp_path / "dataset" / "sequences", tmp_path / "stepped"
    midway = tmp_path / "midway"
    sequences = shop.sequences()
    for n in range(SHARDS):
        pq.write_table(sequences.slice(5 * n, 5), folder / f"{n:02d}.parquet")
    for old in ("0", "1"):
        (folder / f"{old}.parquet").unlink()
    bad, read = folder / f"{BAD}.parquet", trainer._rows

    def read_once_it_broke(named: pa.Table, **given: Any) -> pa.Table:
        if named["shard"].to_pylist() == [str(bad)]:
            deadline = time.monotonic() + 60
            while not stepped.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            midway.write_text(str(stepped.exists()))
            content = bad.read_bytes()
            bad.write_bytes(content[:100] + bytes(len(content) - 600) + content[-500:])
        return read(named, **given)

    def worker(given: dict[str, Any]) -> None:
        from rayrec.training import workers

        class Stepping(workers.RayPeers):
            def step(self, stage: str, epoch: int, steps: int, step: int, loss: float) -> None:
                stepped.touch()
                super().step(stage, epoch, steps, step, loss)

        workers.RayPeers = Stepping  # type: ignore[misc]
        workers.ROWS_A_CHUNK = 4  # or all that there is would be read before the first step
        workers.train_worker(given)

    said: list[str] = []
    monkeypatch.setattr(trainer, "_rows", read_once_it_broke)
    monkeypatch.setattr(trainer, "train_worker", worker)
    monkeypatch.setattr(trainer, "step", said.append)
    return Dataset.open(shop.path), said


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_two_workers_end_where_a_shard_breaks_in_the_middle_of_an_epoch(
    breaks_midway: tuple[Dataset, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, began = ray.train.FailureConfig, time.monotonic()
    monkeypatch.setattr(ray.train, "FailureConfig", lambda max_failures: once(max_failures=0))
    with pytest.raises(DataError, match=rf"sequences/{BAD}[.]parquet: this shard cannot be read"):
        train(breaks_midway[0].path, str(tmp_path / "bundles"), tinyshop.tiny(*BRIEF))
    assert (tmp_path / "midway").read_text() == "True"
    assert time.monotonic() - began < 200
    assert versions(tmp_path / "bundles") == []


@pytest.mark.timeout(240)
def test_two_workers_go_on_without_a_shard_that_breaks_in_the_middle_of_an_epoch_if_so_wished(
    breaks_midway: tuple[Dataset, list[str]], tmp_path: Path
) -> None:
    (shop, said), began = breaks_midway, time.monotonic()
    # As a job that may be submitted again: nothing is left to go on with.
    bundle = train(shop.path, str(tmp_path / "bundles"), tinyshop.tiny(*BRIEF, "train.bad_shards=skip"), resume=True)
    assert f"train: {tmp_path}/bundles has no training that did not finish: a new one begins" in said
    assert (tmp_path / "midway").read_text() == "True"
    assert time.monotonic() - began < 200
    (named,) = [line for line in said if "cannot be read" in line]
    assert f"sequences/{BAD}.parquet: this shard cannot be read" in named
    assert f"is left out (1 of {SHARDS})" in named
    first, second = bundle.json("metrics.json")["training"]
    rows = next_item_windows(shop.sequences(shards=good(shop)), 10, SETTINGS.train.fusion_holdout)
    assert first["samples"] == second["samples"] == len(rows) // 2


def good(shop: Dataset) -> list[str]:
    """Paths of the shards that do not break."""
    return [f"{shop.path}/sequences/{n:02d}.parquet" for n in range(SHARDS) if n != BAD]


def test_a_training_of_which_no_shard_can_be_read_any_more_is_none() -> None:
    class Told:
        n = 0

        def remote(self, shard: str, why: str, of: int) -> Any:
            self.n += 1
            return ray.put(self.n)

    board = SimpleNamespace(leave_out=Told())
    leave_out = partial(trainer._leave_out, board, 2)
    named = pa.table({"shard": ["/nowhere/0.parquet"]})
    rows = trainer._rows(named, "retrieval", SETTINGS, pafs.LocalFileSystem(), leave_out)
    assert len(rows) == 0
    with pytest.raises(DataError, match=r"0[.]parquet: neither this shard nor any other can be read"):
        trainer._rows(named, "retrieval", SETTINGS, pafs.LocalFileSystem(), leave_out)


@pytest.mark.timeout(240)
def test_two_workers_of_whom_one_finds_another_dataset_end(
    dataset: Dataset, tmp_path: Path, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, once, began = tinyshop.write(tmp_path / "other", users=20), ray.train.FailureConfig, time.monotonic()

    def worker(given: dict[str, Any]) -> None:
        from dataclasses import replace

        from rayrec.training import workers

        if ray.train.get_context().get_world_rank() == 1:
            given = {**given, "job": ray.put(replace(ray.get(given["job"]), dataset=other.path))}
        workers.train_worker(given)

    monkeypatch.setattr(trainer, "train_worker", worker)
    monkeypatch.setattr(ray.train, "FailureConfig", lambda max_failures: once(max_failures=0))
    with pytest.raises(DataError, match=r"worker 1 finds another dataset there.*name a place that all nodes share"):
        train(dataset.path, str(tmp_path / "bundles"), tinyshop.tiny(*BRIEF))
    assert time.monotonic() - began < 90


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ResourceError, match=r"1 GPU\(s\)"):
        worker_resources(tinyshop.tiny("train.gpu=true"), 0.0)


@pytest.mark.parametrize(("workers", "cpus", "share"), [(1, 2, 1.0), (2, 2, 0.5), (1, 16, 1.0), (4, 4, 0.75)])
def test_workers_leave_a_cpu_for_the_data(
    workers: int, cpus: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    assert worker_resources(tinyshop.tiny(f"train.workers={workers}"), 0.0) == {"CPU": share}


def test_another_training_is_not_resumed(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / ".runs").mkdir()
    saved = {"run": "20200101-000000-small", "config": SETTINGS.model_dump(mode="json")}
    (tmp_path / ".runs" / "OPEN").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="other settings"):
        train(dataset.path, str(tmp_path), tinyshop.tiny("train.epochs=9"), resume=True)


def test_small_pictures_are_refused_with_what_to_do(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 16x16 images and the model reads 32.*images[.]size=32"):
        train(dataset.path, str(tmp_path), tinyshop.tiny("model.image_size=32"))
    with pytest.raises(UsageError, match=r"leave model[.]image_size alone"):
        train(dataset.path, str(tmp_path), tinyshop.tiny("model.kind=paper"))


def test_the_live_version_can_be_set_by_hand(alone: Bundle, together: tuple[Bundle, Path], bundles: Path) -> None:
    publish(together[0])
    assert Bundle.open(bundles).version == together[0].version
    publish(alone)
