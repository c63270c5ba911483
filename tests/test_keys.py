"""Who may call what: keys with scopes, visitors with tokens of their own, and nobody else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shopfake import FakeScorer
from webclient import Client

from rayrec.config import ServeConfig
from rayrec.errors import UsageError
from rayrec.serving.keys import ANYONE, Keys, needed, own_headers
from rayrec.serving.limits import Limiter
from rayrec.serving.web import create_app
from rayrec.state import open_state

SHOP, ADMIN = "s" * 20, "a" * 20
KEYS = Keys.parse(f"shop={SHOP}, admin={ADMIN}")
RECOMMEND, EVENTS = "/v1/recommend", "/v1/events"


def bearer(secret: str) -> dict[str, dict[str, str]]:
    return {"headers": {"Authorization": f"Bearer {secret}"}}


@pytest.fixture
def audit_file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def client(tmp_path: Path, audit_file: Path) -> Iterator[Client]:
    config = ServeConfig(
        visitor_rate=10, newcomer_rate=10, audit_file=str(audit_file), cors_origins=("https://shop.example",)
    )
    client = Client(create_app(FakeScorer(), open_state(f"sqlite:///{tmp_path}/state.db"), config, keys=KEYS))
    yield client
    client.close()


@pytest.fixture
def visitor(client: Client) -> dict[str, str]:
    answer = client.post("/v1/visitors", {})
    assert answer.status_code == 200
    return answer.json()


@pytest.mark.parametrize(
    ("method", "path", "anyone", "shop"),
    [
        ("GET", "/healthz", 200, 200),
        ("GET", "/readyz", 200, 200),
        ("GET", "/", 200, 200),
        ("GET", "/v1/items/red-1", 200, 200),
        ("POST", RECOMMEND, 401, 200),
        ("GET", "/v1/status", 401, 403),
        ("GET", "/metrics", 401, 403),
        ("GET", "/v1/users/u", 401, 403),
        ("DELETE", "/v1/users/u", 401, 403),
        ("POST", "/v1/users/u:join", 401, 403),
        ("POST", "/v1/models/v2:activate", 401, 403),
        ("GET", "/no/such/path", 401, 403),
    ],
)
def test_scopes(client: Client, method: str, path: str, anyone: int, shop: int) -> None:
    body = {"json": {}} if method == "POST" else {}
    assert client.request(method, path, **body).status_code == anyone
    assert client.request(method, path, **body, **bearer(SHOP)).status_code == shop
    assert client.request(method, path, **body, **bearer(ADMIN)).status_code not in (401, 403)
    wrong = client.request(method, path, **body, **bearer("w" * 20))
    assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
    assert wrong.headers["content-type"] == "application/problem+json"


def test_a_visitor_is_bound_to_their_session(client: Client, visitor: dict[str, str]) -> None:
    own, as_visitor = visitor["session_id"], bearer(visitor["token"])
    event = {"item_id": "red-1", "action": "view"}
    sent = {"events": [{**event, "session_id": own}, {**event, "session_id": "other"}, {**event, "user_id": "u"}]}
    stored = client.post(EVENTS, sent, **as_visitor).json()
    assert stored["accepted"] == 1
    assert [one["index"] for one in stored["rejected"]] == [1, 2]
    assert client.post(RECOMMEND, {"session_id": own}, **as_visitor).json()["served_by"] == "model"
    for body in ({"session_id": "other"}, {"user_id": "u"}, {"user_id": "u", "session_id": own}):
        assert client.post(RECOMMEND, body, **as_visitor).status_code == 403
    assert client.get("/v1/users/u", **as_visitor).status_code == 403
    assert client.get("/v1/users/session:other", **as_visitor).status_code == 403
    assert len(client.get(f"/v1/users/session:{own}", **as_visitor).json()["events"]) == 1
    assert client.request("DELETE", f"/v1/users/session:{own}", **as_visitor).json()["deleted"]["events"] == 1
    assert client.get("/v1/status", **as_visitor).status_code == 403


def test_a_token_goes_on_with_its_session(client: Client, visitor: dict[str, str]) -> None:
    again = client.post("/v1/visitors", {"token": visitor["token"]}).json()
    assert again["session_id"] == visitor["session_id"]
    forged = client.post("/v1/visitors", {"token": visitor["token"][:-2] + "xx"}).json()
    assert forged["session_id"] != visitor["session_id"]


def test_tokens_are_signed_and_end() -> None:
    token = KEYS.token("mine", now_s=1000)
    assert KEYS.session_of(token, now_s=1000 + 3599) == "mine"
    assert KEYS.session_of(token, now_s=1000 + 3601) is None
    assert KEYS.session_of(token, now_s=1000 + 86_400, renewing=True) == "mine"
    assert KEYS.session_of(token, now_s=1000 + 90 * 86_400, renewing=True) is None
    assert Keys.parse(f"shop={SHOP}x,admin={ADMIN}").session_of(token, now_s=1000) is None, "other keys sign otherwise"
    head, _, signature = token.split(".")
    other = KEYS.token("theirs", now_s=1000).split(".")[1]
    assert KEYS.session_of(f"{head}.{other}.{signature}", now_s=1000) is None


@given(st.text(max_size=200))
def test_no_other_text_is_a_caller(text: str) -> None:
    assert KEYS.caller(f"Bearer {text}") is None
    assert KEYS.caller(f"Bearer visitor.{text}") is None
    assert text.lower().startswith("bearer ") or KEYS.caller(text) is None


def test_callers_have_names_that_give_no_key_away() -> None:
    assert KEYS.caller(None) is ANYONE
    caller = KEYS.caller(f"bearer {ADMIN}")
    assert caller is not None
    assert (caller.scope, caller.may("shop"), ADMIN in caller.name) == ("admin", True, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shop", "part 1 must be"),
        (f"root={ADMIN}", "part 1 must be"),
        (f"shop={SHOP},admin=short", "part 2"),
        (",", "is empty"),
    ],
)
def test_wrong_keys_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as told:
        Keys.parse(text)
    assert SHOP not in str(told.value)


def test_this_process_calls_as_admin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYREC_API_KEYS", raising=False)
    assert own_headers() == {}
    monkeypatch.setenv("RAYREC_API_KEYS", f"shop={SHOP}, admin={ADMIN}")
    assert own_headers() == bearer(ADMIN)["headers"]


def test_what_is_not_named_is_for_admins() -> None:
    assert needed("PUT", "/v1/items/x") == "admin"
    assert needed("DELETE", "/v1/users/someone") == "admin"
    assert needed("GET", "/v1/users/session:x") == "visitor"


# ---------------------------------------------------------------- limits, audit, browsers


def test_who_asks_too_often_is_slowed_down(tmp_path: Path) -> None:
    config = ServeConfig(visitor_rate=0.5, newcomer_rate=0.5)
    client = Client(create_app(FakeScorer(), open_state(f"sqlite:///{tmp_path}/state.db"), config, keys=KEYS))
    own = bearer(client.post("/v1/visitors", {}).json()["token"])
    answers = [client.post(RECOMMEND, {}, **own) for _ in range(20)]
    assert (answers[0].status_code, answers[1].headers["retry-after"]) == (200, "1")
    assert {answer.status_code for answer in answers} == {200, 429}
    assert client.post(RECOMMEND, {}, **bearer(SHOP)).status_code == 200, "nobody else is"
    assert 429 in [client.post("/v1/visitors", {}).status_code for _ in range(20)]
    client.close()


def test_a_bucket_fills_again() -> None:
    limiter = Limiter(2)
    assert [limiter.admits("a", 0.0) for _ in range(5)] == [True] * 4 + [False]
    assert limiter.admits("b", 0.0)
    assert [limiter.admits("a", 1.0) for _ in range(3)] == [True, True, False]
    assert all(Limiter(0).admits("a", 0.0) for _ in range(1000))


def test_deeds_are_noted_without_ids(client: Client, audit_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rayrec.audit")
    client.get("/v1/users/very-special", **bearer(ADMIN))
    client.request("DELETE", "/v1/users/very-special", **bearer(ADMIN))
    client.post("/v1/users/very-special:join", {"session_id": "s"}, **bearer(ADMIN))
    lines = [json.loads(line) for line in audit_file.read_text().splitlines()]
    assert [line["did"] for line in lines] == ["read", "erase", "join"]
    assert len({line["about"] for line in lines}) == 1
    assert all(line["who"].startswith("admin-") for line in lines)
    assert "very-special" not in audit_file.read_text() + caplog.text
    assert len(caplog.records) == 3


def test_what_changes_the_shop_is_noted(client: Client, audit_file: Path) -> None:
    client.request("PUT", "/v1/items/red-0", json={"price": 3.0}, **bearer(ADMIN))
    client.request("DELETE", "/v1/items/red-0", **bearer(ADMIN))
    client.post("/v1/models/v2:activate", **bearer(ADMIN))
    lines = [json.loads(line) for line in audit_file.read_text().splitlines()]
    assert [(line["did"], line["about"]) for line in lines] == [
        ("put item", "red-0"),
        ("delete item", "red-0"),
        ("activate", "v2"),
    ]
    assert all(line["who"].startswith("admin-") for line in lines)


def test_pages_of_named_origins_may_call(client: Client) -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    answer = client.request("OPTIONS", RECOMMEND, headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    other = client.request("OPTIONS", RECOMMEND, headers={**asked, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
