"""A few threads that do blocking work for the loop, at a fraction of what a hop costs in general.

Collecting is the most frequent hop of all: one for each step.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class _Errand:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self.loop.create_future()
        self.done = False
        self.over: asyncio.Future[None] | None = None  # who asked was cancelled, and waits for this


class Crew:
    """At most `size` threads, started as they are needed; they end with the process, whatever they wait for.

    The one that was busy last is the first to be asked: its memory is warm.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._threads = 0
        self._idle: list[SimpleQueue[_Errand]] = []  # of each thread that has nothing to do
        self._waiting: deque[_Errand] = deque()

    async def do(self, work: Callable[[], T]) -> T:
        """Its result. It is carried out to its end: who is cancelled waits for that, too."""
        errand = _Errand(work)
        if self._idle:
            self._idle.pop().put(errand)
        elif self._threads < self._size:
            self._threads += 1
            queue: SimpleQueue[_Errand] = SimpleQueue()
            queue.put(errand)
            threading.Thread(
                target=self._serve, args=(queue,), name=f"{self._name} {self._threads}", daemon=True
            ).start()
        else:
            self._waiting.append(errand)
        try:
            return await errand.answer  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            if not errand.done:
                errand.over = errand.loop.create_future()
                with anyio.CancelScope(shield=True):
                    await errand.over
            raise

    def _serve(self, queue: SimpleQueue[_Errand]) -> None:
        while True:
            errand = queue.get()
            result, fault = None, None
            try:
                result = errand.work()
            except BaseException as error:
                fault = error
            try:
                errand.loop.call_soon_threadsafe(self._done, queue, errand, result, fault)
            except RuntimeError:
                pass  # the loop is closed: nobody waits
            del errand, result, fault

    def _done(self, queue: SimpleQueue[_Errand], errand: _Errand, result: object, fault: BaseException | None) -> None:
        if self._waiting:
            queue.put(self._waiting.popleft())
        else:
            self._idle.append(queue)
        errand.done = True
        if errand.over is not None:
            errand.over.set_result(None)
        elif errand.answer.cancelled():
            return  # who asked has not been told yet
        elif fault is None:
            errand.answer.set_result(result)
        else:
            errand.answer.set_exception(fault)
