"""Clients that ask again as soon as they are answered, with next to no cost of their own: for one machine that both
asks and answers.

In: an address, requests as bytes, how many clients, for how long. Out: how long answers took, and what failed. It must
not know what is asked. `load` has shoppers, rates and retries; here nothing is read of an answer but its status and
where it ends, so that the generator takes as little as can be from the server that it measures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

HOST: Final = "127.0.0.1"
PATIENCE_S: Final = 30.0
RECONNECT_S: Final = 0.05
HEAD_END: Final = b"\r\n\r\n"
LENGTH: Final = b"\r\ncontent-length:"
NO_ANSWER, NO_LENGTH = "no answer", "no length"


def rendered(path: str, body: Any) -> bytes:
    """A POST of `body` as JSON, ready to be sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + HEAD_END + content


@dataclass
class Asked:
    """What came of a closed loop. took_s: of each request that was answered by 2xx. cpu_s: what asking cost."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    took_s: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, Any]:
        """Answers, failures by kind, answers a second, percentiles in ms, CPU seconds of the generator."""
        took_ms = 1000 * np.array(self.took_s)
        return {
            "answers": len(self.took_s),
            "failed": dict(self.failed),
            "rate": len(self.took_s) / max(self.seconds, 1e-9),
            "ms": {f"p{share}": float(np.percentile(took_ms, share)) if len(took_ms) else None for share in (50, 99)},
            "generator_cpu_s": self.cpu_s,
        }


def ask(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Asked:
    """Let `clients` ask a server on this machine for `seconds`, one request after another, in turn from `requests`.

    What is under way at the end is waited for and counts, its time too.
    """
    asked = Asked()
    used_s, started = _cpu_s(), time.perf_counter()
    asyncio.run(_all_clients(port, itertools.cycle(requests), clients, started + seconds, asked))
    asked.seconds, asked.cpu_s = time.perf_counter() - started, _cpu_s() - used_s
    return asked


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _all_clients(port: int, requests: Iterator[bytes], clients: int, until: float, asked: Asked) -> None:
    await asyncio.gather(*(_client(port, requests, until, asked) for _ in range(clients)))


async def _client(port: int, requests: Iterator[bytes], until: float, asked: Asked) -> None:
    """One client, on one connection for as long as the server keeps it."""
    loop = asyncio.get_running_loop()
    while time.perf_counter() < until:
        connection = _Connection(requests, until, asked)
        try:
            transport, _ = await loop.create_connection(lambda: connection, HOST, port)  # noqa: B023
        except OSError:
            asked.failed[NO_ANSWER] += 1
            await asyncio.sleep(RECONNECT_S)
            continue
        try:
            await asyncio.wait_for(connection.done, max(0.0, until - time.perf_counter()) + PATIENCE_S)
        except asyncio.TimeoutError:
            asked.failed[NO_ANSWER] += 1
        finally:
            transport.abort()


class _Connection(asyncio.Protocol):
    """Sends a request when the one before is answered. `done`: time is up, or the connection is lost."""

    def __init__(self, requests: Iterator[bytes], until: float, asked: Asked) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests, self._until, self._asked = requests, until, asked
        self._got, self._whole_bytes = b"", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._got, self._whole_bytes = b"", 0
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._got = self._got + data if self._got else data
        if not self._whole_bytes and not self._measure():
            return
        if len(self._got) < self._whole_bytes:
            return
        now = time.perf_counter()
        if self._got[9:10] == b"2":
            self._asked.took_s.append(now - self._sent)
        else:
            self._asked.failed[self._got[9:12].decode("latin-1")] += 1
        if now < self._until:
            self._send()
        else:
            self._end()

    def _measure(self) -> bool:
        """How long the answer is, once its head is there."""
        end = self._got.find(HEAD_END)
        if end < 0:
            return False
        head = self._got[:end].lower()
        at = head.find(LENGTH)
        if at < 0:
            self._asked.failed[NO_LENGTH] += 1
            self._end()
            return False
        self._whole_bytes = end + len(HEAD_END) + int(head[at + len(LENGTH) :].split(b"\r\n", 1)[0])
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self._asked.failed[NO_ANSWER] += 1
        self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
