"""Each export holds what is new of a state and no more, and who was erased leaves those that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.data.raw import find_raw
from rayrec.retrain.exports import ITEMS_SCHEMA, JOINS, Exports, New
from rayrec.state import open_state
from rayrec.state.protocol import Event, Shown, State

CATALOGUE = pa.Table.from_pylist([{"item_id": "a", "title": "A", "category": "x|y", "price": 1.5}], ITEMS_SCHEMA)
NO_ITEMS = ITEMS_SCHEMA.empty_table()


@pytest.fixture
def state(tmp_path: Path) -> State:
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    state.append_events([Event("u", "a", "view", 7, "e1"), Event("session:t", "b", "cart", 8, "e2")])
    state.log_shown([Shown("r", "u", 5, "home", "m", "model", ("a", "b"), (0.9, 0.1))])
    state.log_shown([Shown("r2", "", 5, "home", "m", "model", ("a", "b"), (0.9, 0.1))])
    return state


def rows(raw: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((raw / "events").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def ids(raw: Path) -> list[str]:
    return sorted(row["event_id"] for row in rows(raw))


def test_an_event_is_exported_once_however_late_it_comes(state: State, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    exports = Exports(str(raw), {})
    assert not exports
    assert exports.export(state, NO_ITEMS) == New(events=2, impressions=2)
    assert exports
    before = {file: file.read_bytes() for file in (raw / "events").iterdir()}
    assert exports.export(state, NO_ITEMS) == New()
    state.append_events([Event("u", "c", "view", 1, "late"), Event("u", "a", "view", 7, "e1")])
    assert Exports(str(raw), {}).export(state, NO_ITEMS) == New(events=1)
    assert ids(raw) == ["e1", "e2", "late", "r:0", "r:1"]
    assert all(file.read_bytes() == content for file, content in before.items()), "what was taken in may not change"
    assert len(find_raw(str(raw)).events) == 2


def test_an_export_that_was_ended_is_made_up_for(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrec.retrain.exports.ROWS_A_FILE", 1)
    raw, put, calls = tmp_path / "raw", Exports._put, []

    def fails(self: Exports, name: str, content: bytes) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Exports, "_put", fails)
        with pytest.raises(KeyboardInterrupt):
            Exports(str(raw), {}).export(state, NO_ITEMS)
    assert 0 < len(ids(raw)) < 4
    Exports(str(raw), {}).export(state, NO_ITEMS)
    assert ids(raw) == ["e1", "e2", "r:0", "r:1"]


def test_columns_are_called_as_the_dataset_calls_them(state: State, tmp_path: Path) -> None:
    exports = Exports(str(tmp_path / "raw"), {"user_id": "customer", "event_id": "id", "item_id": "sku"})
    exports.export(state, NO_ITEMS)
    row = next(row for row in rows(tmp_path / "raw") if row["id"] == "e1")
    assert (row["customer"], row["sku"]) == ("u", "a")
    assert exports.export(state, NO_ITEMS) == New()
    assert exports.visitors() == {"u", "session:t"}


def test_edited_items_are_whole_rows(state: State, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    state.put_item("a", {"price": 2.0, "in_stock": False, "listed": True}, b"jpeg")
    state.put_item("new", {"title": "N", "listed": True})
    state.put_item("came and went", {"listed": False})
    state.put_item("in/a/path", {"listed": True}, b"jpeg")
    exports = Exports(str(raw), {})
    assert exports.export(state, CATALOGUE) == New(2, 2, items=3, pictures=1)
    assert pq.read_table(raw / "items.parquet").to_pylist()[::2] == [
        {"item_id": "a", "title": "A", "category": "x|y", "brand": None, "price": 2.0},
        {"item_id": "new", "title": "N", "category": None, "brand": None, "price": None},
    ]
    assert (raw / "images" / "a.jpg").read_bytes() == b"jpeg"
    assert exports.export(state, CATALOGUE) == New(), "the same is not written again"
    assert find_raw(str(raw)).images.keys() == {"a"}
    state.put_item("a", {"title": None, "listed": True}, b"other")
    assert exports.export(state, CATALOGUE) == New(items=3, pictures=1)
    assert pq.read_table(raw / "items.parquet").to_pylist()[0]["title"] is None


def test_where_logs_came_without_a_catalogue_edits_make_none(state: State, tmp_path: Path) -> None:
    """With a catalogue of one item all others would be unlisted, and never recommended."""
    state.put_item("a", {"price": 2.0, "listed": True})
    assert Exports(str(tmp_path / "raw"), {}).export(state, NO_ITEMS).items == 0
    assert not (tmp_path / "raw" / "items.parquet").exists()


def test_the_erased_leave_with_the_sessions_that_were_theirs(state: State, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    exports = Exports(str(raw), {})
    exports.export(state, NO_ITEMS)  # the session is nobody's yet
    state.join("u", "t")
    state.append_events([Event("u", "c", "view", 9, "e3"), Event("other", "c", "view", 9, "e4")])
    exports.export(state, NO_ITEMS)
    assert json.loads((raw / JOINS).read_text()) == {"session:t": "u"}
    assert exports.visitors() == {"u", "session:t", "other"}
    assert exports.forget({"u": 8}) == {"u": 8, "session:t": 8}
    assert ids(raw) == ["e3", "e4"], "what they did after they were erased stays"
    exports.forget_joins({"u": 8})
    assert json.loads((raw / JOINS).read_text()) == {}
