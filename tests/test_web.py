"""The HTTP contract, on the fake scorer, without Ray."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from shopfake import FakeScorer, catalogue
from webclient import Client

from rayrec.config import ServeConfig
from rayrec.errors import StateError
from rayrec.serving import wire
from rayrec.serving.batching import Batcher, OverCapacityError
from rayrec.serving.guard import Guard, is_loopback
from rayrec.serving.metrics import Metrics
from rayrec.serving.web import create_app
from rayrec.state import State, open_state

PICTURE = b"\xff\xd8picture"


@pytest.fixture
def scorer() -> FakeScorer:
    return FakeScorer()


@pytest.fixture
def state(tmp_path: Path) -> State:
    return open_state(f"sqlite:///{tmp_path}/state.db")


@pytest.fixture
def client(scorer: FakeScorer, state: State) -> Iterator[Client]:
    app = create_app(
        *(scorer, state, ServeConfig(diversity=0)),
        model="v7",
        replica_id="one",
        image_of=lambda index: (PICTURE, "image/jpeg") if index == 1 else None,
    )
    client = Client(app)
    yield client
    client.close()


def event(item_id: str = "green-7", action: str = "click", **more: Any) -> dict[str, Any]:
    return {"user_id": "u", "item_id": item_id, "action": action, **more}


def store(client: Client, *events: Any) -> dict[str, Any]:
    answer = client.post("/v1/events", {"events": list(events)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(client: Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/recommend", body)
    assert answer.status_code == 200, answer.text
    return wire.RecommendAnswer.model_validate(answer.json()).model_dump()


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = wire.Problem.model_validate(answer.json()).model_dump()
    assert body["status"] == status
    assert body["type"]
    assert body["title"]
    return body


# ---------------------------------------------------------------- events and lists


def test_an_event_changes_the_next_list(client: Client) -> None:
    before = ask(client, user_id="u")
    assert store(client, event()) == {"accepted": 1, "duplicate": 0, "unknown_item": 0, "rejected": []}
    after = ask(client, user_id="u")
    assert before["served_by"] == "popular"
    assert after["served_by"] == "model"
    assert ids(after) == [f"green-{n}" for n in range(10)]
    assert after["model"] == "v7"


def test_a_list_tells_what_the_contract_says(client: Client) -> None:
    store(client, event())
    answer = ask(client, user_id="u", k=1, reasons=True)
    assert answer["items"] == [
        {
            "item_id": "green-0",
            "title": "Green thing 0",
            "category": "green|things",
            "brand": "even",
            "price": 1.0,
            "image": None,
            "score": pytest.approx(0.8176, abs=1e-4),
            "propensity": 1.0,
            "sources": ["model", "popular"],
            "reasons": ["Fits your interest in Green thing 7", "Popular with other visitors"],
        }
    ]
    assert len(answer["request_id"]) == 32


def test_the_same_event_counts_once(client: Client) -> None:
    assert store(client, event(event_id="e"), event(event_id="e"))["duplicate"] == 1
    assert store(client, event(event_id="e")) == {"accepted": 0, "duplicate": 1, "unknown_item": 0, "rejected": []}
    assert len(client.get("/v1/users/u").json()["events"]) == 1


def test_events_of_unknown_items_are_kept_and_counted(client: Client) -> None:
    assert store(client, event("not-yet"), event())["unknown_item"] == 1
    assert len(client.get("/v1/users/u").json()["events"]) == 2


def test_bad_events_are_rejected_one_by_one(client: Client) -> None:
    answer = store(
        client,
        event(),
        event(action="levitate"),
        {"item_id": "red-0", "action": "view"},
        {"user_id": "u", "action": "view"},
        event(timestamp=time.time() + 3600),
        event(timestamp=60),
        event(timestamp="yesterday"),
        event(user_id="session:mine"),
        event(user_id=""),
        event(item_id="x" * 300),
        event(item_id="a\u0000b"),
        event(value="much"),
        "no event",
        None,
        event(timestamp=10**300),
        event(position=-1),
        event(timestamp="1970-01-01T00:00:00Z"),
        event(timestamp="2100-01-01"),
        event("i" * 10_000),
    )
    reasons = {one["index"]: one["reason"] for one in answer["rejected"]}
    assert answer["accepted"] == 1
    assert sorted(reasons) == list(range(1, 19))
    for index, word in [
        (1, "unknown action 'levitate'"),
        (2, "user_id or a session_id"),
        (3, "item_id"),
        (4, "future"),
    ]:
        assert word in reasons[index]
    assert "1995" in reasons[5]
    assert "ISO 8601" in reasons[6]
    assert "session_id" in reasons[7]
    assert "1995" in reasons[16]
    assert "future" in reasons[17]


@pytest.mark.parametrize(
    "sent",
    [
        *(1_700_000_000, 1_700_000_000_000, 1_700_000_000.0),
        *("2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00", "2023-11-14 22:13:20"),
    ],
)
def test_times_are_understood(client: Client, sent: Any) -> None:
    store(client, event(timestamp=sent))
    assert client.get("/v1/users/u").json()["events"][0]["time_ms"] == 1_700_000_000_000


def test_a_clock_that_is_a_little_ahead_counts_as_now(client: Client) -> None:
    before_ms = time.time() * 1000
    store(client, event(timestamp=time.time() + 200))
    assert before_ms - 1 <= client.get("/v1/users/u").json()["events"][0]["time_ms"] <= time.time() * 1000 + 1


def test_synonyms_and_numbers_as_ids_are_understood(client: Client) -> None:
    assert store(client, {"user_id": 17850.0, "item_id": 22, "action": "Add_To_Cart"})["accepted"] == 1
    held = client.get("/v1/users/17850").json()["events"][0]
    assert (held["item_id"], held["action"]) == ("22", "cart")


def test_what_training_needs_is_kept(client: Client) -> None:
    more = {
        "request_id": "r",
        "position": 3,
        "propensity": 0.25,
        "scene": "home",
        "model": "v7",
        "variant": "b",
        "value": 2,
    }
    store(client, event(**more))
    held = client.get("/v1/users/u").json()["events"][0]
    assert held.items() >= more.items()


@pytest.mark.parametrize("price", ["NaN", "Infinity", "-1e999"])
def test_a_price_that_is_no_number_rejects_its_event_alone(client: Client, price: str) -> None:
    good, bad = json.dumps(event()), json.dumps(event(price=0)).replace("0}", price + "}")
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/events", content=f'{{"events": [{bad}, {good}]}}', headers=headers).json()
    assert answer["accepted"] == 1
    assert answer["rejected"] == [{"index": 0, "reason": "price: Input should be a finite number"}]
    bound = client.post("/v1/recommend", content=f'{{"filters": {{"price": {{"min": {price}}}}}}}', headers=headers)
    assert problem(bound, 422)["errors"][0]["pointer"] == "/filters/price/min"


@pytest.mark.parametrize("n", [0, 1001])
def test_1_to_1000_events(client: Client, n: int) -> None:
    problem(client.post("/v1/events", {"events": [event()] * n}), 422)
    assert store(client, *[event()] * 1000)["accepted"] == 1000


def test_a_user_without_events_is_known_by_their_session(client: Client) -> None:
    store(client, {"session_id": "s", "item_id": "blue-3", "action": "view"})
    assert ask(client, user_id="new", session_id="s")["served_by"] == "model"


@pytest.mark.parametrize("who", [{"user_id": "unknown"}, {"session_id": "unknown"}, {}])
def test_unknown_visitors_get_a_list(client: Client, who: dict[str, str]) -> None:
    assert ids(ask(client, k=3, **who)) == ["blue-0", "green-0", "red-0"]


@pytest.mark.parametrize("k", [0, 201, 10_000, -3, 1.5, "10", True])
def test_k_is_1_to_200(client: Client, k: Any) -> None:
    body = problem(client.post("/v1/recommend", {"user_id": "u", "k": k}), 422)
    assert body["errors"][0]["pointer"] == "/k"
    assert len(ask(client, k=200)["items"]) == 60


def test_an_unknown_scene_is_told_the_known_ones(client: Client) -> None:
    body = problem(client.post("/v1/recommend", {"scene": "attic"}), 422)
    assert "cart, home, item" in body["detail"]


def test_an_unknown_item_in_context_is_404(client: Client) -> None:
    for context in ({"item_id": "nothing"}, {"cart": ["red-0", "nothing"]}):
        assert "'nothing'" in problem(client.post("/v1/recommend", {"context": context}), 404)["detail"]


def test_context_and_filters(client: Client) -> None:
    answer = ask(
        client,
        scene="item",
        context={"item_id": "red-2"},
        filters={"category": "red", "brand": ["even"], "price": {"max": 9}, "exclude": ["red-0"]},
    )
    assert ids(answer) == ["red-4", "red-6", "red-8"]
    assert answer["removed"] == {"context": 1, "excluded": 1, "category": 40, "brand": 10, "price": 5}


def test_the_scene_of_the_cart(client: Client) -> None:
    answer = ask(client, scene="cart", context={"cart": ["red-0", "red-3"]}, k=4)
    assert {item_id.split("-")[0] for item_id in ids(answer)} == {"green", "blue"}, "no substitutes"
    assert answer["removed"]["substitute"] > 0
    assert problem(client.post("/v1/recommend", {"scene": "cart", "context": {"cart": ["nothing"]}}), 404)


def test_the_scene_of_search(client: Client) -> None:
    answer = ask(client, scene="search", context={"query": "blue thing"}, k=3)
    assert {item_id.split("-")[0] for item_id in ids(answer)} == {"blue"}
    assert answer["served_by"] == "query"
    assert "context.query" in problem(client.post("/v1/recommend", {"scene": "search"}), 422)["detail"]


def test_events_sent_along_are_used_and_nothing_is_kept(client: Client, state: State) -> None:
    sent = [{"item_id": "red-1", "action": "view"}]
    answer = ask(client, user_id="u", events=sent, store=False)
    assert {item_id[:3] for item_id in ids(answer)} == {"red"}
    assert state.counts() == {"events": 0, "shown": 0, "erased": 0}
    bad = client.post("/v1/recommend", {"events": [{"item_id": "red-1", "action": "levitate"}]})
    assert "levitate" in problem(bad, 422)["detail"]


def test_exploration_tells_its_propensities(client: Client) -> None:
    store(client, event())
    items = ask(client, user_id="u", k=3, explore=0.5)["items"]
    for item, left in zip(items, (50, 49, 48), strict=True):
        assert any(item["propensity"] == pytest.approx(p) for p in (0.5 / left, 0.5 + 0.5 / left))
    logged = client.get("/v1/users/u").json()["impressions"][-1]
    assert logged["propensities"] == [item["propensity"] for item in items]
    assert logged["item_ids"] == [item["item_id"] for item in items]


def test_a_failing_model_shows_in_served_by(client: Client, scorer: FakeScorer) -> None:
    store(client, event("red-4", "view"))
    scorer.broken = "fuse"
    assert ask(client, user_id="u")["served_by"] == "cooccurrence"
    assert ask(client, user_id="nobody")["served_by"] == "popular"


@pytest.mark.parametrize(
    "body",
    [
        {"usr_id": "u"},
        {"user_id": ["u"]},
        {"user_id": "x" * 10_000},
        {"user_id": "session:x"},
        {"diversity": 2},
        {"explore": -0.1},
        {"filters": {"price": {"min": "cheap"}}},
        {"filters": {"colour": "red"}},
        {"context": "red-0"},
        {"store": "perhaps"},
        {"store": 0},
        {"diversity": True},
        {"filters": {"price": {"min": True}}},
        [],
        "text",
        None,
    ],
)
def test_invalid_bodies_are_422_with_the_field(client: Client, body: Any) -> None:
    answer = client.post("/v1/recommend", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert problem(answer, 422)["errors"][0]["pointer"].startswith("/")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"user_id": "\\ud800"}', b'{"diversity": NaN}', b'{"explore": 1e999}', b"[" * 100_000],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/events"])
def test_malformed_bodies_are_422(client: Client, path: str, content: bytes) -> None:
    problem(client.post(path, content=content, headers={"Content-Type": "application/json"}), 422)


def test_bodies_over_the_limit_are_413(client: Client) -> None:
    large = b'{"user_id": "' + b"x" * 1_048_576 + b'"}'

    async def chunks() -> Any:
        for start in range(0, len(large), 65536):
            yield large[start : start + 65536]

    headers = {"Content-Type": "application/json"}
    problem(client.post("/v1/recommend", content=large, headers=headers), 413)
    problem(client.post("/v1/recommend", content=chunks(), headers=headers), 413)


@pytest.mark.parametrize("size", [10_000_000, 100_000_000])
def test_what_is_announced_too_large_is_refused_unread(client: Client, size: int) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": str(size)}
    problem(client.post("/v1/events", content=b"{", headers=headers), 413)


@pytest.mark.parametrize("length", [{}, {"Content-Length": "60000"}], ids=["chunked", "announced"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/events"), ("PUT", "/v1/items/red-1/image")])
def test_a_body_that_drips_is_not_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch, method: str, path: str, length: dict[str, str]
) -> None:
    monkeypatch.setitem(Guard.__init__.__kwdefaults__, "body_within_s", 0.2)

    async def drops() -> Any:
        for _ in range(60_000):
            yield b" "
            await asyncio.sleep(0.02)

    began = time.monotonic()
    answer = client.request(method, path, content=drops(), headers={"Content-Type": "application/json", **length})
    assert "0.2 s" in problem(answer, 408)["detail"]
    assert time.monotonic() - began < 5
    assert client.post("/v1/events", {"events": [event()] * 900}).status_code == 200, "a large one is read"


def test_chunked_bodies_within_the_limit_are_read(client: Client) -> None:
    async def chunks() -> Any:
        yield b'{"user_'
        yield b'id": "u", "k": 2}'

    answer = client.post("/v1/recommend", content=chunks(), headers={"Content-Type": "application/json"})
    assert len(answer.json()["items"]) == 2


# ---------------------------------------------------------------- people


def test_a_user_sees_all_that_is_held_and_can_erase_it(client: Client) -> None:
    store(client, event(event_id="e"), event("red-0", "purchase"))
    ask(client, user_id="u", k=2)
    held = client.get("/v1/users/u").json()
    assert [one["item_id"] for one in held["events"]] == ["green-7", "red-0"]
    assert len(held["impressions"][0]["item_ids"]) == 2
    receipt = client.request("DELETE", "/v1/users/u").json()
    assert receipt["deleted"] == {"events": 2, "impressions": 1, "sessions": 0}
    assert client.get("/v1/users/u").json() == {"user_id": "u", "events": [], "impressions": [], "sessions": []}
    assert ask(client, user_id="u")["served_by"] == "popular"
    again = store(client, event(event_id="e", timestamp=(receipt["erased_ms"] - 5) / 1000))
    assert "erased" in again["rejected"][0]["reason"]


def test_a_session_joins_its_user(client: Client) -> None:
    store(client, {"session_id": "s", "item_id": "blue-3", "action": "view"})
    answer = client.post("/v1/users/u:join", {"session_id": "s"})
    assert answer.json() == {"user_id": "u", "session_id": "s", "moved": 1}
    assert ids(ask(client, user_id="u", k=1)) == ["blue-0"]
    assert client.get("/v1/users/u").json()["sessions"] == ["s"]


@pytest.mark.parametrize("user_id", ["a/b", "../../etc/passwd", "ü %", "'; DROP TABLE events; --", "*", "events:x"])
def test_odd_ids_are_just_ids(client: Client, user_id: str) -> None:
    store(client, event() | {"user_id": user_id})
    path = "/v1/users/" + quote(user_id, safe="")
    assert len(client.get(path).json()["events"]) == 1
    assert client.request("DELETE", path).json()["deleted"]["events"] == 1


@pytest.mark.parametrize("path", ["/v1/users/", "/v1/items/"])
@pytest.mark.parametrize("odd", ["x" * 10_000, "", "a%0Ab", "%00"])
def test_ids_that_cannot_be_are_told(client: Client, path: str, odd: str) -> None:
    assert problem(client.get(path + odd), 422)["errors"][0]["pointer"].endswith("_id")


def test_broken_utf_8_in_a_path_is_no_error_of_the_server(client: Client) -> None:
    assert client.get("/v1/users/%FF%FE").status_code in (200, 422)
    problem(client.get("/v1/items/%FF%FE"), 404)


# ---------------------------------------------------------------- items, service


def test_items_and_their_pictures(client: Client) -> None:
    assert client.get("/v1/items/red-1").json()["title"] == "Red thing 1"
    problem(client.get("/v1/items/nothing"), 404)
    problem(client.get("/v1/items/..%2F..%2Fetc%2Fpasswd"), 404)
    picture = client.get("/v1/items/red-0/image")
    assert (picture.content, picture.headers["content-type"]) == (PICTURE, "image/jpeg")
    problem(client.get("/v1/items/red-1/image"), 404)
    problem(client.get("/v1/items/nothing/image"), 404)


def test_status(client: Client) -> None:
    store(client, event())
    body = client.get("/v1/status").json()
    assert body["model"] == "v7"
    assert (body["replica"], body["replicas"], body["catalogue"]) == ("one", 1, 60)
    assert body["scenes"] == ["cart", "home", "item", "search"]
    assert body["counters"] == {"events": 1, "shown": 0, "erased": 0}


def test_a_late_list_is_what_is_popular(tmp_path: Path) -> None:
    class Slow(FakeScorer):
        """Sleeps when it is told to."""

        seconds = 0.0

        def user_vectors(self, history: Any) -> Any:
            time.sleep(self.seconds)
            return super().user_vectors(history)

    scorer = Slow()
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    client = Client(create_app(scorer, state, ServeConfig(deadline_s=0.3)))
    store(client, event())
    body = {"user_id": "u", "k": 5}
    scorer.seconds = 1.0
    started = time.monotonic()
    late = ask(client, **body)
    assert time.monotonic() - started < 0.9
    assert (late["served_by"], len(late["items"])) == ("popular", 5)
    assert 'rayrec_answers_without_total{what="time"} 1.0' in counted(client)
    scorer.seconds = 0.0
    time.sleep(1.0)
    assert ask(client, **body)["served_by"] == "model"
    client.close()


def test_a_state_that_is_away_refuses_events_and_answers_lists(
    client: Client, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(client, event())

    def away(*_: object) -> Any:
        raise StateError("away")

    for name in ("append_events", "histories", "log_shown"):
        monkeypatch.setattr(state, name, away)
    problem(client.post("/v1/events", {"events": [event()]}), 503)
    assert ask(client, user_id="u")["served_by"] == "popular"
    text = counted(client)
    assert 'rayrec_answers_without_total{what="state"} 1.0' in text
    assert 'rayrec_answers_without_total{what="log"} 1.0' in text


def test_health(client: Client, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200

    def away(*_: object) -> Any:
        raise StateError("away")

    monkeypatch.setattr(state, "setting", away)
    monkeypatch.setattr(state, "append_events", away)
    assert client.get("/healthz").status_code == 200
    problem(client.get("/readyz"), 503)
    refused = client.post("/v1/events", {"events": [event()]})
    problem(refused, 503)
    assert refused.headers["retry-after"] == "1"


def counted(client: Client) -> str:
    """What `/metrics` says, without the label that names the replica."""
    text = client.get("/metrics").text
    assert all('serve_replica="' in line for line in text.splitlines() if not line.startswith("#"))
    return re.sub(r',serve_replica="\w+"|serve_replica="\w+",?', "", text).replace("{}", "")


def test_the_metrics_of_all_replicas_add_up(client: Client, state: State) -> None:
    other = Metrics("two")
    other.serves("v6")
    for _ in range(3):
        other.requested("/v1/recommend", 200, 0.001)
    state.beat("two", "v6")
    state.tell_metrics("two", other.text().replace("Requests answered", "Requests, as another version has it"))
    ask(client)
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    assert len({family.name for family in families}) == len(families)
    values = {
        (sample.labels["serve_replica"], sample.labels.get("version"), sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "rayrec_model_info" or (sample.name == "rayrec_requests_total" and sample.value)
    }
    assert values == {("one", "v7", 1.0), ("two", "v6", 1.0), ("one", None, 1.0), ("two", None, 3.0)}


def test_metrics_of_one_replica_while_the_state_is_away(
    client: Client, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> Any:
        raise StateError("away")

    ask(client)
    monkeypatch.setattr(state, "told_metrics", away)
    assert 'rayrec_lists_total{scene="home"} 1.0' in counted(client)


def test_metrics_count_without_naming_anyone(client: Client) -> None:
    store(client, event(user_id="somebody", event_id="e"), event(user_id="somebody", event_id="e"), event(action="?"))
    ask(client, user_id="somebody", filters={"exclude": ["green-0"]})
    text = counted(client)
    for line in (
        'rayrec_answers_total{served_by="model"} 1.0',
        'rayrec_events_total{outcome="accepted"} 1.0',
        'rayrec_events_total{outcome="duplicate"} 1.0',
        'rayrec_events_total{outcome="rejected"} 1.0',
        'rayrec_removed_total{reason="excluded"} 1.0',
        'rayrec_stage_seconds_count{stage="rerank"} 1.0',
        'rayrec_lists_total{scene="home"} 1.0',
        'rayrec_candidates_total{source="model"}',
        'rayrec_model_info{version="v7"} 1.0',
        "rayrec_batch_size_sum 1.0",
        "rayrec_event_age_seconds_count 1.0",
    ):
        assert line in text
    assert "somebody" not in text


def test_lists_whose_scores_were_known_are_counted(client: Client) -> None:
    store(client, event("red-1", "view", user_id="again"))
    for _ in range(3):
        ask(client, user_id="again", store=False)
    assert "rayrec_lists_remembered_total 2.0" in counted(client)
    store(client, event("red-2", "view", user_id="again"))
    ask(client, user_id="again")
    assert "rayrec_lists_remembered_total 2.0" in counted(client)


def test_every_request_is_counted_by_route_and_status_and_no_label_holds_an_id(client: Client) -> None:
    ask(client)
    client.post("/v1/recommend", {"k": 0})
    client.get("/v1/items/nobody-sells-this")
    client.get("/no/such/place")
    text = counted(client)
    for route, status in (
        ("/v1/recommend", 200),
        ("/v1/recommend", 422),
        ("/v1/items/{item_id}", 404),
        ("none", 404),
    ):
        assert f'rayrec_requests_total{{route="{route}",status="{status}"}} 1.0' in text, text
    assert 'rayrec_request_seconds_count{route="/v1/recommend"} 2.0' in text
    assert "nobody-sells" not in text
    assert "such" not in text


def test_the_cart_is_worth_something(client: Client) -> None:
    ask(client, scene="cart", context={"cart": ["red-0", "red-3"]})
    assert "rayrec_basket_value_sum 5.0" in counted(client)


def base(metric: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", metric)


def test_the_dashboard_asks_for_what_is_measured_and_leaves_nothing_out(client: Client) -> None:
    measured = {line.split()[2] for line in counted(client).splitlines() if line.startswith("# TYPE ")}
    measured = {name for name in measured if not name.endswith("_created")}
    dashboard = json.loads((Path(__file__).resolve().parents[1] / "jobs" / "grafana" / "rayrec.json").read_text())
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {base(name) for expr in exprs for name in re.findall(r"rayrec_\w+", expr)} == measured


def test_the_storefront_needs_nothing_from_elsewhere(client: Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("http://www.w3.org", "")


def test_openapi_names_every_route_and_type(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert {
        *("/v1/events", "/v1/recommend", "/v1/items/{item_id}", "/v1/items/{item_id}/image", "/v1/users/{user_id}"),
        *(
            "/v1/users/{user_id}:join",
            "/v1/status",
            "/v1/models/{version}:activate",
            "/v1/visitors",
            "/healthz",
            "/readyz",
            "/metrics",
        ),
    } == set(document["paths"])
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], name
    assert "EventIn" in document["components"]["schemas"]
    assert client.get("/docs").status_code == 200


def test_unknown_routes_are_problems(client: Client) -> None:
    problem(client.get("/nothing/here"), 404)


def test_methods_that_a_path_does_not_have_are_refused_with_those_it_has(client: Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in paths:
        url = re.sub(r"{\w+}", "x", path)
        has = {
            method.upper()
            for template, methods in paths.items()
            if re.fullmatch(re.sub(r"{\w+}", ".+", template), url)
            for method in methods
        }
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - has:
            refused = client.request(method, url)
            problem(refused, 405)
            assert set(refused.headers["allow"].split(", ")) == has, (method, url)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.9:8000", "", "[::1"])
def test_foreign_hosts_are_refused(client: Client, host: str) -> None:
    problem(client.get("/healthz", headers={"Host": host}), 403)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "http://["])
def test_foreign_origins_are_refused(client: Client, origin: str) -> None:
    problem(client.post("/v1/recommend", {}, headers={"Origin": origin}), 403)


@pytest.mark.parametrize("name", ["localhost:8000", "127.0.0.1", "127.9.9.9:80", "[::1]:8000", "shop.localhost"])
def test_loopback_names_are_let_in(client: Client, name: str) -> None:
    assert client.get("/healthz", headers={"Host": name, "Origin": f"http://{name}"}).status_code == 200


def test_loopback() -> None:
    assert is_loopback("127.0.0.1")
    assert not any(map(is_loopback, ["0.0.0.0", "::", "example.com", "", None, "localhost.example.com"]))


def test_a_bug_is_a_problem_too(client: Client, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(state, "user", bug)
    problem(client.get("/v1/users/u"), 500)


# ---------------------------------------------------------------- batching


def test_requests_that_come_together_are_ranked_together(client: Client, scorer: FakeScorer) -> None:
    store(client, *(event(f"red-{n}", "view", user_id=f"r{n}") for n in range(20)))
    answers = client.together([("/v1/recommend", {"user_id": f"r{n}", "k": 1}) for n in range(20)])
    assert {ids(answer.json())[0] for answer in answers} == {"red-0"}
    assert len({answer.json()["request_id"] for answer in answers}) == 20
    assert sum(scorer.calls) == 20
    assert max(scorer.calls) > 1


def test_waiting_work_is_bounded(tmp_path: Path) -> None:
    app = create_app(
        FakeScorer(catalogue()),
        open_state(f"sqlite:///{tmp_path}/state.db"),
        ServeConfig(max_queued_requests=1, batch_size=1),
    )
    client = Client(app)
    try:
        answers = client.together([("/v1/recommend", {})] * 20)
    finally:
        client.close()
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    problem(refused, 429)
    assert refused.headers["retry-after"] == "1"


def test_one_bad_piece_does_not_fail_its_neighbours() -> None:
    def halve(numbers: list[int]) -> list[float]:
        if any(number < 0 for number in numbers):
            raise ValueError("negative")
        return [number / 2 for number in numbers]

    async def run() -> list[Any]:
        batcher = Batcher("halve", halve, size=8, max_waiting=10)
        results = await asyncio.gather(*(batcher.submit(n) for n in (2, -1, 4)), return_exceptions=True)
        batcher.close()
        return results

    first, second, third = asyncio.run(run())
    assert (first, third) == (1.0, 2.0)
    assert isinstance(second, ValueError)


def test_a_full_batcher_refuses_at_once() -> None:
    async def run() -> list[Any]:
        batcher = Batcher("slow", lambda pieces: time.sleep(0.05) or pieces, size=1, max_waiting=2)
        results = await asyncio.gather(*(batcher.submit(n) for n in range(5)), return_exceptions=True)
        batcher.close()
        return results

    results = asyncio.run(run())
    assert sum(isinstance(result, OverCapacityError) for result in results) == 3
