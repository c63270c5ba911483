"""What a command costs: seconds, CPU seconds and memory of it and all that it starts.

In: a command line. Out: a `Measured`. It must not know what the command does.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SAMPLE_EVERY_S = 0.25
END_WITHIN_S = 30.0
MEMORY_SHARE = 0.02
"""Of the time, for reading memory: the kernel walks every page, and holds up the process that is measured."""


@dataclass(frozen=True)
class Measured:
    """One run: wall and CPU seconds, peak PSS of the process and all its descendants, and what it printed."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    output: str

    def figures(self) -> dict[str, float]:
        """The costs, rounded."""
        return {name: round(getattr(self, name), 2) for name in ("wall_s", "cpu_s", "peak_mib")}


def measured(command: Sequence[str], env: Mapping[str, str] | None = None, errors: IO[str] | None = None) -> Measured:
    """Run a command to its end; it ends early where this process is interrupted. Raises RuntimeError if it fails.

    errors: for its standard error; None is ours.
    """
    started = time.monotonic()
    given = None if env is None else dict(env)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=given)
    peak_mib = 0.0
    cpu_s: dict[int, float] = {}  # CPU time counts other programs out, where the machine is shared
    done = threading.Event()

    def watch() -> None:
        nonlocal peak_mib
        next_look = 0.0
        while not done.wait(SAMPLE_EVERY_S):
            members = family(child.pid)
            cpu_s.update(members)
            begun = time.monotonic()
            if begun >= next_look:
                peak_mib = max(peak_mib, pss_mib(members))
                ended = time.monotonic()
                next_look = ended + (ended - begun) / MEMORY_SHARE

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output, _ = child.communicate()
    finally:
        done.set()
        watcher.join()
        _end(child)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed with exit code {child.returncode}")
    return Measured(time.monotonic() - started, sum(cpu_s.values()), peak_mib, output)


def torchrun(module: str, workers: int) -> list[str]:
    """The words after `python` that start a module in so many processes on this machine, as `torchrun` does."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m", module]


def _end(child: subprocess.Popen[str]) -> None:
    """End a command that was not waited for; killed at once, one with a Ray of its own would leave that behind."""
    child.terminate()
    try:
        child.communicate(timeout=END_WITHIN_S)
    except subprocess.TimeoutExpired:
        child.kill()


def family(root: int) -> dict[int, float]:
    """A process and all its descendants: the CPU seconds that each has used."""
    children: dict[int, list[int]] = {}
    cpu_s: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # from the third field of proc(5) on
        except OSError:
            continue
        pid = int(stat.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        cpu_s[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found, waiting = {}, [root]
    while waiting:
        pid = waiting.pop()
        found[pid] = cpu_s.get(pid, 0.0)
        waiting += children.get(pid, [])
    return found


def pss_mib(pids: Iterable[int]) -> float:
    """Memory of these processes together: each page that some of them share counts once. Holds them up: ask seldom."""
    return sum(_pss_kib(pid) for pid in pids) / 1024


def _pss_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
