"""Runs under way: what can be resumed, and what is left when they end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tinyshop

from rayrec.errors import ResourceError, UsageError
from rayrec.training.runs import Runs


def test_a_run_that_began_can_be_resumed_with_the_same_settings(tmp_path: Path) -> None:
    runs = Runs(str(tmp_path / "bundles"))
    run = runs.begin(tinyshop.tiny())
    assert re.fullmatch(r"\d{8}-\d{6}-small", run)
    assert Runs(str(tmp_path / "bundles")).unfinished(tinyshop.tiny()) == run


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    runs = Runs(str(tmp_path))
    run = runs.begin(tinyshop.tiny())
    with pytest.raises(UsageError, match=rf"{run}\) had other settings"):
        runs.unfinished(tinyshop.tiny("train.lr=0.5"))


def test_a_run_of_a_version_without_a_setting_is_refused_where_that_taught_otherwise(tmp_path: Path) -> None:
    runs = Runs(str(tmp_path))
    runs.begin(tinyshop.tiny())
    open_run = tmp_path / ".runs" / "OPEN"
    saved = json.loads(open_run.read_text())
    del saved["config"]["train"]["cnn_lr"]
    open_run.write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"train\.cnn_lr was 1\.0 and is 0\.3"):
        runs.unfinished(tinyshop.tiny())
    assert runs.unfinished(tinyshop.tiny("train.cnn_lr=1"))


def test_there_is_nothing_to_resume_in_a_new_folder(tmp_path: Path) -> None:
    assert Runs(str(tmp_path / "nowhere")).unfinished(tinyshop.tiny()) is None
    (tmp_path / ".runs").mkdir()
    (tmp_path / ".runs" / "OPEN").write_text("{half a")
    assert Runs(str(tmp_path)).unfinished(tinyshop.tiny()) is None


def test_a_finished_run_is_gone(tmp_path: Path) -> None:
    runs = Runs(str(tmp_path))
    run = runs.begin(tinyshop.tiny())
    checkpoint = Path(runs.storage) / run / "checkpoint_000000"
    checkpoint.mkdir(parents=True)
    runs.finish(run)
    assert list(Path(runs.storage).iterdir()) == []
    assert runs.unfinished(tinyshop.tiny()) is None


def test_checkpoints_lie_beside_the_bundles_wherever_these_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Runs("bundles").storage == str(tmp_path / "bundles" / ".runs")
    assert Runs("s3://bucket/bundles/").storage == "s3://bucket/bundles/.runs"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write here"):
        Runs(str(tmp_path / "file")).begin(tinyshop.tiny())


def test_a_run_by_uri(tmp_path: Path) -> None:
    runs = Runs(f"file://{tmp_path}/bundles")
    run = runs.begin(tinyshop.tiny())
    assert runs.unfinished(tinyshop.tiny()) == run
    assert (tmp_path / "bundles" / ".runs" / "OPEN").exists()
