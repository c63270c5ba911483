"""Checkpoints: whole ones are found, damaged ones are told from them and passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayrec.training.checkpoints import DamagedCheckpointError, check, newest, seal


def write(storage: Path, name: str, at: list[int], parts: int = 1) -> Path:
    """A checkpoint of so many workers."""
    folder = storage / name
    folder.mkdir(parents=True)
    for part in range(parts):
        (folder / f"worker-{part}.pt").write_bytes(bytes([part]) * 1000)
    (folder / "state.json").write_text(json.dumps({"at": at}))
    for part in range(parts):
        seal(folder, part, parts)
    return folder


def cut(folder: Path) -> None:
    path = folder / "worker-0.pt"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "worker-0.pt"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": cut,
    "a bit flipped": flip,
    "a file missing": lambda folder: (folder / "worker-0.pt").unlink(),
    "no seal": lambda folder: (folder / "seal-0.json").unlink(),
    "half a seal": lambda folder: (folder / "seal-0.json").write_text('{"parts": 1, "fi'),
    "a worker's part missing": lambda folder: (folder / "seal-1.json").unlink(),
    "half a state": lambda folder: (folder / "state.json").write_text('{"at": [0, '),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "run", "checkpoint_a", [0, 3, 0], parts=2)
    write(tmp_path / "run", "checkpoint_b", [0, 3, 7], parts=2)
    assert newest(str(tmp_path / "run"), tmp_path / "first") == "checkpoint_b"
    DAMAGE[damage](tmp_path / "run" / "checkpoint_b")
    with pytest.raises(DamagedCheckpointError):
        check(tmp_path / "run" / "checkpoint_b")
    said: list[str] = []
    assert newest(str(tmp_path / "run"), tmp_path / "second", said.append) == "checkpoint_a"
    assert check(tmp_path / "second" / "checkpoint_a")["at"] == [0, 3, 0]
    assert said == [] if damage == "half a state" else "checkpoint_b is damaged" in said[0]


def test_how_far_a_checkpoint_is_decides_and_not_its_name(tmp_path: Path) -> None:
    """Clocks of machines differ."""
    for name, at in (("checkpoint_z", [0, 2, 0]), ("checkpoint_b", [1, 0, 4]), ("checkpoint_a", [1, 0, 12])):
        write(tmp_path / "run", name, at)
    (tmp_path / "run" / "something else").mkdir()
    assert newest(f"file://{tmp_path}/run", tmp_path / "scratch") == "checkpoint_a"


def test_where_nothing_was_written_nothing_is_found(tmp_path: Path) -> None:
    assert newest(str(tmp_path / "nowhere"), tmp_path / "scratch") is None
    cut(write(tmp_path / "run", "checkpoint_a", [0, 1, 0]))
    assert newest(str(tmp_path / "run"), tmp_path / "scratch") is None
