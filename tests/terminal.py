"""A command as a user runs it at a terminal: a session of its own, Ctrl-C to all of it, and who is left afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

import rayrec

REPOSITORY = Path(__file__).resolve().parents[1]
MARK = "RAYREC_TEST_MARK"
TINY_PREPARE = ("--set", "images.size=32")
TINY_TRAIN = (
    "--epochs", "1", "--set", "train.fusion_epochs=1", "--set", "train.fusion_steps=0",
    "--set", "train.refit_epochs=0", "--set", "train.tracker=[]",
    "--set", "model.width=16", "--set", "model.hidden_width=16", "--set", "model.fusion_width=16",
    "--set", "model.image_size=16",
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What a finished command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output."""
        return json.loads(self.out.strip().splitlines()[-1])


class Terminal:
    """Runs commands whose processes can all be found again; its Ray keeps to itself. Use as a context manager."""

    def __init__(self, **env: str) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="rr", dir="/tmp"))  # Ray's socket paths end at 107 characters
        home = self.folder / "home"
        home.mkdir()
        # Without it Ray would ask the clouds' metadata address who it is.
        (home / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.env: Mapping[str, str] = {
            **inherited,
            "HOME": str(home),
            "RAY_TMPDIR": str(self.folder),
            "PYTHONPATH": str(Path(rayrec.__file__).parents[1]),  # the one under test, installed or not
            "COLUMNS": "200",
            MARK: self.mark,
            **env,
        }

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        deadline = time.monotonic() + 20
        while (found := self.processes()) and time.monotonic() < deadline:  # some are restarted by others
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def rayrec(self, *arguments: object, timeout_s: float = 240) -> Ran:
        """Run a command to its end."""
        return self.run(sys.executable, "-m", "rayrec", *arguments, timeout_s=timeout_s)

    def run(self, *command: object, timeout_s: float = 240, cwd: Path | None = None) -> Ran:
        """Run any program to its end."""
        done = subprocess.run(
            list(map(str, command)), env=self.env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: object, program: tuple[str, ...] = ("-m", "rayrec")) -> Running:
        """Start a command, or another program of Python's, in a session of its own and come back at once."""
        return Running(self, *program, *arguments)

    def processes(self) -> list[psutil.Process]:
        """All that carry this terminal's mark in their environment: children of children too, whoever adopted them."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def values_of(self, variable: str) -> set[str]:
        """What an environment variable is in the processes, where it is set."""
        found = set()
        for process in self.processes():
            with suppress(psutil.Error):
                found.add(process.environ().get(variable, ""))
        return found - {""}

    def left(self, within_s: float = 30) -> list[str]:
        """Command lines of the processes that are still there after so long."""
        deadline = time.monotonic() + within_s
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [_command_line(process) for process in found]

    def has(self, title: str) -> bool:
        """Whether a process runs whose command line holds `title`."""
        return any(title in _command_line(process) for process in self.processes())


class Running:
    """A command under way."""

    def __init__(self, terminal: Terminal, *arguments: object) -> None:
        self.log = terminal.folder / f"log-{uuid.uuid4().hex[:6]}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=terminal.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell ignores Ctrl-C in what it starts in the background, these tests perhaps; a terminal does not.
                preexec_fn=_hear_ctrl_c,
            )

    @property
    def said(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text(errors="replace")

    def wait_until(self, ready: Callable[[], bool], within_s: float = 200) -> None:
        """Wait until `ready`, while the command runs."""
        deadline = time.monotonic() + within_s
        while not ready():
            assert self.process.poll() is None, f"ended too early ({self.process.returncode}):\n{self.said}"
            assert time.monotonic() < deadline, f"not ready in {within_s} s:\n{self.said}"
            time.sleep(0.05)

    def interrupt(self, number: int = signal.SIGINT, within_s: float = 90) -> int:
        """Ctrl-C: SIGINT, or another signal, to the whole foreground process group; the exit code."""
        os.killpg(self.process.pid, number)
        return self.process.wait(within_s)


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
