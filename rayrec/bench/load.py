"""`rayrec load`: shoppers against a running service, by an honest clock.

In: a URL, a rate or a number of clients, seconds. Out: how many requests failed, latencies, what served the lists,
replicas over time. At a rate (open loop) shoppers come whether or not the service keeps up, and a latency counts from
when a request was due, not from when it could be sent: a stall is felt by all who came meanwhile ("coordinated
omission", Tene 2013). With clients (closed loop) each waits for its answer before it asks again, which flatters a slow
service.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import aiohttp
import numpy as np
import numpy.typing as npt

from rayrec.errors import ResourceError, UsageError
from rayrec.progress import Task

MIX: Final = {"home": 6, "item": 3, "cart": 1, "search": 1, "events": 4}
"""How often each scene, and events, is asked for."""
ZIPF: Final = 1.1
"""Few users come often: user n of the list with a weight of n ** -ZIPF."""
TIMEOUT_S: Final = 30.0
MOST_AT_ONCE: Final = 5000
"""Requests under way in an open loop; one that is due beyond is a failure."""
OVERRUN, NO_ANSWER = "overrun", "no answer"

Call: TypeAlias = tuple[str, dict[str, Any]]
Doubles: TypeAlias = npt.NDArray[np.float64]


class Shoppers:
    """What shoppers send, one request after another. Seeded."""

    def __init__(self, items: list[tuple[str, str]], users: int, mix: Mapping[str, float], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._items, self._names = items, list(mix)
        share = np.array([mix[name] for name in self._names], float)
        self._share = share / share.sum()
        weight_U = np.arange(1, users + 1) ** -ZIPF
        self._reach_U = weight_U.cumsum() / weight_U.sum()
        self._run, self._sent = uuid.uuid4().hex[:12], 0

    def next(self) -> Call:
        """Path and body of the next request."""
        self._sent += 1
        name = self._names[self._rng.choice(len(self._names), p=self._share)]
        user = f"load-{int(np.searchsorted(self._reach_U, self._rng.random()))}"
        item_id, title = self._items[int(self._rng.integers(len(self._items)))]
        if name == "events":
            action = ("view", "click", "cart", "purchase")[int(self._rng.choice(4, p=(0.7, 0.15, 0.1, 0.05)))]
            event = {"user_id": user, "item_id": item_id, "action": action, "event_id": f"{self._run}-{self._sent}"}
            return "/v1/events", {"events": [event]}
        context = {"item": {"item_id": item_id}, "cart": {"cart": [item_id]}, "search": {"query": title}}.get(name)
        body = {"user_id": user, "scene": name, "k": 10}
        return "/v1/recommend", {**body, "context": context} if context else body


@dataclass
class Record:
    """What came of each request: when it was due, when it was sent, how long it took from then it was due, seconds."""

    due_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    replicas: list[tuple[int, int]] = field(default_factory=list)
    served_by: Counter[str] = field(default_factory=Counter)
    retried: int = 0

    def add(self, due_s: float, sent_s: float, done_s: float, status: str) -> None:
        """Note a request; all on one clock that begins with the load."""
        self.due_s.append(due_s)
        self.late_s.append(sent_s - due_s)
        self.took_s.append(done_s - due_s)
        self.status.append(status)

    def summary(self, seconds: float) -> dict[str, Any]:
        """The figures of the whole load. ms: of requests that were answered well."""
        good = np.array([status.startswith("2") for status in self.status], bool)
        took_ms = 1000 * np.array(self.took_s)[good]
        late_ms = 1000 * np.array(self.late_s)
        return {
            "requests": len(self.status),
            "failed": int((~good).sum()),
            "status": dict(sorted(Counter(self.status).items())),
            "rate": round(float(good.sum()) / max(seconds, 1e-9), 1),
            "ms": {name: _at(took_ms, share) for name, share in PERCENTILES.items()},
            "served_by": dict(sorted(self.served_by.items())),
            "replicas": [list(one) for one in self.replicas],
            "retried": self.retried,
            "late_ms": {name: _at(late_ms, share) for name, share in PERCENTILES.items()},
        }


PERCENTILES: Final = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}


def _at(values: Doubles, share: float) -> float | None:
    return round(float(np.percentile(values, share)), 3) if len(values) else None


def run(
    url: str,
    *,
    seconds: float,
    rate: float | None = None,
    clients: int | None = None,
    retry: bool = False,
    users: int = 10_000,
    mix: str = "",
    seed: int = 0,
    headers: Mapping[str, str] | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Load the service at `url`, by a rate or by clients; the figures. picture: draw them over time into this PNG.

    retry: a request that failed is sent once more, with the same event_id. mix: as `home=6,events=4`.
    Raises UsageError, and ResourceError if the service does not answer at the start.
    """
    if (rate is None) == (clients is None):
        raise UsageError("give --rate R or --clients C")
    load = Load(url.rstrip("/"), seconds, retry, dict(headers or {}))
    asyncio.run(load.run(rate, clients, users, parsed_mix(mix), seed))
    figures = {"url": url, "seconds": seconds, **load.record.summary(seconds)}
    if picture is not None:
        draw(load.record, seconds, picture)
    return figures


def parsed_mix(text: str) -> dict[str, float]:
    """`home=6,events=4` as a dictionary; MIX if it is empty. Raises UsageError."""
    if not text:
        return dict(MIX)
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = part.strip().partition("=")
        try:
            mix[name] = float(share)
        except ValueError:
            equals = ""
        if not equals or not name or not math.isfinite(mix[name]) or mix[name] < 0:
            raise UsageError(f"--mix {part}: write scenes and events with their shares, as home=6,events=4")
    if not sum(mix.values()) > 0:
        raise UsageError("--mix: the shares must not all be 0")
    return mix


@dataclass
class Load:
    """One load under way."""

    url: str
    seconds: float
    retry: bool
    headers: dict[str, str]
    record: Record = field(default_factory=Record)

    async def run(
        self, rate: float | None, clients: int | None, users: int, mix: Mapping[str, float], seed: int
    ) -> None:
        """From the first request to the last answer."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers) as self._http:
            shoppers = Shoppers(await self._items(), users, mix, seed)
            self._started = time.perf_counter()
            with Task("load", math.ceil(self.seconds)) as task:
                watcher = asyncio.create_task(self._watch(task))
                if rate is not None:
                    await self._open_loop(shoppers, rate, np.random.default_rng([seed, 1]))
                else:
                    await asyncio.gather(*(self._client(shoppers) for _ in range(clients or 1)))
                watcher.cancel()

    def _now(self) -> float:
        return time.perf_counter() - self._started

    async def _items(self) -> list[tuple[str, str]]:
        """Ids and titles of some items, which also tells whether the service is there."""
        try:
            async with self._http.post(f"{self.url}/v1/recommend", json={"k": 200, "store": False}) as answer:
                body = await answer.json(content_type=None)
                if answer.status != 200:
                    raise ResourceError(f"{self.url}: answers {answer.status}: {body.get('detail', body)}")
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise ResourceError(f"{self.url}: does not answer ({error or type(error).__name__})") from None
        items = [(item["item_id"], item["title"] or item["item_id"]) for item in body["items"]]
        if not items:
            raise ResourceError(f"{self.url}: shows no items")
        return items

    async def _open_loop(self, shoppers: Shoppers, rate: float, rng: np.random.Generator) -> None:
        """Requests come as those of many independent people do: with exponential gaps."""
        under_way: set[asyncio.Task[None]] = set()
        due_s = float(rng.exponential(1 / rate))
        while due_s < self.seconds:
            if (wait_s := due_s - self._now()) > 0:
                await asyncio.sleep(wait_s)
            if len(under_way) >= MOST_AT_ONCE:
                self.record.add(due_s, due_s, due_s, OVERRUN)
            else:
                sending = asyncio.create_task(self._send(shoppers.next(), due_s))
                under_way.add(sending)
                sending.add_done_callback(under_way.discard)
            due_s += float(rng.exponential(1 / rate))
        await asyncio.gather(*under_way)

    async def _client(self, shoppers: Shoppers) -> None:
        while (now_s := self._now()) < self.seconds:
            await self._send(shoppers.next(), now_s)

    async def _send(self, call: Call, due_s: float) -> None:
        sent_s = self._now()
        status = await self._status_of(call)
        if self.retry and not status.startswith(("2", "4")):
            self.record.retried += 1
            status = await self._status_of(call)
        self.record.add(due_s, sent_s, self._now(), status)

    async def _status_of(self, call: Call) -> str:
        path, body = call
        try:
            async with self._http.post(self.url + path, json=body) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return NO_ANSWER
        if answer.status == 200:
            self.heard(call, json.loads(content))
        return str(answer.status)

    def heard(self, call: Call, answer: dict[str, Any]) -> None:
        """Note what a good answer says."""
        if "served_by" in answer:
            self.record.served_by[answer["served_by"]] += 1

    def counted(self, second: int, replicas: int) -> None:
        """Note how many replicas there are."""
        self.record.replicas.append((second, replicas))

    async def _watch(self, task: Task) -> None:
        """Count replicas each second, until it is cancelled."""
        while True:
            second = int(self._now())
            task.update(min(second, math.ceil(self.seconds)), f"{len(self.record.status)} requests")
            try:
                async with self._http.get(f"{self.url}/v1/status") as answer:
                    if answer.status == 200:
                        self.counted(second, int((await answer.json())["replicas"]))
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, KeyError):
                pass  # a service that does not say so under load is still loaded
            await asyncio.sleep(max(0.0, second + 1 - self._now()))


def draw(record: Record, seconds: float, path: Path) -> None:
    """Answers and failures a second, percentiles of latency, and replicas, over time, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    rates, latencies, replicas = figure.subplots(3, 1, sharex=True)
    second_R = np.array(record.due_s).astype(int)
    good_R = np.array([status.startswith("2") for status in record.status], bool)
    took_R = 1000 * np.array(record.took_s)
    axis_S = np.arange(math.ceil(seconds))
    rates.plot(axis_S, [np.sum(good_R & (second_R == s)) for s in axis_S], color="#2a6f97", label="answered")
    rates.plot(axis_S, [np.sum(~good_R & (second_R == s)) for s in axis_S], color="#c44e00", label="failed")
    rates.set_ylabel("requests a second")
    for name, share, colour in (("p50", 50, "#8a8f98"), ("p95", 95, "#2a6f97"), ("p99", 99, "#c44e00")):
        curve = [_at(took_R[good_R & (second_R == s)], share) or np.nan for s in axis_S]
        latencies.plot(axis_S, curve, color=colour, label=name)
    latencies.set_yscale("log")
    latencies.set_ylabel("ms, from when it was due")
    if record.replicas:
        replicas.step(*zip(*record.replicas, strict=True), where="post", color="#2a6f97")
    replicas.set_ylim(bottom=0)
    replicas.set_ylabel("replicas")
    replicas.set_xlabel("seconds")
    for axis in (rates, latencies):
        axis.legend()
    for axis in (rates, latencies, replicas):
        axis.grid(alpha=0.3)
    figure.savefig(str(path), dpi=110)
