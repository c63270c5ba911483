"""Checkpoints: sealed with the hashes of their files, verified before use; the newest whole one of a run is found.

In: folders of files, a run's storage (a folder or a URI). Out: a folder that is whole, or why it is not. It must not
know what a checkpoint holds, beyond `state.json`: {"at": how far it is, in numbers that grow, ...}.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.bundle import sha256, write_atomically
from rayrec.errors import DataError
from rayrec.files import filesystem

STATE = "state.json"
PREFIX = "checkpoint_"
"""Of the folders that Ray Train makes for checkpoints in a run's storage."""


class DamagedCheckpointError(DataError):
    """A checkpoint that was not written to its end, or was changed since."""


def seal(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Write down what a worker's part of a checkpoint holds, after all else.

    The `parts` of a checkpoint come from as many workers and end in one folder; their files have names of their own.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if not path.name.startswith("seal-")
    }
    write_atomically(folder / f"seal-{part}.json", json.dumps({"parts": parts, "files": files}).encode())


def check(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint of which every file of every part is as it was sealed.

    Raises DamagedCheckpointError, naming what is missing or changed.
    """
    parts, part = 1, 0
    while part < parts:
        sealed = _json(folder / f"seal-{part}.json")
        parts, part = int(sealed["parts"]), part + 1
        for name, said in sealed["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != said["bytes"]:
                raise DamagedCheckpointError(f"{path}: missing, or cut short")
            if sha256(path) != said["sha256"]:
                raise DamagedCheckpointError(f"{path}: changed since it was written")
    return _json(folder / STATE)


def newest(storage: str, scratch: Path, tell: Callable[[str], None] = lambda text: None) -> str | None:
    """The name of the newest whole checkpoint of a run, which is then in `scratch`; None if there is none.

    Those which are not whole are passed over, and `tell` is told. One that a worker wrote to its end counts, whether
    or not anybody heard of it any more.
    """
    fs, root = filesystem(storage)
    selector = pafs.FileSelector(root, allow_not_found=True)
    names = [info.base_name for info in fs.get_file_info(selector) if info.base_name.startswith(PREFIX)]
    for name in sorted(names, key=lambda name: (_at(fs, f"{root}/{name}"), name), reverse=True):
        try:
            check(fetch(storage, name, scratch))
        except DamagedCheckpointError as error:
            tell(f"checkpoint {name} is damaged and passed over: {error}")
            shutil.rmtree(scratch / name, ignore_errors=True)
        else:
            return name
    return None


def fetch(storage: str, name: str, scratch: Path) -> Path:
    """A local copy of a checkpoint, in `scratch`."""
    fs, root = filesystem(storage)
    copy = scratch / name
    if not copy.is_dir():
        copy.mkdir(parents=True)
        pafs.copy_files(f"{root}/{name}", str(copy), source_filesystem=fs)
    return copy


def _at(fs: pafs.FileSystem, folder: str) -> list[float]:
    """How far a checkpoint is, as it says itself; one that cannot say is looked at last."""
    try:
        with fs.open_input_stream(f"{folder}/{STATE}") as stream:
            return [float(number) for number in json.loads(stream.read())["at"]]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return []


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        raise DamagedCheckpointError(f"{path}: missing, or cut short") from None
    if not isinstance(found, dict):
        raise DamagedCheckpointError(f"{path}: not what was written")
    return found
