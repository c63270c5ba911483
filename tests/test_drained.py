"""A machine that is about to be taken away: a checkpoint of the step under way, once a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.train
import tinyshop

from rayrec.data.dataset import Dataset
from rayrec.training import fit
from rayrec.training.fit import Fit, Job
from rayrec.training.local import Alone, LocalFeed
from rayrec.training.survey import survey
from rayrec.training.workers import RayPeers

BRIEF = tinyshop.tiny("train.epochs=1", "train.fusion_epochs=0", "train.refit_epochs=0")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("shop") / "dataset")


class Warned(Alone):
    """A worker whose machine is announced to go away when it asks for the third time."""

    asked = 0
    kept: list[int]

    def warned(self) -> bool:
        self.asked += 1
        return self.asked == 3

    def keep(self, place: dict[str, Any], save: Any) -> None:
        self.kept.append(place["step"])
        super().keep(place, save)


@pytest.mark.parametrize(("look_s", "kept"), [(0.0, [3]), (1e9, [])])
def test_a_warning_has_a_checkpoint_written_after_the_step(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_s: float, kept: list[int]
) -> None:
    """The training goes on from there to its end: whether the machine goes is not known yet."""
    monkeypatch.setattr(fit, "LOOK_S", look_s)
    facts = survey(dataset, tinyshop.N_ITEMS, BRIEF)
    peers = Warned(tmp_path)
    peers.kept = []
    training = Fit(Job(BRIEF, dataset.path, facts.first_stage, facts.rows), LocalFeed(dataset, BRIEF), peers)
    training.run()
    (line,) = training.history
    assert line["steps"] > 3
    assert peers.kept == kept
    assert peers.asked == (line["steps"] if look_s == 0 else 0)


def test_a_node_that_is_drained_warns_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([None, "drained", "drained", None, "drained"])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(told))
    peers = object.__new__(RayPeers)
    peers.was_warned = False
    assert [peers.warned() for _ in range(5)] == [False, True, False, False, True]
