"""What faults cost a service under constant load: failed requests, lists of a lesser source, events lost.

Each test prints a row of figures: `pytest -m slow -s tests/test_faults.py`. An event is lost if it was acknowledged
and is not in the state afterwards, which is read directly.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tinyshop
from redisserver import RedisServer
from terminal import Running, Terminal

from rayrec.bench import load
from rayrec.bench.load import NO_ANSWER, Call, Load
from rayrec.bundle import Bundle, BundleWriter, versions
from rayrec.config import ServeConfig
from rayrec.settings import with_settings
from rayrec.state import open_state
from rayrec.training.local import train_alone
from rayrec.training.publish import write_bundle

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

TESTS = Path(__file__).parent
PORT = "PORT"
RATE, USERS = 30.0, 5
FAULT_AT_S = 5.0
REPLICA, CONTROLLER = "ServeReplica:rayrec", "ServeController"
TWO = ("--min-replicas", "2", "--max-replicas", "2", "--set", "replica_cpus=0.5")


# ---------------------------------------------------------------- a service, and a load that can tell what was lost


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BUNDLES folder of three versions, of which the first is live."""
    folder = tmp_path_factory.mktemp("faults")
    dataset, config = tinyshop.write(folder / "dataset", users=30), tinyshop.tiny("train.epochs=1")
    (folder / "checkpoint").mkdir()
    fit = train_alone(dataset, config, folder / "checkpoint")
    for live in (True, False, False):
        write_bundle(
            folder / "checkpoint", str(folder / "bundles"), dataset, dataset.catalogue(), config, fit.job.followers,
            live=live,
        )  # fmt: skip
    return folder / "bundles"


@dataclass
class Witness(Load):
    """A load that keeps the ids of the events which were acknowledged."""

    acknowledged: set[str] = field(default_factory=set)

    def heard(self, call: Call, answer: dict[str, Any]) -> None:
        super().heard(call, answer)
        if "accepted" in answer:
            self.acknowledged |= {event["event_id"] for event in call[1]["events"]}
            assert not answer["rejected"]


@dataclass
class Service:
    """`rayrec serve`, in a terminal of its own."""

    terminal: Terminal
    running: Running
    url: str
    state_url: str

    def processes(self, title: str) -> list[psutil.Process]:
        """Those whose name or command line holds `title`."""
        found = []
        for process in self.terminal.processes():
            try:
                if title in " ".join([process.name(), *process.cmdline()[:1]]):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def seen(self) -> dict[str, str]:
        """The replicas that answer, and their models; {} while somebody does not."""
        try:
            answers = [httpx.get(f"{self.url}/v1/status", timeout=5).json() for _ in range(8)]
            return {answer["replica"]: answer["model"] for answer in answers}
        except (httpx.HTTPError, ValueError, KeyError):
            return {}

    def wait_for_both(self, within_s: float = 120) -> float:
        """Until two replicas answer; the seconds it took."""
        started = time.monotonic()
        while len(self.seen()) != 2:
            assert time.monotonic() - started < within_s, self.running.said
            time.sleep(0.2)
        return time.monotonic() - started

    def gcs_address(self) -> str:
        """Of its Ray: `auto` would find any Ray of this machine."""
        words = [word for process in self.terminal.processes() for word in process.cmdline()]
        return next(word.partition("=")[2] for word in words if word.startswith("--gcs-address="))

    def held(self) -> set[str]:
        """The ids of all events in the state."""
        state = open_state(self.state_url)
        try:
            return {str(event.event_id) for visitor in state.visitors() for event in state.user(visitor).events}
        finally:
            state.close()


@contextmanager
def serving(
    *words: object, program: tuple[str, ...] = ("-m", "rayrec"), state_url: str, **env: str
) -> Iterator[Service]:
    """A service as a user starts it, whose few users are known to it. words: PORT among them stands for a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with Terminal(**env) as terminal:
        running = terminal.start(*(port if word == PORT else word for word in words), program=program)
        service = Service(terminal, running, url, state_url)
        running.wait_until(lambda: url in running.said)
        greet(service)
        yield service
        assert running.interrupt(signal.SIGTERM) == 0, running.said


def serve(bundles: Path, state_url: str, *options: str) -> AbstractContextManager[Service]:
    """`rayrec serve`."""
    return serving("serve", bundles, "--port", PORT, "--state", state_url, *options, state_url=state_url)


def serve_slowly(folder: Path, slow: Path, state_url: str, *settings: str) -> AbstractContextManager[Service]:
    """The same with a scorer that sleeps in the process whose id stands in `slow`."""
    with BundleWriter(folder, "v1") as writer:
        writer.json("config.json", {})
        bundle = writer.commit(clock="time").path
    return serving(
        *(bundle, state_url, PORT, *settings), program=(str(TESTS / "serverfake.py"),), state_url=state_url,
        RAYREC_TEST_LOADER="shopfake:load_slow", RAYREC_TEST_SLOW=str(slow), PYTHONPATH=f"{TESTS.parent}:{TESTS}",
    )  # fmt: skip


def greet(service: Service) -> None:
    """Make the users of the load known, so that a list for them is the model's."""
    first = httpx.post(f"{service.url}/v1/recommend", json={"store": False}, timeout=20).json()["items"][0]["item_id"]
    events = [{"user_id": f"load-{user}", "item_id": first, "action": "view"} for user in range(USERS)]
    httpx.post(f"{service.url}/v1/events", json={"events": events}, timeout=20).raise_for_status()


@dataclass
class Told:
    """What a load under a fault came to. in_flight: requests while it struck. away_s: from first to last failure."""

    figures: dict[str, Any]
    in_flight: int
    away_s: float
    lost: int

    @property
    def failed(self) -> int:
        return int(self.figures["failed"])

    @property
    def degraded(self) -> int:
        """Lists that the model did not make."""
        return sum(self.figures["served_by"].values()) - int(self.figures["served_by"].get("model", 0))


def strike(
    service: Service,
    fault: Callable[[], object],
    name: str,
    *,
    after_s: float = 15,
    retry: bool = False,
    mix: dict[str, float] | None = None,
) -> Told:
    """Load the service, let the fault happen, go on for so long when it has, and print what came of it."""
    witness = Witness(service.url, 300, retry, {})
    struck_s: list[float] = []

    def strike_in_time() -> None:
        time.sleep(FAULT_AT_S)
        struck_s.append(witness._now())
        try:
            fault()
        finally:
            struck_s.append(witness._now())
            witness.seconds = struck_s[1] + after_s

    with ThreadPoolExecutor(1) as pool:
        striking = pool.submit(strike_in_time)
        asyncio.run(witness.run(RATE, None, USERS, mix or {"home": 1, "events": 1}, 0))
        striking.result()
    record = witness.record
    sent_R = np.add(record.due_s, record.late_s)
    done_R = np.add(record.due_s, record.took_s)
    bad_R = np.array([not status.startswith("2") for status in record.status])
    in_flight = int(((sent_R <= struck_s[1]) & (done_R >= struck_s[0])).sum())
    away_s = float(np.ptp(done_R[bad_R])) if bad_R.any() else 0.0
    told = Told(record.summary(witness.seconds), in_flight, away_s, len(witness.acknowledged - service.held()))
    figures = told.figures
    print(
        f"\n| {name}{', a client that retries' if retry else ''} | {figures['requests']} requests "
        f"| {told.failed} failed {figures['status']} | {in_flight} under way as it struck | away {away_s:.1f} s "
        f"| {told.degraded} degraded | {told.lost} of {len(witness.acknowledged)} events lost "
        f"| p50 {figures['ms']['p50']} max {figures['ms']['max']} ms |"
    )
    return told


# ---------------------------------------------------------------- what dies


def end(process: psutil.Process) -> None:
    """`kill -9`, until it is gone: it listens for as long as it takes the kernel to take it apart."""
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def pair(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two replicas that share a SQLite file."""
    folder = tmp_path_factory.mktemp("pair")
    with serve(bundles, f"sqlite:///{folder}/state.db", *TWO) as service:
        yield service


@pytest.mark.parametrize("retry", [False, True])
def test_a_killed_replica_costs_what_was_in_flight_on_it(pair: Service, retry: bool) -> None:
    pair.wait_for_both()
    victim = pair.processes(REPLICA)[0]
    told = strike(pair, lambda: end(victim), "kill -9 of a replica", retry=retry)
    assert told.failed <= (0 if retry else told.in_flight)
    assert told.lost == 0
    print(f"  two replicas again {pair.wait_for_both():.1f} s after the load")


def test_a_killed_haproxy_comes_back_and_loses_nothing(pair: Service) -> None:
    pair.wait_for_both()
    victim = pair.processes("haproxy")[0]
    told = strike(pair, lambda: end(victim), "kill -9 of HAProxy", after_s=25, retry=True)
    assert told.lost == 0
    # Serve asks after its proxy three times, then starts an actor for it anew, which knows no replica at first: HAProxy
    # answers 404 until it does, which no client takes for a reason to try again. All of that is Ray's.
    assert set(told.figures["status"]) <= {"200", "404", NO_ANSWER}
    assert told.away_s < 25


def test_a_killed_controller_is_not_noticed(pair: Service) -> None:
    pair.wait_for_both()
    victim = pair.processes(CONTROLLER)[0]
    told = strike(pair, lambda: end(victim), "kill -9 of the Serve controller", after_s=25)
    assert (told.failed, told.lost) == (0, 0)
    assert pair.running.process.poll() is None
    pair.wait_for_both()


# ---------------------------------------------------------------- what changes


def activate(service: Service, version: str) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/models/{version}:activate", timeout=60)


def other(service: Service, bundles: Path) -> str:
    """A good version that is not live."""
    live = httpx.get(f"{service.url}/v1/status", timeout=10).json()["model"]
    return next(version for version in versions(bundles)[:2] if version != live)


def test_a_hot_swap_fails_no_request(pair: Service, bundles: Path) -> None:
    pair.wait_for_both()
    version = other(pair, bundles)
    told = strike(pair, lambda: activate(pair, version).raise_for_status(), "hot swap")
    assert (told.failed, told.degraded, told.lost) == (0, 0, 0)
    assert set(pair.seen().values()) == {version}


def test_a_broken_version_is_refused_and_the_old_one_goes_on(pair: Service, bundles: Path) -> None:
    pair.wait_for_both()
    live, broken = pair.seen(), versions(bundles)[-1]
    weights = bundles / broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused: list[httpx.Response] = []
    told = strike(pair, lambda: refused.append(activate(pair, broken)), "a broken version activated")
    assert refused[0].status_code == 409
    assert "goes on" in refused[0].json()["detail"]
    assert str(bundles) not in refused[0].text
    assert (told.failed, told.degraded, told.lost) == (0, 0, 0)
    assert pair.seen() == live


REDEPLOY = """
import sys
import ray
from ray import serve
from rayrec.config import ServeConfig
from rayrec.serving.app import APP_NAME, build
address, bundle, state_url, config = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
application = build(bundle, state_url=state_url, config=ServeConfig.model_validate_json(config))
serve.run(application, name=APP_NAME, route_prefix="/")
"""


def test_a_rolling_redeploy_fails_no_request(pair: Service, bundles: Path) -> None:
    pair.wait_for_both()
    before = pair.seen()
    config = with_settings(
        ServeConfig(), ["autoscale.min_replicas=2", "autoscale.max_replicas=2", "replica_cpus=0.5", "history=50"]
    )
    words = [pair.gcs_address(), str(Bundle.open(bundles).path), pair.state_url, config.model_dump_json()]
    settings = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    # Else Ray takes the machine's address on a network for its loopback one, where this service does not listen.
    settings |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    def redeploy() -> None:
        ran = [sys.executable, "-c", REDEPLOY, *words]
        subprocess.run(ran, env={**pair.terminal.env, **settings}, check=True, timeout=120)

    told = strike(pair, redeploy, "rolling redeploy")
    pair.wait_for_both()
    assert not before.keys() & pair.seen().keys()
    assert (told.failed, told.degraded, told.lost) == (0, 0, 0)


# ---------------------------------------------------------------- what is slow, full or away


def test_a_slow_replica_answers_in_time_with_what_is_popular(tmp_path: Path) -> None:
    slow, state_url = tmp_path / "slow", f"sqlite:///{tmp_path}/state.db"
    settings = ("autoscale.min_replicas=2", "autoscale.max_replicas=2", "replica_cpus=0.5", "deadline_s=0.3")
    with serve_slowly(tmp_path / "bundles", slow, state_url, *settings) as service:
        pid = service.processes(REPLICA)[0].pid
        told = strike(service, lambda: slow.write_text(str(pid)), "a replica that takes 1 s a batch")
    assert (told.failed, told.lost) == (0, 0)
    assert told.degraded > 0
    assert told.figures["ms"]["max"] < 1000


def test_a_full_disk_refuses_events_and_answers_lists(bundles: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_mib=32) as disk, serve(bundles, f"sqlite:///{disk}/state.db") as service:
        filler = disk / "filler"

        def fill_and_free() -> None:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            time.sleep(6)
            filler.unlink()

        told = strike(service, fill_and_free, "disk full for 6 s, SQLite")
    assert set(told.figures["status"]) <= {"200", "503"}
    assert told.failed > 0
    assert told.away_s < 8
    assert told.lost == 0


@contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[Path]:
    """A file system of its own; skips the test where it may not be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", folder], check=False).returncode:
        pytest.skip("may not mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_a_killed_redis_loses_nothing_and_is_found_again(bundles: Path, tmp_path: Path, fsync: str) -> None:
    server = RedisServer(tmp_path, options=("--appendonly", "yes", "--appendfsync", fsync)).start()

    def kill_and_start() -> None:
        server.kill()
        time.sleep(3)
        server.start()

    try:
        with serve(bundles, server.url, *TWO) as service:
            service.wait_for_both()
            told = strike(service, kill_and_start, f"kill -9 of Redis for 3 s, appendfsync {fsync}")
    finally:
        server.kill()
    assert set(told.figures["status"]) <= {"200", "503"}
    assert told.failed > 0
    assert told.away_s < 6
    assert told.lost == 0


# ---------------------------------------------------------------- a ramp


def test_replicas_follow_a_ramp_up_and_down_and_no_request_fails(bundles: Path, tmp_path: Path) -> None:
    delays = ("autoscale.upscale_delay_s=1", "autoscale.downscale_delay_s=2", "autoscale.target_ongoing_requests=2")
    options = [word for setting in (*delays, "replica_cpus=0.5") for word in ("--set", setting)]
    with serve(bundles, f"sqlite:///{tmp_path}/state.db", "--max-replicas", "2", *options) as service:
        crowd = load.run(service.url, seconds=45, clients=12, users=USERS)
        alone = load.run(service.url, seconds=90, rate=2, users=USERS)
    up_s = next(second for second, replicas in crowd["replicas"] if replicas == 2)
    down_s = next(second for second, replicas in alone["replicas"] if replicas == 1)
    failed = crowd["failed"] + alone["failed"]
    print(f"\n| ramp | {crowd['requests'] + alone['requests']} requests | {failed} failed | 1 to 2 in {up_s} s of 12 "
          f"clients | 2 to 1 in {down_s} s of 2 a second |")  # fmt: skip
    assert crowd["replicas"][0][1] == 1
    assert failed == 0
