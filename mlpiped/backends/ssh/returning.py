"""What comes home: small things at once, large ones by a child, and after a break from where it was."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from mlpiped.backends.ssh.carrier import LARGE
from mlpiped.backends.ssh.incoming import Garbled, Incoming
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from mlpiped.backends.ssh.carrier import Carrier
    from mlpiped.backends.ssh.progress import Moving

ALL, ASK = "all", "ask"  # in the place of a limit; `ask`: before its bytes the box asks how many of them are here


class Returning:
    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self._locks: dict[Path, anyio.Lock] = {}

    @asynccontextmanager
    async def brought(
        self,
        command: Sequence[str],
        names: Sequence[str],
        part: Path,
        moves: Callable[[], AbstractContextManager[Moving | None]] = nullcontext,
    ) -> AsyncIterator[None]:
        """`names` of what `command` (`tree.sh get …`) tells lie in the folder `part`, which is removed after this.

        It stays when the way breaks off in the middle of something large. Raises BackendUnavailable, OSError.
        """  # fmt: skip
        async with self._locks.setdefault(part, anyio.Lock()):
            kept = False
            try:
                left = await anyio.to_thread.run_sync(part.exists)
                if not left and await self._small(command, names, part):
                    yield
                    return
                with moves() as moving:
                    kept = True
                    await self._large([*command, ASK if left else ALL, *names], part, moving)
                    kept = False
                yield
            except Garbled as fault:
                kept = False
                raise BackendUnavailable(f"what came from `{self.carrier.link.name}` is not whole: {fault}") from fault
            except OSError:
                kept = False
                raise
            finally:
                if not kept:
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(lambda: shutil.rmtree(part, ignore_errors=True))
                self._locks.pop(part, None)

    async def _small(self, command: Sequence[str], names: Sequence[str], part: Path) -> bool:
        await anyio.to_thread.run_sync(lambda: part.mkdir(parents=True))
        into = Incoming(part)
        try:
            await self.carrier.get([*command, str(LARGE), *names], into)
        finally:
            into.close()
        return not into.big

    async def _large(self, command: Sequence[str], part: Path, moving: Moving | None) -> None:
        into = Incoming(part, moving)
        try:
            await self.carrier.get_large(command, into)
        finally:
            into.close()
