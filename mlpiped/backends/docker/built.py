"""The images that Dockerfiles made on an engine: marked when somebody asks for one, removed when nobody does any more.

All that a build leaves has a label with the daemon's instance: the image, its stages, what a build that failed came to.
When an image was asked for last is the time of a file in `<state>/docker-images/`; of what has none there, when it was
made. All computes of a daemon share that folder: two of them may be on one engine.

What people made of such an image inherits its label: what has a name of theirs is left alone, and so is what a
container is of.
"""

from __future__ import annotations

import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from blake3 import blake3

from mlpiped.backends.docker.engine import Engine, Refused
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BUILT_BY = "mlpiped.built-by"  # a label; not the one of our containers, which people's own would inherit
REPOSITORY = "mlpiped-built"
NO_NAME = "<none>:<none>"


class BuiltImages:
    def __init__(self, engine: Engine, instance: str, marks: Path) -> None:
        self._engine = engine
        self._instance = instance
        self._marks = marks
        self._going = 0  # builds: what they have come to has no name yet
        self._turn = anyio.Lock()  # of a removal, and of a build's first step

    def name(self, digest: str) -> str:
        """Of the image that this content makes: no other daemon's, who would not know that we need it."""
        return f"{REPOSITORY}:{blake3(f'{self._instance} {digest}'.encode()).hexdigest()[:40]}"

    async def asked_for(self, name: str) -> None:
        """From now on it is not removed by whoever wants those that were asked for earlier only."""
        async with self._turn:
            await anyio.to_thread.run_sync(self._mark, name)

    @asynccontextmanager
    async def build(self) -> AsyncIterator[None]:
        """Nothing is removed meanwhile."""
        async with self._turn:
            self._going += 1
        try:
            yield
        finally:
            self._going -= 1

    async def drop(self, before: float, *, only_look: bool) -> list[str]:
        """Remove what nobody has asked for since `before` (seconds since the epoch); what has gone, or would."""
        gone: list[str] = []
        for image in await self._engine.images([f"{BUILT_BY}={self._instance}"]):
            for name in _names(image):
                async with self._turn:
                    if self._going:  # it may stand on any of these; they go the next time
                        return gone
                    last = await anyio.to_thread.run_sync(self._last_use, name, float(image["Created"]))
                    if last < before and (only_look or await self._removed(name)):
                        gone.append(name)
        if not only_look:
            await anyio.to_thread.run_sync(self._forget, before)
        return gone

    async def _removed(self, name: str) -> bool:
        try:
            await self._engine.remove_image(name)
        except Refused as no:
            if no.status not in (404, 409):
                raise BackendUnavailable(f"an image cannot be removed: `{name}`: {no.words}") from None
            return False  # gone; or a container is of it
        return True

    # --- marks: all of it blocks
    def _mark(self, name: str) -> None:
        try:
            path = self._path(name)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch()
            os.utime(path, ns=(time.time_ns(),) * 2)  # by itself a file system notes the last tick
        except OSError as error:
            raise BackendUnavailable(f"cannot note who needs an image: {error.strerror}: {error.filename}") from error

    def _last_use(self, name: str, made: float) -> float:
        try:
            return max(made, self._path(name).stat().st_mtime)
        except OSError:
            return made

    def _forget(self, before: float) -> None:
        """Marks that say no more than none would."""
        for path in self._marks.glob("*"):
            if path.stat().st_mtime < before:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._marks / os.path.basename(name.rpartition(":")[2])


def _names(image: dict[str, Any]) -> list[str]:
    """What of ours names it; its id, when nothing does; nothing, when only others' names are left."""
    names = [name for name in image.get("RepoTags") or () if name != NO_NAME]
    return [name for name in names if name.startswith(f"{REPOSITORY}:")] if names else [image["Id"]]
