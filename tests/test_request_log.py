"""Lines of the log: which, with which id, and without a word about the visitor."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shopfake import FakeScorer
from webclient import Client

from rayrec.config import ServeConfig
from rayrec.errors import StateError
from rayrec.ranking.pipeline import Ranker
from rayrec.serving.keys import Keys
from rayrec.serving.request_log import log_lines
from rayrec.serving.web import create_app
from rayrec.state import State, open_state

KEYS = "shop=shop-key-of-tests-1,admin=admin-key-of-tests-1"
SHOP = {"Authorization": "Bearer shop-key-of-tests-1"}


class Log:
    """An application and what it has logged."""

    def __init__(self, client: Client, state: State, scorer: FakeScorer, stream: io.StringIO) -> None:
        self.client, self.state, self.scorer, self._stream = client, state, scorer, stream

    def lines(self) -> list[dict[str, Any]]:
        """Those since the last call."""
        said = self._stream.getvalue()
        self._stream.seek(0)
        self._stream.truncate()
        return [json.loads(line) for line in said.splitlines()]

    def line(self) -> dict[str, Any]:
        (line,) = self.lines()
        return line


Start = Callable[..., Log]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    clients: list[Client] = []
    ours = logging.getLogger("rayrec")
    before = (ours.handlers, ours.propagate, ours.level)

    def begin(*, keys: str = "", answers_id: bool = True, **settings: Any) -> Log:
        stream, scorer = io.StringIO(), FakeScorer()
        config = ServeConfig(**settings)
        log_lines(stream, visitors=config.log_visitors)
        state = open_state(f"sqlite:///{tmp_path}/state.db")
        parsed = Keys.parse(keys) if keys else None
        app = create_app(scorer, state, config, model="v7", replica_id="one", keys=parsed, answers_id=answers_id)
        clients.append(Client(app))
        return Log(clients[-1], state, scorer, stream)

    yield begin
    for client in clients:
        client.close()
    ours.handlers, ours.propagate = before[:2]
    ours.setLevel(before[2])


def test_a_list_is_one_line(start: Start) -> None:
    log = start(log_requests="all")
    answer = log.client.post("/v1/recommend", {"user_id": "u"}, headers={"X-Request-Id": "shop_1-a"})
    line = log.line()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line.pop("ms") > 0
    assert line == {
        "level": "info", "request_id": "shop_1-a", "method": "POST", "route": "/v1/recommend", "status": 200,
        "caller": "local", "replica": "one", "model": "v7", "served_by": "popular", "scene": "home",
        "list_id": answer.json()["request_id"],
    }  # fmt: skip
    assert answer.headers["x-request-id"] == "shop_1-a"


def test_by_default_errors_are_logged_and_answers_are_not(start: Start) -> None:
    log = start()
    log.client.post("/v1/recommend", {"user_id": "u"})
    assert log.lines() == []
    log.client.post("/v1/recommend", {"user_id": "u", "k": 0})
    line = log.line()
    assert (line["status"], line["level"], line["route"]) == (422, "warning", "/v1/recommend")
    assert "served_by" not in line


def test_none_of_the_requests_if_so_wished(start: Start) -> None:
    log = start(log_requests="none")
    log.client.get("/nowhere")
    log.client.get("/healthz")
    assert log.lines() == []


@pytest.mark.parametrize("sent", ["", "a b", "a" * 129, "a\tb", "ü", 'a"b', "a,b"])
def test_an_id_that_is_not_sane_is_replaced(start: Start, sent: str) -> None:
    log = start(log_requests="all")
    answer = log.client.get("/healthz", headers=[(b"X-Request-Id", sent.encode())])
    (said,) = answer.headers.get_list("x-request-id")
    assert re.fullmatch(r"[0-9a-f]{32}", said)
    assert log.line()["request_id"] == said


def test_requests_without_an_id_get_different_ones(start: Start) -> None:
    log = start()
    assert len({log.client.get("/healthz").headers["x-request-id"] for _ in range(5)}) == 5


def test_where_the_server_answers_the_id_the_application_does_not(start: Start) -> None:
    log = start(answers_id=False, log_requests="all")
    assert "x-request-id" not in log.client.get("/healthz", headers={"X-Request-Id": "a"}).headers
    assert log.line()["request_id"] == "a"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "route", "caller"),
    [
        ("GET", "/v1/users/anna@example.com", SHOP, 403, "/v1/users/{user_id}", None),
        ("GET", "/v1/items/secret-thing", SHOP, 404, "/v1/items/{item_id}", "shop-"),
        ("GET", "/v1/items/secret-thing/image", SHOP, 404, "/v1/items/{item_id}/image", "shop-"),
        ("POST", "/v1/users/anna@example.com:join", {}, 401, "/v1/users/{user_id}:join", None),
        ("POST", "/v1/recommend", {"Authorization": "Bearer wrong"}, 401, "/v1/recommend", None),
        ("PATCH", "/v1/recommend", {"Authorization": "Bearer admin-key-of-tests-1"}, 405, "/v1/recommend", "admin-"),
        ("GET", "/anna", {"Authorization": "Bearer admin-key-of-tests-1"}, 404, None, "admin-"),
        ("GET", "/", {"Host": "x"}, 200, "/", "anyone"),
        ("GET", "/docs", {}, 200, "/docs", "anyone"),
    ],
)
def test_each_answer_bears_an_id_and_its_line_names_the_route_and_never_the_path(
    start: Start, method: str, path: str, headers: dict[str, str], status: int, route: str | None, caller: str | None
) -> None:
    log = start(keys=KEYS, log_requests="all")
    answer = log.client.request(method, path, headers=headers)
    line = log.line()
    assert (answer.status_code, line["status"], line["route"]) == (status, status, route)
    assert answer.headers["x-request-id"] == line["request_id"]
    assert line["caller"] is None if caller is None else line["caller"].startswith(caller)
    assert not re.search("anna|secret|key-of", json.dumps(line))


def test_nothing_of_the_visitor_is_logged_unless_asked_for(start: Start) -> None:
    body = {
        "user_id": "anna", "scene": "search", "context": {"query": "red, please", "item_id": "red-7"},
        "events": [{"user_id": "anna", "item_id": "green-3", "action": "view"}],
    }  # fmt: skip
    quiet = start(log_requests="all")
    events = {"events": [{"session_id": "anna", "item_id": "red-7", "action": "view"}]}
    for path, sent in (("/v1/recommend", body), ("/v1/events", events), ("/v1/users/anna:join", {"session_id": "s9"})):
        assert quiet.client.post(path, sent).status_code == 200
    quiet.client.get("/v1/users/anna")
    said = [line for line in quiet.lines() if line.get("logger") != "rayrec.audit"]
    assert len(said) == 4
    assert not re.search("anna|red-7|green-3|please|s9", json.dumps(said))

    told = start(log_requests="all", log_visitors=True)
    told.client.post("/v1/recommend", body)
    line = told.line()
    assert (line["user_id"], line["path"]) == ("anna", "/v1/recommend")
    assert line["context"] == {"query": "red, please", "item_id": "red-7"}


def test_an_error_of_the_server_is_a_problem_with_the_id_and_one_record_with_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = start()
    monkeypatch.setattr(log.state, "user", lambda user: {}["no " + user])
    answer = log.client.get("/v1/users/anna")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    _audited, bug, line = log.lines()
    assert bug["error"] == "KeyError"
    assert "test_request_log.py" in bug["traceback"]
    assert (line["status"], line["level"]) == (500, "error")
    assert {bug["request_id"], line["request_id"]} == {answer.headers["x-request-id"]}
    assert "anna" not in json.dumps([bug, line])


def test_records_of_other_threads_bear_the_id(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    log = start()

    def away(*_: object) -> Any:
        logging.getLogger("rayrec.state").warning("in a thread")
        raise StateError("the state is away")

    monkeypatch.setattr(log.state, "user", away)
    log.client.get("/v1/users/u", headers={"X-Request-Id": "thread"})
    said = log.lines()
    assert "in a thread" in [line.get("message") for line in said]
    assert {line["request_id"] for line in said} == {"thread"}
    log.scorer.broken = "fuse"
    log.client.post("/v1/events", {"events": [{"user_id": "u", "item_id": "red-1", "action": "view"}]})
    answer = log.client.post("/v1/recommend", {"user_id": "u"}, headers={"X-Request-Id": "batched"})
    assert answer.status_code == 200
    line = log.line()
    assert (line["request_id"], line["error"]) == ("batched", "RuntimeError")
    assert line["message"] == "the model failed on candidates; answering without it"


def test_a_record_of_a_batch_bears_the_ids_of_all(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    log = start()
    ranked = Ranker.recommend

    def recommend(self: Ranker, asked: Any, state: Any) -> Any:
        logging.getLogger("rayrec.ranking").warning("%s at once", len(asked))
        return ranked(self, asked, state)

    monkeypatch.setattr(Ranker, "recommend", recommend)
    answers = log.client.together([("/v1/recommend", {"user_id": f"u{n}"}) for n in range(6)])
    sent = {answer.headers["x-request-id"] for answer in answers}
    assert len(sent) == 6
    seen = [line.get("request_ids") or [line["request_id"]] for line in log.lines()]
    assert sorted(one for ids in seen for one in ids) == sorted(sent)
    assert max(map(len, seen)) > 1


def test_what_is_logged_between_requests_bears_no_id(start: Start) -> None:
    log = start()
    log.client.get("/healthz")
    logging.getLogger("rayrec.state").warning("by the way")
    line = log.line()
    assert (line["logger"], line["message"]) == ("rayrec.state", "by the way")
    assert "request_id" not in line


def test_a_line_is_one_line_whatever_is_in_it(start: Start) -> None:
    log = start()
    logging.getLogger("rayrec.state").warning('two\nlines and a "quote" \u2028')
    assert log.line()["message"] == 'two\nlines and a "quote" \u2028'
