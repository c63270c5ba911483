"""`rayrec serve` as a user runs it, on a Ray of its own: who can reach it, its TLS, its log, its end."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
from certificates import certificate
from terminal import Running, Terminal
from test_app import free_port
from test_interrupt import interrupted_well

pytestmark = [pytest.mark.ray, pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")]


class Served(NamedTuple):
    terminal: Terminal
    running: Running
    port: int
    trusted: ssl.SSLContext

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(f"https://localhost:{self.port}{path}", verify=self.trusted, timeout=20, **options)

    def processes(self) -> list[psutil.Process]:
        """Whatever the command started: by its mark, or by its session where a title lies over the environment."""
        found = {process.pid: process for process in self.terminal.processes()}
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.getsid(process.pid) == self.running.process.pid:
                    found[process.pid] = process
        return list(found.values())


@pytest.fixture(scope="module")
def served(tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    pem, key = certificate(folder, "shop")
    with Terminal() as terminal:
        state = f"sqlite:///{folder}/state.db"
        running = terminal.start(
            "serve", tiny_bundles, "--port", port, "--state", state, "--tls-cert", pem, "--tls-key", key
        )
        running.wait_until(lambda: "serving at" in running.said)
        yield Served(terminal, running, port, ssl.create_default_context(cafile=str(pem)))
        if running.process.poll() is None:
            running.interrupt()


def test_nothing_listens_beyond_this_machine(served: Served) -> None:
    deadline, missing = time.monotonic() + 30, ["haproxy"]
    while missing and time.monotonic() < deadline:  # HAProxy replaces itself when it hears of a replica
        listening = listeners(served)
        commands = [command for command, _, _ in listening]
        wanted = ("haproxy", "raylet", "gcs_server", "ServeReplica")
        missing = [known for known in wanted if not any(known in command for command in commands)]
    assert missing == [], f"not among {listening}"
    assert [one for one in listening if not is_loopback(one[1])] == []


def listeners(served: Served) -> list[tuple[str, str, int]]:
    """Command, address and port of all that listens."""
    listening = []
    for process in served.processes():
        with suppress(psutil.NoSuchProcess):  # idle workers of Ray come and go
            command = " ".join(process.cmdline())
            listening += [
                (command, connection.laddr.ip, connection.laddr.port)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
    return listening


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def test_it_speaks_tls_with_the_certificate_that_it_was_given(served: Served) -> None:
    assert f"serving at https://127.0.0.1:{served.port}" in served.running.said
    assert served.get("/readyz").json()["status"] == "ready"
    with pytest.raises(httpx.ConnectError, match="self-signed certificate"):
        httpx.get(f"https://localhost:{served.port}/readyz")


def test_plain_http_is_not_answered(served: Served) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{served.port}/readyz")


def test_a_redirect_stays_with_tls(served: Served) -> None:
    assert served.get("/v1/status/").headers["location"].startswith("https://localhost")


def test_the_line_of_a_request_is_in_rays_logs_with_the_id_that_was_answered(served: Served) -> None:
    for sent in ({}, {"X-Request-Id": "mine_1"}, {"X-Request-Id": "not sane"}):
        answer = served.get("/v1/items/nothing", headers=sent)
        (request_id,) = answer.headers.get_list("x-request-id")
        assert request_id != "not sane"
        served.running.wait_until(lambda sent=request_id: lines_with(sent, served.terminal.folder) != [], within_s=20)
        assert lines_with(request_id, served.terminal.folder) == ["/v1/items/{item_id}"]


def lines_with(request_id: str, folder: Path) -> list[str]:
    """Routes of the JSON lines with this id, in all of Ray's logs: once, or Ray has doubled or swallowed them."""
    said = [
        line for log in (folder / "ray" / "session_latest" / "logs").rglob("*.*") if log.is_file() for line in read(log)
    ]
    found = [json.loads(line[line.index("{") :]) for line in said if f'"request_id": "{request_id}"' in line]
    return [line["route"] for line in found]


def read(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()


def test_ctrl_c_stops_it_and_leaves_nothing_behind(served: Served) -> None:
    (proxy_files,) = served.terminal.values_of("RAY_SERVE_HAPROXY_SERVER_STATE_BASE")
    assert Path(proxy_files).is_dir()
    interrupted_well(served.terminal, served.running)
    assert "graceful_shutdown" not in served.running.said, "what ended as it should is no failure"
    assert not Path(proxy_files).exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", served.port)) != 0
