"""A training that is asked to end: SIGTERM or Ctrl-C to the process that started it.

In: the workers' board. Out: the workers have been asked, and an end all the same once the time of grace is over. It
must not know how a worker ends.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer

from rayrec.errors import RayrecError
from rayrec.progress import step
from rayrec.training.workers import hear_sigterm

GRACE_S = 20
"""From SIGTERM to an end without a checkpoint: less than the half minute that clouds and Kubernetes leave."""
GO_ON = "train with --resume goes on from there, and retrain by itself"

Handler = Callable[[int, FrameType | None], Any]


class TerminatedError(RayrecError):
    """SIGTERM, and what it ended can go on later."""

    exit_code = 128 + signal.SIGTERM


class Asked:
    """Who asked a training to end, if anybody did: a signal's number."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.by: int | None = None

    @contextmanager
    def by_sigterm(self) -> Iterator[None]:
        """Hear SIGTERM meanwhile. Raises TerminatedError for one that finds no step under way, or a second one."""
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
        signal.signal(signal.SIGTERM, lambda number, frame: self._ask(number, lambda *given: terminate()))
        signal.signal(signal.SIGALRM, lambda number, frame: terminate())
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGALRM, before[1])

    def by_ctrl_c(self, at_once: Handler) -> None:
        """Hear a first Ctrl-C; at_once: what hears a second one, or one that finds no step under way."""
        signal.signal(signal.SIGINT, lambda number, frame: self._ask(number, at_once))

    def _ask(self, number: int, at_once: Handler) -> None:
        if self.by is not None or not self._trains():
            at_once(number, None)
            return
        self.by = number
        self.board.end.remote()
        if number == signal.SIGTERM:
            signal.alarm(GRACE_S)
        step("train: asked to end: a checkpoint after the step under way, then the end (once more: at once)")

    def _trains(self) -> bool:
        try:
            return bool(ray.get(self.board.trains.remote(), timeout=3))
        except Exception:  # Ray itself was asked to end, and is not there any more
            return False


def terminate() -> None:
    """Raise TerminatedError: there was no time for a checkpoint, or nothing new to save."""
    raise TerminatedError(f"ended by SIGTERM; what the last checkpoint has is safe: {GO_ON}")


class Trainer(TorchTrainer):
    """Ray Train's, which hands Ctrl-C over to `asked` first."""

    def __init__(self, *given: Any, asked: Asked, **options: Any) -> None:
        super().__init__(*given, **options)
        self.asked = asked

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)  # type: ignore[misc]
        at_once = signal.getsignal(signal.SIGINT)
        if callable(at_once):
            self.asked.by_ctrl_c(at_once)


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(hear_sigterm)  # here it runs in the workers' main threads, which alone may


class Workers(TorchConfig):
    """Torch workers that hear SIGTERM."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """See `ray.train.backend.BackendConfig`."""
        return _Backend
