"""Training on a Ray cluster: shards of rows from Ray Data, workers of Ray Train, one bundle at the end.

In: a dataset folder and settings. Out: a published bundle. Everything that is learned happens in `fit`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from rayrec.bundle import Bundle
from rayrec.cluster import connect, on_this_node
from rayrec.config import SCRATCH, Config
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError, RayrecError, ResourceError, UsageError, writing
from rayrec.files import absolute, filesystem
from rayrec.model.backbone import PACKAGED, pretrained
from rayrec.model.paper import IMAGE_SIZE
from rayrec.progress import Task, step
from rayrec.schema import SEQUENCE_SCHEMA
from rayrec.training.fit import Job
from rayrec.training.lineage import lineage
from rayrec.training.publish import write_bundle
from rayrec.training.runs import Runs
from rayrec.training.stopping import GO_ON, Asked, TerminatedError, Trainer, Workers
from rayrec.training.survey import read_shards, survey
from rayrec.training.tracking import describe, open_trackers
from rayrec.training.windows import stage_rows, stages
from rayrec.training.workers import Board, train_worker

MIN_CPU_A_WORKER = 0.25

LOOK_FOR_MORE_S = 60.0
"""How often a training that may have fewer workers than it wants looks for nodes to take more on."""

FAILURES, ELASTIC_FAILURES = 2, 10
"""How many times workers are replaced. Where nodes come and go there are more faults that are nobody's."""

# glibc hands big freed blocks back to the kernel and faults them in again each step, which costs a third of the
# time of CPU training; keep them.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

# How often Ray Train asks its workers for reports. At its default of 2 s short epochs wait for it, and an epoch that
# was reported just before a worker failed is lost.
POLL = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

# Ray Train's own memory of a run's checkpoints. It refuses to start where one of them is gone; ours are found by what
# lies there (`checkpoints.newest`).
SNAPSHOT = "checkpoint_manager_snapshot.json"

# Rows in the order of their shards, and none of them where a worker happens to be near: what a worker gets, and when,
# must not depend on which task was quicker.
IN_ORDER = ray.data.ExecutionOptions(preserve_order=True)


def train(
    dataset_path: str,
    bundles: str,
    config: Config,
    *,
    resume: bool = False,
    start_from: str | None = None,
    publish: bool = True,
    wait_s: float = 0.0,
) -> Bundle:
    """Train the model of `config` on a dataset; write the bundle, and make it the live one if `publish`.

    resume: go on with the last training of this BUNDLES folder that did not finish, if there is one, so that a job can
    be submitted again as it was.
    start_from: a bundle whose weights to start from.
    wait_s: how long a cluster that scales up may take to give the workers.
    Raises ResourceError at once if the cluster cannot give `config.train.workers`.
    """
    dataset = Dataset.open(dataset_path)
    parent = Bundle.open(start_from) if start_from else None  # a broken one is refused here, not in a worker
    origin = lineage(dataset, parent)  # now: while it trains, days may be added to the dataset
    catalogue = dataset.catalogue()
    config = _with_absolute_backbone(config)
    _check_images(dataset, config)
    runs, fingerprint = Runs(bundles), dataset.fingerprint()
    unfinished = runs.unfinished(config, fingerprint) if resume else None
    if unfinished:
        origin["parent"] = runs.parent()
    elif resume:
        step(f"train: {bundles} has no training that did not finish: a new one begins")
    connect()
    resources = worker_resources(config, wait_s)
    facts = survey(dataset, len(catalogue), config)
    rows = next(iter(facts.rows.values()))
    if rows < config.train.workers:
        raise UsageError(
            f"{dataset.path}: {rows} row(s) to learn from cannot be shared by {config.train.workers} workers"
        )
    if unfinished:
        _forget(runs, unfinished)
    # Only now: what cannot start must not take the place of what can go on.
    run = unfinished or runs.begin(config, fingerprint, origin["parent"])
    step(f"train: preset {config.preset}, {config.train.workers} worker(s), {len(catalogue)} items, run {run}")
    start = absolute(start_from) if start_from else None
    job = Job(
        config, dataset.path, facts.first_stage, facts.rows, start, fingerprint=fingerprint, shards=facts.shards
    )  # fmt: skip
    board = Board.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    asked = Asked(board)
    trainer = _trainer(job, dataset, runs.storage, run, resources, board, asked)
    with asked.by_sigterm():
        with _progress(board, bundles, run, config), writing(bundles), _naming_shards(dataset, config):
            result = _fit(trainer)
        if place := ray.get(board.ended_at.remote()):
            _ended(asked, place)
    if result.checkpoint is None:
        raise ResourceError(f"the training ended without a checkpoint; see {runs.storage}/{run}")
    with result.checkpoint.as_directory() as folder:
        bundle = write_bundle(
            Path(folder), bundles, dataset, catalogue, config, facts.everything, live=publish, origin=origin
        )
    runs.finish(run)
    return bundle


def _trainer(
    job: Job, dataset: Dataset, storage: str, run: str, resources: dict[str, float], board: Any, asked: Asked
) -> Trainer:
    """Ray's trainer of one run: how many workers, what each asks for and reads, and what is done where one fails."""
    config = job.config
    elastic, workers = config.train.min_workers, config.train.workers
    os.environ.setdefault(*POLL)
    return Trainer(
        train_worker,
        train_loop_config={"job": ray.put(job), "board": board, "storage": f"{storage}/{run}"},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(elastic, workers) if elastic else workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=LOOK_FOR_MORE_S,  # type: ignore[call-arg]
            use_gpu=config.train.gpu,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=run,
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=ELASTIC_FAILURES if elastic else FAILURES),
            worker_runtime_env={"env_vars": ALLOCATOR},  # type: ignore[call-arg]
        ),
        torch_config=Workers(backend="nccl" if config.train.gpu else "gloo"),
        datasets=_tables(dataset, config, list(job.shards), board),
        # What is split has a coordinator, a process for each table; one worker does without.
        dataset_config=ray.train.DataConfig(datasets_to_split="all" if workers > 1 else [], execution_options=IN_ORDER),
        asked=asked,
    )


def _ended(asked: Asked, place: str) -> None:
    """Raise what befits a training that ended early, because somebody wanted it to."""
    if asked.by == signal.SIGINT:
        step(f"train: stopped at {place}: {GO_ON}")
        raise KeyboardInterrupt
    if asked.by == signal.SIGTERM:
        raise TerminatedError(f"ended by SIGTERM at {place}: {GO_ON}")
    raise ResourceError(f"a worker got SIGTERM, and the training ended at {place}: {GO_ON}")


def _forget(runs: Runs, run: str) -> None:
    fs, root = filesystem(f"{runs.storage}/{run}/{SNAPSHOT}")
    with suppress(FileNotFoundError):
        fs.delete_file(root)


def _tables(dataset: Dataset, config: Config, shards: list[str], board: Any) -> dict[str, Any]:
    """The rows of each stage, made from sequence shards as they are asked for.

    A task reads a shard itself: what Ray's reader does beforehand asks for a CPU, whatever its reading may ask for.
    """
    fs, _ = filesystem(dataset.path)
    # A block a shard: how many CPUs there are must not decide which rows are whose.
    named = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    leave_out = partial(_leave_out, board, len(shards)) if config.train.bad_shards == "skip" else None
    # Workers may take every CPU of the nodes that are left: what feeds them must not wait for one.
    asks: dict[str, Any] = {"num_cpus": 0, "concurrency": config.train.workers} if config.train.min_workers else {}

    def rows(stage: str) -> ray.data.Dataset:
        make = partial(_rows, stage=stage, config=config, fs=fs, leave_out=leave_out)
        return named.map_batches(make, batch_format="pyarrow", batch_size=None, **asks)

    return {stage: rows(stage) for stage in stages(config)}


def _rows(
    named: pa.Table,
    stage: str,
    config: Config,
    fs: pafs.FileSystem,
    leave_out: Callable[[str, Exception], None] | None = None,
) -> pa.Table:
    """The stage's rows of the shards named. leave_out: told of one that cannot be read, if such are to be skipped."""
    tables = []
    for path in named["shard"].to_pylist():
        try:
            tables.append(pq.read_table(path, filesystem=fs, partitioning=None))
        except (pa.ArrowException, OSError) as error:
            if leave_out is None:
                raise
            leave_out(path, error)
    return stage_rows(pa.concat_tables(tables) if tables else SEQUENCE_SCHEMA.empty_table(), stage, config)


def _leave_out(board: Any, of: int, path: str, error: Exception) -> None:
    """Have it said that a shard could be read at first and cannot any more. Raises DataError if none of them can."""
    if ray.get(board.leave_out.remote(path, str(error).splitlines()[0], of)) == of:
        raise DataError(f"{path}: neither this shard nor any other can be read; prepare again")


def worker_resources(config: Config, wait_s: float) -> dict[str, float]:
    """What each worker asks of the cluster. On CPUs it leaves one for Ray Data, which feeds the workers.

    If fewer workers will do, each asks for a CPU, so that it is the nodes which decide how many there are.
    Raises ResourceError if the cluster does not have it within `wait_s`.
    """
    elastic, gpu = config.train.min_workers, config.train.gpu
    workers = elastic or config.train.workers
    deadline = time.monotonic() + wait_s
    if wait_s:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[{"CPU": 1.0, **({"GPU": 1.0} if gpu else {})}] * workers)
    while True:
        have = ray.cluster_resources()
        cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
        share = 1.0 if elastic else min(1.0, (cpus - 1) / workers)
        if cpus >= workers and share >= MIN_CPU_A_WORKER and (not gpu or gpus >= workers):
            return {"CPU": share, **({"GPU": 1.0} if gpu else {})}
        if time.monotonic() >= deadline:
            break
        time.sleep(1.0)
    wanted = f"{workers} GPU(s) and {workers} CPU(s)" if gpu else f"{max(2, workers)} CPU(s)"
    raise ResourceError(
        f"{workers} worker(s) need {wanted} and the cluster has {cpus} CPU(s) and {gpus} GPU(s): "
        "ask for fewer with --workers, add nodes, or give an autoscaling cluster time with --wait SECONDS"
    )


def _with_absolute_backbone(config: Config) -> Config:
    """A worker runs in another folder: a file's path must mean the same there."""
    source = config.model.image_backbone
    if not config.model.use_image or source in (SCRATCH, PACKAGED):
        return config
    model = config.model.model_copy(update={"image_backbone": absolute(source)})
    return config.model_copy(update={"model": model})


def _check_images(dataset: Dataset, config: Config) -> None:
    if config.model.use_image and config.model.image_backbone != SCRATCH:
        pretrained(config.model.image_backbone)  # what is wrong with the weights is told here, not in a worker
        return
    size = int(dataset.manifest["config"]["images"]["size"])
    if config.model.kind == "paper" and config.model.image_size != IMAGE_SIZE:
        raise UsageError(f"the paper's model reads {IMAGE_SIZE}x{IMAGE_SIZE} images; leave model.image_size alone")
    if config.model.use_image and dataset.has("images") and size < config.model.image_size:
        raise DataError(
            f"{dataset.path} holds {size}x{size} images and the model reads {config.model.image_size}: "
            f"prepare with --set images.size={config.model.image_size}, or --set model.image_size={size}"
        )


def _fit(trainer: TorchTrainer) -> ray.train.Result:
    """Train. Ctrl-C is a KeyboardInterrupt, and an error that a user can mend is itself, out of Ray's wrapping."""
    ours = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit:  # Ray Train's handler of Ctrl-C stops the workers, exits with 0, and would stay for good
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
        causes = [getattr(failure, "_base_exc", failure) for failure in failures]
        raise next((cause for cause in causes if isinstance(cause, RayrecError | OSError)), error) from None
    finally:
        if signal.getsignal(signal.SIGINT) != ours:
            signal.signal(signal.SIGINT, ours)


@contextmanager
def _naming_shards(dataset: Dataset, config: Config) -> Iterator[None]:
    """Raise DataError where what failed is due to a shard that cannot be read: neither Ray nor Arrow name it."""
    try:
        yield
    except (ray.train.TrainingFailedError, OSError):
        if config.train.bad_shards == "stop":
            for _ in read_shards(dataset):
                pass
        raise


@contextmanager
def _progress(board: Any, bundles: str, run: str, config: Config) -> Iterator[None]:
    """Show what the workers pin on the board, and pass finished epochs to the trackers, while the training runs."""
    over = threading.Event()
    trackers = open_trackers(config.train.tracker, bundles, run, config)

    def watch() -> None:
        read = noted = 0
        with Task("train (steps)") as task:
            while True:
                last = over.wait(0.5)
                shown, epochs, notes = ray.get(board.read.remote(read, noted))
                read, noted = read + len(epochs), noted + len(notes)
                for note in notes:
                    step(f"train: {note}")
                if shown:
                    task.title = f"train {shown.stage} {shown.epoch + 1}"
                    task.update(shown.step, f"loss {shown.loss:.3f}", shown.steps)
                for epoch in epochs:
                    if epoch["stage"] != "done":
                        step(describe(epoch))
                        for tracker in trackers:
                            tracker.epoch(epoch)
                if last:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)
        for tracker in trackers:
            tracker.close()
