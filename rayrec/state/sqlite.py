"""Shared state in one SQLite file: the default, for one machine and any number of processes.

In: values of `protocol`. Out: the same. It must not know who reads or writes. WAL lets readers and one writer
work at once; a write is one short IMMEDIATE transaction; deleted content is overwritten (`secure_delete`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

from rayrec.errors import StateError, UsageError
from rayrec.schema import ENGAGEMENTS, SESSION_PREFIX
from rayrec.state.protocol import (
    FORGET_REPLICA_MS,
    KEEP_CHANGES,
    KEEP_HAPPENINGS,
    MARKS,
    Act,
    Change,
    Event,
    Happening,
    History,
    ItemEdit,
    Outcome,
    Receipt,
    Replica,
    Shown,
    UserRecord,
)

BUSY_TIMEOUT_S = 10.0


def _one_of(words: Sequence[str]) -> str:
    return "action IN (" + ",".join(f"'{word}'" for word in words) + ")"


ENGAGED, MARKED = _one_of(ENGAGEMENTS), _one_of(MARKS)
"""Predicates of the partial indices; SQLite uses an index only where a query repeats its predicate."""

SCHEMA = f"""
CREATE TABLE events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, visitor TEXT NOT NULL, item_id TEXT NOT NULL, action TEXT NOT NULL,
  time_ms INTEGER NOT NULL, event_id TEXT NOT NULL UNIQUE, session_id TEXT, value REAL, price REAL,
  quantity REAL, request_id TEXT, position INTEGER, scene TEXT, propensity REAL, model TEXT, variant TEXT);
CREATE INDEX events_engaged ON events (visitor, time_ms, seq, item_id, action) WHERE {ENGAGED};
CREATE INDEX events_marked ON events (visitor, action, item_id) WHERE {MARKED};
CREATE INDEX events_visitor ON events (visitor);
CREATE TABLE shown (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, visitor TEXT NOT NULL,
  time_ms INTEGER NOT NULL, scene TEXT NOT NULL, model TEXT NOT NULL, served_by TEXT NOT NULL,
  item_ids TEXT NOT NULL, propensities TEXT NOT NULL);
CREATE INDEX shown_visitor ON shown (visitor);
CREATE INDEX shown_request ON shown (request_id);
CREATE TABLE joins (session TEXT PRIMARY KEY, visitor TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX joins_visitor ON joins (visitor);
CREATE TABLE tombstones (digest TEXT PRIMARY KEY, erased_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE changes (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, key TEXT NOT NULL, time_ms INTEGER NOT NULL);
CREATE TABLE replicas (
  replica_id TEXT PRIMARY KEY, model TEXT NOT NULL, beat_ms INTEGER NOT NULL) WITHOUT ROWID;
"""
ITEMS_SCHEMA = """
CREATE TABLE items (
  item_id TEXT PRIMARY KEY, seq INTEGER NOT NULL, facts TEXT NOT NULL, picture_seq INTEGER NOT NULL, picture BLOB);
CREATE INDEX items_seq ON items (seq, item_id, facts, picture_seq);
"""
METRICS_SCHEMA = """
CREATE TABLE replica_metrics (replica_id TEXT PRIMARY KEY, told_ms INTEGER NOT NULL, metrics TEXT NOT NULL)
"""
STEPS = (SCHEMA, ITEMS_SCHEMA, METRICS_SCHEMA)
"""What each version added. Only ever append: a state of an earlier one is brought up to date when it is opened."""

EVENT_COLUMNS = tuple(field.name for field in fields(Event))
_REST = attrgetter(*EVENT_COLUMNS[1:])
SHOWN_COLUMNS = tuple(field.name for field in fields(Shown))


def _insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({','.join(columns)}) VALUES ({','.join('?' * len(columns))})"


INSERT_EVENT = _insert("events", EVENT_COLUMNS) + " ON CONFLICT (event_id) DO NOTHING"
INSERT_SHOWN = _insert("shown", SHOWN_COLUMNS)


class SqliteState:
    """`protocol.State` in the file `path`. Each thread has a connection of its own."""

    def __init__(self, path: Path, synchronous: str = "normal") -> None:
        self.path, self._synchronous = path, synchronous
        self._local = threading.local()
        self._open: list[_Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._create()
        self._key = self._secret("tombstones")

    @classmethod
    def open(cls, url: str) -> SqliteState:
        """From `sqlite:///PATH[?synchronous=normal|full]`.

        Raises UsageError for another form of URL, StateError for a file that cannot be used.
        """
        place, _, query = url.removeprefix("sqlite://").partition("?")
        options = parse_qs(query)
        synchronous = options.pop("synchronous", ["normal"])[0].lower()
        if not place.startswith("/") or len(place) < 2 or options or synchronous not in ("normal", "full"):
            raise UsageError(f"state '{url}': write it as sqlite:///PATH or sqlite:///PATH?synchronous=full")
        path = Path(unquote(place[1:])).absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # people's data: for this account only
        except OSError as error:
            raise StateError(f"state {path}: cannot write there ({error.strerror}); name another place") from None
        try:
            return cls(path, synchronous)
        except StateError as error:
            help_ = "free space there" if "disk is full" in str(error) else "remove this file"
            raise StateError(f"state {path}: {error}; {help_}, or name another place") from None

    # ------------------------------------------------------------ events

    def append_events(self, events: Sequence[Event]) -> list[Outcome]:
        """See `protocol.State`."""
        outcomes: list[Outcome] = []
        with self._write() as db:
            owner = self._owners(db, {event.visitor for event in events})
            erased = self._erasures(db, set(owner.values()))
            for event in events:
                visitor = owner[event.visitor]
                if event.time_ms <= erased.get(visitor, -1):
                    outcomes.append("erased")
                    continue
                row = (visitor, *_REST(event))
                if event.event_id is None:
                    row = (*row[:4], uuid.uuid4().hex, *row[5:])
                outcomes.append("accepted" if db.execute(INSERT_EVENT, row).rowcount else "duplicate")
        return outcomes

    def histories(self, visitors: Sequence[str], limit: int) -> list[History]:
        """See `protocol.State`."""
        with self._read() as db:
            owner = self._owners(db, set(visitors))
            found = {visitor: self._history(db, visitor, limit) for visitor in set(owner.values())}
        return [found[owner[visitor]] for visitor in visitors]

    def happenings(self, since: int | None, limit: int = KEEP_HAPPENINGS) -> list[Happening]:
        """See `protocol.State`."""
        newest_first = since is None
        query = (
            "SELECT seq, item_id, action, time_ms, (SELECT item_id FROM events p WHERE p.visitor = e.visitor "
            f"AND p.{ENGAGED} AND p.time_ms <= e.time_ms AND p.seq < e.seq "
            "ORDER BY p.time_ms DESC, p.seq DESC LIMIT 1) "
            f"FROM events e WHERE seq > ? AND {ENGAGED} ORDER BY seq {'DESC' if newest_first else 'ASC'} LIMIT ?"
        )
        with self._read() as db:
            rows = db.execute(query, (since or 0, limit)).fetchall()
        return [Happening(*row) for row in (reversed(rows) if newest_first else rows)]

    def _history(self, db: sqlite3.Connection, visitor: str, limit: int) -> History:
        acts = db.execute(
            f"SELECT item_id, action, time_ms FROM events WHERE visitor = ? AND {ENGAGED} "
            "ORDER BY time_ms DESC, seq DESC LIMIT ?",
            (visitor, limit),
        ).fetchall()
        held: defaultdict[str, int] = defaultdict(int)
        bought_ms: dict[str, int] = {}
        hidden = set()
        for item_id, action, n, last_ms in db.execute(
            "SELECT item_id, action, count(*), max(time_ms) FROM events "
            f"WHERE visitor = ? AND {MARKED} GROUP BY action, item_id",
            (visitor,),
        ):
            if action in ("hide", "dislike"):
                hidden.add(item_id)
                continue
            held[item_id] += n if action == "purchase" else -n
            if action == "purchase":
                bought_ms[item_id] = last_ms
        return History(
            acts=tuple(Act(*act) for act in reversed(acts)),
            bought={item_id: last_ms for item_id, last_ms in bought_ms.items() if held[item_id] > 0},
            hidden=frozenset(hidden),
        )

    def log_shown(self, lists: Sequence[Shown]) -> None:
        """See `protocol.State`."""
        with self._write() as db:
            owner = self._owners(db, {shown.visitor for shown in lists})
            db.executemany(
                INSERT_SHOWN,
                [
                    (
                        *(shown.request_id, owner[shown.visitor], shown.time_ms),
                        *(shown.scene, shown.model, shown.served_by),
                        *(json.dumps(shown.item_ids), json.dumps(shown.propensities)),
                    )
                    for shown in lists
                ],
            )

    # ------------------------------------------------------------ people

    def user(self, visitor: str) -> UserRecord:
        """See `protocol.State`."""
        with self._read() as db:
            events = _rows(db, "events", EVENT_COLUMNS, visitor)
            shown = _rows(db, "shown", SHOWN_COLUMNS, visitor)
            sessions = db.execute("SELECT session FROM joins WHERE visitor = ? ORDER BY session", (visitor,)).fetchall()
        return UserRecord(
            events=[Event(*row) for row in events],
            shown=[_shown(row) for row in shown],
            sessions=[session.removeprefix(SESSION_PREFIX) for (session,) in sessions],
        )

    def visitors(self) -> Iterator[str]:
        """See `protocol.State`. No transaction stays open between two of them."""
        next_of = "SELECT min(visitor) FROM (SELECT min(visitor) AS visitor FROM events WHERE visitor {0} UNION ALL "
        next_of += "SELECT min(visitor) FROM shown WHERE visitor {0})"
        query, after = next_of.format(">= ?"), ""
        while True:
            with self._read() as db:
                found = db.execute(query, (after, after)).fetchone()[0]
            if found is None:
                return
            yield found
            query, after = next_of.format("> ?"), found

    def erase(self, visitor: str) -> Receipt:
        """See `protocol.State`. The log of SQLite is emptied too, so that no copy stays behind in it."""
        digest, now_ms = self._digest(visitor), _now_ms()
        with self._write() as db:
            gone = {
                table: db.execute(f"DELETE FROM {table} WHERE visitor = ?", (visitor,)).rowcount
                for table in ("events", "shown", "joins")
            }
            db.execute("DELETE FROM joins WHERE session = ?", (visitor,))
            db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?)", (digest, now_ms))
            _announce(db, "erased", digest)
        with self._read() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return Receipt(digest, now_ms, gone["events"], gone["shown"], gone["joins"])

    def erased_ms(self, visitor: str) -> int | None:
        """See `protocol.State`."""
        with self._read() as db:
            return self._erasures(db, {visitor}).get(visitor)

    def join(self, user_id: str, session_id: str) -> int:
        """See `protocol.State`."""
        session = SESSION_PREFIX + session_id
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO joins VALUES (?, ?)", (session, user_id))
            moved = db.execute("UPDATE events SET visitor = ? WHERE visitor = ?", (user_id, session)).rowcount
            db.execute("UPDATE shown SET visitor = ? WHERE visitor = ?", (user_id, session))
            _announce(db, "joined", self._digest(user_id))
        return moved

    # ------------------------------------------------------------ what replicas share

    def put_setting(self, name: str, value: str) -> None:
        """See `protocol.State`."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))
            _announce(db, "setting", name)

    def setting(self, name: str) -> str | None:
        """See `protocol.State`."""
        with self._read() as db:
            row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def put_item(self, item_id: str, facts: Mapping[str, Any], picture: bytes | None = None) -> int:
        """See `protocol.State`."""
        with self._write() as db:
            seq = _announce(db, "item", item_id)
            row = db.execute("SELECT facts, picture_seq, picture FROM items WHERE item_id = ?", (item_id,)).fetchone()
            said, picture_seq, before = row or ("{}", 0, None)
            pictured = (picture_seq, before) if picture is None else (seq, picture)
            together = json.dumps({**json.loads(said), **facts}, ensure_ascii=False)
            db.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)", (item_id, seq, together, *pictured))
        return seq

    def item_edits(self, since: int, limit: int = 1000) -> list[ItemEdit]:
        """See `protocol.State`."""
        query = "SELECT seq, item_id, facts, picture_seq FROM items WHERE seq > ? ORDER BY seq LIMIT ?"
        with self._read() as db:
            rows = db.execute(query, (since, limit)).fetchall()
        return [ItemEdit(seq, item_id, json.loads(facts), at) for seq, item_id, facts, at in rows]

    def item_picture(self, item_id: str) -> bytes | None:
        """See `protocol.State`."""
        with self._read() as db:
            row = db.execute("SELECT picture FROM items WHERE item_id = ?", (item_id,)).fetchone()
        return None if row is None else row[0]

    def changes(self, since: int, limit: int = 1000) -> list[Change]:
        """See `protocol.State`."""
        with self._read() as db:
            rows = db.execute(
                "SELECT seq, kind, key, time_ms FROM changes WHERE seq > ? ORDER BY seq LIMIT ?",
                (since, limit),
            ).fetchall()
        return [Change(*row) for row in rows]

    def beat(self, replica_id: str, model: str) -> None:
        """See `protocol.State`."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?)", (replica_id, model, _now_ms()))
            db.execute("DELETE FROM replicas WHERE beat_ms < ?", (_now_ms() - FORGET_REPLICA_MS,))

    def leave(self, replica_id: str) -> None:
        """See `protocol.State`."""
        with self._write() as db:
            for table in ("replicas", "replica_metrics"):
                db.execute(f"DELETE FROM {table} WHERE replica_id = ?", (replica_id,))

    def tell_metrics(self, replica_id: str, metrics: str) -> None:
        """See `protocol.State`."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO replica_metrics VALUES (?, ?, ?)", (replica_id, _now_ms(), metrics))
            db.execute("DELETE FROM replica_metrics WHERE told_ms < ?", (_now_ms() - FORGET_REPLICA_MS,))

    def told_metrics(self) -> dict[str, str]:
        """See `protocol.State`."""
        query = "SELECT replica_id, metrics FROM replica_metrics WHERE told_ms >= ? ORDER BY replica_id"
        with self._read() as db:
            return dict(db.execute(query, (_now_ms() - FORGET_REPLICA_MS,)).fetchall())

    def replicas(self, within_ms: int) -> list[Replica]:
        """See `protocol.State`."""
        with self._read() as db:
            rows = db.execute(
                "SELECT replica_id, model, beat_ms FROM replicas WHERE beat_ms >= ? ORDER BY replica_id",
                (_now_ms() - within_ms,),
            ).fetchall()
        return [Replica(*row) for row in rows]

    def counts(self) -> dict[str, int]:
        """See `protocol.State`."""
        tables = {"events": "events", "shown": "shown", "erased": "tombstones"}
        with self._read() as db:
            return {name: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for name, table in tables.items()}

    def close(self) -> None:
        """See `protocol.State`."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                with connection.busy:  # SQLite crashes the process if a connection is closed while it works
                    connection.db.close()
            self._open.clear()

    # ------------------------------------------------------------ inside

    def _create(self) -> None:
        with self._write() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(STEPS):
                raise StateError(f"written by a later rayrec (version {version}, this one reads {len(STEPS)})")
            for step in STEPS[version:]:
                for statement in step.split(";"):
                    db.execute(statement)
            if version == 0:
                db.execute("INSERT INTO secrets VALUES ('tombstones', ?)", (secrets.token_bytes(32),))
            db.execute(f"PRAGMA user_version = {len(STEPS)}")

    def _secret(self, name: str) -> bytes:
        with self._read() as db:
            return bytes(db.execute("SELECT value FROM secrets WHERE name = ?", (name,)).fetchone()[0])

    def _digest(self, visitor: str) -> str:
        return hmac.new(self._key, visitor.encode(), hashlib.sha256).hexdigest()

    def _erasures(self, db: sqlite3.Connection, visitors: set[str]) -> dict[str, int]:
        """When each visitor that was erased was erased."""
        found = {}
        for visitor in visitors:
            row = db.execute("SELECT erased_ms FROM tombstones WHERE digest = ?", (self._digest(visitor),)).fetchone()
            if row is not None:
                found[visitor] = int(row[0])
        return found

    def _owners(self, db: sqlite3.Connection, visitors: set[str]) -> dict[str, str]:
        """Whose history each visitor's events go to: the user that a session was joined to, else itself."""
        owner = {visitor: visitor for visitor in visitors}
        for visitor in visitors:
            if visitor.startswith(SESSION_PREFIX):
                row = db.execute("SELECT visitor FROM joins WHERE session = ?", (visitor,)).fetchone()
                owner[visitor] = row[0] if row else visitor
        return owner

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, held for as long as it is used."""
        own: _Connection | None = getattr(self._local, "own", None)
        if own is None:
            own = _Connection(self._connect(), threading.Lock())
            with self._lock:
                self._open.append(own)
            self._local.own = own
        with own.busy:
            if self._closed:
                raise StateError("the state was closed")
            yield own.db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        _to_wal(db)
        for pragma in (f"synchronous = {self._synchronous}", "secure_delete = ON"):
            db.execute(f"PRAGMA {pragma}")
        return db

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection() as db:
                yield db
        except sqlite3.Error as error:
            raise StateError(f"the state cannot be read ({error})") from error

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection() as db:
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise StateError(f"the state cannot be written ({error})") from error


class _Connection(NamedTuple):
    db: sqlite3.Connection
    busy: threading.Lock


def _to_wal(db: sqlite3.Connection) -> None:
    """Turn on the write-ahead log. SQLite does not wait for its lock where several connections ask for that at once."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _rows(db: sqlite3.Connection, table: str, columns: Sequence[str], visitor: str) -> list[tuple[Any, ...]]:
    query = f"SELECT {','.join(columns)} FROM {table} WHERE visitor = ? ORDER BY time_ms, seq"
    return db.execute(query, (visitor,)).fetchall()


def _shown(row: tuple[Any, ...]) -> Shown:
    item_ids, propensities = (tuple(json.loads(text)) for text in row[-2:])
    return Shown(*(*row[:-2], item_ids, propensities))


def _announce(db: sqlite3.Connection, kind: str, key: str) -> int:
    """Add a change to the feed; its seq."""
    seq = db.execute("INSERT INTO changes (kind, key, time_ms) VALUES (?, ?, ?)", (kind, key, _now_ms())).lastrowid
    assert seq is not None  # of a row just inserted
    db.execute("DELETE FROM changes WHERE seq <= ?", (seq - KEEP_CHANGES,))
    return seq


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
