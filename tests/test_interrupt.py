"""Ctrl-C in every command, as a terminal sends it: exit code 130, no process left, no half output."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from terminal import TINY_PREPARE, TINY_TRAIN, Running, Terminal

from rayrec.interrupts import unbroken


@pytest.fixture
def own() -> Iterator[Terminal]:
    """A terminal whose commands start a local Ray of their own, as a user's do."""
    with Terminal() as terminal:
        yield terminal


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def interrupted_well(terminal: Terminal, running: Running) -> None:
    code = running.interrupt()
    assert code == 130, f"exit code {code}:\n{running.said}"
    assert "Traceback" not in running.said
    assert running.said.rstrip().endswith("rayrec: interrupted"), running.said
    assert terminal.left() == []


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize(("interrupts", "done"), [(0, "all of it"), (1, "all of it"), (2, "")])
def test_ray_starts_and_stops_unbroken_by_a_first_ctrl_c(interrupts: int, done: str) -> None:
    said = ""

    def work() -> None:
        nonlocal said
        with unbroken():
            for _ in range(interrupts):
                signal.raise_signal(signal.SIGINT)
            said = "all of it"

    with pytest.raises(KeyboardInterrupt) if interrupts else nullcontext():
        work()
    assert said == done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sample(own: Terminal, tmp_path: Path) -> None:
    running = own.start("sample", tmp_path / "shop", "--items", 4000)
    running.wait_until(lambda: any((part / "images").is_dir() for part in tmp_path.iterdir()))
    interrupted_well(own, running)
    assert names(tmp_path) == set()


def test_import(own: Terminal, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / "ratings.dat")  # to read it is to wait
    running = own.start("import", "movielens_1m", source, tmp_path / "shop")
    running.wait_until(lambda: any((part / "events").is_dir() for part in tmp_path.iterdir()))
    interrupted_well(own, running)
    assert names(tmp_path) == {"source"}


@pytest.mark.ray
def test_prepare(own: Terminal, tiny_shop: Path, tmp_path: Path) -> None:
    running = own.start("prepare", tiny_shop, tmp_path / "dataset", *TINY_PREPARE)
    running.wait_until(lambda: own.has("ray::"))
    interrupted_well(own, running)
    assert names(tmp_path) == set()


@pytest.mark.ray
@pytest.mark.slow
def test_train_leaves_no_bundle_and_can_be_resumed(own: Terminal, tiny_dataset: Path, tmp_path: Path) -> None:
    train = ("train", tiny_dataset, tmp_path / "bundles", *TINY_TRAIN, "--set", "train.epochs=10000")
    running = own.start(*train, "--set", "train.patience=10000")
    running.wait_until(lambda: "retrieval 1:" in running.said)
    interrupted_well(own, running)
    assert names(tmp_path / "bundles") == {".runs"}, "only what --resume goes on with may stay"
    assert (tmp_path / "bundles" / ".runs" / "OPEN").is_file()


@pytest.mark.ray
def test_evaluate_leaves_the_bundle_as_it_was(
    own: Terminal, tiny_bundles: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_bundles.rglob("*")}
    running = own.start("evaluate", tiny_bundles, tiny_dataset, "--report", tmp_path / "report.html")
    running.wait_until(lambda: own.has("ray::"))
    interrupted_well(own, running)
    assert {path: path.stat().st_mtime_ns for path in tiny_bundles.rglob("*")} == before
    assert names(tmp_path) == set()


@pytest.mark.ray
def test_serve_while_it_starts(own: Terminal, tiny_bundles: Path, tmp_path: Path) -> None:
    """And once it is ready: see test_serve_command."""
    port = free_port()
    running = own.start("serve", tiny_bundles, "--port", port, "--state", f"sqlite:///{tmp_path}/state.db")
    running.wait_until(lambda: own.has("ray::"))
    (proxy_files,) = own.values_of("RAY_SERVE_HAPROXY_SERVER_STATE_BASE")
    assert Path(proxy_files).is_dir()
    interrupted_well(own, running)
    assert "graceful_shutdown" not in running.said, "what ended as it should is no failure"
    assert not Path(proxy_files).exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.ray
@pytest.mark.slow
def test_serve_stopped_with_all_its_processes_at_once(own: Terminal, tiny_bundles: Path, tmp_path: Path) -> None:
    """SIGTERM to the whole group, as systemd sends it: Serve's controller may end before it has stopped the proxy."""
    running = own.start("serve", tiny_bundles, "--port", free_port(), "--state", f"sqlite:///{tmp_path}/state.db")
    running.wait_until(lambda: "serving at" in running.said and own.has("haproxy"))
    assert running.interrupt(signal.SIGTERM) == 0, running.said
    assert "Traceback" not in running.said
    assert own.left() == []


@pytest.mark.ray
def test_recommend_while_it_loads(own: Terminal, tiny_bundles: Path, tmp_path: Path) -> None:
    running = own.start("recommend", tiny_bundles, "--user", "u1", "--state", f"sqlite:///{tmp_path}/state.db")
    process = psutil.Process(running.process.pid)
    running.wait_until(lambda: any("libtorch_cpu" in file.path for file in process.memory_maps()))
    interrupted_well(own, running)
    assert names(tmp_path) == set()


@pytest.mark.ray
@pytest.mark.slow
def test_demo_leaves_nothing_half_done(own: Terminal, tmp_path: Path) -> None:
    running = own.start("demo", "--work", tmp_path / "work", "--port", free_port())
    running.wait_until(lambda: "[2/5]" in running.said and own.has("ray::"))
    interrupted_well(own, running)
    assert names(tmp_path / "work") == {".rayrec-demo", "shop"}
