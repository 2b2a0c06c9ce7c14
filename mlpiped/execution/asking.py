"""What is away now is asked until it answers: after growing pauses, and at once when somebody finds it well again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import anyio

from mlpiped.errors import BackendUnavailable, StorageAway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mlpiped.clock import Clock

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries to reach a backend


class Asking:
    """One attempt's. `on_silence`: it could not be asked; `on_answer`: it can be again."""

    def __init__(self, clock: Clock, on_silence: Callable[[], None], on_answer: Callable[[], None]) -> None:
        self.held: str | None = None
        """Why there is no answer just now."""
        self._clock = clock
        self._on_silence, self._on_answer = on_silence, on_answer
        self._well = asyncio.Event()

    async def until_answered(self, question: Callable[[], Awaitable[T]], trouble: str | None = None) -> T:
        """What `question` gives, as soon as it raises neither BackendUnavailable nor StorageAway; `trouble`: why it did
        before."""
        pause = FIRST_PAUSE
        while True:
            if trouble is not None:
                self.held = trouble
                woken = await self._pause(pause)
                pause = FIRST_PAUSE if woken else min(pause * 2, LONGEST_PAUSE)
            try:
                answer = await question()
                break
            except (BackendUnavailable, StorageAway) as fault:
                self.held = trouble = fault.advice
                self._on_silence()
        if self.held is not None:
            self.held = None
            self._well.clear()
            self._on_answer()
        return answer

    def well_again(self) -> None:
        """No pause goes on, and the next ones are short."""
        if self.held is not None:
            self._well.set()

    async def _pause(self, seconds: float) -> bool:
        """Whether it was cut short."""
        async with anyio.create_task_group() as tasks:

            async def until_well() -> None:
                await self._well.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(until_well, name="until the compute is well")
            await self._clock.sleep(seconds)
            tasks.cancel_scope.cancel()
        woken = self._well.is_set()
        self._well.clear()
        return woken
