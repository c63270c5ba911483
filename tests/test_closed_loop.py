"""Clients in a closed loop against servers that answer, refuse, are slow, hang up or are not there."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from rayrec.bench.answers_at_once import Answering
from rayrec.bench.closed_loop import NO_ANSWER, NO_LENGTH, ask, rendered

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A server in a thread whose connections are served by `talk`, or by the trivial server with it None."""

    def __init__(self, talk: Talk | None) -> None:
        self._talk, self._loop = talk, asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> int:
        if self._talk is None:
            answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
            self._server = await self._loop.create_server(lambda: Answering(answer), "127.0.0.1", 0)
        else:
            self._server = await asyncio.start_server(self._talking, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _talking(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._talk is not None
        try:
            await self._talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _stop(self) -> None:
        self._server.close()
        await asyncio.sleep(0.02)  # let connections learn that their clients are gone
        talks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@pytest.fixture
def serving() -> Iterator[Callable[[Talk | None], int]]:
    servers: list[Server] = []

    def serve(talk: Talk | None) -> int:
        servers.append(Server(talk))
        return servers[-1].port

    yield serve
    for server in servers:
        server.close()


async def request(reader: asyncio.StreamReader) -> dict[str, object]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    return json.loads(await reader.readexactly(length))


def test_each_client_waits_for_its_answer(serving: Callable[[Talk | None], int]) -> None:
    seen: list[object] = []

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append((await request(reader))["n"])
            await asyncio.sleep(0.05)
            body = b'{"items": [1, 2]}'
            # In two pieces, and another's case: as servers do.
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body))
            await asyncio.sleep(0.005)
            writer.write(b"Server: slow\r\n\r\n" + body)

    asked = ask(serving(slow), [rendered("/v1/recommend", {"n": n}) for n in range(7)], 3, 1.0)
    figures = asked.figures()
    assert figures["failed"] == {}
    assert figures["answers"] == len(seen) == pytest.approx(3 / 0.06, rel=0.4)
    assert figures["rate"] == pytest.approx(figures["answers"] / asked.seconds)
    assert 50 < figures["ms"]["p50"] <= figures["ms"]["p99"] < 500
    assert seen[:14] == [0, 1, 2, 3, 4, 5, 6] * 2
    assert figures["generator_cpu_s"] > 0


def test_the_trivial_server_answers_many(serving: Callable[[Talk | None], int]) -> None:
    figures = ask(serving(None), [rendered("/", {"user_id": "u" * 5000})], 8, 0.5).figures()
    assert (figures["failed"], figures["answers"] > 100) == ({}, True)


def test_refusals_are_counted_by_status(serving: Callable[[Talk | None], int]) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")

    figures = ask(serving(refuse), [rendered("/", {})], 2, 0.2).figures()
    assert figures["answers"] == 0
    assert figures["ms"] == {"p50": None, "p99": None}
    assert set(figures["failed"]) == {"429"}


def test_who_hangs_up_is_called_again(serving: Callable[[Talk | None], int]) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await request(reader)
        writer.close()

    figures = ask(serving(once), [rendered("/", {})], 1, 0.5).figures()
    assert figures["answers"] == pytest.approx(figures["failed"][NO_ANSWER], abs=1)
    assert figures["answers"] > 2


def test_an_answer_without_a_length_is_no_answer(serving: Callable[[Talk | None], int]) -> None:
    async def chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")

    assert set(ask(serving(chunks), [rendered("/", {})], 1, 0.2).failed) == {NO_LENGTH}


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = ask(port, [rendered("/", {})], 2, 0.2)
    assert (len(asked.took_s), set(asked.failed)) == (0, {NO_ANSWER})
