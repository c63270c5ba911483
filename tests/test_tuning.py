"""A search: trials run, the poor stop early, the best is written down, and what is done is not done again."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import cloudpickle
from rich.console import Console
from terminal import TINY_TRAIN, Terminal
from tinyshop import TINY

from rayrec import progress
from rayrec.config import Config
from rayrec.errors import ResourceError, UsageError
from rayrec.settings import with_file, with_settings
from rayrec.training.dials import parse
from rayrec.training.trial_table import Epoch, Trial, draw, table
from rayrec.training.tuning import TRIALS, Search, Watcher, _fit, search

CONFIG = with_settings(Config(), [*TINY, "train.epochs=1", "train.fusion_epochs=1", "train.refit_epochs=0"])


def of(config: Config, *dials: str, n: int = 2) -> Search:
    return Search(config, [parse(text, config) for text in dials], n)


def test_the_table_has_the_best_first_and_what_failed_last(tmp_path: Path) -> None:
    epochs = [Epoch("retrieval", 1.0, 0.1), Epoch("fusion", 2.5, 0.3)]
    trials = [
        Trial(0, (), epochs[:1], False),
        Trial(1, ("train.lr=9",), [], False, "it | burst"),
        Trial(2, ("train.lr=0.1",), epochs, True),
    ]
    rows = table(trials).splitlines()[2:]
    assert rows == [
        "| 2 | train.lr=0.1 | 0.3000 | 2 | 2 | to its end |",
        "| 0 | the preset | 0.1000 | 1 | 1 | stopped early |",
        "| 1 | train.lr=9 |  | 0 |  | failed: it / burst |",
    ]
    draw(trials, tmp_path / "tune.png")
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ray
def test_a_search_finds_what_is_better_and_can_be_resumed(cluster: None, tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "tune"
    what = of(CONFIG, "train.lr=1e-7")
    found = search(str(tiny_dataset), out, what, resume=True)  # of nothing: a new one begins
    best = found["results"][found["best"]]
    assert found == json.loads((out / "trials.json").read_text())
    assert [result["settings"] for result in found["results"]] == [list(turn) for turn in what.turns()]
    assert best["best"] == max(result["best"] for result in found["results"])
    assert best["settings"] == [], "what hardly learns is worse than the preset"
    assert with_file(Config(), out / "best.yaml") == with_settings(CONFIG, best["settings"])
    assert yaml.safe_load((out / "best.yaml").read_text())["preset"] == "small"

    written = (out / "trials.json").stat().st_mtime_ns
    assert search(str(tiny_dataset), out, what, resume=True)["results"] == found["results"]
    assert (out / "trials.json").stat().st_mtime_ns > written
    with pytest.raises(UsageError, match="holds a search already"):
        search(str(tiny_dataset), out, what)
    with pytest.raises(UsageError, match="had other settings"):
        search(str(tiny_dataset), out, of(CONFIG, "train.lr=1e-6"), resume=True)


# ---------------------------------------------------------------- a search that is broken off


def test_a_bar_on_a_terminal_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_console", Console(file=io.StringIO(), force_terminal=True))
    with Watcher(2) as first:
        written = cloudpickle.dumps(first)
    with Watcher(2) as resumed:
        assert cloudpickle.loads(written) is resumed


EPOCHS = 8
OF_A_TRIAL = ["retrieval"] * EPOCHS + ["fusion", "done"]


def reported(out: Path) -> list[list[dict[str, Any]]]:
    """What each trial that has begun reported so far, the first to begin first."""
    texts = [path.read_text() for path in (out / TRIALS).glob("*/result.json")]
    trials = [[json.loads(line) for line in text.splitlines() if line.endswith("}")] for text in texts]
    return sorted(filter(None, trials), key=lambda lines: lines[0]["config"]["number"])


def half_done(out: Path) -> bool:
    """Whether one trial is done and the second under way."""
    trials = reported(out)
    return len(trials) == 2 and trials[0][-1]["stage"] == "done" and trials[1][-1]["stage"] == "retrieval"


def went_on(before: list[list[dict[str, Any]]], after: list[list[dict[str, Any]]]) -> None:
    """What was done is as it was, and the trial that was under way did the rest and no more."""
    assert [line["stage"] for line in before[0]] == OF_A_TRIAL
    assert after[0] == before[0], "a finished trial is not repeated"
    assert 0 < len(before[1]) < len(OF_A_TRIAL)
    assert after[1][: len(before[1])] == before[1]
    assert [line["stage"] for line in after[1]] == OF_A_TRIAL, "no epoch is told twice, and none is lost"
    assert 0 < after[1][-1]["iterations_since_restore"] < len(OF_A_TRIAL), "it goes on from its last epoch"


def interrupting(ready: Callable[[], bool]) -> threading.Thread:
    """Press Ctrl-C as soon as `ready`; to be joined."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.ray
def test_a_search_that_was_interrupted_goes_on_where_it_was(
    cluster: None, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal, whose bar is no text; and into a URI."""
    shown = io.StringIO()
    monkeypatch.setattr(progress, "_console", Console(file=shown, force_terminal=True, width=200))
    # The second trial learns more than the preset, so that it is not stopped early.
    config = with_settings(CONFIG, ["train.lr=1e-7", f"train.epochs={EPOCHS}", f"train.patience={EPOCHS}"])
    one_at_a_time = Search(config, [parse("train.lr=0.02", config)], 2, cpus=2)
    out = tmp_path / "tune"
    watcher = interrupting(lambda: half_done(out))
    try:
        with pytest.raises(KeyboardInterrupt):
            search(str(tiny_dataset), f"file://{out}", one_at_a_time)
    finally:
        watcher.join()
    before = reported(out)
    assert not (out / "trials.json").exists()
    assert "2/2" not in shown.getvalue()

    found = search(str(tiny_dataset), f"file://{out}", one_at_a_time, resume=True)
    went_on(before, reported(out))
    assert [result["fate"] for result in found["results"]] == ["to its end"] * 2
    assert (found["best"], found) == (1, json.loads((out / "trials.json").read_text()))
    assert "2/2" in shown.getvalue()


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_whose_machine_died_goes_on_where_it_was(tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "tune"
    tune = (
        "tune", tiny_dataset, out, *TINY_TRAIN[2:], "--set", f"train.epochs={EPOCHS}", "--set",
        f"train.patience={EPOCHS}", "--set", "train.lr=1e-7", "--dial", "train.lr=0.02", "--trials", 2,
        "--cpus", (os.cpu_count() or 1) // 2 + 1,
    )  # fmt: skip
    with Terminal() as own:
        own.start(*tune).wait_until(lambda: half_done(out))
    before = reported(out)  # every process was killed
    with Terminal() as own:
        ran = own.rayrec(*tune, "--resume", "--json")
    assert ran.code == 0, ran.err
    went_on(before, reported(out))
    assert ran.json["best"] == 1


class Ended:
    """A search that ends as Ray Tune's do: its handler of Ctrl-C stays, unless it has heard one."""

    def __init__(self, interrupted: bool) -> None:
        self.interrupted = interrupted

    def fit(self) -> str:
        before = signal.signal(signal.SIGINT, lambda *given: None)
        if self.interrupted:
            signal.signal(signal.SIGINT, before)
        return "results"


def test_a_search_that_was_interrupted_is_not_done() -> None:
    assert _fit(Ended(interrupted=False)) == "results"  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C is ours again"
    with pytest.raises(KeyboardInterrupt):
        _fit(Ended(interrupted=True))  # type: ignore[arg-type]


@pytest.mark.ray
def test_what_cannot_be_searched_is_told(cluster: None, tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="asks for 99 CPUs"):
        search(str(tiny_dataset), tmp_path / "many", Search(CONFIG, [], 1, cpus=99))
