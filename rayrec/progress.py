"""Progress of anything that takes over two seconds: a bar on a terminal, plain lines in a job's log.

In: a title and counts. Out: text on standard error. It must not know what is counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 5.0
_console = Console(stderr=True)


class Task:
    """One counted piece of work. Use as a context manager; `advance` as parts are done."""

    def __init__(self, title: str, total: int | None = None) -> None:
        self.title, self.total, self.done, self.note = title, total, 0, ""
        self._started = self._last_line = time.monotonic()
        self._said: tuple[str, int, int | None] | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Task:
        if _console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=_console,
            )
            self._id = self._bar.add_task(self.title, total=self.total, note="")
            self._bar.start()
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more parts done; `note` is shown beside the count (a loss, a rate)."""
        self.update(self.done + n, note)

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Set the count done, and the total if it has become known."""
        self.done, self.note = done, note or self.note
        self.total = total if total is not None else self.total
        if self._bar is not None:
            self._bar.update(self._id, completed=done, total=self.total, note=self.note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        """Print how far it is, unless the last line said the same."""
        self._last_line = time.monotonic()
        said = (self.title, self.done, self.total)
        if said == self._said:
            return
        self._said = said
        of_total = f"/{self.total}" if self.total is not None else ""
        seconds = self._last_line - self._started
        print(f"{self.title}: {self.done}{of_total} {seconds:.0f}s {self.note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif time.monotonic() - self._started >= 2.0:
            self._line()


def step(text: str) -> None:
    """Say in one line what happens now."""
    _console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def timed(text: str) -> Iterator[None]:
    """Say what happens now and, if it took over two seconds, how long it took."""
    step(text)
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    if seconds >= 2.0:
        step(f"{text}: {seconds:.1f} s")
