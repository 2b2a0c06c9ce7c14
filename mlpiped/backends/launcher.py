"""The daemon's side of the zygote and of the supervisors that it forks, one line to each.

What comes over a line is told after the job's folder says it. A supervisor that has ended is known by the end of its
line: whoever waits then looks at the folder. One that says it can do more is kept for a while, and given the next job.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from mlpiped.backends import supervisor

Said = dict[str, Any]
REMEMBERED = 1024  # jobs that are over and that nobody has waited for yet
MESSAGE = supervisor.PACKET  # bytes
IDLE = 2.0  # seconds until a supervisor that has nothing to do is let go


@dataclass(eq=False, slots=True)
class Call:
    """A job that one supervisor was asked to run, and what was heard of it. `changed` wakes who waits, at each word;
    `over`: nothing more will be heard."""

    token: str
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    claim: Said | None = None  # it is ours: the contents of its handle.json
    trouble: Said | None = None  # of its start
    exit: Said | None = None
    over: bool = False

    def tell(self) -> None:
        self.changed.set()
        self.changed.clear()  # who waits was woken


@dataclass(eq=False, slots=True)
class _Supervisor:
    sock: socket.socket
    call: Call | None
    since: float = 0.0  # idle, by the loop's clock


@dataclass(eq=False, slots=True)
class _Zygote:
    process: subprocess.Popen[bytes]
    sock: socket.socket
    pidfd: int
    sending: anyio.Lock = field(default_factory=anyio.Lock)


class Launcher:
    def __init__(self, python: str) -> None:
        self.python = python
        self._zygote: _Zygote | None = None
        self._starting = anyio.Lock()
        self._supervisors: set[_Supervisor] = set()
        self._idle: list[_Supervisor] = []
        self._trimming: asyncio.TimerHandle | None = None
        self._calls: dict[str, Call] = {}  # of claimed jobs, until their end was told

    @property
    def pid(self) -> int | None:
        """Of the zygote that serves at present."""
        return self._zygote.process.pid if self._zygote else None

    async def zygote(self) -> _Zygote:
        """The one that serves; starts it when there is none. Raises OSError."""
        async with self._starting:
            if self._zygote is None:
                process, sock = await anyio.to_thread.run_sync(self._spawn)
                self._zygote = zygote = _Zygote(process, sock, os.pidfd_open(process.pid))
                asyncio.get_running_loop().add_reader(zygote.pidfd, self._bury, zygote)
            return self._zygote

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

    # --- jobs -------------------------------------------------------------------------------------------------
    async def ask(self, token: str, message: bytes) -> Call:
        """Have a supervisor run the job of this packet. Raises OSError when none can be started."""
        call = Call(token)
        while self._idle:
            idle = self._idle.pop()
            idle.call = call
            try:
                idle.sock.send(message)
                return call
            except OSError:  # it has ended: its line is about to say so
                idle.call = None
        zygote = self._zygote or await self.zygote()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE)
        new = _Supervisor(ours, call)
        self._supervisors.add(new)
        asyncio.get_running_loop().add_reader(ours, self._hear, new)
        with theirs:
            async with zygote.sending:
                while zygote is self._zygote:
                    try:
                        socket.send_fds(zygote.sock, [message], [theirs.fileno()])
                        break
                    except BlockingIOError:
                        await anyio.wait_writable(zygote.sock)
                    except OSError:  # it is dying: the line's end says so, and whoever asks next asks the next one
                        break
        return call

    def known(self, token: str) -> Call | None:
        """The job, if a supervisor of ours has claimed it and its end was not told."""
        return self._calls.get(token)

    def forget(self, call: Call) -> None:
        """Its end was told."""
        if self._calls.get(call.token) is call:
            del self._calls[call.token]

    def _hear(self, who: _Supervisor) -> None:
        try:
            packet = who.sock.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet = b""
        if not packet:
            self._part(who)
            return
        said, call = json.loads(packet), who.call
        if call is None:
            return
        match said["kind"]:
            case "claimed":
                self._claimed(call, said["claim"])
            case "exited":
                self._claimed(call, said["claim"])
                call.exit, call.over, who.call = said["fact"], True, None
                if said["more"]:
                    self._rest(who)
            case _:
                call.trouble = said
        call.tell()

    def _claimed(self, call: Call, claim: Said) -> None:
        if call.claim is None:
            call.claim = claim
            self._calls[call.token] = call
            if len(self._calls) > REMEMBERED:
                over = [call for call in self._calls.values() if call.over]
                for old in over[: len(self._calls) - REMEMBERED]:
                    self.forget(old)  # the folder has not forgotten

    def _part(self, who: _Supervisor) -> None:
        """It has ended, or we let it go."""
        asyncio.get_running_loop().remove_reader(who.sock)
        who.sock.close()
        self._supervisors.discard(who)
        if who in self._idle:
            self._idle.remove(who)
        if who.call is not None:
            who.call.over = True
            who.call.tell()

    # --- those that have nothing to do ------------------------------------------------------------------------
    def _rest(self, who: _Supervisor) -> None:
        loop = asyncio.get_running_loop()
        who.since = loop.time()
        self._idle.append(who)
        if self._trimming is None:
            self._trimming = loop.call_later(IDLE, self._trim)

    def _trim(self) -> None:
        loop = asyncio.get_running_loop()
        for who in [who for who in self._idle if who.since <= loop.time() - IDLE]:
            self._part(who)  # it reads the end of the line, and ends
        self._trimming = loop.call_later(IDLE, self._trim) if self._idle else None

    # --- the end ----------------------------------------------------------------------------------------------
    def _bury(self, zygote: _Zygote) -> None:
        """Its supervisors go on. What lies in its queue is lost, and the lines that went with it end."""
        asyncio.get_running_loop().remove_reader(zygote.pidfd)
        os.close(zygote.pidfd)
        zygote.sock.close()
        if zygote is self._zygote:
            self._zygote = None
        zygote.process.poll()

    async def close(self) -> None:
        """Let the zygote go. Supervisors and steps go on."""
        if self._trimming is not None:
            self._trimming.cancel()
        for who in list(self._supervisors):
            self._part(who)
        zygote = self._zygote
        if zygote is not None:
            self._bury(zygote)  # it reads the end of the stream, and ends
            with anyio.move_on_after(5, shield=True):
                await anyio.to_thread.run_sync(zygote.process.wait, abandon_on_cancel=True)
