"""A search over a preset's dials: trials side by side on the cluster, the poor ones stopped early (ASHA).

In: a dataset, a preset and its dials. Out: a folder with `trials.json`, `table.md`, `tune.png` and `best.yaml`, which
`rayrec train --config` takes. What is judged is validation alone: test data is never looked at.
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from rayrec.cluster import connect, cpus
from rayrec.config import Config
from rayrec.data.dataset import Dataset
from rayrec.errors import ResourceError, UsageError, writing
from rayrec.files import absolute, filesystem, read_text, upload
from rayrec.progress import Task, step
from rayrec.settings import with_settings
from rayrec.training.dials import Dial, turns
from rayrec.training.group import add_up_alike
from rayrec.training.local import Alone, train_as
from rayrec.training.trial_table import Epoch, Trial, draw, table
from rayrec.training.validation import score

TRIALS = ".trials"
PLAN = "plan.json"
GRACE_EPOCHS = 2
REDUCTION = 3


@dataclass(frozen=True)
class Search:
    """What is searched: `n` trials of a preset's dials. Two searches that are equal try the same settings.

    cpus, gpus: of each trial.
    """

    config: Config
    dials: Sequence[Dial]
    n: int
    seed: int = 0
    cpus: int = 1
    gpus: float = 0.0

    def turns(self) -> list[list[str]]:
        """The settings of each trial."""
        return turns(self.dials, self.n, self.seed)

    def plan(self, dataset: str) -> dict[str, Any]:
        """What must be the same for a search to go on."""
        return {"dataset": dataset, "config": self.config.model_dump(mode="json"), "trials": self.turns()}


def search(dataset_path: str, out: str | Path, what: Search, *, resume: bool = False) -> dict[str, Any]:
    """Run the trials; write into `out`, a local folder or a URI, and answer, what `trials.json` holds.

    resume: go on with the search of this folder, if there is one; trials that are done are not repeated, and one that
    was under way goes on from its last epoch. Raises UsageError where `out` holds another search; ResourceError if no
    trial fits the cluster or every one failed.
    """
    dataset = Dataset.open(dataset_path)
    plan = what.plan(dataset.path)
    out = absolute(out)
    with writing(out):
        _hold(out, plan, resume)
    connect()
    if what.cpus > cpus():
        raise ResourceError(
            f"a trial asks for {what.cpus} CPUs and the cluster has {cpus()}: ask for fewer with --cpus"
        )
    step(f"tune: {what.n} trials of preset {what.config.preset}, {max(1, cpus() // what.cpus)} at a time")
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, dataset=dataset.path, config=what.config.model_dump()),
        {"cpu": what.cpus, "gpu": what.gpus},
    )
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    storage = f"{out}/{TRIALS}"
    watcher = Watcher(what.n)
    with watcher, writing(out):
        if resume and tune.Tuner.can_restore(storage):
            tuner = tune.Tuner.restore(storage, trainable, resume_errored=True, param_space=_space(plan))
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_space(plan),
                tune_config=tune.TuneConfig(
                    metric="best",
                    mode="max",
                    scheduler=ASHAScheduler(
                        max_t=what.config.train.epochs + what.config.train.fusion_epochs + 2,
                        grace_period=GRACE_EPOCHS,
                        reduction_factor=REDUCTION,
                    ),
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name=TRIALS,
                    storage_path=out,
                    verbose=0,
                    callbacks=[watcher],
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                    failure_config=tune.FailureConfig(max_failures=1),
                ),
            )
        results = _fit(tuner)
    trials = _trials(results, plan["trials"])
    return _write(out, plan, trials, what.config)


def _fit(tuner: tune.Tuner) -> tune.ResultGrid:
    """Search. Ctrl-C is a KeyboardInterrupt, and not, as of Ray Tune, an end as if all was done.

    What there is is written down before. Its handler takes itself away when it has heard one, else stays for good.
    """
    if threading.current_thread() is not threading.main_thread():
        return tuner.fit()
    ours = signal.getsignal(signal.SIGINT)
    try:
        results = tuner.fit()
        if signal.getsignal(signal.SIGINT) == ours:
            raise KeyboardInterrupt
        return results
    finally:
        signal.signal(signal.SIGINT, ours)


def _hold(out: str, plan: dict[str, Any], resume: bool) -> None:
    """Write down what is searched, or make sure that it is what was."""
    fs, root = filesystem(out)
    held = read_text(fs, f"{root}/{PLAN}")
    if held is not None:
        if not resume:
            raise UsageError(f"{out}: holds a search already; go on with --resume, or name another folder")
        if json.loads(held) != plan:
            raise UsageError(f"{out}: the search to resume had other settings, dials, trials or another dataset")
        return
    if resume:
        step(f"tune: {out} has no search to go on with: a new one begins")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
        upload(Path(folder), out, PLAN)


def _space(plan: dict[str, Any]) -> dict[str, Any]:
    return {"number": tune.grid_search(list(range(len(plan["trials"])))), "trials": plan["trials"]}


def run_trial(given: Mapping[str, Any], dataset: str, config: Mapping[str, Any]) -> None:
    """One trial, in a process of its own: a whole training by its settings, reported after each epoch."""
    settings = with_settings(Config.model_validate(config), given["trials"][given["number"]])
    if not settings.train.gpu:
        add_up_alike(max(1, int(tune.get_context().get_trial_resources().required_resources["CPU"])))
    device = torch.device("cuda" if settings.train.gpu else "cpu")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        checkpoint = tune.get_checkpoint()
        resume = Path(checkpoint.to_directory(scratch)) if checkpoint else None
        train_as(Reporting(Path(folder), device=device), Dataset.open(dataset), settings, resume=resume)


@dataclass
class Reporting(Alone):
    """A worker without others, whose epochs Ray Tune hears of; `folder` is for what it is given then."""

    line: dict[str, Any] = field(default_factory=dict)

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`."""
        judged = {name: value for name, value in metrics.items() if name.startswith("valid_")}
        # The refit may lose some of what the fusion had, or be thrown away, and "done" is no epoch.
        if judged and metrics["stage"] != "refit":
            now = score(judged)
            self.line = {"now": now, "best": max(now, self.line.get("best", now)), "cpu_s": metrics["cpu_s"]}
        super().report(metrics, save)
        line = {**self.line, "stage": metrics["stage"]}
        tune.report(line, checkpoint=tune.Checkpoint.from_directory(self.folder))

    def keep(self, place: dict[str, Any], save: Callable[[Path], None]) -> None:
        """See `fit.Peers`. A trial goes on from the end of an epoch."""


class Watcher(tune.Callback):
    """Says how the trials go. A context manager around the search."""

    current: ClassVar[Watcher | None] = None
    """Of the search under way in this process."""

    def __init__(self, n: int) -> None:
        self._task = Task("tune (trials)", n)
        self._best = -1.0

    def __enter__(self) -> Watcher:
        self._task.__enter__()
        Watcher.current = self
        return self

    def __exit__(self, *error: Any) -> None:
        Watcher.current = None
        self._task.__exit__(*error)

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray Tune writes callbacks down and reads them again to resume. A bar on a terminal cannot be written, and of
        # the search that goes on it is the new one that must move.
        return _watching, ()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """An epoch of a trial is done."""
        self._best = max(self._best, result.get("best", -1.0))
        self._task.update(sum(one.is_finished() for one in trials), f"best {self._best:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial is done, or stopped; Ray Tune says so before it counts as finished."""
        self._task.update(sum(one is trial or one.is_finished() for one in trials), f"best {self._best:.4f}")


def _watching() -> Watcher:
    return Watcher.current or Watcher(0)


def _trials(results: Any, settings: Sequence[Sequence[str]]) -> list[Trial]:
    """What came of each trial, in the order of their numbers."""
    found = []
    for result in results:
        number = result.config["number"]
        epochs = [] if result.metrics_dataframe is None else _epochs(result.metrics_dataframe)
        last = (result.metrics or {}).get("stage")
        found.append(Trial(number, tuple(settings[number]), epochs, last == "done", _why(result.error)))
    return sorted(found, key=lambda trial: trial.number)


def _epochs(lines: Any) -> list[Epoch]:
    judged = lines[~lines["stage"].isin(("refit", "done"))]
    return [Epoch(*row) for row in judged[["stage", "cpu_s", "now"]].itertuples(index=False)]


def _why(error: Exception | None) -> str | None:
    return None if error is None else str(getattr(error, "cause", error)).strip().splitlines()[-1]


def _write(out: str, plan: dict[str, Any], trials: list[Trial], config: Config) -> dict[str, Any]:
    judged = [trial for trial in trials if trial.epochs]
    if not judged:
        why = next((trial.error for trial in trials if trial.error), "no trial came to its first epoch")
        raise ResourceError(f"every trial failed: {why}; see {out}/{TRIALS}")
    best = max(judged, key=lambda trial: trial.best)
    result = {**plan, "best": best.number, "results": [trial.body() for trial in trials]}
    chosen = with_settings(config, best.settings).model_dump(mode="json")
    with tempfile.TemporaryDirectory() as made, writing(out):
        folder = Path(made)
        (folder / "trials.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "table.md").write_text(table(trials))
        (folder / "best.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))
        draw(trials, folder / "tune.png")
        upload(folder, out, "best.yaml")
    return result
