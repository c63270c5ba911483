"""`rayrec bench serve`: what a list costs, beside the same behind other servers, and how that grows with the shop.

In: a folder, how many rounds, seconds, clients, and sizes. Out: in that folder a file for each run, `serve.json`,
`table.md`, `serve.png` and a picture of each ramp. A run whose file is there is not repeated. Servers take turns: each
starts anew with a copy of the same state in every round, and every other round goes backwards, so that a busy minute is
nobody's alone.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rayrec.bench import ramp
from rayrec.bench.closed_loop import ask, rendered
from rayrec.bench.kept import kept_body
from rayrec.bench.load import MIX, ZIPF
from rayrec.bench.made_shop import draw_items, fill_state, item_id, make_bundle, user_id
from rayrec.bench.server_runs import KINDS, TRIVIAL, Server, free_port, running, spent_s, started
from rayrec.bench.serving_table import draw, summary, table
from rayrec.errors import UsageError
from rayrec.progress import step

LISTS, EVENTS = "lists", "lists and events"
GROWN = "uvicorn"
"""The kind of server whose growth is measured: one process, nothing between it and the client."""
GROWTH_CLIENTS = (1, 8)
DRAWN = 20_000
"""Requests that are drawn before a run, and sent in turn."""
WARM_SHARE = 0.2
"""Of the seconds of a point, before it and not counted."""
LAYERS, RAMP = "layers", "ramp"
LAYERS_CODE = "import sys; from rayrec.bench.layers import main; main(*sys.argv[1:])"
RECALL_CODE = "import sys; from rayrec.bench.recall import main; main(*sys.argv[1:])"


@dataclass(frozen=True)
class Shop:
    """A shop that is served. even: every visitor comes as often as any other, else few come often (see `load.ZIPF`)."""

    items: int = 20_000
    users: int = 10_000
    events: int = 50
    even: bool = False


USERS_EVENTS = 10
"""A visitor's events where users are many: millions of long histories would fill the disk and say the same."""


@dataclass(frozen=True)
class Sizes:
    """What growth is measured over."""

    items: Sequence[int] = (1_000, 20_000, 200_000, 1_000_000)
    history: Sequence[int] = (10, 50, 200, 1_000)
    users: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000)

    def shops(self) -> Iterator[tuple[str, int, Shop]]:
        """What grows, how far, and the shop."""
        for n in self.items:
            yield "items", n, Shop(items=n)
        for n in self.history:
            yield "history", n, Shop(events=n)
        for n in self.users:
            yield "users", n, Shop(users=n, events=USERS_EVENTS, even=True)


@dataclass(frozen=True)
class Plan:
    """One run of a round. part: "servers", or what grows, or LAYERS, or RAMP."""

    part: str
    name: str
    kind: str
    shop: Shop
    clients: tuple[int, ...]
    mixes: tuple[str, ...] = (LISTS,)


def plans(clients: Sequence[int], sizes: Sizes, only: Sequence[str] = ()) -> list[Plan]:
    """All runs of a round; only: kinds of server, "items", "history", "users", "layers", "ramp".

    Raises UsageError.
    """
    found = [Plan("servers", TRIVIAL, TRIVIAL, Shop(), tuple(clients))]
    for name, kind in KINDS.items():
        mixes = (LISTS, EVENTS) if kind.takes_events else (LISTS,)
        found.append(Plan("servers", name, name, Shop(), tuple(clients), mixes))
    found += [Plan(part, str(n), GROWN, shop, GROWTH_CLIENTS) for part, n, shop in sizes.shops()]
    found += [Plan(part, part, "", Shop(), ()) for part in (LAYERS, RAMP)]
    known = dict.fromkeys(name for plan in found for name in (plan.kind if plan.part == "servers" else plan.part,))
    if unknown := [name for name in only if name not in known]:
        raise UsageError(f"unknown part {', '.join(unknown)}: choose among {', '.join(known)}")
    return [plan for plan in found if not only or {plan.part, plan.kind if plan.part == "servers" else ""} & {*only}]


def run(
    out: Path, *, rounds: int, seconds: float, clients: Sequence[int], sizes: Sizes, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Run what is missing, and write `serve.json`, `table.md` and `serve.png` into `out`; answers what is in the first.

    clients: of each point of the comparison. Raises UsageError for an unknown part.
    """
    wanted = plans(clients, sizes, only)
    runs: list[dict[str, Any]] = []
    trouble: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as scratch:
        bench = Bench(out, seconds, Made(Path(scratch)))
        for round_ in range(rounds):
            for plan in wanted if round_ % 2 == 0 else wanted[::-1]:
                try:
                    runs.append({**asdict(plan), "round": round_, **bench.run(plan, round_)})
                except (RuntimeError, OSError) as error:  # who cannot run must not end the others
                    trouble[plan.name] = " ".join(str(error).replace("|", "/").split())
                    step(f"{plan.name}: {trouble[plan.name]}")
        recall = {plan.name: bench.recall(plan.shop) for plan in wanted if plan.part == "items"}
    result = {
        "bench": "serve",
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "seconds": seconds,
        "rounds": rounds,
        "shop": asdict(Shop()),
        **summary(runs, recall),
        "trouble": trouble,
    }
    (out / "serve.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "table.md").write_text(table(result))
    draw(result, out / "serve.png")
    step(table(result))
    return result


# ---------------------------------------------------------------- what is served


@dataclass
class Made:
    """Bundles and states in a folder, each made once, when it is first needed."""

    folder: Path

    def __post_init__(self) -> None:
        self.bundle: Callable[[int], str] = cache(self._bundle)
        self._filled: Callable[[int, int, int], Path] = cache(self._fill)

    def _bundle(self, items: int) -> str:
        step(f"making a catalogue of {items:,} items")
        place = self.folder / f"bundles-{items}"
        make_bundle(place, items)
        return str(place)

    def _fill(self, users: int, events: int, items: int) -> Path:
        step(f"making a state of {users:,} visitors with {events:,} events each")
        path = self.folder / f"state-{users}-{events}-{items}.db"
        fill_state(path, users, events, items)
        return path

    @contextmanager
    def state(self, shop: Shop) -> Iterator[Path]:
        """A copy of the shop's state, for one run."""
        filled = self._filled(shop.users, shop.events, shop.items)
        copy = self.folder / "served.db"
        shutil.copyfile(filled, copy)
        try:
            yield copy
        finally:
            for file in self.folder.glob("served.db*"):  # its log too
                file.unlink()


def visitors(shop: Shop, n: int, rng: np.random.Generator) -> list[str]:
    """Who comes, one after another."""
    weight_U = np.arange(1, shop.users + 1) ** (0.0 if shop.even else -ZIPF)
    reach_U = weight_U.cumsum() / weight_U.sum()
    return [user_id(user) for user in np.searchsorted(reach_U, rng.random(n)).tolist()]


def requests(kind: str, shop: Shop, mix: str, seed: int) -> list[bytes]:
    """What clients send: lists of ten for scene home; with EVENTS, as often as in `load`, an event in place of one."""
    rng = np.random.default_rng([seed, shop.items, shop.users, shop.events])
    as_sent = KINDS[kind].request
    found = [as_sent({"user_id": user, "scene": "home", "k": 10}) for user in visitors(shop, DRAWN, rng)]
    if mix == EVENTS:
        places = np.flatnonzero(rng.random(DRAWN) < MIX["events"] / sum(MIX.values()))
        items = draw_items(shop.items, len(places), rng).tolist()
        for place, item, user in zip(places.tolist(), items, visitors(shop, len(places), rng), strict=True):
            event = {"user_id": user, "item_id": item_id(item), "action": "view"}
            found[place] = rendered("/v1/events", {"events": [event]})
    return found


# ---------------------------------------------------------------- runs


@dataclass
class Bench:
    """The folder in which the bench keeps its runs, and what it serves."""

    out: Path
    seconds: float
    made: Made
    environments: Path = field(init=False)

    def __post_init__(self) -> None:
        self.environments = self.out / "environments"
        self.runs, self.logs = self.out / "runs", self.out / "logs"
        for folder in (self.runs, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, plan: Plan, round_: int) -> dict[str, Any]:
        """A run as kept, or anew. Raises RuntimeError if its server does not come up."""
        key = {"seconds": self.seconds, **asdict(plan)}
        if plan.kind in KINDS:
            key["requirements"] = KINDS[plan.kind].requirements
        name = f"{plan.part}-{plan.name}".replace(" ", "-").replace(",", "")
        make = {LAYERS: self._layers, RAMP: self._ramp}.get(
            plan.part, self._trivial if plan.kind == TRIVIAL else self._server
        )
        return kept_body(self.runs, name, key, round_, lambda: make(plan, round_))

    def recall(self, shop: Shop) -> dict[str, Any]:
        """Of the items that a search by vector should find, the share that it does."""

        def make() -> dict[str, Any]:
            step(f"recall among {shop.items:,} items")
            return _in_a_process(RECALL_CODE, self.made.bundle(shop.items))

        return kept_body(self.runs, "recall", {"items": shop.items}, 0, make)

    def _server(self, plan: Plan, round_: int) -> dict[str, Any]:
        log = self.logs / f"{plan.part}-{plan.name}.log"
        bundle = self.made.bundle(plan.shop.items)
        with self.made.state(plan.shop) as state:
            step(f"round {round_ + 1}: {plan.part}, {plan.name}")
            with running(KINDS[plan.kind], bundle, state, self.environments, log) as server:
                return self._points(plan, server, round_)

    def _trivial(self, plan: Plan, round_: int) -> dict[str, Any]:
        """What the generator can do at most: as many bytes as an answer has, for no work."""
        port = free_port()
        command = [sys.executable, "-m", "rayrec.bench.answers_at_once", str(port), "3000"]
        log = self.logs / "trivial.log"
        with started(command, port, rendered("/", {}), dict(os.environ), log) as server:
            return self._points(replace(plan, kind=GROWN), server, round_)

    def _points(self, plan: Plan, server: Server, round_: int) -> dict[str, Any]:
        """Each mix with each number of clients; memory before the first and after the last."""
        points: list[dict[str, Any]] = []
        memory: list[float] = []
        for mix in plan.mixes:
            sent = requests(plan.kind, plan.shop, mix, round_)
            for clients in plan.clients:
                ask(server.port, sent, clients, WARM_SHARE * self.seconds)
                if not memory:
                    memory.append(server.pss_mib())
                before = server.cpu_s()
                figures = ask(server.port, sent, clients, self.seconds).figures()
                figures["cpu_s"] = spent_s(before, server.cpu_s())
                points.append({"mix": mix, "clients": clients, **figures})
                step(f"  {mix}, {clients} clients: {described(points[-1])}")
        memory.append(server.pss_mib())
        return {"ready_s": server.ready_s, "points": points, "mib": memory}

    def _layers(self, plan: Plan, round_: int) -> dict[str, Any]:
        step(f"round {round_ + 1}: where the time of a request goes")
        with self.made.state(plan.shop) as state:
            users = json.dumps(visitors(plan.shop, 400, np.random.default_rng(round_)))
            bundle = self.made.bundle(plan.shop.items)
            return _in_a_process(LAYERS_CODE, bundle, f"sqlite:///{state}", users, str(self.seconds))

    def _ramp(self, plan: Plan, round_: int) -> dict[str, Any]:
        step(f"round {round_ + 1}: a crowd comes and goes")
        bundle, log = self.made.bundle(plan.shop.items), self.logs / "ramp.log"
        with self.made.state(plan.shop) as state, running(ramp.KIND, bundle, state, self.environments, log) as server:
            return ramp.measure(server, self.seconds, self.out / f"ramp-{round_}.png")


def described(point: dict[str, Any]) -> str:
    """A point in a line."""
    ms = point["ms"]
    times = "" if ms["p50"] is None else f", p50 {ms['p50']:.2f} ms, p99 {ms['p99']:.2f} ms"
    return f"{point['rate']:.0f}/s{times}" + (f", failed {point['failed']}" if point["failed"] else "")


def _in_a_process(code: str, *words: str) -> dict[str, Any]:
    """The JSON that this code prints, run by itself with one thread. Raises RuntimeError if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
