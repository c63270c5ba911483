"""Wire types: what clients send and get, and how one sent event becomes a stored one.

In: JSON values. Out: validated models, events, reasons for rejection. It must not know routes, state or models.
"""

from __future__ import annotations

import math
import re
from datetime import datetime, timezone
from typing import Annotated, Any, Final

from fastapi import Path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SkipValidation,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from rayrec.ranking.requests import MAX_K, Request
from rayrec.ranking.rules import Filters
from rayrec.schema import ACTION_CODE, SESSION_PREFIX, SYNONYMS, visitor_id
from rayrec.state.protocol import Act, Event

EARLIEST_MS: Final = 788_918_400_000  # 1995-01-01
SECONDS_BELOW: Final = 1e11  # smaller numbers are seconds: 1e11 ms is 1973, 1e11 s the year 5138
MAX_EVENTS: Final = 1000
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _number_as_id(value: Any) -> Any:
    """Numbers as logs write them: 17850 and 17850.0 are the id "17850"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _printable(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("must not contain control characters or broken Unicode")
    return value


_TEXT: Final = {"type": "string", "minLength": 1, "maxLength": 256}
TextId = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_printable)]
Id = Annotated[
    TextId,
    BeforeValidator(_number_as_id),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "integer"}]}, mode="validation"),
]


def _no_session(value: str) -> str:
    if value.startswith(SESSION_PREFIX):
        raise ValueError(f"must not begin with '{SESSION_PREFIX}'; send it as session_id")
    return value


UserId = Annotated[Id, AfterValidator(_no_session)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_printable)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


def _tell_of_null(schema: dict[str, Any]) -> None:
    """Have the JSON schema of a `Wire` say that null may stand for each field that need not be there."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            told = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {**told, "anyOf": [field, {"type": "null"}]}


class Wire(BaseModel):
    """A request or a part of one; unknown fields are an error, so that a misspelt one is not lost.

    null stands for a field that is not there: many clients write out what they leave open.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_tell_of_null)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {
            name: value
            for name, value in given.items()
            if value is not None or name not in fields or fields[name].is_required()
        }


class EventIn(BaseModel):
    """One event as sent. Fields that are not named here are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    user_id: UserId | None = None
    session_id: Id | None = None
    item_id: Id
    action: str = Field(max_length=64, description="a canonical action or a synonym: view, click, cart, purchase, ...")
    timestamp: int | float | str | None = Field(None, description="epoch s or ms, or ISO 8601; now if absent")
    event_id: Id | None = Field(None, description="the same event_id counts once: a retry is safe")
    request_id: Id | None = Field(None, description="the list in which the visitor met the item")
    value: Number | None = None
    price: Number | None = None
    quantity: Number | None = None
    position: int | None = Field(None, ge=0, le=1_000_000)
    scene: Name | None = None
    propensity: Share | None = None
    model: Name | None = None
    variant: Name | None = None

    @model_validator(mode="after")
    def _has_a_visitor(self) -> EventIn:
        if self.user_id is None and self.session_id is None:
            raise ValueError("needs a user_id or a session_id")
        return self


class ItemEvent(Wire):
    """An event used for one answer and not stored; it is the asking visitor's own."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    item_id: Id
    action: str = Field("view", max_length=64)
    timestamp: int | float | str | None = None


class EventsRequest(Wire):
    """1 to 1,000 events. Each is judged by itself, so that a bad one does not cost the others."""

    events: list[SkipValidation[EventIn]] = Field(min_length=1, max_length=MAX_EVENTS)


class Rejected(BaseModel):
    """An event that was not stored."""

    index: int
    reason: str


class EventsAnswer(BaseModel):
    """accepted + duplicate + rejected = events sent. `unknown_item` of the accepted count once their item is known."""

    accepted: int
    duplicate: int
    unknown_item: int
    rejected: list[Rejected]


class VisitorRequest(Wire):
    """A visitor who comes, or comes back."""

    token: str | None = Field(None, max_length=1024, description="an old token, to go on with its session")


class VisitorAnswer(BaseModel):
    """A visitor's session, and what to send as `Authorization: Bearer`; no token where the server has no keys."""

    session_id: str
    token: str | None
    expires_s: int


class Context(Wire):
    """What the visitor has before them."""

    item_id: Id | None = None
    cart: tuple[Id, ...] = Field((), max_length=100)
    query: str | None = Field(None, max_length=512, description="for scenes that search")


Bound = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class Price(Wire):
    """A range of prices, both ends included."""

    min: Bound | None = None
    max: Bound | None = None


OneOrMore = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(max_length=100),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 100}]}, mode="validation"),
]


class FiltersIn(Wire):
    """What may be in the list; several values of one filter mean any of them."""

    category: OneOrMore = ()
    brand: OneOrMore = ()
    item_type: OneOrMore = ()
    price: Price = Price()
    exclude: tuple[Id, ...] = Field((), max_length=1000)


class RecommendRequest(Wire):
    """What is asked for."""

    user_id: UserId | None = None
    session_id: Id | None = None
    scene: str = Field("home", max_length=64)
    k: int = Field(10, ge=1, le=MAX_K, strict=True)
    context: Context = Context()
    events: tuple[ItemEvent, ...] = Field((), max_length=MAX_EVENTS, description="used for this answer, not stored")
    store: Flag = Field(True, description="false: nothing of this request is kept")
    filters: FiltersIn = FiltersIn()
    diversity: Share | None = None
    explore: Share | None = None
    reasons: Flag = False


Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=1000), AfterValidator(_printable)]


class ItemRequest(Wire):
    """What a shop says of an item: what is not given stays as it is, and of a new item it is unknown.

    image: a `data:` URI, or a place that begins with one of the server's `image_prefixes`.
    """

    title: Text | None = None
    category: Text | None = None
    brand: Text | None = None
    price: Annotated[float, Field(gt=0, lt=1e30, allow_inf_nan=False, strict=True)] | None = None
    in_stock: Flag | None = None
    image: str | None = None

    def facts(self) -> dict[str, Any]:
        """What is said, by the names of `data.edits`; an empty text makes it unknown."""
        said = {name: getattr(self, name) for name in self.model_fields_set - {"image"}}
        return {name: None if value == "" else value for name, value in said.items()}


class ItemAnswer(BaseModel):
    """What was said of an item, live everywhere within a second."""

    item_id: str
    known: bool = Field(description="whether there was such an item before")
    changed: dict[str, str | float | bool | None] = Field(description="what was said, a picture aside")
    image: bool = Field(description="whether a picture came with it")


class ItemOut(BaseModel):
    """What the catalogue says of an item."""

    item_id: str
    title: str | None
    category: str | None
    brand: str | None
    price: float | None
    image: str | None


class ItemDetail(ItemOut):
    """The same, and whether it can be bought now."""

    in_stock: bool


class RankedOut(ItemOut):
    """An item of a list."""

    score: float
    propensity: float
    sources: list[str]
    reasons: list[str]


class RecommendAnswer(BaseModel):
    """A list, and how it came to be."""

    request_id: str
    model: str
    served_by: str
    items: list[RankedOut]
    removed: dict[str, int]
    timing_ms: dict[str, float]


class JoinRequest(Wire):
    """The session that turned out to be this user's."""

    session_id: Id


class JoinAnswer(BaseModel):
    """How many events changed hands."""

    user_id: str
    session_id: str
    moved: int


class UserAnswer(BaseModel):
    """Everything held about a visitor."""

    user_id: str
    events: list[dict[str, Any]]
    impressions: list[dict[str, Any]]
    sessions: list[str]


class EraseAnswer(BaseModel):
    """A receipt: what was deleted, and the keyed hash that keeps it deleted."""

    tombstone: str
    erased_ms: int
    deleted: dict[str, int]


class Status(BaseModel):
    """How the service is."""

    model: str
    version: str
    replica: str
    replicas: int
    catalogue: int
    scenes: list[str]
    uptime_s: float
    counters: dict[str, int]


Version = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="a bundle's version")]


class ActivateAnswer(BaseModel):
    """The version that is live now, and the one before."""

    model: str
    before: str


class Problem(BaseModel):
    """Problem details, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]]


# ---------------------------------------------------------------- from the wire to values


def event_of(sent: Any, now_ms: int, skew_s: float) -> Event:
    """A stored event from one as sent. Raises ValueError with the reason for rejecting it."""
    try:
        event = EventIn.model_validate(sent)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {what}" if where else what) from None
    return Event(
        visitor=visitor_id(event.user_id, event.session_id),
        action=action_of(event.action),
        time_ms=time_of(event.timestamp, now_ms, skew_s),
        **event.model_dump(exclude={"user_id", "action", "timestamp"}),
    )


def request_of(sent: RecommendRequest, now_ms: int, skew_s: float) -> Request:
    """What ranking is asked. Raises ValueError for an event that cannot be read."""
    known = sent.user_id or sent.session_id
    return Request(
        visitor=visitor_id(sent.user_id, sent.session_id) if known else None,
        session=visitor_id(None, sent.session_id) if sent.session_id else None,
        scene=sent.scene,
        k=sent.k,
        item_id=sent.context.item_id,
        cart=sent.context.cart,
        query=sent.context.query,
        events=tuple(
            Act(event.item_id, action_of(event.action), time_of(event.timestamp, now_ms, skew_s))
            for event in sent.events
        ),
        store=sent.store,
        filters=Filters(
            category=sent.filters.category,
            brand=sent.filters.brand,
            item_type=sent.filters.item_type,
            price_min=sent.filters.price.min,
            price_max=sent.filters.price.max,
            exclude=sent.filters.exclude,
        ),
        diversity=sent.diversity,
        explore=sent.explore,
        reasons=sent.reasons,
    )


def action_of(name: str) -> str:
    """The canonical action that `name` means. Raises ValueError."""
    plain = name.strip().lower()
    action = SYNONYMS.get(plain, plain)
    if action not in ACTION_CODE:
        raise ValueError(f"unknown action '{name[:40]}'; there are: {', '.join(ACTION_CODE)}")
    return action


def time_of(sent: int | float | str | None, now_ms: int, skew_s: float) -> int:
    """Epoch ms from epoch s, epoch ms or ISO 8601 (UTC where it names no zone); None is now.

    A client's clock may be ahead by `skew_s`; such times count as now. Raises ValueError for later ones, for times
    before 1995, and for what is no time.
    """
    if sent is None:
        return now_ms
    try:
        time_ms = _iso_ms(sent) if isinstance(sent, str) else float(sent) * (1000 if abs(sent) < SECONDS_BELOW else 1)
    except OverflowError:
        time_ms = math.inf
    if math.isnan(time_ms):
        raise ValueError("timestamp: not a number")
    if time_ms > now_ms + skew_s * 1000:
        raise ValueError(f"timestamp: more than {skew_s:g} s in the future")
    if time_ms < EARLIEST_MS:
        raise ValueError("timestamp: before 1995")
    return min(int(time_ms), now_ms)


def _iso_ms(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise ValueError("timestamp: write it as epoch seconds, epoch milliseconds or ISO 8601") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1000
