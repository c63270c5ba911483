"""`rayrec bench epoch` counts events as they are, and compares within a round."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrec.bench import epoch
from rayrec.bench.dataset_made import make_dataset
from rayrec.config import preset
from rayrec.data.dataset import Dataset
from rayrec.settings import with_settings


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "dataset", 400, 16)


def test_an_event_is_told_once_however_long_a_window_is(dataset: Dataset) -> None:
    """Of 20 visitors' 20 events two are for validation and test, and some of half of them for the fusion."""
    told = [
        epoch.targets(dataset, with_settings(preset("small"), [*epoch.OURS, f"model.max_len={n}"])) for n in (5, 50)
    ]
    withheld = sum(len(row) for row in dataset.sequences()["item"].to_pylist()) - 20 * 3 - told[0]
    assert told[0] == told[1]
    assert 0 < withheld < 20 * 17 / 2


def test_ratios_are_of_rounds_and_runs_are_kept(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    slow = iter([1.0, 2.0, 10.0, 10.0])

    def ours(*given: object) -> dict[str, float]:
        asked.append("ours")
        return epoch._pace(300, next(slow), 1.0)

    def theirs(name: str, *given: object) -> dict[str, float]:
        asked.append(name)
        return epoch._pace(100, 1.0, 2.0)

    monkeypatch.setattr(epoch, "_ours", ours)
    monkeypatch.setattr(epoch, "_theirs", theirs)
    found = epoch.run(dataset.path, tmp_path / "out", 2, [])
    assert asked == ["ours", "ours", *epoch.THEIRS, "ours", *epoch.THEIRS, "ours"]
    assert found["ratio"]["rayrec"]["recbole-gru4rec"] == {"events_per_s": 1.65, "events_per_cpu_s": 6.0}
    assert epoch.run(dataset.path, tmp_path / "out", 2, []) == found
    assert len(asked) == 2 * (2 + len(epoch.THEIRS))
