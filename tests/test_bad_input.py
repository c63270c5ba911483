"""A user's mistakes, each by the real command: the right exit code, one message that says what to do, no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from terminal import TINY_TRAIN, Ran

from rayrec import cli
from rayrec.errors import DataError, ResourceError, writing
from rayrec.training.trainer import _fit

FAILED, WRONG_USAGE = 1, 2
HEADER = "user_id,item_id,timestamp,action\n"
ROWS = "".join(f"u{n % 7},i{n % 5},{1_700_000_000 + 60 * n},view\n" for n in range(200))

Command = Callable[..., Ran]


@pytest.fixture
def rayrec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process; the shared cluster, where a test has asked for it, outlives it."""
    monkeypatch.setattr("rayrec.cluster.disconnect", lambda: None)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = cli._run([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


def refused(ran: Ran, code: int, *words: str) -> None:
    """Exit code, no traceback, nothing on standard output, and one message, which holds all of `words`."""
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    messages = [line for line in ran.err.splitlines() if line.startswith("rayrec: ")]
    assert len(messages) == 1, ran.err
    assert ran.err.rstrip().splitlines()[-1] == messages[0], ran.err
    for word in words:
        assert word in messages[0]


def shop(folder: Path, events: str, **images: bytes) -> Path:
    """A raw folder. images: item id -> the bytes of a PNG."""
    (folder / "shop" / "images").mkdir(parents=True)
    (folder / "shop" / "events.csv").write_text(events)
    for item_id, data in images.items():
        (folder / "shop" / "images" / f"{item_id}.png").write_bytes(data)
    return folder / "shop"


def nothing_but(folder: Path, *names: str) -> None:
    assert {entry.name for entry in folder.iterdir()} == set(names)


def test_a_ray_that_does_not_start(rayrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray raises on a machine that is too busy is no more than an Exception."""

    def too_slow(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("rayrec.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setattr("rayrec.cluster.ray.init", too_slow)
    raw = shop(tmp_path, HEADER + ROWS)
    refused(rayrec("prepare", raw, tmp_path / "dataset"), FAILED, "cannot start a local Ray", "timed out")
    nothing_but(tmp_path, "shop")


# ---------------------------------------------------------------- input that is not there, or not what it should be


def test_missing_raw_folder(rayrec: Command, tmp_path: Path) -> None:
    refused(rayrec("prepare", tmp_path / "none", tmp_path / "dataset"), WRONG_USAGE, f"{tmp_path}/none: no such file")
    nothing_but(tmp_path)


@pytest.mark.parametrize("content", ["", HEADER], ids=["no bytes", "a header"])
@pytest.mark.ray
def test_empty_file(cluster: None, rayrec: Command, tmp_path: Path, content: str) -> None:
    raw = shop(tmp_path, content)
    refused(rayrec("prepare", raw, tmp_path / "dataset"), FAILED, "events.csv", "nothing to prepare")
    nothing_but(tmp_path, "shop")


def test_no_user_id(rayrec: Command, tmp_path: Path) -> None:
    raw = shop(tmp_path, "who,item_id,timestamp,action\na,b,1700000000,view\n")
    ran = rayrec("prepare", raw, tmp_path / "dataset")
    refused(ran, FAILED, "events.csv", "user_id", "it has: who, item_id", "--map")
    nothing_but(tmp_path, "shop")


@pytest.mark.ray
def test_broken_quote_costs_its_row_only(cluster: None, rayrec: Command, tmp_path: Path) -> None:
    raw = shop(tmp_path, HEADER + ROWS + 'u1,"i2,1700000000,view\n' + ROWS.replace("u", "v"))
    ran = rayrec("prepare", raw, tmp_path / "dataset", "--json")
    assert ran.code == 0, ran.err
    events = json.loads(ran.out.splitlines()[-1])["events"]
    assert events["read"] == 401
    assert events["kept"] == 400
    assert sum(events["rejected"].values()) == 1
    (reject,) = pq.read_table(tmp_path / "dataset" / "rejects" / "events").to_pylist()
    assert (reject["file"], reject["row"]) == ("events.csv", 201)
    assert reject["raw"].strip() == 'u1,"i2,1700000000,view'


@pytest.mark.ray
def test_all_rows_rejected(cluster: None, rayrec: Command, tmp_path: Path) -> None:
    raw = shop(tmp_path, HEADER + ROWS.replace("view", "gaze"))
    refused(rayrec("prepare", raw, tmp_path / "dataset"), FAILED, "every row was rejected", "unknown_action: 200")
    nothing_but(tmp_path, "shop")


def png(width: int, height: int) -> bytes:
    """The head of a PNG of RGB pixels, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.mark.ray
def test_images_that_are_none(cluster: None, rayrec: Command, tmp_path: Path) -> None:
    raw = shop(tmp_path, HEADER + ROWS, i1=b"hello, I am text", i2=png(32768, 32768), i3=b"", stranger=png(8, 8))
    started = time.monotonic()
    ran = rayrec("prepare", raw, tmp_path / "dataset", "--json")
    assert ran.code == 0, ran.err
    assert time.monotonic() - started < 60
    images = json.loads(ran.out.splitlines()[-1])["images"]
    assert (images["read"], images["kept"]) == (4, 0)
    assert images["rejected"] == {"not_an_image": 1, "too_many_pixels": 1, "empty": 1, "unknown_item": 1}
    items = pq.read_table(tmp_path / "dataset" / "items")
    assert sorted(items["item_id"].to_pylist()) == ["i0", "i1", "i2", "i3", "i4"], "their items are kept"


def test_a_gigapixel_image_is_refused_unread(tmp_path: Path) -> None:
    """In a process of its own, which says how much its memory grew."""
    (tmp_path / "bomb.png").write_bytes(png(32768, 32768))
    script = (
        "import resource, sys, pathlib\n"
        "from rayrec.config import ImageConfig\n"
        "from rayrec.data.images import ImageRejected, decode\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: decode(pathlib.Path(sys.argv[1]).read_bytes(), ImageConfig())\n"
        "except ImageRejected as rejected: print(rejected.reason, peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bomb.png")], capture_output=True, text=True, timeout=60
    )
    reason, grown_kib = done.stdout.split()
    assert reason == "too_many_pixels"
    assert int(grown_kib) < 20_000, "3 GB of pixels were decoded"


# ---------------------------------------------------------------- datasets and bundles


@pytest.fixture
def bundles(tiny_bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles, tmp_path / "bundles"))


@pytest.mark.ray
@pytest.mark.parametrize("command", ["recommend", "serve", "evaluate", "train"])
def test_bundle_with_a_flipped_byte(
    rayrec: Command, bundles: Path, tiny_dataset: Path, tmp_path: Path, command: str
) -> None:
    (weights,) = bundles.glob("*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    arguments: dict[str, list[object]] = {
        "recommend": [bundles, "--user", "u1"],
        "serve": [bundles],
        "evaluate": [bundles, tiny_dataset],
        "train": [tiny_dataset, tmp_path / "more", "--from", bundles],
    }
    refused(rayrec(command, *arguments[command]), FAILED, "model.safetensors was changed")


@pytest.mark.parametrize("command", ["train", "evaluate", "recommend"])
@pytest.mark.ray
def test_dataset_of_another_version(
    rayrec: Command, bundles: Path, tiny_dataset: Path, tmp_path: Path, command: str
) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    manifest = json.loads((tiny_dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    arguments: dict[str, list[object]] = {
        "train": [dataset, tmp_path / "more"],
        "evaluate": [bundles, dataset],
        "recommend": [bundles, "--user", "u1", "--history", dataset],
    }
    refused(rayrec(command, *arguments[command]), FAILED, "dataset of version 99", "run prepare again")
    assert not (tmp_path / "more").exists()


def test_interrupted_outputs_are_named_as_such(rayrec: Command, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    refused(rayrec("train", tmp_path / "half", tmp_path / "bundles"), FAILED, "no manifest.json", "prepare")
    refused(rayrec("recommend", tmp_path / "half", "--user", "u"), WRONG_USAGE, "no manifest.json")
    nothing_but(tmp_path, "half")


# ---------------------------------------------------------------- the machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.ray
def test_port_in_use(rayrec: Command, tiny_bundles: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        started = time.monotonic()
        ran = rayrec("serve", tiny_bundles, "--port", port)
        assert time.monotonic() - started < 20
    refused(ran, FAILED, f"127.0.0.1:{port}", "another --port")


@pytest.mark.ray
def test_more_workers_than_the_cluster_has(cluster: None, rayrec: Command, tiny_dataset: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    ran = rayrec("train", tiny_dataset, tmp_path / "bundles", "--workers", 64)
    assert time.monotonic() - started < 20
    refused(ran, FAILED, "64 worker(s) need 64 CPU(s) and the cluster has 2 CPU(s)", "--workers", "--wait")
    ran = rayrec("train", tiny_dataset, tmp_path / "bundles", "--gpu")
    refused(ran, FAILED, "1 GPU(s)", "0 GPU(s)")
    assert not list((tmp_path / "bundles").glob("*/manifest.json"))


@pytest.mark.ray
def test_more_replicas_than_the_cluster_has(cluster: None, rayrec: Command, tiny_bundles: Path, tmp_path: Path) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    ran = rayrec("serve", tiny_bundles, "--port", free_port(), "--min-replicas", 64, "--state", state)
    refused(ran, FAILED, "64 replicas need 64 CPUs and the cluster has 2", "--min-replicas")


# ---------------------------------------------------------------- folders that cannot be written


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB: a folder can be made there, and a first small file."""
    yield from _mounted(tmp_path / "full", "size=64k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that cannot be written, not even by root."""
    yield from _mounted(tmp_path / "read-only", "ro")


def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a refused state file may still be open


WRITERS = ["sample", "import", "prepare", "train", "evaluate", "recommend", "serve", "demo"]


@pytest.fixture
def to_write(
    tiny_shop: Path, tiny_dataset: Path, tiny_bundles: Path, bundles: Path, tmp_path: Path
) -> Callable[..., list[object]]:
    """Arguments of each command, to write below a folder."""
    ratings = tmp_path / "ratings.dat"
    ratings.write_text("".join(f"{n}::{n % 9}::5::{978_300_760 + n}\n" for n in range(20_000)))
    ratings.with_name("movies.dat").write_text("1::A film (1999)::Drama\n")
    train = [tiny_dataset, *TINY_TRAIN]

    def arguments(command: str, folder: Path) -> list[object]:
        return {
            "sample": [folder / "shop", "--users", 60, "--items", 100, "--events", 5000],
            "import": ["movielens_1m", ratings, folder / "shop"],
            "prepare": [tiny_shop, folder / "dataset"],
            "train": [train[0], folder / "bundles", *train[1:]],
            "evaluate": [bundles, tiny_dataset, "--report", folder / "report.html"],
            "recommend": [tiny_bundles, "--user", "u1", "--state", f"sqlite:///{folder}/state.db"],
            "serve": [tiny_bundles, "--state", f"sqlite:///{folder}/state.db", "--port", free_port()],
            "demo": ["--work", folder / "work"],
        }[command]

    return arguments


@pytest.mark.ray
@pytest.mark.parametrize("command", WRITERS)
def test_read_only_folder(
    cluster: None, rayrec: Command, to_write: Callable[..., list[object]], read_only: Path, command: str
) -> None:
    started = time.monotonic()
    ran = rayrec(command, *to_write(command, read_only))
    refused(ran, ran.code, str(read_only))
    assert ran.code in (FAILED, WRONG_USAGE)
    assert time.monotonic() - started < 30, "it should be known before the work"


@pytest.mark.ray
@pytest.mark.parametrize("command", [command for command in WRITERS if command != "evaluate"])
def test_full_folder(
    cluster: None, rayrec: Command, to_write: Callable[..., list[object]], full: Path, command: str
) -> None:
    ran = rayrec(command, *to_write(command, full))
    refused(ran, ran.code, str(full))
    assert ran.code in (FAILED, WRONG_USAGE)
    left = {path.name for path in full.rglob("*") if path.is_file()}
    assert left <= {"OPEN", ".rayrec-demo", "state.db", "state.db-wal", "state.db-shm"}, "half an output stayed"


@pytest.mark.parametrize("command", ["sample", "prepare", "train"])
@pytest.mark.ray
def test_a_file_where_a_folder_should_be(
    rayrec: Command, to_write: Callable[..., list[object]], tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    ran = rayrec(command, *to_write(command, tmp_path / "file"))
    refused(ran, ran.code, f"{tmp_path}/file")
    assert ran.code in (FAILED, WRONG_USAGE)
    assert (tmp_path / "file").read_text() == "mine"


class Failing:
    """A trainer whose fit ends in an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def fit(self) -> None:
        signal.signal(signal.SIGINT, lambda *given: None)  # as Ray Train does
        raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            WorkerGroupError("on worker 0", {0: UserExceptionWithTraceback(FULL, "...")}),
            ResourceError,
            "/b: .*No space",
        ),
        (ControllerError(FULL), ResourceError, "/b: cannot write there"),
        (ControllerError(DataError("row 7 is bad")), DataError, "row 7 is bad"),
        (ControllerError(RuntimeError("a bug")), ControllerError, "a bug"),
        (SystemExit(0), KeyboardInterrupt, "^$"),
    ],
)
def test_training_that_fails_says_what_a_user_can_mend(
    error: BaseException, kind: type[BaseException], words: str
) -> None:
    with pytest.raises(kind, match=words), writing("/b"):
        _fit(Failing(error))  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C is ours again"
