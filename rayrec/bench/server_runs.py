"""A server under measurement: how each kind is started, when it is ready, what it costs, and how it ends.

In: a kind, a bundle, a state. Out: a running server on a port of this machine. It must not know what is asked of it.
Other libraries live in virtual environments of their own (see `peer_runs`), their scripts in `peers`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rayrec
from rayrec.bench.closed_loop import rendered
from rayrec.bench.measure import family, pss_mib
from rayrec.bench.peer_runs import environment

READY_WITHIN_S = 900.0
"""A catalogue of a million items takes minutes."""
STOPPED_WITHIN_S = 60.0
BATCH = 16
LISTS = "/v1/recommend"
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Place:
    """What a server is started with."""

    bundle: str
    state: Path
    port: int

    @property
    def words(self) -> list[str]:
        """As scripts take it."""
        return [self.bundle, f"sqlite:///{self.state}", str(self.port)]


Command = Callable[[str, Place], list[str]]
"""From the Python that runs it."""


@dataclass(frozen=True)
class Kind:
    """A kind of server. requirements: of its own environment; none is ours. wraps: how it wants a body."""

    command: Command
    requirements: tuple[str, ...] = ()
    wraps: Callable[[dict[str, Any]], Any] = lambda body: body
    takes_events: bool = False
    env: tuple[tuple[str, str], ...] = ()

    def request(self, body: dict[str, Any]) -> bytes:
        """A request of a list, as it is sent."""
        return rendered(LISTS, self.wraps(body))


def _served(python: str, place: Place) -> list[str]:
    state, port = place.words[1:]
    return [
        *(python, "-m", "rayrec", "serve", place.bundle, "--state", state, "--port", port),
        *("--min-replicas", "1", "--max-replicas", "1"),
    ]


def _bare(*settings: str) -> Command:
    return lambda python, place: [python, "-m", "rayrec.bench.bare", *place.words, *settings]


def _script(name: str) -> Command:
    return lambda python, place: [python, "-W", "ignore", str(PEERS / f"{name}.py"), *place.words, str(BATCH)]


def _same(name: str) -> str:
    """The very release that we run: what is compared are servers."""
    return f"{name}=={version(name).partition('+')[0]}"


_OURS = (
    *(_same(name) for name in ("torch", "numpy", "pandas", "scipy", "pyarrow", "pydantic")),
    "fastapi", "prometheus-client", "pyyaml", "rich", "safetensors", "tantivy", "uvicorn[standard]",
)  # fmt: skip

KINDS: dict[str, Kind] = {
    "rayrec serve": Kind(_served, takes_events=True),
    "uvicorn, one by one": Kind(_bare("batch_size=1")),
    "uvicorn": Kind(_bare(f"batch_size={BATCH}")),
    "LitServe": Kind(_script("litserve_server"), ("litserve>=0.2,<0.3", *_OURS)),
    "BentoML": Kind(
        _script("bentoml_server"),
        ("bentoml>=1.4,<1.5", *_OURS),
        wraps=lambda body: {"requests": [body]},  # what may be batched takes a list there
        env=(("BENTOML_DO_NOT_TRACK", "true"),),
    ),
}
"""All but `rayrec serve` are one process of ranking, as one replica is."""

TRIVIAL = "nothing but an answer"


@dataclass
class Server:
    """A running server, with all processes that it started."""

    process: subprocess.Popen[bytes]
    port: int
    ready_s: float

    def cpu_s(self) -> dict[int, float]:
        """CPU seconds that each of its processes has used so far."""
        return family(self.process.pid)

    def pss_mib(self) -> float:
        """Its memory; asking holds it up."""
        return pss_mib(self.cpu_s())


def spent_s(before: dict[int, float], after: dict[int, float]) -> float:
    """CPU seconds between two looks at the same server."""
    return sum(used - before.get(pid, 0.0) for pid, used in after.items())


@contextmanager
def running(kind: Kind, bundle: str, state: Path, environments: Path, log: Path) -> Iterator[Server]:
    """A server of this kind, ready to answer; it ends with all that it started. log: what it says.

    Raises RuntimeError if its environment cannot be made, or it does not come up.
    """
    python = sys.executable
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict(kind.env)}  # as Ray sets it for a replica
    if kind.requirements:
        python = str(environment(environments, kind.requirements))
        env["PYTHONPATH"] = str(_alone(environments))
    place = Place(bundle, state, free_port())
    with started(kind.command(python, place), place.port, kind.request({"k": 1, "store": False}), env, log) as server:
        yield server


@contextmanager
def started(command: list[str], port: int, probe: bytes, env: dict[str, str], log: Path) -> Iterator[Server]:
    """A server by its command line, once it answers `probe` by 200. Raises RuntimeError if it does not."""
    begun = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env)
    try:
        while not _answers(port, probe):
            if process.poll() is not None or time.monotonic() - begun > READY_WITHIN_S:
                last = (log.read_text(errors="replace").strip() or "no word").splitlines()[-1]
                raise RuntimeError(f"did not come up: {last}")
            time.sleep(0.2)
        yield Server(process, port, time.monotonic() - begun)
    finally:
        _stop(process)


def _answers(port: int, probe: bytes) -> bool:
    body = probe.partition(b"\r\n\r\n")[2]
    request = urllib.request.Request(f"http://127.0.0.1:{port}{LISTS}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:  # its errors of HTTP among them
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; then end what is left of it."""
    mine = {pid: _born(pid) for pid in family(process.pid)}
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOPPED_WITHIN_S)
    for pid, born in mine.items():
        if born is not None and _born(pid) == born:  # a number may have gone to somebody else
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _alone(environments: Path) -> Path:
    """A folder with rayrec and nothing beside it: an environment of another library sees none of our packages."""
    folder = environments / "rayrec-alone"
    folder.mkdir(parents=True, exist_ok=True)
    link, package = folder / "rayrec", Path(rayrec.__file__).parent
    if not link.exists() or link.resolve() != package:
        link.unlink(missing_ok=True)
        link.symlink_to(package)
    return folder


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
