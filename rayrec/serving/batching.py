"""Micro-batching without waiting: what has arrived while the last batch was at work makes up the next one.

In: single pieces of work on the event loop. Out: their results. It must not know what the work is. Runs with or
without Ray. One thread does the work, so the event loop stays free and the work needs no locks.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from rayrec.serving.request_log import AT_WORK

In = TypeVar("In")
Out = TypeVar("Out")


class OverCapacityError(Exception):
    """More work is waiting than may wait."""


@dataclass(frozen=True)
class _Piece(Generic[In, Out]):
    work: In
    done: asyncio.Future[Out]
    requests: tuple[str, ...]


class Batcher(Generic[In, Out]):
    """Runs `work`, which maps a list to a list of the same length, on up to `size` pieces at once."""

    def __init__(self, name: str, work: Callable[[list[In]], list[Out]], *, size: int, max_waiting: int) -> None:
        self._work, self._size, self._max_waiting = work, size, max_waiting
        self._waiting: deque[_Piece[In, Out]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._task: asyncio.Task[None] | None = None

    async def submit(self, piece: In) -> Out:
        """The result of one piece. Raises what `work` raises on it, or OverCapacityError at once."""
        if len(self._waiting) >= self._max_waiting:
            raise OverCapacityError
        future: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Piece(piece, future, AT_WORK.get()))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            await self._run([piece for piece in batch if not piece.done.cancelled()])

    async def _run(self, batch: list[_Piece[In, Out]]) -> None:
        pieces = [piece.work for piece in batch]
        context = contextvars.copy_context()  # which a thread does not get by itself
        context.run(AT_WORK.set, tuple(dict.fromkeys(one for piece in batch for one in piece.requests)))
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, context.run, self._work, pieces)
        except Exception as error:
            if len(batch) > 1:  # one bad piece must not fail its neighbours
                for piece in batch:
                    await self._run([piece])
            elif batch and not batch[0].done.cancelled():
                batch[0].done.set_exception(error)
            return
        for piece, result in zip(batch, results, strict=True):
            if not piece.done.cancelled():
                piece.done.set_result(result)

    def close(self) -> None:
        """Finish the batch at work and stop."""
        self._thread.shutdown(wait=True)
