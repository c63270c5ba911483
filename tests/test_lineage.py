"""A bundle says which data, which parent and which code it comes from, and its manifest covers what it says."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import tinyshop

from rayrec.bundle import Bundle, BundleWriter
from rayrec.errors import BundleError
from rayrec.training.lineage import LINEAGE, git_state, lineage
from rayrec.training.runs import Runs


@pytest.fixture
def parent(tmp_path: Path) -> Bundle:
    with BundleWriter(tmp_path / "bundles", "v1") as writer:
        return writer.commit(created="2026-01-01T00:00:00Z")


def test_it_names_data_parent_and_code(tmp_path: Path, parent: Bundle) -> None:
    dataset = tinyshop.write(tmp_path / "dataset", users=5)
    record = lineage(dataset, parent)
    digest = hashlib.sha256((tmp_path / "dataset" / "manifest.json").read_bytes()).hexdigest()
    assert record["dataset"] == {"path": dataset.path, "id": digest[:12], "manifest_sha256": digest}
    assert record["parent"] == {"version": "v1", "path": str(parent.path), "created": "2026-01-01T00:00:00Z"}
    assert set(record["code"]) == {"rayrec", "commit", "changed"}
    assert lineage(dataset, None)["parent"] is None


def test_the_commit_is_that_of_a_checkout_of_ours_alone(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "changed": None}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-q", "-m", "a checkout of something else")
    assert git_state(tmp_path)["commit"] is None
    (tmp_path / "lineage.py").write_text("")
    git("add", "lineage.py")
    git("commit", "-q", "-m", "ours")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "lineage.py").write_text("changed")
    assert git_state(tmp_path)["changed"] is True


def test_the_manifest_covers_it(tmp_path: Path) -> None:
    with BundleWriter(tmp_path, "v2") as writer:
        writer.json(LINEAGE, {"parent": None})
        bundle = writer.commit()
    assert Bundle.open(bundle.path).json(LINEAGE) == {"parent": None}
    (bundle.path / LINEAGE).write_text("{}")
    with pytest.raises(BundleError, match=r"lineage\.json was changed"):
        Bundle.open(bundle.path)


def test_a_resumed_training_remembers_its_parent(tmp_path: Path) -> None:
    runs = Runs(str(tmp_path))
    assert runs.unfinished(tinyshop.tiny()) is None
    runs.begin(tinyshop.tiny(), parent={"version": "v1"})
    assert runs.unfinished(tinyshop.tiny())
    assert runs.parent() == {"version": "v1"}
