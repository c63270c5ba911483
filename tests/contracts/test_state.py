"""What every state backend must do; a backend is one more entry in BACKENDS."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrec.errors import StateError, UsageError
from rayrec.state import State, absolute_url, open_state
from rayrec.state.protocol import Act, Event, History, ItemEdit, Shown
from rayrec.state.sqlite import STEPS, SqliteState

NOW_MS = time.time_ns() // 1_000_000


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return f"sqlite:///{tmp_path}/state.db"


@pytest.fixture
def state(url: str) -> Iterator[State]:
    state = open_state(url)
    yield state
    state.close()


def view(visitor: str, item_id: str, time_ms: int, action: str = "view", event_id: str | None = None) -> Event:
    return Event(visitor, item_id, action, time_ms, event_id)


def history(state: State, visitor: str, limit: int = 10) -> History:
    return state.histories([visitor], limit)[0]


def items(state: State, visitor: str, limit: int = 10) -> list[str]:
    return [act.item_id for act in history(state, visitor, limit).acts]


def test_events_come_back_as_history_oldest_first(state: State) -> None:
    assert state.append_events([view("u", "a", 10), view("u", "b", 20, "cart"), view("v", "c", 5)]) == ["accepted"] * 3
    assert history(state, "u") == History((Act("a", "view", 10), Act("b", "cart", 20)))
    assert items(state, "v") == ["c"]


def test_late_events_take_their_place_and_ties_keep_the_order_of_arrival(state: State) -> None:
    state.append_events([view("u", "late", 30)])
    state.append_events([view("u", "early", 10), view("u", "tie-1", 20), view("u", "tie-2", 20)])
    assert items(state, "u") == ["early", "tie-1", "tie-2", "late"]


def test_history_is_bounded_to_the_newest(state: State) -> None:
    state.append_events([view("u", str(n), n) for n in range(50)])
    assert items(state, "u", limit=3) == ["47", "48", "49"]


def test_only_engagements_make_history(state: State) -> None:
    state.append_events([view("u", "a", 1), view("u", "b", 2, "impression"), view("u", "c", 3, "hide")])
    assert items(state, "u") == ["a"]


def test_an_event_id_counts_once_ever(state: State) -> None:
    assert state.append_events([view("u", "a", 1, event_id="e"), view("u", "a", 1, event_id="e")]) == [
        "accepted",
        "duplicate",
    ]
    assert state.append_events([view("u", "a", 1, event_id="e")]) == ["duplicate"]
    assert items(state, "u") == ["a"]


def test_events_without_an_id_each_count_and_get_one(state: State) -> None:
    assert state.append_events([view("u", "a", 1), view("u", "a", 1)]) == ["accepted", "accepted"]
    assert len({event.event_id for event in state.user("u").events}) == 2


def test_every_field_of_an_event_survives(state: State) -> None:
    event = Event(
        *("u", "a", "purchase", 7, "e", "s", 1.5, 9.99, 2.0, "r", 3, "home", 0.25, "m", "v"),
    )
    state.append_events([event])
    assert state.user("u").events == [event]


def test_bought_counts_purchases_less_cancellations(state: State) -> None:
    actions = [("a", "purchase"), ("b", "purchase"), ("b", "cancel"), ("c", "hide"), ("d", "dislike"), ("e", "view")]
    state.append_events([view("u", item_id, n, action) for n, (item_id, action) in enumerate(actions)])
    state.append_events([view("u", "a", 70, "purchase"), view("u", "a", 60, "purchase"), view("u", "z", 80, "cancel")])
    assert history(state, "u", limit=1).bought == {"a": 70}, "and when last, whatever the order of arrival"
    assert history(state, "u", limit=1).hidden == {"c", "d"}


def test_unknown_visitors_have_an_empty_history(state: State) -> None:
    assert state.histories(["nobody", "nobody", "else"], 10) == [History()] * 3
    assert state.histories([], 10) == []
    assert state.user("nobody").events == []


def shown(visitor: str, request_id: str = "r1") -> Shown:
    return Shown(request_id, visitor, 5, "home", "m1", "model", ("a", "b"), (0.9, 0.1))


def test_lists_shown_are_kept_with_their_propensities(state: State) -> None:
    state.log_shown([shown("u"), shown("v", "r2")])
    assert state.user("u").shown == [shown("u")]


def test_join_keeps_when_it_was_bought_last(state: State) -> None:
    state.append_events([view("session:s", "a", 70, "purchase"), view("u", "a", 60, "purchase")])
    state.append_events([view("u", "b", 5, "purchase"), view("session:s", "b", 6, "cancel")])
    state.join("u", "s")
    assert history(state, "u").bought == {"a": 70}


def test_join_moves_what_was_and_what_comes(state: State) -> None:
    state.append_events([view("session:s", "a", 10), view("u", "b", 20), view("session:t", "x", 1)])
    state.log_shown([shown("session:s")])
    assert state.join("u", "s") == 1
    state.append_events([view("session:s", "c", 15)])
    state.log_shown([shown("session:s", "r2")])
    assert items(state, "u") == ["a", "c", "b"]
    assert items(state, "session:s") == ["a", "c", "b"], "a session that was joined sees its user's history"
    assert items(state, "session:t") == ["x"]
    assert [one.request_id for one in state.user("u").shown] == ["r1", "r2"]
    assert state.user("u").sessions == ["s"]
    assert state.join("u", "s") == 0


def test_everybody_of_whom_anything_is_held(state: State) -> None:
    assert list(state.visitors()) == []
    state.append_events([view("session:s", "a", 1), view("u", "b", 2), view("v", "c", 3), view("u", "d", 4)])
    state.log_shown([shown("u"), shown("w"), shown("")])
    assert sorted(state.visitors()) == ["", "session:s", "u", "v", "w"]
    state.erase("u")
    state.join("v", "s")
    assert sorted(state.visitors()) == ["", "v", "w"]


def test_erase_deletes_everything_and_says_how_much(state: State) -> None:
    state.append_events([view("session:s", "a", 1), view("u", "b", 2), view("other", "c", 3)])
    state.join("u", "s")
    state.log_shown([shown("u")])
    receipt = state.erase("u")
    assert (receipt.events, receipt.impressions, receipt.sessions) == (2, 1, 1)
    left = state.user("u")
    assert (left.events, left.shown, left.sessions) == ([], [], [])
    assert history(state, "u") == History() == history(state, "session:s")
    assert items(state, "other") == ["c"]


def test_erased_stays_erased_but_a_visitor_may_come_back(state: State) -> None:
    state.append_events([view("u", "a", NOW_MS - 1000, event_id="e")])
    receipt = state.erase("u")
    assert state.erased_ms("u") == receipt.erased_ms
    assert state.erased_ms("v") is None
    assert state.append_events([view("u", "a", NOW_MS - 1000, event_id="e")]) == ["erased"], "a retry arrives late"
    assert state.append_events([view("u", "b", receipt.erased_ms + 1)]) == ["accepted"]
    assert items(state, "u") == ["b"]


def test_an_erased_id_is_nowhere_on_disk(
    state: State, url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = "very-recognisable-visitor"
    state.append_events([view(name, "item-of-theirs", n) for n in range(500)])
    state.log_shown([shown(name)])
    state.join(name, "their-session")
    state.erase(name)
    while url.startswith("redis") and rewriting(url):
        time.sleep(0.05)
    folder = request.getfixturevalue("shared_redis").folder if url.startswith("redis") else tmp_path
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        for word in (name, "item-of-theirs", "their-session"):
            assert word.encode() not in content, file.name


def rewriting(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        info = client.info("persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


def test_changes_are_announced_in_order_without_ids(state: State) -> None:
    state.put_setting("active_model", "v1")
    state.join("u", "s")
    state.erase("u")
    changes = state.changes(0)
    assert [(change.kind, change.key == "active_model") for change in changes] == [
        ("setting", True),
        ("joined", False),
        ("erased", False),
    ]
    assert [change.seq for change in changes] == sorted({change.seq for change in changes})
    assert state.changes(changes[0].seq, limit=1) == [changes[1]]
    assert state.changes(changes[-1].seq) == []
    assert all(change.key not in ("u", "s") for change in changes)


def test_settings_are_shared(state: State, url: str) -> None:
    assert state.setting("active_model") is None
    state.put_setting("active_model", "v1")
    other = open_state(url)
    other.put_setting("active_model", "v2")
    other.close()
    assert state.setting("active_model") == "v2"


def test_replicas_are_those_that_beat_lately(state: State) -> None:
    state.beat("one", "m")
    state.beat("two", "m")
    assert [replica.replica_id for replica in state.replicas(60_000)] == ["one", "two"]
    state.leave("one")
    assert [replica.replica_id for replica in state.replicas(60_000)] == ["two"]
    time.sleep(0.02)
    assert state.replicas(1) == []


def test_metrics_are_those_that_a_replica_told_last_until_it_leaves(state: State) -> None:
    assert state.told_metrics() == {}
    for replica in ("two", "one"):
        state.beat(replica, "m")
        state.tell_metrics(replica, f"lists 1 {replica}\n")
    state.tell_metrics("one", 'lists{scene="home"} 2\n')
    assert state.told_metrics() == {"one": 'lists{scene="home"} 2\n', "two": "lists 1 two\n"}
    state.leave("two")
    assert state.told_metrics() == {"one": 'lists{scene="home"} 2\n'}


def test_counts(state: State) -> None:
    state.append_events([view("u", "a", 1), view("v", "b", 2)])
    state.log_shown([shown("u")])
    state.erase("v")
    assert state.counts() == {"events": 1, "shown": 1, "erased": 1}


@pytest.mark.parametrize("odd", ["'; DROP TABLE events; --", "%", "\u0645\u0646\u062a\u062c", "a\tb", "x" * 256])
def test_odd_ids_are_just_ids(state: State, odd: str) -> None:
    state.append_events([view(odd, odd, 1, event_id=odd)])
    assert items(state, odd) == [odd]
    assert state.erase(odd).events == 1


def test_many_threads_lose_nothing(state: State) -> None:
    def write(worker: int) -> None:
        for n in range(20):
            state.append_events([view("u", f"{worker}-{n}", n), view("u", "same", n, event_id=f"shared-{n}")])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert state.counts()["events"] == 4 * 20 + 20


def test_many_may_open_it_at_once(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(open_state, [url] * 8))
    for n, state in enumerate(states):
        assert state.append_events([view("u", str(n), n)]) == ["accepted"]
    assert len(states[0].user("u").events) == 8
    for state in states:
        state.close()


def use_for_ever(state: State) -> None:
    while True:
        state.append_events([view("u", "a", 1)])
        history(state, "u")


def test_it_may_be_closed_while_others_use_it(url: str) -> None:
    for _ in range(10):
        state = open_state(url)
        with ThreadPoolExecutor(3) as pool:
            users = [pool.submit(use_for_ever, state) for _ in range(3)]
            time.sleep(0.02)
            state.close()
            state.close()
            for user in users:
                with pytest.raises(StateError, match="closed"):
                    user.result(30)


def write_until_killed(url: str, reported: mp.connection.Connection) -> None:
    state = open_state(url)
    for n in range(100_000):
        state.append_events([view("u", f"i{n}", n)])
        reported.send(n)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_what_was_answered_survives_kill_9(url: str) -> None:
    open_state(url).close()
    context = mp.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    writer = context.Process(target=write_until_killed, args=(url, send))
    writer.start()
    send.close()
    answered = [receive.recv() for _ in range(200)]
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    while True:  # what was answered between the last look and the kill
        try:
            answered.append(receive.recv())
        except EOFError:
            break
    state = open_state(url)
    kept = {event.item_id for event in state.user("u").events}
    state.close()
    assert {f"i{n}" for n in answered} <= kept


def test_append_is_all_or_nothing(state: State) -> None:
    with pytest.raises(StateError):
        state.append_events([view("u", "a", 1), replace(view("u", "b", 2), action=None)])  # type: ignore[arg-type]
    assert items(state, "u") == []


# ---------------------------------------------------------------- opening


@pytest.mark.parametrize(
    "url", ["mysql://x", "sqlite://", "sqlite:///", "sqlite:///x?what=1", "sqlite:///x?synchronous=off", "state.db"]
)
def test_bad_urls_are_refused_with_what_to_write(url: str) -> None:
    with pytest.raises(UsageError, match="sqlite:///PATH"):
        open_state(url)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot write there"):
        open_state(f"sqlite:///{tmp_path}/file/state.db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(StateError, match=r"not a database.*; remove this file, or name another place"):
        open_state(f"sqlite:///{tmp_path}/state.db")


def test_a_full_disk_is_no_reason_to_remove_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: SqliteState) -> None:
        with state._write() as db:
            db.execute("CREATE TABLE first (name TEXT)")
            db.execute("PRAGMA max_page_count = 1")  # SQLite then says what it says of a full disk
            db.execute("CREATE TABLE second (name TEXT)")

    monkeypatch.setattr(SqliteState, "_create", full)
    with pytest.raises(StateError, match=r"disk is full.*; free space there, or name another place"):
        open_state(f"sqlite:///{tmp_path}/state.db")


def test_the_file_is_private(tmp_path: Path) -> None:
    open_state(f"sqlite:///{tmp_path}/state.db").close()
    assert (tmp_path / "state.db").stat().st_mode & 0o077 == 0


def test_full_synchronous_is_a_setting(tmp_path: Path) -> None:
    state = open_state(f"sqlite:///{tmp_path}/state.db?synchronous=full")
    assert state.append_events([view("u", "a", 1)]) == ["accepted"]
    state.close()


def test_an_absolute_url_means_the_same_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_url("sqlite:///a/b.db?synchronous=full") == f"sqlite:///{tmp_path}/a/b.db?synchronous=full"
    for url in (f"sqlite:///{tmp_path}/b.db", "redis://localhost:6379/0"):
        assert absolute_url(url) == url


# ---------------------------------------------------------------- what happens


def happened(state: State, since: int | None = None, limit: int = 100) -> list[tuple[str, str, int, str | None]]:
    return [one[1:] for one in state.happenings(since, limit)]


def test_what_happens_is_told_with_what_came_before_and_without_whom(state: State) -> None:
    state.append_events([view("u", "a", 10), view("v", "x", 11), view("u", "b", 20, "cart")])
    state.append_events([view("u", "late", 15), view("u", "not-shown", 30, "impression"), view("u", "tie", 20)])
    assert happened(state) == [
        ("a", "view", 10, None), ("x", "view", 11, None), ("b", "cart", 20, "a"),
        ("late", "view", 15, "a"), ("tie", "view", 20, "b"),
    ]  # fmt: skip


def test_what_happens_is_told_once_to_those_who_follow(state: State) -> None:
    state.append_events([view("u", "a", 10), view("u", "b", 20), view("u", "c", 30)])
    first = state.happenings(0, limit=2)
    assert [one.item_id for one in first] == ["a", "b"]
    assert happened(state, first[-1].seq) == [("c", "view", 30, "b")]
    assert happened(state, None, 2) == [("b", "view", 20, "a"), ("c", "view", 30, "b")], (
        "newcomers begin with the newest"
    )
    last = state.happenings(first[-1].seq)[-1].seq
    state.append_events([view("u", "c", 30, event_id="same"), view("u", "c", 30, event_id="same")])
    assert len(happened(state, last)) == 1


def test_what_the_erased_did_is_told_to_nobody(state: State) -> None:
    state.append_events([view("u", "a", 10), view("v", "b", 20)])
    state.erase("u")
    assert happened(state) == [("b", "view", 20, None)]


# ---------------------------------------------------------------- catalogue


def test_what_is_said_of_an_item_adds_up(state: State) -> None:
    first = state.put_item("a", {"price": 9.9, "title": "Dress"})
    second = state.put_item("a", {"price": None, "in_stock": False})
    assert second > first
    assert state.item_edits(0) == [
        ItemEdit(second, "a", {"price": None, "title": "Dress", "in_stock": False}, picture_seq=0)
    ]


def test_edits_come_once_each_in_the_order_of_the_last_word(state: State) -> None:
    state.put_item("a", {"price": 1})
    second = state.put_item("b", {"price": 2})
    third = state.put_item("a", {"price": 3})
    assert [(edit.seq, edit.item_id) for edit in state.item_edits(0)] == [(second, "b"), (third, "a")]
    assert [edit.item_id for edit in state.item_edits(second)] == ["a"]
    assert [edit.item_id for edit in state.item_edits(0, limit=1)] == ["b"]
    assert state.item_edits(third) == []


def test_a_picture_stays_until_another_comes(state: State) -> None:
    picture = bytes(range(256))
    with_picture = state.put_item("a", {}, picture)
    assert state.item_edits(0)[0].picture_seq == with_picture
    state.put_item("a", {"price": 5})
    assert state.item_edits(0)[0].picture_seq == with_picture
    assert state.item_picture("a") == picture
    assert state.item_picture("b") is None
    state.put_item("b", {"price": 5})
    assert state.item_picture("b") is None
    again = state.put_item("a", {}, b"other")
    assert (state.item_edits(0)[-1].picture_seq, state.item_picture("a")) == (again, b"other")


@given(
    facts=st.dictionaries(
        st.sampled_from(["title", "category", "brand", "price", "in_stock"]),
        st.none() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_facts_come_back_as_they_were(state: State, facts: dict[str, Any]) -> None:
    item_id = uuid.uuid4().hex
    before = max((edit.seq for edit in state.item_edits(0)), default=0)
    state.put_item(item_id, facts)
    assert [edit.facts for edit in state.item_edits(before)] == [facts]


def test_edits_of_many_at_once_all_count(state: State) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: state.put_item("a", {f"fact{n}": n}), range(40)))
    assert state.item_edits(0)[0].facts == {f"fact{n}": n for n in range(40)}


@pytest.mark.parametrize("version", range(1, len(STEPS)))
def test_a_state_of_an_earlier_version_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as db:
        for step in STEPS[:version]:
            db.executescript(step)
        db.execute("INSERT INTO secrets VALUES ('tombstones', ?)", (b"k" * 32,))
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    state = SqliteState(path)
    state.put_item("a", {"price": 1})
    assert [edit.item_id for edit in state.item_edits(0)] == ["a"]
    state.beat("one", "m")
    state.tell_metrics("one", "counted")
    assert state.told_metrics() == {"one": "counted"}
    state.close()
