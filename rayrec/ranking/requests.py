"""Requests and answers, as ranking takes and gives them. In: plain values. Out: the same. It must not know the web."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayrec.errors import UsageError
from rayrec.ranking.rules import Filters
from rayrec.state.protocol import Act

MAX_K = 200
NO_FILTERS = Filters()


class UnknownSceneError(UsageError):
    """The request names a scene that is not configured."""


class UnknownItemError(UsageError):
    """The request's context names an item that is not in the catalogue."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `visitor` is a `schema.visitor_id`, None for nobody in particular; `session` is that of the
    visitor's session, whose events count where the visitor has none.
    """

    visitor: str | None = None
    scene: str = "home"
    k: int = 10
    item_id: str | None = None  # the item at hand
    cart: tuple[str, ...] = ()
    query: str | None = None
    events: tuple[Act, ...] = ()  # used for this answer and not stored
    store: bool = True
    filters: Filters = NO_FILTERS
    diversity: float | None = None  # None: as configured
    explore: float | None = None
    reasons: bool = False
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    """One item of an answer."""

    item_id: str
    score: float
    propensity: float
    sources: list[str]
    reasons: list[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """A list, and how it came to be. timing_ms: of each stage, for the batch the request was part of."""

    request_id: str
    model: str
    served_by: str  # "model", or what answered in its place: "query", "context", "cooccurrence", "popular"
    items: list[Ranked]
    removed: dict[str, int]
    timing_ms: dict[str, float]
    without: tuple[str, ...] = ()  # what failed, and was done without: "state", "model", "log", "time"
    candidates: Mapping[str, int] = field(default_factory=dict)  # by source, before rules; one may be of several
    together: int = 1  # requests that were ranked in one batch
    basket: float | None = None  # what the items of the request's cart cost
    remembered: bool = False  # the model's scores were known from an earlier request


def new_request_id() -> str:
    """A random id that begins with the time, so that rows of one time lie together in an index."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
