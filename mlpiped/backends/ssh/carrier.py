"""Streams to and from a box: small ones on a channel of the one connection, large ones by a child of their own.

asyncssh encrypts in the event loop. What takes long there would make everybody else wait, so where OpenSSH's client is
installed it carries what is large.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import anyio
import anyio.to_thread
import asyncssh

from mlpiped.backends.ssh.agent import MARK
from mlpiped.backends.ssh.parcels import Start
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.ssh.incoming import Incoming
    from mlpiped.backends.ssh.link import Link

LARGE = 8 << 20  # bytes
STALLED = 120.0  # seconds without a byte's progress
HASHED = 6 * 3600.0  # seconds in which a box has hashed what it was sent
BLOCK = 1 << 18
PIPE = 1 << 20


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
    async def put(self, command: Sequence[str], stream: Iterator[bytes]) -> None:
        """Raises BackendUnavailable; what the stream raises; OSError."""
        self._kept(await self._put_on_channel(command, lambda process: _ready(stream), STALLED))

    async def put_large(self, command: Sequence[str], stream: Callable[[Start], Iterator[bytes]]) -> None:
        """The same, from where an earlier try broke off: the box says it first."""
        if self.client is not None:
            async with self._large:
                said = await self._child(command, lambda child: _pour(child, lambda at: self._counted(stream(at))))
        else:

            async def asked(process: asyncssh.SSHClientProcess[bytes]) -> Iterator[bytes] | None:
                start = _start(await process.stdout.readline())
                return None if start is None else stream(start)

            said = await self._put_on_channel(command, asked, HASHED)
        self._kept(said)

    def _kept(self, said: bytes) -> None:
        if said.strip().splitlines()[-1:] not in ([b"ok"], [b"there"]):
            raise BackendUnavailable(f"`{self.link.name}` could not keep what was sent: {_last(said)}")

    def _counted(self, stream: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in stream:
            self.sent += len(chunk)
            yield chunk

    async def _put_on_channel(self, command: Sequence[str], begun: Begun, patience: float) -> bytes:
        async with self.link.channel() as connection:
            try:
                process = await self.link.process(connection, command)
                try:
                    stream = await begun(process)
                    if stream is None:
                        return b"there"
                    chunks = self._counted(stream)
                    while chunk := await anyio.to_thread.run_sync(_gather, chunks, limiter=self._threads):
                        process.stdin.write(chunk)
                        with anyio.fail_after(STALLED):
                            await process.stdin.drain()
                    process.stdin.write_eof()
                    with anyio.fail_after(patience):
                        said = await process.stdout.read()
                        words = await process.stderr.read()  # a login shell may warn of anything
                        await process.wait_closed()
                finally:
                    process.channel.abort()
            except (OSError, asyncssh.Error) as fault:
                if isinstance(fault, OSError) and fault.filename is not None:
                    raise  # of a file here
                raise BackendUnavailable(f"the connection to `{self.link.name}` was lost") from fault
        return bytes(said or words)

    # --- words --------------------------------------------------------------------------------------------------
    async def lines(self, command: Sequence[str], patience: float, given: bytes = b"") -> list[str]:
        """What it says before its `ok`. Raises BackendUnavailable, also when there was none."""
        name = self.link.name
        async with self.link.channel() as connection:
            try:
                process = await self.link.process(connection, command)
                try:
                    if given:
                        process.stdin.write(given)
                    with anyio.fail_after(patience):
                        said = (await process.stdout.read()).decode("ascii", "replace").splitlines()
                finally:
                    process.channel.abort()
            except TimeoutError:
                raise BackendUnavailable(f"`{name}` does not answer") from None
            except (OSError, asyncssh.Error) as fault:
                raise BackendUnavailable(f"the connection to `{name}` was lost") from fault
        if said[-1:] != ["ok"]:
            raise BackendUnavailable(f"`{name}` does not say what it keeps")
        return said[:-1]

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
                    for answer in await anyio.to_thread.run_sync(into.feed, data, limiter=self._threads):
                        process.stdin.write(answer)
            finally:
                process.channel.abort()

    async def get_large(self, command: Sequence[str], into: Incoming) -> None:
        if self.client is None:
            await self.get(command, into)
            return
        async with self._large:
            said = await self._child(command, lambda child: self._drained(child, into))
        if not into.done:
            raise BackendUnavailable(f"the way from `{self.link.name}` broke off: {_last(said)}")

    def _drained(self, child: subprocess.Popen[bytes], into: Incoming) -> bytes:
        assert child.stdin is not None and child.stdout is not None
        while not into.done and (data := child.stdout.read1(1 << 20)):  # type: ignore[attr-defined]
            self.received += len(data)
            for answer in into.feed(data):
                with suppress(BrokenPipeError):  # it says why
                    child.stdin.write(answer)
                    child.stdin.flush()
        return b""

    # --- a child ------------------------------------------------------------------------------------------------
    async def _child(self, command: Sequence[str], work: Work) -> bytes:
        """What `work` brought, else what it said on stderr."""
        argv = [*self.link.command(), self.link.remote(command)]
        with tempfile.TemporaryFile() as errors:
            child = _started(argv, errors)
            try:
                said = await anyio.to_thread.run_sync(self._worked, child, work, abandon_on_cancel=True)
            finally:
                child.kill()
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(child.wait)
            errors.seek(0)
            return said or errors.read(65536)

    def _worked(self, child: subprocess.Popen[bytes], work: Work) -> bytes:
        assert child.stdout is not None
        while self.link.greets and (line := child.stdout.readline()) != MARK.encode() + b"\n":
            if not line:
                return b""
        return work(child)


Work = Callable[["subprocess.Popen[bytes]"], bytes]
Begun = Callable[["asyncssh.SSHClientProcess[bytes]"], Awaitable[Iterator[bytes] | None]]


def _started(argv: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Not asyncio's: a thread reads and writes its pipes, and does other things meanwhile."""
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        with suppress(OSError):  # a user may have so many pages of pipes only
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
    return child


async def _ready(stream: Iterator[bytes]) -> Iterator[bytes]:
    return stream


def _start(line: bytes) -> Start | None:
    """Of `from UNITS BYTES`; None: it is all there."""
    match line.split():
        case [b"from", units, offset] if units.isdigit() and offset.isdigit():
            return Start(int(units), int(offset))
        case [b"there"]:
            return None
    raise ConnectionError("it does not say what is there")


def _pour(child: subprocess.Popen[bytes], stream: Callable[[Start], Iterator[bytes]]) -> bytes:
    assert child.stdin is not None and child.stdout is not None
    try:
        start = _start(child.stdout.readline())
    except ConnectionError:
        return b""
    if start is None:
        return b"there"
    with suppress(BrokenPipeError):  # it says why
        for chunk in stream(start):
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
