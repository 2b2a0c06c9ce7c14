"""Logs as they grow on the box: all that are followed share one channel, on which one question is open at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import asyncssh

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from mlpiped.backends.ssh.keeper import Keeper

PIECE = 1 << 17  # bytes
ANSWER = 60.0  # seconds


class Tails:
    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._process: asyncssh.SSHClientProcess[bytes] | None = None
        self._lock = anyio.Lock()

    async def read(self, token: str, stream: str, offset: int) -> tuple[bool, bytes]:
        """(whether the job was over before the reading, at most PIECE bytes). A negative offset counts from the end.

        Raises BackendUnavailable.
        """
        async with self._lock:
            whole = False
            try:
                process = await self._opened()
                process.stdin.write(b"%b %b %d %d\n" % (token.encode(), stream.encode(), offset, PIECE))
                with anyio.fail_after(ANSWER):
                    over, size = (await process.stdout.readuntil(b"\n")).split()
                    data = await process.stdout.readexactly(int(size))
                whole = True
                return over == b"1", bytes(data)
            except (OSError, EOFError, ValueError, asyncssh.Error, TimeoutError) as fault:
                raise BackendUnavailable(f"the connection to `{self.keeper.link.name}` was lost") from fault
            finally:
                if not whole:  # cancelled or broken in the middle of an answer
                    self.close()

    async def _opened(self) -> asyncssh.SSHClientProcess[bytes]:
        if self._process is None or self._process.is_closing():
            agent = await self.keeper.agent()
            async with self.keeper.link.channel() as connection:
                command = agent.box.script("tree.sh", "logs", agent.box.root)
                self._process = await self.keeper.link.process(connection, command)
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.channel.abort()
            self._process = None
