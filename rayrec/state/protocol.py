"""What replicas share: visitors' events, lists shown, erasures, settings, and a feed of changes.

In: events and lists as plain values. Out: histories, records, receipts. It must not know how a backend keeps
them, nor models, catalogues or the web. Every backend passes the same contract test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, Protocol

Outcome = Literal["accepted", "duplicate", "erased"]
"""What became of an event. "erased": its visitor was erased after it happened, so it is not stored."""

MARKS: Final = ("purchase", "cancel", "hide", "dislike")
"""Actions that count for good, however long ago: they decide what is never shown again."""

REPLICA_ALIVE_MS: Final = 3500
"""Replicas report themselves every second: one that was silent for longer is gone."""
FORGET_REPLICA_MS: Final = 60_000
"""Replicas that were killed say no goodbye: they are forgotten after so long."""
KEEP_CHANGES: Final = 100_000
"""Of the feed: replicas ask every second, and none is so far behind."""
KEEP_HAPPENINGS: Final = 100_000
"""Of the newest engagements: what is popular now, and what goes with what, is counted from no more."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing a visitor did. Optional fields as in `schema.EVENT_SCHEMA`."""

    visitor: str  # schema.visitor_id()
    item_id: str
    action: str  # one of schema.ACTIONS
    time_ms: int  # epoch ms, UTC
    event_id: str | None = None  # the backend gives one to an event that has none
    session_id: str | None = None
    value: float | None = None
    price: float | None = None
    quantity: float | None = None
    request_id: str | None = None
    position: int | None = None
    scene: str | None = None
    propensity: float | None = None
    model: str | None = None
    variant: str | None = None


class Act(NamedTuple):
    """The part of an event that ranking reads."""

    item_id: str
    action: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class History:
    """What ranking knows of one visitor.

    acts: the newest engagements (schema.ENGAGEMENTS), oldest first, ties in order of arrival.
    bought: items whose purchases are not all cancelled, and when each was bought last (epoch ms).
    hidden: items that were hidden or disliked.
    """

    acts: tuple[Act, ...] = ()
    bought: Mapping[str, int] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Shown:
    """One list as it was shown: item p stood at position p, with probability propensities[p]."""

    request_id: str
    visitor: str
    time_ms: int
    scene: str
    model: str
    served_by: str
    item_ids: tuple[str, ...]
    propensities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class UserRecord:
    """Everything held about one visitor, oldest first."""

    events: list[Event]
    shown: list[Shown]
    sessions: list[str]


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of an erasure: what was deleted, and the keyed hash that remains so that it stays deleted."""

    tombstone: str
    erased_ms: int
    events: int
    impressions: int
    sessions: int


class Happening(NamedTuple):
    """An engagement of somebody, whoever it was.

    seq: only ever grows, in order of arrival. after: the item that they were at before, as far as it was known when
    this arrived; None at their first.
    """

    seq: int
    item_id: str
    action: str
    time_ms: int
    after: str | None


class ItemEdit(NamedTuple):
    """What a shop has said of an item since the catalogue was written, all of it together.

    seq: the change that said the last of it. facts: by name, as JSON has them; what was never said is not there.
    picture_seq: the change that brought its picture, 0 if none did.
    """

    seq: int
    item_id: str
    facts: Mapping[str, Any]
    picture_seq: int


class Change(NamedTuple):
    """One entry of the feed that keeps replicas in step. `seq` only ever grows."""

    seq: int
    kind: Literal["setting", "joined", "erased", "item"]
    key: str  # name of the setting, id of the item, or the keyed hash of the visitor: never a visitor's id
    time_ms: int


class Replica(NamedTuple):
    """A live replica, as it last reported itself."""

    replica_id: str
    model: str
    beat_ms: int


class Past(Protocol):
    """What ranking asks of a state, and tells it."""

    def histories(self, visitors: Sequence[str], limit: int) -> list[History]:
        """The history of each visitor, with the newest `limit` engagements; empty for an unknown one."""

    def log_shown(self, lists: Sequence[Shown]) -> None:
        """Keep lists as they were shown."""


class State(Past, Protocol):
    """Shared state, safe to use from several threads and processes.

    What `append_events` has answered survives `kill -9` of every process. Methods raise `StateError` when the
    backend cannot be reached.
    """

    def append_events(self, events: Sequence[Event]) -> list[Outcome]:
        """Store events durably, all or none; one outcome each, in order. An event_id counts once, ever."""

    def happenings(self, since: int | None, limit: int = KEEP_HAPPENINGS) -> list[Happening]:
        """Engagements (schema.ENGAGEMENTS) that arrived after `since`, the earliest first; None: the newest `limit`.

        At least the newest KEEP_HAPPENINGS are kept, but for those of the erased.
        """

    def user(self, visitor: str) -> UserRecord:
        """Everything held about a visitor; empty for an unknown one."""

    def visitors(self) -> Iterator[str]:
        """Everybody of whom events or lists are held, in no order; "" if lists were shown to nobody in particular.

        Who comes while it runs may or may not be among them, and somebody may be twice.
        """

    def erase(self, visitor: str) -> Receipt:
        """Delete all that is held about a visitor, for good; older events are refused from now on."""

    def erased_ms(self, visitor: str) -> int | None:
        """When this visitor was last erased (epoch ms), None if never."""

    def join(self, user_id: str, session_id: str) -> int:
        """Give a session's past and future events to a user. Returns how many events moved."""

    def put_setting(self, name: str, value: str) -> None:
        """Set a value that all replicas share (the active model)."""

    def setting(self, name: str) -> str | None:
        """A shared value, None if it was never set."""

    def put_item(self, item_id: str, facts: Mapping[str, Any], picture: bytes | None = None) -> int:
        """Say something of an item: `facts` beside and in place of what was said before; None leaves the picture.

        Returns the seq of the change.
        """

    def item_edits(self, since: int, limit: int = 1000) -> list[ItemEdit]:
        """Items of which something was said after `since`, each once, the earliest first. None is ever dropped."""

    def item_picture(self, item_id: str) -> bytes | None:
        """The picture that was put for an item, None if none was."""

    def changes(self, since: int, limit: int = 1000) -> list[Change]:
        """Entries of the change feed after `since`, oldest first. Only the newest hundred thousand are kept."""

    def beat(self, replica_id: str, model: str) -> None:
        """Say that a replica is alive and which model it serves."""

    def tell_metrics(self, replica_id: str, metrics: str) -> None:
        """Say what a replica has counted until now."""

    def told_metrics(self) -> dict[str, str]:
        """What each replica that has not left said last, if that was within FORGET_REPLICA_MS."""

    def leave(self, replica_id: str) -> None:
        """Say that a replica stops."""

    def replicas(self, within_ms: int) -> list[Replica]:
        """Replicas that reported themselves within the last `within_ms`, at most a minute."""

    def counts(self) -> dict[str, int]:
        """How many events, lists shown and erasures are held: `events`, `shown`, `erased`."""

    def close(self) -> None:
        """Close this process's connections."""
