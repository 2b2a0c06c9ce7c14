"""A backend without machines, for the faults that real ones cannot be made to show on demand. It executes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from mlpiped.backends.base import Capacity, Exited, Handle, Job, Lost, NeverRan, Outcome
from mlpiped.errors import BackendUnavailable

World = dict[str, list[Any] | None]  # token -> [when it ends, how, what says that this changed]; None: the fence


class FakeBackend:
    """`world` outlives the daemon, as machines do: hand it to the next one."""

    kind = "fake"
    logs_here = True

    def __init__(self, name: str = "fake", *, slots: int = 2, world: World | None = None) -> None:
        self.name, self.slots, self.world = name, slots, {} if world is None else world
        self.run_for, self.exit_code = 0.0, 0  # of what is submitted from now on
        self.lose_after: float | None = None  # its machine dies after so many seconds
        self.unavailable_for = 0  # so many calls are refused

    async def _call(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self.unavailable_for > 0:
            self.unavailable_for -= 1
            raise BackendUnavailable(f"`{self.name}` does not answer")

    async def submit(self, job: Job) -> Handle:
        ends: list[tuple[float, Outcome]] = [(self.run_for, Exited(self.exit_code))]
        ends += [(job.timeout, Exited(None, signal=15, timed_out=True))] if job.timeout is not None else []
        ends += [(self.lose_after, Lost("its machine died"))] if self.lose_after is not None else []
        after, outcome = min(ends, key=lambda end: end[0])
        await self._call()
        if self.world.setdefault(job.token, [anyio.current_time() + after, outcome, anyio.Event()]) is None:
            raise BackendUnavailable(f"token `{job.token}` was fenced and cannot start")
        return {"v": 1, "token": job.token}

    async def wait(self, handle: Handle) -> Outcome:
        await self._call()
        if (entry := self.world.get(handle["token"])) is None:
            return Lost("nobody knows it")
        with anyio.move_on_after(entry[0] - anyio.current_time()):
            await entry[2].wait()
        return entry[1]  # type: ignore[no-any-return]

    async def cancel(self, handle: Handle) -> None:
        await self._call()
        entry = self.world.get(handle["token"])
        if entry is not None and entry[0] > anyio.current_time():
            entry[:2] = 0.0, Exited(None, signal=15, cancelled=True)
            entry[2].set()

    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        await self._call()
        return {token: {"v": 1, "token": token} for token in tokens if self.world.get(token) is not None}

    async def fence(self, token: str) -> NeverRan | Handle:
        await self._call()
        entry = self.world.setdefault(token, None)
        return NeverRan("its token was fenced") if entry is None else {"v": 1, "token": token}

    async def logs(self, handle: Handle, stream: str, offset: int, follow: bool) -> AsyncIterator[bytes]:
        if follow:
            await self.wait(handle)
        for chunk in list[bytes]():
            yield chunk

    def capacity(self) -> Capacity:
        return Capacity(self.slots)

    def missing(self, contents: object) -> int:
        return 0

    def doing(self, token: str) -> str | None:
        return None

    async def start(self, stack: object) -> None: ...

    async def fetch(self, handle: Handle, into: Path) -> Path:
        return into

    async def discard(self, token: str, *, keep_logs: bool) -> None: ...

    async def health(self) -> str | None:
        return f"`{self.name}` does not answer" if self.unavailable_for else None
