"""News of containers: hints that one may have ended. Whoever gets one asks the engine.

One stream of events for all, opened again when it ends; and, since it may be silent for ever, a look at the list of
containers now and then. After a time without a stream everybody is told to look.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.backends.docker.container import INSTANCE, TOKEN
from mlpiped.backends.docker.engine import Refused
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from mlpiped.backends.docker.engine import Engine

log = structlog.get_logger("docker")
POLL = 10.0  # seconds between two looks at the list
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between two tries to hear the engine


class Watch:
    def __init__(self, engine: Engine, instance: str, name: str, on_connected: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self._labels = [f"{INSTANCE}={instance}"]
        self._name = name
        self._on_connected = on_connected
        self._waiting: dict[str, set[anyio.Event]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._hear(), name=f"events of {self._name}"),
            loop.create_task(self._poll(), name=f"containers of {self._name}"),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextmanager
    def listen(self, token: str) -> Iterator[anyio.Event]:
        """Set when there may be news of `token`."""
        event = anyio.Event()
        self._waiting.setdefault(token, set()).add(event)
        try:
            yield event
        finally:
            events = self._waiting[token]
            events.discard(event)
            if not events:
                del self._waiting[token]

    def tell(self, token: str) -> None:
        for event in self._waiting.get(token, ()):
            event.set()

    def tell_all(self) -> None:
        for token in self._waiting:
            self.tell(token)

    async def _hear(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with aclosing(self._engine.events(self._labels)) as events:
                    async for event in events:
                        if event is None:
                            pause = FIRST_PAUSE
                            await self._on_connected()
                            self.tell_all()  # of what happened before it listened
                        else:
                            self.tell(event.get("Actor", {}).get("Attributes", {}).get(TOKEN, ""))
            except (BackendUnavailable, Refused) as fault:
                log.debug("no events", compute=self._name, why=str(fault))
            except Exception:  # a hint that cannot be understood must not end all hints
                log.exception("events of containers", compute=self._name)
            self.tell_all()
            await anyio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _poll(self) -> None:
        while True:
            await anyio.sleep(POLL)
            if not self._waiting:
                continue
            try:
                found = await self._engine.list(self._labels)
            except (BackendUnavailable, Refused):
                continue  # no answer is no answer
            running = {each["Labels"].get(TOKEN) for each in found if each["State"] == "running"}
            for token in self._waiting:
                if token not in running:
                    self.tell(token)
