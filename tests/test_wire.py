"""From the wire to values: whatever is sent, the result is a sound event or a reason."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.schema import ACTIONS, SYNONYMS
from rayrec.serving import wire

NOW_MS = 1_700_000_000_000
SKEW_S = 300.0

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
fields = st.dictionaries(st.sampled_from(sorted(wire.EventIn.model_fields)), anything)


@given(anything | fields)
def test_an_event_is_sound_or_refused_with_a_reason(sent: Any) -> None:
    try:
        event = wire.event_of(sent, NOW_MS, SKEW_S)
    except ValueError as error:
        event, reason = None, str(error)
    if event is None:
        assert 0 < len(reason) < 1000
        return
    assert event.visitor
    assert event.item_id
    assert event.action in ACTIONS
    assert wire.EARLIEST_MS <= event.time_ms <= NOW_MS
    for text in (event.visitor, event.item_id, event.scene, event.model):
        if text is not None:
            text.encode()  # SQLite and JSON can hold it


@given(st.datetimes(datetime(1996, 1, 1), datetime(2023, 1, 1)))
def test_every_way_to_write_a_time_means_the_same(moment: datetime) -> None:
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=timezone.utc)
    time_ms = round(moment.timestamp() * 1000)
    abroad = moment.astimezone(timezone(timedelta(hours=5, minutes=30)))
    for sent in (
        *(time_ms, time_ms / 1000, float(time_ms), moment.isoformat(), abroad.isoformat()),
        *(moment.replace(tzinfo=None).isoformat(" "), moment.replace(tzinfo=None).isoformat() + "Z"),
    ):
        assert abs(wire.time_of(sent, NOW_MS, SKEW_S) - time_ms) <= 1, sent


@pytest.mark.parametrize(("ahead_ms", "fine"), [(0, True), (300_000, True), (300_001, False)])
def test_clock_skew_is_bounded(ahead_ms: int, fine: bool) -> None:
    if fine:
        assert wire.time_of(NOW_MS + ahead_ms, NOW_MS, SKEW_S) == NOW_MS
    else:
        with pytest.raises(ValueError, match="300 s in the future"):
            wire.time_of(NOW_MS + ahead_ms, NOW_MS, SKEW_S)


@pytest.mark.parametrize("sent", [0, -1, 1970, "1970-01-01", float("nan"), float("inf"), 10**400, "soon", "", "0001-01-01T00:00:00+14:00"])  # fmt: skip # noqa: E501
def test_impossible_times_are_refused(sent: Any) -> None:
    with pytest.raises(ValueError, match="timestamp"):
        wire.time_of(sent, NOW_MS, SKEW_S)


@pytest.mark.parametrize("name", [*ACTIONS, *SYNONYMS, "  View ", "BUY"])
def test_actions_and_synonyms(name: str) -> None:
    assert wire.action_of(name) in ACTIONS


@pytest.mark.parametrize(
    ("sent", "meant"),
    [(17850, "17850"), (17850.0, "17850"), ("007", "007"), ("17850.0", "17850.0"), (1.5, None), (True, None)],
)
def test_ids_are_strings(sent: Any, meant: str | None) -> None:
    event = {"user_id": "u", "item_id": sent, "action": "view"}
    if meant is None:
        with pytest.raises(ValueError, match="item_id"):
            wire.event_of(event, NOW_MS, SKEW_S)
    else:
        assert wire.event_of(event, NOW_MS, SKEW_S).item_id == meant


def test_a_user_goes_before_a_session() -> None:
    both = {"user_id": "u", "session_id": "s", "item_id": "i", "action": "view"}
    event = wire.event_of(both, NOW_MS, SKEW_S)
    assert (event.visitor, event.session_id) == ("u", "s")
    assert wire.event_of({**both, "user_id": None}, NOW_MS, SKEW_S).visitor == "session:s"


def test_a_request_becomes_what_ranking_is_asked() -> None:
    sent = wire.RecommendRequest.model_validate(
        {
            "session_id": "s",
            "scene": "item",
            "k": 3,
            "context": {"item_id": "a", "cart": ["b"]},
            "filters": {"category": "c", "price": {"min": 1}, "exclude": ["d"]},
            "explore": 0.25,
        }
    )
    request = wire.request_of(sent, NOW_MS, SKEW_S)
    assert (request.visitor, request.scene, request.k, request.item_id, request.cart) == (
        "session:s",
        "item",
        3,
        "a",
        ("b",),
    )
    assert (request.filters.category, request.filters.price_min, request.filters.price_max) == (("c",), 1.0, None)
    assert (request.filters.exclude, request.explore, request.diversity, request.store) == (("d",), 0.25, None, True)


def test_null_stands_for_a_field_that_is_not_there() -> None:
    fields = ("user_id", "scene", "k", "context", "events", "store", "filters", "diversity", "explore", "reasons")
    assert wire.RecommendRequest.model_validate({"session_id": "s", **dict.fromkeys(fields)}) == wire.RecommendRequest(
        session_id="s"
    )
    nested = {"session_id": "s", "filters": {"category": None, "brand": "b", "price": None, "exclude": None}}
    assert wire.RecommendRequest.model_validate(nested).filters.brand == ("b",)
    with pytest.raises(pydantic.ValidationError, match="Extra inputs are not permitted"):
        wire.RecommendRequest.model_validate({"session_id": "s", "sceen": None})
