"""Streams to and from a box: small ones on a channel of the one connection, large ones by a child of their own.

asyncssh encrypts in the event loop. What takes long there would make everybody else wait, so where OpenSSH's client is
installed it carries what is large.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import anyio
import anyio.to_thread
import asyncssh

from mlpiped.backends.ssh.link import quoted
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.ssh.link import Link
    from mlpiped.backends.ssh.parcels import Incoming

LARGE = 8 << 20  # bytes
STALLED = 120.0  # seconds without a byte's progress
BLOCK = 1 << 18


class Carrier:
    def __init__(self, link: Link) -> None:
        self.link = link
        self.client = shutil.which("ssh")
        self.sent = 0
        """Bytes of content that went out, all told."""
        self.received = 0
        """Bytes that came home of what steps made and printed, all told."""
        self._threads = anyio.CapacityLimiter(4)
        self._large = anyio.CapacityLimiter(2)

    # --- out ----------------------------------------------------------------------------------------------------
    async def put(self, command: Sequence[str], stream: Iterator[bytes], size: int) -> None:
        """Raises BackendUnavailable; what the stream raises; OSError."""
        if size > LARGE and self.client is not None:
            async with self._large:
                said = await self._child(command, lambda child: _pour(child, self._counted(stream)))
        else:
            said = await self._put_on_channel(command, stream)
        if said.strip().splitlines()[-1:] != [b"ok"]:
            raise BackendUnavailable(f"`{self.link.name}` could not keep what was sent: {_last(said)}")

    def _counted(self, stream: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in stream:
            self.sent += len(chunk)
            yield chunk

    async def _put_on_channel(self, command: Sequence[str], stream: Iterator[bytes]) -> bytes:
        chunks = self._counted(stream)
        async with self.link.channel() as connection:
            try:
                process = await self.link.process(connection, command)
                try:
                    while chunk := await anyio.to_thread.run_sync(_gather, chunks, limiter=self._threads):
                        process.stdin.write(chunk)
                        with anyio.fail_after(STALLED):
                            await process.stdin.drain()
                    process.stdin.write_eof()
                    with anyio.fail_after(STALLED):
                        said = await process.stdout.read()
                        said += await process.stderr.read()
                        await process.wait_closed()
                finally:
                    process.channel.abort()
            except (OSError, asyncssh.Error) as fault:
                if isinstance(fault, OSError) and fault.filename is not None:
                    raise  # of a file here
                raise BackendUnavailable(f"the connection to `{self.link.name}` was lost") from fault
        return bytes(said)

    # --- home ---------------------------------------------------------------------------------------------------
    async def get(self, command: Sequence[str], into: Incoming) -> None:
        """Raises BackendUnavailable, Garbled, OSError."""
        async with self.link.channel() as connection:
            try:
                process = await self.link.process(connection, command)
            except (OSError, asyncssh.Error) as fault:
                raise BackendUnavailable(f"the connection to `{self.link.name}` was lost") from fault
            try:
                while not into.done:
                    try:
                        with anyio.fail_after(STALLED):
                            data = await process.stdout.read(BLOCK)
                    except (OSError, asyncssh.Error) as fault:
                        raise BackendUnavailable(f"the connection to `{self.link.name}` was lost") from fault
                    if not data:
                        raise BackendUnavailable(f"the way from `{self.link.name}` broke off")
                    self.received += len(data)
                    await anyio.to_thread.run_sync(into.feed, data, limiter=self._threads)
            finally:
                process.channel.abort()

    async def get_large(self, command: Sequence[str], into: Incoming) -> None:
        async with self._large:
            said = await self._child(command, lambda child: self._drained(child, into))
        if not into.done:
            raise BackendUnavailable(f"the way from `{self.link.name}` broke off: {_last(said)}")

    def _drained(self, child: subprocess.Popen[bytes], into: Incoming) -> bytes:
        assert child.stdout is not None
        while not into.done and (data := child.stdout.read1(1 << 20)):  # type: ignore[attr-defined]
            self.received += len(data)
            into.feed(data)
        return b""

    # --- a child ------------------------------------------------------------------------------------------------
    async def _child(self, command: Sequence[str], work: Work) -> bytes:
        """What `work` brought, else what it said on stderr."""
        argv = [*self.link.command(), quoted(*command)]
        with tempfile.TemporaryFile() as errors:
            child = _started(argv, errors)
            try:
                said = await anyio.to_thread.run_sync(work, child, abandon_on_cancel=True)
            finally:
                child.kill()
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(child.wait)
            errors.seek(0)
            return said or errors.read(65536)


Work = Callable[["subprocess.Popen[bytes]"], bytes]


def _started(argv: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Not asyncio's: a thread reads and writes its pipes."""
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)


def _pour(child: subprocess.Popen[bytes], stream: Iterator[bytes]) -> bytes:
    assert child.stdin is not None and child.stdout is not None
    with suppress(BrokenPipeError):  # it says why
        for chunk in stream:
            child.stdin.write(chunk)
        child.stdin.close()
    return child.stdout.read(65536)


def _gather(chunks: Iterator[bytes]) -> bytes:
    """Some of the stream, in one piece: it is made of many small ones."""
    found, size = [], 0
    for chunk in chunks:
        found.append(chunk)
        size += len(chunk)
        if size >= BLOCK:
            break
    return b"".join(found)


def _last(said: bytes) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
