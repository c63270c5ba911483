"""One run at a time in a BUNDLES folder. In: the folder. Out: nobody else's run meanwhile."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrec.errors import ResourceError, writing
from rayrec.files import is_uri

LOCK = ".retrain.lock"


@contextmanager
def alone(bundles: str) -> Iterator[None]:
    """Raise ResourceError where another process holds the folder. The lock goes with its process, however that ends.

    At a URI there are no locks, and nothing is held.
    """
    if is_uri(bundles):
        yield
        return
    path = Path(bundles) / LOCK
    with writing(bundles):
        lock = path.open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ResourceError(
                f"{bundles}: another retrain is under way (process {lock.read().strip()}), and goes on"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
