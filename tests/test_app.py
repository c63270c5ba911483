"""The service for real: Ray Serve behind HAProxy, two replicas, one state, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from rayrec.bundle import Bundle, BundleWriter, publish
from rayrec.config import AutoscaleConfig, ServeConfig
from rayrec.errors import BundleError, ResourceError, UsageError
from rayrec.serving import app
from rayrec.serving.app import served
from rayrec.state import open_state

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BUNDLES folder whose bundle is valid and holds nothing: the fake scorer needs no files."""
    bundles = tmp_path_factory.mktemp("bundles")
    publish(hollow(bundles, "v1"))
    return bundles


def hollow(bundles: Path, version: str) -> Bundle:
    with BundleWriter(bundles, version) as writer:
        writer.json("config.json", {})
        return writer.commit(clock="time")


class Server:
    """tests/serverfake.py on the shared cluster."""

    def __init__(self, bundle: Path, folder: Path, *settings: str) -> None:
        self.state_url = f"sqlite:///{folder}/state.db"
        self.port, self.log = free_port(), folder / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(TESTS / "serverfake.py"), str(bundle), self.state_url, str(self.port)]
        environment = {
            **os.environ,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *settings], env=environment, stdout=log, stderr=log)
        self._wait_for("ready http", 120)

    def _wait_for(self, word: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while word not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def post(self, path: str, body: Any) -> Any:
        answer = httpx.post(self.url + path, json=body, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self) -> int:
        """As a supervisor and an impatient user would: two signals."""
        self.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(cluster: None, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas, where one would do: a policy of the shop's own asks for them."""
    policy = ("policy=test_scaling:Always", "policy_options={replicas: 2}", "max_replicas=2", "upscale_delay_s=0")
    settings = (f"autoscale.{setting}" for setting in policy)
    server = Server(bundle, tmp_path_factory.mktemp("served"), "replica_cpus=0.5", *settings)
    yield server
    if server.process.poll() is None:
        server.stop()


def proxy_folder(proxy: psutil.Process) -> Path:
    """The folder that the server made for this proxy's files."""
    (config,) = [part for part in proxy.cmdline() if part.endswith("haproxy.cfg")]
    return next(parent for parent in Path(config).parents if parent.name.startswith("rayrec-"))


def haproxy(port: int) -> psutil.Process:
    """The one that listens there; for a moment there are two of them or none, when replicas come or go."""
    deadline = time.monotonic() + 30
    while len(found := {process.pid: process for process in haproxies(port)}) != 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return next(iter(found.values()))


def haproxies(port: int) -> list[psutil.Process]:
    found = []
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(connection.pid))
    return found


@pytest.mark.ray
def test_a_policy_of_the_shops_own_is_asked(server: Server) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(server.url + "/v1/status", timeout=10).json()["replicas"] < 2:  # nobody loads it
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.ray
def test_an_event_changes_the_next_list_whichever_replica_answers(server: Server) -> None:
    assert server.post("/v1/recommend", {"user_id": "u"})["served_by"] == "popular"
    answer = server.post("/v1/events", {"events": [{"user_id": "u", "item_id": "green-7", "action": "click"}]})
    assert answer["accepted"] == 1
    for _ in range(20):  # a new connection each: the proxy spreads them over both replicas
        after = server.post("/v1/recommend", {"user_id": "u", "k": 3})
        assert after["served_by"] == "model"
        assert [item["item_id"] for item in after["items"]] == ["green-0", "green-1", "green-2"]


@pytest.mark.ray
def test_two_replicas_answer_and_know_of_each_other(server: Server) -> None:
    seen, deadline = set(), time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < deadline:
        status = httpx.get(server.url + "/v1/status", timeout=10).json()
        assert status["replicas"] == 2
        seen.add(status["replica"])
    assert len(seen) == 2


@pytest.mark.ray
def test_the_proxy_is_haproxy_on_loopback(server: Server) -> None:
    proxy = haproxy(server.port)
    assert proxy.name() == "haproxy"
    assert all(
        connection.laddr.ip == "127.0.0.1"
        for connection in proxy.net_connections()
        if connection.laddr.port == server.port
    )
    assert proxy_folder(proxy).is_dir()


@pytest.mark.ray
def test_problems_pass_the_proxy_unchanged(server: Server) -> None:
    for path, body, status in (
        ("/v1/recommend", {"k": 0}, 422),
        ("/v1/recommend", {"context": {"item_id": "nothing"}}, 404),
        ("/v1/recommend", {"user_id": "x" * 2_000_000}, 413),
    ):
        answer = httpx.post(server.url + path, json=body, timeout=10)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
    assert httpx.get(server.url + "/healthz", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.ray
def test_what_is_published_is_served_by_all_and_no_request_is_lost(server: Server, bundle: Path) -> None:
    publish(hollow(bundle, "v2"))
    serving: dict[str, str] = {}
    deadline = time.monotonic() + 60
    while len(serving) < 2 or set(serving.values()) != {"v2"}:
        for _ in range(2):  # and one list: were their number even, one replica would get all of a kind
            answer = httpx.get(server.url + "/v1/status", timeout=10)
            assert answer.status_code == 200
            serving[answer.json()["replica"]] = answer.json()["model"]
        assert server.post("/v1/recommend", {"user_id": "u"})["model"] in ("v1", "v2")
        assert time.monotonic() < deadline, serving
    broken = hollow(bundle, "v3")
    (broken.path / "config.json").write_text("{ }")
    publish(broken)
    server._wait_for("refused v3", 30)
    assert server.post("/v1/recommend", {"user_id": "u"})["model"] == "v2"
    publish(Bundle.open(bundle / "v2"))


@pytest.mark.ray
def test_events_that_were_answered_survive_kill_9_of_every_replica(server: Server) -> None:
    sent = [{"user_id": "k", "item_id": f"red-{n}", "action": "view", "event_id": f"k{n}"} for n in range(10)]
    assert server.post("/v1/events", {"events": sent})["accepted"] == 10
    victims = [process for process in psutil.process_iter(["cmdline"]) if is_our_replica(process)]
    assert len(victims) == 2
    for victim in victims:
        victim.kill()
    deadline = time.monotonic() + 60
    while True:
        try:
            again = httpx.post(server.url + "/v1/events", json={"events": sent}, timeout=10)
            if again.status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert again.json() == {"accepted": 0, "duplicate": 10, "unknown_item": 0, "rejected": []}
    assert server.post("/v1/recommend", {"user_id": "k"})["model"] == "v2", "a new replica asks what is live"


def is_our_replica(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.info["cmdline"] or [])
        return "ServeReplica:rayrec" in title and os.getpid() in [parent.pid for parent in process.parents()]
    except psutil.Error:
        return False


@pytest.mark.ray
def test_sigterm_stops_it_and_leaves_nothing_behind(server: Server) -> None:
    folder = proxy_folder(haproxy(server.port))
    assert server.stop() == 0, server.log.read_text()
    assert haproxies(server.port) == []
    assert not any(is_our_replica(process) for process in psutil.process_iter(["cmdline"]))
    assert not folder.exists()
    assert "Traceback" not in server.log.read_text()
    state = open_state(server.state_url)
    assert len(state.user("k").events) == 10
    state.close()


# ---------------------------------------------------------------- what is refused, before Ray is asked


def served_with(bundle: Path | str, folder: Path, **more: Any) -> Any:
    options = {"state_url": f"sqlite:///{folder}/state.db", "config": ServeConfig(), "port": free_port(), **more}
    return served(str(bundle), **options)


def test_a_port_in_use_is_told_at_once(bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, started = taken.getsockname()[1], time.monotonic()
        with (
            pytest.raises(ResourceError, match=f"{port}.*choose another --port"),
            served_with(bundle, tmp_path, port=port),
        ):
            pass
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_without_keys_only_loopback_is_served(bundle: Path, tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="this machine only"), served_with(bundle, tmp_path, host=host):
        pass


def test_wrong_keys_are_told_and_never_shown(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYREC_API_KEYS", "shop=tell-nobody")
    with pytest.raises(UsageError, match="RAYREC_API_KEYS: the shop key of part 1 is short") as told:
        served_with(bundle, tmp_path).__enter__()
    assert "tell-nobody" not in str(told.value)


def test_a_missing_or_changed_bundle_and_a_bad_state_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such bundle"), served_with(tmp_path / "none", tmp_path):
        pass
    with BundleWriter(tmp_path, "v1") as writer:
        writer.json("config.json", {})
        bundle = writer.commit(clock="time").path
    with pytest.raises(UsageError, match="unknown kind"), served_with(bundle, tmp_path, state_url="mysql://x"):
        pass
    (bundle / "config.json").write_text("{ }")
    with pytest.raises(BundleError, match="changed"), served_with(bundle, tmp_path):
        pass


def test_a_policy_that_is_not_there_is_told(bundle: Path, tmp_path: Path) -> None:
    config = ServeConfig(autoscale=AutoscaleConfig(policy="no.such:Policy"))
    with pytest.raises(UsageError, match="No module named 'no'"), served_with(bundle, tmp_path, config=config):
        pass


@pytest.mark.ray
def test_more_replicas_than_the_cluster_can_hold_are_refused(cluster: None, bundle: Path, tmp_path: Path) -> None:
    config = ServeConfig(autoscale=AutoscaleConfig(min_replicas=50, max_replicas=50))
    with pytest.raises(ResourceError, match="50 replicas need 50 CPUs"), served_with(bundle, tmp_path, config=config):
        pass


def test_a_service_that_does_not_start_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: Any) -> None:
        raise TimeoutError("the proxies are not ready")

    monkeypatch.setattr("ray.serve.start", fails)
    with pytest.raises(ResourceError, match="did not start: the proxies are not ready"):
        app._start(None, "127.0.0.1", 8000)


@pytest.mark.ray
@pytest.mark.slow
def test_replicas_that_do_not_come_up_are_told_of(cluster: None, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the service did not start"):
        served_with(bundle, tmp_path, loader="nowhere:nothing").__enter__()


def test_the_ports_of_replicas_are_of_this_service_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy whose replica died would reach the replica of another service at the same port."""
    drawn = iter((21_000, 21_200))
    monkeypatch.setattr(app.random, "randrange", lambda *bounds: next(drawn))
    monkeypatch.setattr(app, "_is_free", lambda port: port != 21_007)
    assert app._free_ports() == range(21_200, 21_400)


def test_a_port_in_use_is_not_free() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert not app._is_free(other.getsockname()[1])
    assert app._is_free(free_port())
