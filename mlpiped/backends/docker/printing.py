"""What a container without a shell prints: the engine has it, and it is brought to the job's folder while it comes.

The files there are as long as what was brought, so whoever goes on, in the next life of the daemon too, leaves out so
many bytes. The engine keeps the last `container.LOG` of it: of more than that, printed while no daemon lived, the head
is missing.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import anyio
import structlog

from mlpiped.backends.docker.engine import Engine, Refused
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from mlpiped.backends.threads import Threads

log = structlog.get_logger("docker")
STREAMS = ("stdout", "stderr")
PAUSE = 0.5  # seconds until an engine that went away is asked to go on


class Printing:
    def __init__(self, engine: Engine, do: Threads) -> None:
        self._engine = engine
        self._do = do
        self._going: dict[str, asyncio.Task[None]] = {}
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def close(self) -> None:
        tasks = list(self._going.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def begin(self, container: str, folder: str) -> None:
        """It runs: bring what it prints, unless that is being done."""
        if container not in self._going:
            going = self._follow(container, folder)
            task = asyncio.get_running_loop().create_task(going, name=f"log of {container[:12]}")
            self._going[container] = task
            task.add_done_callback(lambda _: self._going.pop(container, None))

    async def finish(self, container: str, folder: str) -> None:
        """It does not run any more: all of it is in the folder then. Raises Refused, BackendUnavailable."""
        if (task := self._going.get(container)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._bring(container, folder, follow=False)

    async def _follow(self, container: str, folder: str) -> None:
        while True:
            try:
                return await self._bring(container, folder, follow=True)
            except Refused:
                return  # whoever looks at the container learns more
            except BackendUnavailable as fault:
                log.debug("no log", container=container, why=fault.message)
            await anyio.sleep(PAUSE)

    async def _bring(self, container: str, folder: str, *, follow: bool) -> None:
        async with self._locks.setdefault(container, anyio.Lock()):
            skip = await self._do("keep the log", lambda: [_size(f"{folder}/{stream}") for stream in STREAMS])
            async with aclosing(self._engine.output(container, follow=follow)) as output:
                async for pieces in output:
                    fresh = [piece[left:] for piece, left in zip(pieces, skip, strict=True)]
                    skip = [max(0, left - len(piece)) for piece, left in zip(pieces, skip, strict=True)]
                    if any(fresh):
                        await self._do("keep the log", lambda fresh=fresh: _append(folder, fresh))  # type: ignore[misc]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _append(folder: str, pieces: list[bytes]) -> None:
    for stream, piece in zip(STREAMS, pieces, strict=True):
        if piece and os.path.isdir(folder):
            with open(f"{folder}/{stream}", "ab", buffering=0) as file:
                left = memoryview(piece)
                while left:
                    left = left[file.write(left) :]
