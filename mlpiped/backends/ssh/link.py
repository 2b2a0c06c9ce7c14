"""One connection to one box: opened when it is needed, watched by keepalives, shared by everything.

Whoever needs the box calls `Link.open`: the first one connects, the others wait for that. After a failure nobody tries
again before a pause is over that grows; what a new key or password would have to heal is not tried at all for long.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import asyncssh

from mlpiped.backends.ssh.agent import MARK, encoded
from mlpiped.backends.ssh.routes import CONNECT, LOGIN, AtJump, Blocked, Route, agent_keys
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from mlpiped.config.computes import SshCompute

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
REFUSALS = 3  # so often in a row may the box refuse our key: more looks like an attack to it
KEPT = 2  # sessions that last: the agent and the logs
CROWDED, ALONE = 60.0, 5.0  # seconds to wait for a session; when it would be the only one beside the agent's

PLAIN = re.compile(r"[A-Za-z0-9._/-]+\Z")
SHUT = 3600.0  # seconds for which nothing is tried after that, or after a changed host key


class Link:
    def __init__(self, name: str, settings: SshCompute, known_hosts: Path) -> None:
        self.name = name
        self.settings = settings
        self.known_hosts = known_hosts
        self.route = Route(settings, known_hosts)
        self.connects = 0
        """How often a connection came about."""
        self._connection: asyncssh.SSHClientConnection | None = None
        self._lock = anyio.Lock()
        self._failures = self._refusals = 0
        self._closed_until = 0.0
        self._trouble = BackendUnavailable(f"`{name}` has not been reached yet")
        self._mended: tuple[float, ...] | None = None  # of the files that would have to change before the next try
        self._channels = anyio.CapacityLimiter(max(1, settings.max_sessions - KEPT))
        self._used = 0
        self.greets = False
        """Whether its login shell prints something before it does what it is told."""

    # --- the connection -----------------------------------------------------------------------------------------
    async def open(self) -> asyncssh.SSHClientConnection:
        """Raises BackendUnavailable: at once while a pause after a failure lasts."""
        if self._alive():
            return self._connection  # type: ignore[return-value]
        async with self._lock:
            if not self._alive():
                if time.monotonic() < self._closed_until and self._mended in (None, self._stamps()):
                    raise self._again()
                try:
                    with anyio.fail_after(CONNECT + LOGIN):
                        self._connection = await self.route.connect()
                except (OSError, asyncssh.Error, TimeoutError, ValueError, Blocked, AtJump) as fault:
                    await self._failed(fault)
                    raise self._again() from fault
                self.connects += 1
                self._failures = self._refusals = 0
                self._closed_until, self._mended = 0.0, None
            return self._connection  # type: ignore[return-value]

    def _alive(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    def _again(self) -> BackendUnavailable:
        return BackendUnavailable(self._trouble.message, hint=self._trouble.hint)

    async def _failed(self, fault: Exception) -> None:
        self._failures += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures - 1, 10)) * random.uniform(0.5, 1.0)
        self._mended = None
        where, host = f"`{self.name}` ({self.settings.host})", self.settings.host
        if isinstance(fault, AtJump):
            where, host, fault = f"the jump host `{fault.host}` of `{self.name}`", fault.host, fault.fault
        if isinstance(fault, asyncssh.HostKeyNotVerifiable):
            pause, self._mended = SHUT, self._stamps()
            self._trouble = self._unverified(where, host)
        elif isinstance(fault, asyncssh.PermissionDenied):
            self._refusals += 1
            self._trouble = BackendUnavailable(
                f"{where} does not let us in: {_words(fault)}", hint=await self._missing_key()
            )
            if self._refusals >= REFUSALS:
                pause, self._mended = SHUT, self._stamps()
                self._trouble = BackendUnavailable(
                    f"{where} is disabled: it refused our key {self._refusals} times",
                    hint="put our public key into its `authorized_keys`, then `mlpipectl reload`",
                )
        elif isinstance(fault, Blocked):
            self._trouble = BackendUnavailable(f"{where} cannot be reached: {fault}", hint=fault.hint)
        else:
            self._trouble = BackendUnavailable(f"{where} cannot be reached: {_words(fault)}")
        self._closed_until = time.monotonic() + pause

    async def _missing_key(self) -> str:
        if self.settings.agent:
            keys = await agent_keys()
            if keys is None:
                return "there is no agent at `$SSH_AUTH_SOCK`: set it in the daemon's unit, or name a `key_file`"
            if keys == 0:
                return "the agent has no key: `ssh-add`, as the daemon's user"
        return "is our public key in its `authorized_keys`?"

    def _unverified(self, where: str, host: str) -> BackendUnavailable:
        name, port = self.route.known_as(host)
        if self._known(name, port):
            return BackendUnavailable(
                f"the host key of {where} has changed: nothing is sent there until that is explained",
                hint=f"if the box was installed anew, replace its line in {self.known_hosts}",
            )
        hint = f"`mlpiped trust {self.name}`, as the daemon's user"
        if host != self.settings.host:
            scan = f"ssh-keyscan -p {port or 22} {name} >> {self.known_hosts}"
            hint = f"`{scan}`, and compare it with the host's own"
        return BackendUnavailable(f"the host key of {where} is not known", hint=hint)

    def _known(self, name: str, port: int | None) -> bool:
        with suppress(OSError, ValueError, asyncssh.Error):
            return bool(asyncssh.match_known_hosts(str(self.known_hosts), name, "", port)[0])
        return False

    def _stamps(self) -> tuple[float, ...]:
        stamps = []
        for path in (self.known_hosts, self.settings.key_file, self.settings.ssh_config):
            try:
                stamps.append(os.stat(path).st_mtime if path is not None else 0.0)
            except OSError:
                stamps.append(0.0)
        return tuple(stamps)

    def try_again(self) -> None:
        """Somebody says that it is mended: no pause goes on."""
        self._closed_until, self._refusals = 0.0, 0

    def drop(self) -> None:
        """Give the connection up: something on it does not answer."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
            with anyio.move_on_after(2, shield=True):
                await connection.wait_closed()

    # --- channels -----------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def channel(self) -> AsyncIterator[asyncssh.SSHClientConnection]:
        """The connection, with leave to open one more session on it. Whoever is over the limit waits."""
        async with self._channels:
            self._used += 1
            try:
                yield await self.open()
            finally:
                self._used -= 1

    async def process(
        self, connection: asyncssh.SSHClientConnection, command: Sequence[str]
    ) -> asyncssh.SSHClientProcess[bytes]:
        """Raises what asyncssh raises. A server that takes fewer sessions than we were told is asked again."""
        until = time.monotonic() + CROWDED
        while True:
            try:
                process = await connection.create_process(self.remote(command), encoding=None)
            except asyncssh.ChannelOpenError as fault:
                if connection.is_closed():
                    raise
                self.narrow()
                if time.monotonic() > until - (CROWDED - ALONE if self._used == 1 else 0):
                    raise BackendUnavailable(
                        f"the sshd of `{self.name}` opens no session beside the first",
                        hint="its sshd_config: `MaxSessions 10`",
                    ) from fault
                await anyio.sleep(random.uniform(0.1, 0.5))
                continue
            try:
                with anyio.fail_after(CROWDED):
                    while self.greets and (line := await process.stdout.readline()) != MARK.encode() + b"\n":
                        if not line:
                            raise ConnectionError("its shell ended at once")
            except BaseException:
                process.channel.abort()
                raise
            return process

    def lasts(self) -> None:
        """One session more will be there all the time."""
        self._channels.total_tokens = max(1, int(self._channels.total_tokens) - 1)

    def remote(self, command: Sequence[str]) -> str:
        """For the login shell there, whichever it is."""
        return quoted(*command, first=MARK if self.greets else "")

    def narrow(self) -> None:
        """The server takes fewer sessions than we were told."""
        self._channels.total_tokens = max(1, min(self._used - 1, int(self._channels.total_tokens) - 1))

    def command(self) -> list[str]:
        """OpenSSH's client on the same way. Raises BackendUnavailable."""
        try:
            return self.route.command()
        except Blocked as fault:
            raise BackendUnavailable(f"`{self.name}` cannot be reached: {fault}", hint=fault.hint) from fault


def quoted(*words: str, first: str = "") -> str:
    """In what any shell takes as it is, csh and fish too. `first`: a line to be said before."""
    if not first and all(PLAIN.match(word) for word in words):
        return " ".join(words)
    text = (f"echo; echo {first}; " if first else "") + "exec " + shlex.join(words)
    return f"exec sh -c 'eval \"$(printf %b \"$1\")\"' sh '{encoded(text).decode()}'"


def _words(fault: Exception) -> str:
    if isinstance(fault, TimeoutError):
        return "no answer"
    if isinstance(fault, OSError) and fault.errno:  # asyncio words its own strerror
        return os.strerror(fault.errno).lower() if fault.errno > 0 else str(fault.strerror).lower()
    reason = getattr(fault, "reason", "") or str(fault) or type(fault).__name__
    return str(reason).strip().rstrip(".")[:300]
