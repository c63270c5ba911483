"""Events that were served become a raw folder that `prepare` reads, nothing lost and nobody's rows twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayrec.errors import UsageError
from rayrec.state import open_state, using
from rayrec.state.export import Exported, export_events
from rayrec.state.protocol import Event, Shown, State


@pytest.fixture
def state(tmp_path: Path) -> State:
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    state.append_events(
        [
            Event("u", "a", "purchase", 7, "e1", "s", 1.5, 9.99, 2.0, "r", 3, "home", 0.25, "m", "v"),
            Event("session:t", "b", "view", 8, "e2"),
            Event("gone", "c", "view", 9, "e3"),
        ]
    )
    state.log_shown(
        [
            Shown("r1", "u", 5, "home", "m1", "model", ("a", "b"), (0.9, 0.1)),
            Shown("r2", "", 6, "home", "m1", "popular", ("a",), (1.0,)),
        ]
    )
    state.erase("gone")
    return state


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [row for file in sorted((folder / "events").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [{name: value for name, value in row.items() if value is not None} for row in found]


def test_every_field_is_written_and_lists_are_impressions(state: State, tmp_path: Path) -> None:
    assert export_events(state, tmp_path / "raw") == Exported(2, 2, 2, nobodys=1, files=1)
    by_id = {row["event_id"]: row for row in rows(tmp_path / "raw")}
    assert sorted(by_id) == ["e1", "e2", "r1:0", "r1:1"]
    assert by_id["e1"] == {
        "user_id": "u", "item_id": "a", "action": "purchase", "timestamp": 7, "event_id": "e1", "session_id": "s",
        "value": 1.5, "price": 9.99, "quantity": 2.0, "request_id": "r", "position": 3, "scene": "home",
        "propensity": 0.25, "model": "m", "variant": "v",
    }  # fmt: skip
    assert by_id["e2"] == {"session_id": "t", "item_id": "b", "action": "view", "timestamp": 8, "event_id": "e2"}
    assert by_id["r1:1"] == {
        "user_id": "u", "item_id": "b", "action": "impression", "timestamp": 5, "event_id": "r1:1", "request_id": "r1",
        "position": 1, "scene": "home", "propensity": 0.1, "model": "m1",
    }  # fmt: skip


def test_files_are_bounded_and_nobody_is_split(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrec.state.export.ROWS_A_FILE", 1)
    assert export_events(state, tmp_path / "raw").files == 2
    assert len(rows(tmp_path / "raw")) == 4


def test_nothing_is_a_folder_without_files(tmp_path: Path) -> None:
    state = open_state(f"sqlite:///{tmp_path}/empty.db")
    assert export_events(state, tmp_path / "raw") == Exported(0, 0, 0, 0, 0)
    assert rows(tmp_path / "raw") == []


def test_an_old_export_is_not_mixed_in(state: State, tmp_path: Path) -> None:
    export_events(state, tmp_path / "raw")
    with pytest.raises(UsageError, match="is not empty"):
        export_events(state, tmp_path / "raw")


def test_a_state_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"), using(f"sqlite:///{tmp_path}/typo.db"):
        pass
    assert not (tmp_path / "typo.db").exists()
