"""The jobs for real: a head of its own, `ray job submit`, and the whole way from raw folder to live endpoint."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from redisserver import RedisServer
from terminal import REPOSITORY, TINY_PREPARE, TINY_TRAIN, Ran, Terminal

RAY = Path(sysconfig.get_path("scripts")) / "ray"


def free_ports(n: int) -> list[int]:
    probes = [socket.socket() for _ in range(n)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Head:
    """`ray start --head` on free ports, and jobs submitted to it."""

    def __init__(self, terminal: Terminal, working_dir: Path) -> None:
        self.terminal, self.working_dir = terminal, working_dir
        port, dashboard, client, grpc, listen = free_ports(5)
        self.address = f"http://127.0.0.1:{dashboard}"
        ran = terminal.run(
            RAY, "start", "--head", "--num-cpus=3", f"--port={port}", f"--ray-client-server-port={client}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-grpc-port={grpc}",
            f"--dashboard-agent-listen-port={listen}", "--disable-usage-stats",
        )  # fmt: skip
        assert ran.code == 0, ran.out + ran.err

    def submit(self, job: str, *arguments: object, wait: bool = True, name: str = "") -> Ran:
        """`ray job submit`, as the README has it."""
        return self.terminal.run(
            RAY, "job", "submit", "--address", self.address, "--working-dir", self.working_dir,
            "--submission-id", name or f"test-{uuid.uuid4().hex[:8]}", *([] if wait else ["--no-wait"]), "--",
            sys.executable, f"jobs/{job}.py", *arguments,
        )  # fmt: skip

    def job(self, command: str, name: str) -> Ran:
        """`ray job status`, `ray job stop`, `ray job logs`."""
        return self.terminal.run(RAY, "job", command, "--address", self.address, name)

    def wait(self, name: str, reached: Callable[[str, str], bool], within_s: float = 300) -> None:
        """Wait until a job's status and its log are so, by the dashboard: Ray's commands take seconds to start."""
        job, deadline = f"{self.address}/api/jobs/{name}", time.monotonic() + within_s
        while True:
            status, logs = (httpx.get(url, timeout=20).raise_for_status().json() for url in (job, f"{job}/logs"))
            if reached(status["status"], logs["logs"] or ""):
                return
            assert status["status"] in ("PENDING", "RUNNING"), logs["logs"]
            assert time.monotonic() < deadline, logs["logs"]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--working-dir .` sends of a clean checkout: the code."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("rayrec", "jobs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def head(working_dir: Path) -> Iterator[Head]:
    with Terminal(PYTHONPATH="") as terminal:  # jobs find rayrec in the working folder, as on a cluster
        # At the end the terminal kills what carries its mark. `ray stop` looks for Ray by name, and would stop the
        # cluster that other tests share.
        yield Head(terminal, working_dir)


def last_json(ran: Ran) -> Any:
    """The last line that is JSON: Ray's own words come after the job's."""
    lines = [line for line in ran.out.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


@pytest.mark.ray
@pytest.mark.slow
def test_a_relative_path_is_refused_with_the_reason(head: Head) -> None:
    ran = head.submit("prepare", "shop", "/tmp/dataset")
    assert ran.code != 0
    assert "rayrec: shop: a relative path. A submitted job runs in a copy of your folder" in ran.out
    assert "Traceback" not in ran.out


def prepared(head: Head, raw: Path, dataset: Path) -> None:
    ran = head.submit("prepare", raw, dataset, *TINY_PREPARE, "--json")
    assert ran.code == 0, ran.out
    assert last_json(ran)["events"]["kept"] == 1500
    assert not re.search(r"Started a local Ray instance", ran.out), "it must join the cluster it was submitted to"


@contextmanager
def serving(head: Head, bundles: Path, *arguments: object) -> Iterator[str]:
    """A service as a job, by its address; stopped as a job at the end."""
    (port,) = free_ports(1)
    served = f"serve-{uuid.uuid4().hex[:8]}"
    words = (bundles, "--port", port, "--set", "replica_cpus=0.5", *arguments)
    ran = head.submit("serve", *words, wait=False, name=served)
    assert ran.code == 0, ran.out
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, head, served)
        yield url
    finally:
        stopped = head.job("stop", served)
    assert stopped.code == 0


def served_and_stopped(head: Head, bundles: Path) -> None:
    with serving(head, bundles) as url:
        answer = httpx.post(f"{url}/v1/recommend", json={"user_id": "u", "k": 3}, timeout=20).json()
        assert len(answer["items"]) == 3
    deadline = time.monotonic() + 60
    while head.terminal.has("haproxy") or head.terminal.has("ray::ServeReplica"):
        assert time.monotonic() < deadline, "the service outlives its job"
        time.sleep(0.5)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz", timeout=2)


@pytest.mark.ray
def test_what_runs_in_tasks_and_in_replicas_as_jobs(
    head: Head, tiny_shop: Path, tiny_bundles: Path, tmp_path: Path
) -> None:
    prepared(head, tiny_shop, tmp_path / "dataset")
    served_and_stopped(head, tiny_bundles)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_raw_folder_to_live_endpoint(head: Head, tiny_shop: Path, tmp_path: Path) -> None:
    dataset, bundles = tmp_path / "dataset", tmp_path / "bundles"
    prepared(head, tiny_shop, dataset)

    ran = head.submit("train", dataset, bundles, *TINY_TRAIN, "--workers", 2, "--json")
    assert ran.code == 0, ran.out
    assert last_json(ran)["version"] == (bundles / "CURRENT").read_text().strip()

    ran = head.submit("evaluate", bundles, dataset, "--json")
    assert ran.code == 0, ran.out
    assert last_json(ran)["items"] == 24

    served_and_stopped(head, bundles)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_job_that_is_killed_goes_on_when_the_same_command_is_submitted_again(
    head: Head, tiny_dataset: Path, tmp_path: Path
) -> None:
    """As whoever restarts what failed does: --resume begins anew where there is nothing to go on with."""
    bundles, name, epochs = tmp_path / "bundles", f"train-{uuid.uuid4().hex[:8]}", 12
    more = ("--epochs", epochs, "--set", f"train.patience={epochs}", "--set", "train.checkpoint_steps=1")
    command = ("train", tiny_dataset, bundles, *TINY_TRAIN, *more, "--resume", "--json")

    ran = head.submit(*command, wait=False, name=name)
    assert ran.code == 0, ran.out
    head.wait(name, lambda status, log: "retrieval 2: loss" in log)
    for process in head.terminal.processes():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "jobs/train.py" in line or "ray::RayTrainWorker" in line:
                process.kill()
    head.wait(name, lambda status, log: status == "FAILED")
    assert not (bundles / "CURRENT").exists()

    ran = head.submit(*command)
    assert ran.code == 0, ran.out
    assert "retrieval 1: loss" not in ran.out
    lines = [line for line in last_json(ran)["training"] if line["stage"] == "retrieval"]
    assert [line["epoch"] for line in lines] == list(range(epochs)), "no epoch is lost, and none told twice"
    assert last_json(ran)["version"] == (bundles / "CURRENT").read_text().strip()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_night_of_a_service_with_its_state_in_redis(
    head: Head, tiny_dataset: Path, tiny_bundles: Path, tmp_path: Path
) -> None:
    """What was served is exported, learned from, judged and swapped in, by jobs of one cluster."""
    dataset, bundles = tmp_path / "dataset", tmp_path / "bundles"
    shutil.copytree(tiny_dataset, dataset)
    shutil.copytree(tiny_bundles, bundles, ignore=shutil.ignore_patterns(".runs"))
    first = (bundles / "CURRENT").read_text().strip()
    server = RedisServer(tmp_path).start()
    retrain = ("retrain", bundles, dataset, "--state", server.url, "--least", 10, "--json")
    try:
        with serving(head, bundles, "--state", server.url) as url:
            ran = head.submit(*retrain)
            assert ran.code == 0, ran.out
            assert last_json(ran)["verdict"] == "no news"

            did = [{"user_id": f"u{n}", "item_id": f"{n % 24 + 1:06d}", "action": "view"} for n in range(30)]
            assert httpx.post(f"{url}/v1/events", json={"events": did}, timeout=20).json()["accepted"] == 30
            ran = head.submit(*retrain, "--margin", 1)
            assert ran.code == 0, ran.out
            verdict = last_json(ran)
            assert (verdict["verdict"], verdict["exported"]["events"]) == ("published", 30)
            assert verdict["version"] != first
            assert (bundles / "CURRENT").read_text().strip() == verdict["version"]
            deadline = time.monotonic() + 60
            while (live := httpx.get(f"{url}/v1/status", timeout=20).json()["model"]) != verdict["version"]:
                assert time.monotonic() < deadline, f"{live} is still live"
                time.sleep(0.5)
            answer = httpx.post(f"{url}/v1/recommend", json={"user_id": "u3", "k": 3}, timeout=20).json()
            assert (answer["model"], answer["served_by"]) == (verdict["version"], "model")
    finally:
        server.kill()


def wait_for(url: str, head: Head, job: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, head.job("logs", job).out
        time.sleep(0.5)
