"""What is known of those who ask: their stored past, what they sent along, and what they have before them.

In: requests, shared state. Out: histories, and the arrays that a model and retrieval read. It must not know
candidates or scores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rayrec.catalogue import Catalogue
from rayrec.history import HistoryBatch, encode_history
from rayrec.ranking.requests import Request
from rayrec.ranking.retrieval import RECENT, Asked, Ints
from rayrec.schema import ACTION_CODE, ENGAGEMENTS
from rayrec.state.protocol import Act, History, Past

NO_HISTORY = History()
DAY_MS = 86_400_000
ENGAGED = frozenset(ENGAGEMENTS)


class Reader(Protocol):
    """How a model reads a history."""

    catalogue: Catalogue
    max_len: int
    clock: str
    actions: tuple[str, ...]  # what it reads of a history


class Reading:
    """Reads the past of visitors as `reader` does. newest: so many of their events are asked of the state."""

    def __init__(self, reader: Reader, newest: int) -> None:
        self._reader, self._newest = reader, newest

    def histories(self, requests: Sequence[Request], state: Past) -> list[History]:
        """What is stored of each visitor, and the request's own events, in order of time. Raises StateError."""
        visitors = list({one for request in requests for one in (request.visitor, request.session) if one is not None})
        return self.put_together(requests, dict(zip(visitors, state.histories(visitors, self._newest), strict=True)))

    def put_together(self, requests: Sequence[Request], stored: Mapping[str, History]) -> list[History]:
        """What is stored of each visitor, if anything, with the request's own events."""
        histories = []
        for request in requests:
            history = stored.get(request.visitor or "", NO_HISTORY)
            if not history.acts:
                session = stored.get(request.session or "", NO_HISTORY)
                history = History(session.acts, {**history.bought, **session.bought}, history.hidden | session.hidden)
            histories.append(_with_events(history, request))
        return histories

    def encode(self, requests: Sequence[Request], histories: list[History]) -> tuple[HistoryBatch, Asked]:
        """Histories as the model reads them, at this moment; the items at hand count as looked at just now."""
        now_ms = time.time_ns() // 1_000_000
        index = self._reader.catalogue.index
        flat: list[tuple[int, int, int]] = []
        offsets, recent, anchors = [0], [], []
        for request, history in zip(requests, histories, strict=True):
            acts = [act for act in history.acts if act.item_id in index]
            at_hand = items_at_hand(request, now_ms)
            acts += _not_yet(at_hand, acts)
            flat += [(index[act.item_id], ACTION_CODE[act.action], act.time_ms) for act in acts]
            offsets.append(len(flat))
            recent.append(_newest_of([index[act.item_id] for act in acts]))
            anchors.append(_newest_of([index[act.item_id] for act in at_hand]))
        item, action, time_ms = np.array(flat, np.int64).reshape(-1, 3).T
        reader, asked_ms = self._reader, np.full(len(requests), now_ms, np.int64)
        if reader.clock == "date":  # the model never saw an hour
            time_ms, asked_ms = time_ms - time_ms % DAY_MS, asked_ms - asked_ms % DAY_MS
        encoded = encode_history(
            *(item, action, time_ms, offsets),
            asked_ms=asked_ms,
            max_len=reader.max_len,
            clock=reader.clock,
            actions=reader.actions,
        )
        return encoded, Asked(user_BD=None, known_B=encoded.length_B > 0, recent=recent, anchors=anchors)


def _with_events(history: History, request: Request) -> History:
    """`history` with the request's own events put in their place."""
    if not request.events:
        return history
    engaged = [act for act in request.events if act.action in ENGAGED]
    bought = {act.item_id: act.time_ms for act in request.events if act.action == "purchase"}
    hidden = {act.item_id for act in request.events if act.action in ("hide", "dislike")}
    acts = sorted([*history.acts, *engaged], key=lambda act: act.time_ms)
    return History(tuple(acts), {**history.bought, **bought}, history.hidden | hidden)


def items_at_hand(request: Request, now_ms: int) -> list[Act]:
    """The items of the request's context, as acts of this moment; the item on the page is the newest."""
    page = [] if request.item_id is None else [Act(request.item_id, "view", now_ms)]
    return [*(Act(item_id, "cart", now_ms) for item_id in request.cart), *page]


def _not_yet(at_hand: Sequence[Act], acts: Sequence[Act]) -> list[Act]:
    """Of the items at hand, those that the history does not tell of: not its newest item, nor what it put in a cart."""
    newest = acts[-1].item_id if acts else None
    put = {act.item_id for act in acts if act.action == "cart"}
    return [act for act in at_hand if act.item_id != newest and not (act.action == "cart" and act.item_id in put)]


def _newest_of(items: Sequence[int]) -> Ints:
    """The newest distinct items, newest first."""
    return np.array(list(dict.fromkeys(reversed(items)))[:RECENT], np.int64)
