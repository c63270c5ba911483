"""A real Redis of a test's own: loopback, a log in the test's folder."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis


@dataclass
class RedisServer:
    """A server process that can be killed and started again on the same port and folder."""

    folder: Path
    options: tuple[str, ...] = ("--appendonly", "yes")
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            pytest.skip("redis-server is not installed")
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([program, *where, *self.options], stdout=log, stderr=log)
        client = redis.Redis(port=self.port)
        for _ in range(200):
            try:
                client.ping()  # an error while it reads its log
            except redis.RedisError:
                time.sleep(0.05)
            else:
                client.close()
                return self
        raise RuntimeError((self.folder / "redis.log").read_text())

    def empty(self) -> None:
        """Forget everything."""
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def kill(self) -> None:
        """As `kill -9`."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
