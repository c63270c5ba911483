"""Where the time of one request goes: the ranker alone, then the service around it, then the application around that.

In: a bundle, a state, visitors. Out: one line of JSON, medians in ms of one request at a time in this process, without
a network; and for what share of the ranker's time each of our functions is at work.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rayrec
from rayrec.bundle import Bundle
from rayrec.config import ServeConfig
from rayrec.history import HistoryBatch
from rayrec.ranking.requests import Request
from rayrec.ranking.retrieval import Floats, Ints
from rayrec.serving import wire
from rayrec.serving.scorer import load_scorer
from rayrec.serving.service import Service
from rayrec.serving.web import create_app
from rayrec.state import open_state

WARM_SHARE = 0.2
PROFILED = 200
SHOWN_FROM = 0.02
"""Share of the ranker's time from which a function is told of."""
HEAD = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "query_string": b""}


class Counting:
    """A scorer that counts the candidates which it is given."""

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer
        self.candidates: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def fuse(self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, heads: Mapping[str, float]) -> Floats:
        """As the scorer's."""
        self.candidates += np.count_nonzero(candidates_BC, axis=1).tolist()
        found: Floats = self._scorer.fuse(history, user_BD, candidates_BC, heads)
        return found


def main(bundle_path: str, state_url: str, users: str, seconds: str) -> None:
    """Measure for so long and print. users: ids as JSON."""
    torch.set_num_threads(1)
    print(json.dumps(asyncio.run(Layers(bundle_path, state_url).measure(json.loads(users), float(seconds)))))


class Layers:
    """The same request through one layer more each time."""

    def __init__(self, bundle_path: str, state_url: str) -> None:
        bundle = Bundle.open(bundle_path)
        self.scorer, self.state = Counting(load_scorer(bundle)), open_state(state_url)
        version = bundle.version
        self.service = Service(
            self.scorer, self.state, ServeConfig(), model=version, image_of=None, replica_id="layers"
        )
        self.app = create_app(self.scorer, open_state(state_url), model=version)
        self.ranker = self.service.live.model.ranker
        self.took_ms: dict[str, list[float]] = defaultdict(list)

    async def measure(self, users: list[str], seconds: float) -> dict[str, Any]:
        """Medians of each layer, of each stage in the ranker, and of reading and writing JSON by themselves."""
        layers = [self._rank, self._serve, self._call, self._json]
        begun = time.monotonic()
        for n in range(10**9):
            if n == 0 or time.monotonic() - begun < WARM_SHARE * seconds:
                self.took_ms.clear()
            elif time.monotonic() - begun > (1 + WARM_SHARE) * seconds:
                break
            body = {"user_id": users[n % len(users)], "scene": "home", "k": 10}
            for at in range(len(layers)):  # none is always the first to meet a visitor
                await layers[(at + n) % len(layers)](body)
        medians = {name: statistics.median(values) for name, values in self.took_ms.items()}
        candidates = statistics.median(self.scorer.candidates)
        shares = self._shares(users)
        await self.service.close()
        return {"requests": len(self.took_ms["rank"]), "candidates": candidates, "ms": medians, "shares": shares}

    async def _rank(self, body: dict[str, Any]) -> None:
        started = time.perf_counter()
        (answer,) = self.ranker.recommend([Request(body["user_id"])], self.state)
        self._add("rank", started)
        for stage, ms in answer.timing_ms.items():
            self.took_ms[f"stage {stage}"].append(ms)
        self.took_ms["stage log"].append(self.took_ms["rank"][-1] - sum(answer.timing_ms.values()))

    async def _serve(self, body: dict[str, Any]) -> None:
        sent = wire.RecommendRequest.model_validate(body)
        started = time.perf_counter()
        self._answer = await self.service.recommend(sent)
        self._add("service", started)

    async def _call(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(content)).encode()))
        path = {"method": "POST", "path": "/v1/recommend", "raw_path": b"/v1/recommend", "headers": headers}
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

        started = time.perf_counter()
        await self.app({**HEAD, **path}, receive, send)
        self._add("app", started)
        if statuses != [200]:
            raise RuntimeError(f"the application answered {statuses}")

    async def _json(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        started = time.perf_counter()
        wire.RecommendRequest.model_validate(json.loads(content))
        self._add("json in", started)
        if hasattr(self, "_answer"):
            started = time.perf_counter()
            json.dumps(self._answer, ensure_ascii=False, allow_nan=False)
            self._add("json out", started)

    def _add(self, name: str, started: float) -> None:
        self.took_ms[name].append(1000 * (time.perf_counter() - started))

    def _shares(self, users: list[str]) -> dict[str, float]:
        """Of the time of the ranker, the share that each of our functions takes, with all that it calls.

        By cProfile, which makes calls dearer than they are: shares to compare, no times.
        """

        def rank() -> None:
            for n in range(PROFILED):
                self.ranker.recommend([Request(users[n % len(users)])], self.state)

        return shares(rank)


def shares(work: Callable[[], None]) -> dict[str, float]:
    """The share of our functions in the time of `work`, those from SHOWN_FROM on, the greatest first."""
    profile = cProfile.Profile()
    profile.runcall(work)
    ours = str(Path(rayrec.__file__).parent)
    stats: dict[tuple[str, int, str], Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    whole_s = max(spent for _, _, _, spent, _ in stats.values())
    found: dict[str, float] = defaultdict(float)
    for (file, _, function), (_, _, _, spent_s, _) in stats.items():
        if file.startswith(ours) and not file.startswith(f"{ours}/bench") and not function.startswith("<"):
            found[f"{Path(file).stem}.{function}"] += spent_s / whole_s
    told = {name: round(share, 4) for name, share in found.items() if share >= SHOWN_FROM}
    return dict(sorted(told.items(), key=lambda one: -one[1]))
