"""Where a bundle comes from: its data, its parent, the code.

In: a dataset, the bundle that a training started from. Out: `lineage.json` of the new bundle, which its manifest
hashes as any other file. It must not know how the bundle is trained. Settings are in config.json, figures in
metrics.json, and who refused or let pass a bundle adds why, under VERDICT (`add_file`).
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from rayrec import __version__
from rayrec.bundle import Bundle
from rayrec.data.dataset import Dataset
from rayrec.files import filesystem

LINEAGE = "lineage.json"
VERDICT = "verdict"
GIT_TIMEOUT_S = 5


def lineage(dataset: Dataset, parent: Bundle | None) -> dict[str, Any]:
    """The record of a bundle that was trained on `dataset`, from the weights of `parent`.

    The dataset's id is the beginning of its manifest's hash: another content, settings or time has another.
    """
    digest = manifest_sha256(dataset)
    return {
        "dataset": {"path": dataset.path, "id": digest[:12], "manifest_sha256": digest},
        "parent": None if parent is None else parent_record(parent),
        "code": {"rayrec": __version__, **git_state(Path(__file__).parent)},
    }


def manifest_sha256(dataset: Dataset) -> str:
    """SHA-256 of a dataset's manifest, which holds the hash of each of its files."""
    fs, root = filesystem(dataset.path)
    with fs.open_input_stream(f"{root}/manifest.json") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def parent_record(parent: Bundle) -> dict[str, Any]:
    """How a bundle is named in those that started from it."""
    return {
        "version": parent.version,
        "path": parent.location,
        "created": parent.manifest.get("created"),
    }


def git_state(folder: Path) -> dict[str, Any]:
    """The commit of the checkout that holds `folder`, and whether tracked files were changed since.

    Both None where `folder` is in no checkout of ours: installed beside somebody else's code, or without git.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    tracked = _git(folder, "ls-files", "--error-unmatch", str(Path(__file__).name)) if top else None
    if not tracked:
        return {"commit": None, "changed": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "changed": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None if it is not there, fails or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
