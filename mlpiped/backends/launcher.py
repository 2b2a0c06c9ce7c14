"""The daemon's side of the zygote: asks it for supervisors and hears their hints; starts another when one is killed.

What comes over the socket is told after the job's folder says it, and may be lost: whoever waits here for long looks
there too.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from mlpiped.backends import supervisor

if TYPE_CHECKING:
    from collections.abc import Iterator

Said = dict[str, Any]
REMEMBERED = 1024  # tokens of which something was said that nobody has asked for yet
MESSAGE = supervisor.PACKET  # bytes


@dataclass(eq=False, slots=True)
class Call:
    """Somebody who wants to hear of `token`: `event` is set when something was said, or when the asked zygote died.

    Its start and its end are kept apart: both may have come before anybody could look.
    """

    token: str
    event: anyio.Event = field(default_factory=anyio.Event)
    said: Said | None = None  # of its start
    exit: Said | None = None
    asked: _Zygote | None = None


@dataclass(eq=False, slots=True)
class _Zygote:
    process: subprocess.Popen[bytes]
    sock: socket.socket
    pidfd: int
    alive: bool = True
    sending: anyio.Lock = field(default_factory=anyio.Lock)


class Launcher:
    def __init__(self, python: str) -> None:
        self.python = python
        self._now: _Zygote | None = None
        self._all: set[_Zygote] = set()  # the dead too: the supervisors of a dead one still speak on its socket
        self._starting = anyio.Lock()
        self._calls: dict[str, set[Call]] = {}
        self._heard: dict[str, Said | None] = {}  # None: claimed by a supervisor that has not said more

    @property
    def pid(self) -> int | None:
        """Of the zygote that serves at present."""
        return self._now.process.pid if self._now and self._now.alive else None

    async def zygote(self) -> _Zygote:
        """The one that serves; starts it when there is none. Raises OSError."""
        async with self._starting:
            if self._now is None or not self._now.alive:
                process, sock = await anyio.to_thread.run_sync(self._spawn)
                self._now = zygote = _Zygote(process, sock, os.pidfd_open(process.pid))
                self._all.add(zygote)
                loop = asyncio.get_running_loop()
                loop.add_reader(sock, self._hear, zygote)
                loop.add_reader(zygote.pidfd, self._died, zygote)
            return self._now

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE)
        with theirs:
            ours.setblocking(False)
            command = [self.python, "-I", "-S", str(Path(supervisor.__file__)), "--serve", str(theirs.fileno())]
            null = subprocess.DEVNULL
            try:
                process = subprocess.Popen(
                    command, stdin=null, stdout=null, stderr=null, cwd="/",
                    pass_fds=(theirs.fileno(),), start_new_session=True,
                )  # fmt: skip
            except OSError:
                ours.close()
                raise
        return process, ours

    async def ask(self, call: Call, message: bytes) -> None:
        """Ask for a supervisor by this packet, once per zygote. Raises OSError when none can be started."""
        zygote = self._now if self._now is not None and self._now.alive else await self.zygote()
        if call.asked is zygote:
            return
        call.asked = zygote
        try:
            async with zygote.sending:
                await asyncio.get_running_loop().sock_sendall(zygote.sock, message)
        except OSError:  # it is dying: `_died` will say so, and the next call asks the next one
            call.event.set()
            call.asked = None

    @contextmanager
    def listen(self, token: str) -> Iterator[Call]:
        call = Call(token)
        self._calls.setdefault(token, set()).add(call)
        try:
            yield call
        finally:
            calls = self._calls[token]
            calls.discard(call)
            if not calls:
                del self._calls[token]

    def _hear(self, zygote: _Zygote) -> None:
        while True:
            try:
                packet = zygote.sock.recv(1 << 16)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                packet = b""
            if not packet:  # the zygote and all of its supervisors are gone
                asyncio.get_running_loop().remove_reader(zygote.sock)
                zygote.sock.close()
                if not zygote.alive:
                    self._all.discard(zygote)
                return
            self._spread(json.loads(packet))

    def _spread(self, said: Said) -> None:
        token, kind = said["token"], said["kind"]
        if kind in ("claimed", "exited"):
            self._heard[token] = said["fact"] if kind == "exited" else None
            if len(self._heard) > REMEMBERED:
                del self._heard[next(iter(self._heard))]
        for call in self._calls.get(token, ()):
            if kind == "exited":
                call.exit = said["fact"]
            else:
                call.said = said
            call.event.set()

    def recall(self, token: str) -> tuple[bool, Said | None]:
        """(whether its supervisor began just now, how it ended when that was said): told once."""
        return token in self._heard, self._heard.pop(token, None)

    def _died(self, zygote: _Zygote) -> None:
        self._bury(zygote)
        zygote.process.poll()
        for calls in self._calls.values():
            for call in calls:
                if call.asked is zygote:
                    call.event.set()

    def _bury(self, zygote: _Zygote) -> None:
        if zygote.alive:
            asyncio.get_running_loop().remove_reader(zygote.pidfd)
            os.close(zygote.pidfd)
            zygote.alive = False
            if zygote.sock.fileno() < 0:
                self._all.discard(zygote)

    async def close(self) -> None:
        """Let the zygote go. Supervisors and steps go on."""
        loop = asyncio.get_running_loop()
        for zygote in list(self._all):
            self._bury(zygote)
            if zygote.sock.fileno() >= 0:
                loop.remove_reader(zygote.sock)
                zygote.sock.close()  # it reads the end of the stream, and ends
            with anyio.move_on_after(5, shield=True):
                await anyio.to_thread.run_sync(zygote.process.wait, abandon_on_cancel=True)
        self._all.clear()
        self._now = None
