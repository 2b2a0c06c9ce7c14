"""Removes containers that nobody needs any more, one after another, behind everybody's back.

What the engine cannot be asked for now is tried again when it is back. Only containers of our own instance are removed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from mlpiped.backends.docker.container import INSTANCE, TOKEN
from mlpiped.backends.docker.engine import Refused
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from mlpiped.backends.docker.engine import Engine

log = structlog.get_logger("docker")


class Remover:
    def __init__(self, engine: Engine, instance: str, name: str) -> None:
        self._engine = engine
        self._instance = instance
        self._name = name
        self.trouble: str | None = None  # a sentence, until a removal goes well
        self._wanted: dict[str, None] = {}  # ids, and names of which it is not known whether they are ours
        self._later: set[str] = set()
        self._some = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"removals on {self._name}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def add(self, container: str) -> None:
        """The container of that id or name, running or not, if there is one and it is ours."""
        self._wanted[container] = None
        self._idle.clear()
        self._some.set()

    def again(self) -> None:
        for container in self._later:
            self.add(container)
        self._later.clear()

    async def flush(self) -> None:
        """Until all that can be removed now is."""
        await self._idle.wait()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            while self._wanted:
                container = next(iter(self._wanted))
                try:
                    await self._remove(container)
                except BackendUnavailable:
                    self._later.add(container)
                except Exception:
                    log.exception("a container cannot be removed", container=container, compute=self._name)
                self._wanted.pop(container, None)
            self._some.clear()
            self._idle.set()

    async def _remove(self, container: str) -> None:
        found = await self._engine.look(container)
        labels = {} if found is None else found["Config"]["Labels"] or {}
        if found is None or labels.get(INSTANCE) != self._instance or TOKEN not in labels:
            return
        try:
            await self._engine.remove(found["Id"], force=True)
            self.trouble = None
        except Refused as no:
            if no.status == 409:  # somebody is removing it
                return
            self.trouble = f"a container of an ended step cannot be removed: `{found['Name'].lstrip('/')}`: {no.words}"
            self._later.add(container)
            log.warning(self.trouble, compute=self._name)
