"""Ctrl-C, put off where it would break what it interrupts.

In: a piece of work. Out: the same, whole, and the KeyboardInterrupt after it. It must not know what is done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def unbroken() -> Iterator[None]:
    """Put off a first Ctrl-C to the end; a second one acts at once. Does nothing outside the main thread."""
    act = signal.getsignal(signal.SIGINT)
    if not callable(act) or threading.current_thread() is not threading.main_thread():
        yield
        return
    put_off: list[int] = []

    def wait_or_act(number: int, frame: FrameType | None) -> None:
        if put_off:
            act(number, frame)
        put_off.append(number)

    signal.signal(signal.SIGINT, wait_or_act)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, act)
        if put_off:  # also where the work failed: by the Ctrl-C itself, more likely than not
            act(signal.SIGINT, None)
