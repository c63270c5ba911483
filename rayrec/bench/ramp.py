"""How the service follows a crowd that comes and goes: from one replica to several and back to one.

In: a running service that may have so many replicas. Out: seconds each way, failed requests, CPU seconds and memory, a
picture. The crowd are clients who wait for their answer; before and after it few shoppers come, at a rate.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from rayrec.bench.load import MIX, Load, Record, draw
from rayrec.bench.server_runs import Kind, Place, Server, spent_s
from rayrec.progress import step

REPLICAS = 4
RATE = 5.0
"""Requests a second while there is no crowd."""
CROWD = 32
"""Clients: as many as make Ray ask for all replicas, by the default target of requests under way."""
PATIENCE_S = 300.0
USERS = 1000


def _served(python: str, place: Place) -> list[str]:
    state, port = place.words[1:]
    return [
        *(python, "-m", "rayrec", "serve", place.bundle, "--state", state, "--port", port),
        *("--min-replicas", "1", "--max-replicas", str(REPLICAS), "--set", f"replica_cpus={1 / REPLICAS}"),
    ]


KIND = Kind(_served)
"""Replicas share whatever CPUs there are, so that it runs on a small machine; delays are the defaults."""


@dataclass
class Until(Load):
    """A load that may end as soon as the service has so many replicas. first_s: when their number began to change."""

    wanted: int | None = None
    first_s: float | None = None
    reached_s: float | None = None
    record: Record = field(default_factory=Record)

    def counted(self, second: int, replicas: int) -> None:
        """End the load where this is what it was for."""
        super().counted(second, replicas)
        if self.first_s is None and replicas != self.record.replicas[0][1]:
            self.first_s = self._now()
        if replicas == self.wanted and self.reached_s is None:
            self.reached_s = self._now()
            self.seconds = min(self.seconds, self.reached_s)


def measure(server: Server, seconds: float, picture: Path) -> dict[str, Any]:
    """Let a crowd come and go. seconds: of each part in which nothing changes.

    Raises RuntimeError if the replicas do not follow within PATIENCE_S.
    """
    parts: list[tuple[str, dict[str, Any]]] = [
        ("one replica", {"rate": RATE}),
        ("the crowd comes", {"clients": CROWD, "wanted": REPLICAS}),
        ("all replicas", {"clients": CROWD}),
        ("the crowd is gone", {"rate": RATE, "wanted": 1}),
        ("one replica again", {"rate": RATE}),
    ]
    loads, rows = [], []
    for name, given in parts:
        load, row = _part(server, seconds, **given)
        if load.wanted is not None and load.reached_s is None:
            raise RuntimeError(f"{name}: {row['replicas']} replicas after {PATIENCE_S:g} s, not {load.wanted}")
        loads.append(load)
        rows.append({"part": name, **row})
        step(f"  {name}: {row['answers']} answers, {row['failed']} failed, {row['replicas']} replicas")
    whole = joined([load.record for load in loads], [row["seconds"] for row in rows])
    draw(whole, sum(row["seconds"] for row in rows), picture)
    up, down = loads[1], loads[3]
    return {
        "ready_s": server.ready_s,
        "replicas": REPLICAS,
        "clients": CROWD,
        "up_s": {"first": up.first_s, "all": up.reached_s},
        "down_s": {"first": down.first_s, "all": down.reached_s},
        "requests": len(whole.status),
        "failed": sum(row["failed"] for row in rows),
        "parts": rows,
    }


def _part(
    server: Server, seconds: float, *, wanted: int | None = None, rate: float | None = None, clients: int | None = None
) -> tuple[Until, dict[str, Any]]:
    load = Until(f"http://127.0.0.1:{server.port}", PATIENCE_S if wanted else seconds, False, {}, wanted=wanted)
    before, own_s, started = server.cpu_s(), time.process_time(), time.monotonic()
    asyncio.run(load.run(rate, clients, USERS, MIX, 0))
    took_s, own_s = time.monotonic() - started, time.process_time() - own_s
    figures = load.record.summary(took_s)
    answers = figures["requests"] - figures["failed"]
    return load, {
        "seconds": took_s,
        "answers": answers,
        "failed": figures["failed"],
        "rate": figures["rate"],
        "ms": {name: figures["ms"][name] for name in ("p50", "p99")},
        "cpu_s_per_1000": 1000 * spent_s(before, server.cpu_s()) / max(answers, 1),
        "generator_cpu_s_per_1000": 1000 * own_s / max(answers, 1),
        "replicas": load.record.replicas[-1][1] if load.record.replicas else None,
        "mib": server.pss_mib(),
    }


def joined(records: Sequence[Record], seconds: Sequence[float]) -> Record:
    """Loads one after another as one. seconds: that each took."""
    whole = Record()
    for record, began_s in zip(records, accumulate(seconds, initial=0.0), strict=False):
        whole.due_s += [began_s + due_s for due_s in record.due_s]
        whole.replicas += [(int(began_s) + second, replicas) for second, replicas in record.replicas]
        for name in ("late_s", "took_s", "status"):
            getattr(whole, name).extend(getattr(record, name))
    return whole
