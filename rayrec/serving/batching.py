"""Micro-batching without waiting: what has arrived while the last batch was at work makes up the next one.

In: single pieces of work on the event loop. Out: their results. It must not know what the work is. Runs with or
without Ray. One thread does the work, so the event loop stays free and the work needs no locks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class OverCapacityError(Exception):
    """More work is waiting than may wait."""


class Batcher(Generic[In, Out]):
    """Runs `work`, which maps a list to a list of the same length, on up to `size` pieces at once."""

    def __init__(self, name: str, work: Callable[[list[In]], list[Out]], *, size: int, max_waiting: int) -> None:
        self._work, self._size, self._max_waiting = work, size, max_waiting
        self._waiting: deque[tuple[In, asyncio.Future[Out]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._task: asyncio.Task[None] | None = None

    async def submit(self, piece: In) -> Out:
        """The result of one piece. Raises what `work` raises on it, or OverCapacityError at once."""
        if len(self._waiting) >= self._max_waiting:
            raise OverCapacityError
        future: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        self._waiting.append((piece, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            await self._run([(piece, future) for piece, future in batch if not future.cancelled()])

    async def _run(self, batch: list[tuple[In, asyncio.Future[Out]]]) -> None:
        pieces = [piece for piece, _ in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, pieces)
        except Exception as error:
            if len(batch) > 1:  # one bad piece must not fail its neighbours
                for one in batch:
                    await self._run([one])
            elif batch and not batch[0][1].cancelled():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.cancelled():
                future.set_result(result)

    def close(self) -> None:
        """Finish the batch at work and stop."""
        self._thread.shutdown(wait=True)
