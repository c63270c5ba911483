"""The load generator against servers that are slow, stall or fail in known ways."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rayrec.bench.load import MIX, Load, Shoppers, parsed_mix, run
from rayrec.errors import ResourceError, UsageError

ITEMS = [(f"i{n}", f"thing {n}") for n in range(5)]
Handler = Callable[[web.Request], Awaitable[web.Response]]


class Server:
    """An aiohttp server in a thread. `before` is awaited at each events or recommend request after the first."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.before: Callable[[int], Awaitable[int]] = self._at_once
        self.replicas, self.served_by = 1, "model"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _at_once(self, n: int) -> int:
        return 200

    async def _start(self) -> str:
        app = web.Application()
        app.router.add_post("/v1/recommend", self._answer)
        app.router.add_post("/v1/events", self._answer)
        app.router.add_get("/v1/status", self._status)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("store") is False:  # the generator looks for items
            return web.json_response({"items": [{"item_id": a, "title": b} for a, b in ITEMS]})
        self.calls.append((request.path, body))
        status = await self.before(len(self.calls))
        return web.json_response({"items": [], "served_by": self.served_by}, status=status)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response({"replicas": self.replicas})

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def test_a_rate_is_kept_and_all_is_counted(server: Server, tmp_path: Path) -> None:
    figures = run(server.url, seconds=2, rate=60, picture=tmp_path / "load.png")
    assert figures["requests"] == len(server.calls) == pytest.approx(120, abs=45)
    assert (figures["failed"], figures["status"]) == (0, {"200": figures["requests"]})
    assert figures["ms"]["p50"] <= figures["ms"]["p95"] <= figures["ms"]["p99"] <= figures["ms"]["max"]
    assert figures["replicas"][0] == [0, 1]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_a_stall_is_felt_by_all_who_came_meanwhile(server: Server) -> None:
    """A service that stands still for one second of two: about half of the shoppers wait, half a second on average."""

    async def stall(n: int) -> int:
        if n == 1:
            time.sleep(1.0)  # the whole server
        return 200

    server.before = stall
    load = Load(server.url, 2, False, {})
    asyncio.run(load.run(50, None, 10, MIX, 0))
    waited = [took_s for took_s in load.record.took_s if took_s > 0.1]
    assert 0.25 < len(waited) / len(load.record.took_s) < 0.9
    assert max(waited) > 0.9


def test_clients_wait_for_their_answers(server: Server) -> None:
    async def slow(n: int) -> int:
        await asyncio.sleep(0.1)
        return 200

    server.before = slow
    figures = run(server.url, seconds=1, clients=3)
    assert 15 <= figures["requests"] <= 33
    assert figures["ms"]["p50"] == pytest.approx(100, abs=60)


def test_failures_are_counted_by_status_and_a_retry_mends_them(server: Server) -> None:
    async def every_other(n: int) -> int:
        return 503 if n % 2 else 200

    server.before = every_other
    figures = run(server.url, seconds=1, clients=1)
    assert set(figures["status"]) == {"200", "503"}
    assert figures["failed"] == figures["status"]["503"]
    server.calls.clear()
    mended = run(server.url, seconds=1, clients=1, retry=True)
    assert (mended["failed"], mended["retried"]) == (0, mended["requests"])
    sent = [body["events"][0]["event_id"] for path, body in server.calls if path == "/v1/events"]
    assert set(Counter(sent).values()) == {2}, "a retry carries the same event_id"


def test_a_refusal_is_not_sent_again(server: Server) -> None:
    async def refuse(n: int) -> int:
        return 429

    server.before = refuse
    figures = run(server.url, seconds=0.5, clients=1, retry=True)
    assert (figures["retried"], figures["failed"]) == (0, figures["requests"])


def test_lists_are_counted_by_what_served_them(server: Server) -> None:
    async def worse(n: int) -> int:
        server.served_by = "popular" if n > 3 else "model"
        return 503 if n > 5 else 200

    server.before = worse
    figures = run(server.url, seconds=0.5, clients=1, mix="home=1")
    assert figures["served_by"] == {"model": 3, "popular": 2}


def test_replicas_are_watched(server: Server) -> None:
    timer = threading.Timer(1.5, setattr, (server, "replicas", 3))
    timer.start()
    figures = run(server.url, seconds=3, clients=1)
    assert (figures["replicas"][0][1], figures["replicas"][-1][1]) == (1, 3)


def test_no_service_is_said() -> None:
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:9: does not answer"):
        run("http://127.0.0.1:9/", seconds=1, rate=1)


def test_shoppers_are_seeded_and_few_come_often() -> None:
    def calls(seed: int) -> list[tuple[str, dict[str, Any]]]:
        shoppers = Shoppers(ITEMS, 1000, MIX, seed)
        return [shoppers.next() for _ in range(2000)]

    first = [body for path, body in calls(0) if path == "/v1/recommend"]
    assert first == [body for path, body in calls(0) if path == "/v1/recommend"]
    users = Counter(body["user_id"] for body in first)
    assert users["load-0"] > 5 * users["load-50"] > 0
    scenes = Counter(body["scene"] for body in first)
    assert scenes["home"] == pytest.approx(2000 * 6 / 15, rel=0.15)
    assert all(body["context"]["query"] for body in first if body["scene"] == "search")


@pytest.mark.parametrize(
    ("text", "mix"), [("", dict(MIX)), ("home=1", {"home": 1.0}), ("a=2, events=0.5", {"a": 2.0, "events": 0.5})]
)
def test_mixes(text: str, mix: dict[str, float]) -> None:
    assert parsed_mix(text) == mix


@pytest.mark.parametrize("text", ["home", "home=x", "home=-1", "=1", "home=0", "home=nan", "home=inf"])
def test_wrong_mixes(text: str) -> None:
    with pytest.raises(UsageError, match="--mix"):
        parsed_mix(text)


def test_one_of_rate_and_clients() -> None:
    for options in ({}, {"rate": 1.0, "clients": 1}):
        with pytest.raises(UsageError, match="give --rate R or --clients C"):
            run("http://127.0.0.1:9", seconds=1, **options)
