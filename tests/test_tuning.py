"""A search: trials run, the poor stop early, the best is written down, and what is done is not done again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from tinyshop import TINY

from rayrec.config import Config
from rayrec.errors import ResourceError, UsageError
from rayrec.settings import with_file, with_settings
from rayrec.training.dials import parse
from rayrec.training.trial_table import Epoch, Trial, draw, table
from rayrec.training.tuning import Search, _fit, search

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
    found = search(str(tiny_dataset), out, what)
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
    with pytest.raises(UsageError, match="no search to resume"):
        search(str(tiny_dataset), tmp_path / "none", of(CONFIG, "train.lr=1e-3"), resume=True)
    with pytest.raises(ResourceError, match="asks for 99 CPUs"):
        search(str(tiny_dataset), tmp_path / "many", Search(CONFIG, [], 1, cpus=99))
