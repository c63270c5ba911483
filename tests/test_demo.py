"""The demo's own pieces: the scripted shopper, and the folder it works in."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayrec import demo
from rayrec.errors import ResourceError, UsageError

CANDLES = [{"item_id": f"c{n}", "title": f"White candle {n}", "category": "candles"} for n in range(10)]
SHOES = [{"item_id": f"s{n}", "title": f"Red sneaker {n}", "category": "shoes"} for n in range(10)]
BY_ID = {item["item_id"]: item for item in [*CANDLES, *SHOES]}


@contextmanager
def endpoint(shelf: Callable[[list[str]], list[dict[str, Any]]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers as the service does; its URL, and the events it was sent.

    shelf: from the items clicked so far to the list.
    """
    events: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(BY_ID[self.path.rpartition("/")[2]])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/events":
                events.extend(body["events"])
                self.answer({"accepted": len(body["events"])})
            else:
                assert self.path == "/v1/recommend"
                self.answer({"items": shelf([event["item_id"] for event in events])[: body["k"]]})

        def answer(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *given: Any) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", events
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_shopper_clicks_three_and_sees_the_list_turn(capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(lambda clicked: SHOES if len(clicked) == 3 else [*CANDLES[:9], SHOES[0]]) as (url, events):
        story = demo.shop_for(url, ["s4", "s5", "s6", "s7"])
    assert (story["hits_before"], story["hits_after"]) == (1, 10)
    assert story["before"][0] == "White candle 0"
    assert story["after"] == [item["title"] for item in SHOES]
    assert [(event["item_id"], event["action"]) for event in events] == [(f"s{n}", "click") for n in (4, 5, 6)]
    assert len({event["session_id"] for event in events}) == 1, "one visitor"
    told = capsys.readouterr().err
    assert "clicks Red sneaker 4" in told
    assert "red shoes in the list: 1 before, 10 after" in told


def test_each_run_is_a_new_visitor() -> None:
    visitors = set()
    for _ in range(2):
        with endpoint(lambda clicked: SHOES if clicked else CANDLES) as (url, events):
            demo.shop_for(url, ["s1"])
        visitors.add(events[0]["session_id"])
    assert len(visitors) == 2


@pytest.mark.parametrize("shelf", [CANDLES, SHOES], ids=["never there", "always there"])
def test_a_list_that_does_not_turn_is_a_failure(shelf: list[dict[str, Any]]) -> None:
    with endpoint(lambda clicked: shelf) as (url, _), pytest.raises(ResourceError, match="did not change"):
        demo.shop_for(url, ["s1", "s2", "s3"])


def test_what_the_shopper_wants_is_popular_red_shoes() -> None:
    items = [
        {"item_id": "a", "title": "Red sneaker", "category": "shoes", "n_train": 3},
        {"item_id": "b", "title": "Red boot", "category": "shoes", "n_train": 9},
        {"item_id": "c", "title": "Redwood candle", "category": "candles", "n_train": 99},
        {"item_id": "d", "title": "Blue boot", "category": "shoes", "n_train": 99},
    ]
    assert demo._wanted(items) == ["b", "a"]


# ---------------------------------------------------------------- the folder


def test_begins_in_a_new_folder(tmp_path: Path) -> None:
    demo._clear(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [demo.MARK]


def test_empties_a_folder_of_an_earlier_demo(tmp_path: Path) -> None:
    demo._clear(tmp_path / "work")
    (tmp_path / "work" / "old").write_text("")
    demo._clear(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == [demo.MARK]


def test_leaves_alone_what_is_not_a_demos(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="name another folder with --work"):
        demo._clear(tmp_path)
    with pytest.raises(UsageError, match="name another folder with --work"):
        demo._clear(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_port_in_use_is_said_before_the_work(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="choose another --port"):
            demo.run(tmp_path / "work", taken.getsockname()[1], leave=True)
    assert not (tmp_path / "work").exists()


def test_says_where_it_cannot_write() -> None:
    with pytest.raises(ResourceError, match="cannot write here"):
        demo._clear(Path("/proc/demo"))
