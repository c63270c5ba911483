"""What a bench measures of a command, and what is left of it where the bench is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayrec.bench.measure import measured

BUSY = "import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass\nprint('done')"


def test_a_command_is_measured_and_one_that_fails_is_an_error() -> None:
    one = measured([sys.executable, "-c", BUSY])
    assert one.output == "done\n"
    assert 0.3 < one.cpu_s < 5
    assert one.peak_mib > 1
    with pytest.raises(RuntimeError, match="exit code 3"):
        measured([sys.executable, "-c", "raise SystemExit(3)"])


# The shop is made in this process; a command that is measured waits in its place.
BENCH = """
import sys
from rayrec.bench import chain
from rayrec.bench.measure import measured
from rayrec.cli import main

def run(*given):
    return measured([sys.executable, "-c", "import os, sys, time\\nopen(sys.argv[1], 'w').write(str(os.getpid()))\\n"
                     "time.sleep(600)", note])

note = sys.argv[1]
chain.run = run
sys.argv = ["rayrec", "bench", "chain", "--out", "nowhere"]
sys.exit(main())
"""


def test_a_bench_that_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    bench = subprocess.Popen([sys.executable, "-c", BENCH, str(note)])
    try:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        child = int(note.read_text())
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    finally:
        bench.kill()
