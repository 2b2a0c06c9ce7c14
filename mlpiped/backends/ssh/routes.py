"""The way to a box, also through the jump hosts that `ssh_config` names; for asyncssh and for OpenSSH's client.

Every host on the way is checked against the same known hosts. What is no way at all is a Blocked, with its words.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncssh

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.config.computes import SshCompute

CONNECT, LOGIN = 10.0, 20.0  # seconds
LOST_AFTER = 3  # keepalives without an answer
NOBODY = b"# no host is known\n"  # None would mean that any host will do
CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
    "aes256-ctr",
)
JUMP = re.compile(r"(?:(?P<user>[^@]+)@)?(?P<host>\[[^]]+\]|[^:]+)(?::(?P<port>[0-9]+))?\Z")


class Blocked(Exception):
    """The settings or the files that they name lead nowhere. `hint`: what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class AtJump(Exception):
    """What went wrong at the jump host `host`, of which the cause is `fault`."""

    def __init__(self, host: str, fault: Exception) -> None:
        super().__init__(str(fault))
        self.host, self.fault = host, fault


@dataclass(frozen=True, slots=True)
class Hop:
    """A host to log in to. None: as `ssh_config` has it."""

    host: str
    user: str | None
    port: int | None
    key: str | None


class Route:
    def __init__(self, settings: SshCompute, known_hosts: Path) -> None:
        self.settings = settings
        self.known_hosts = known_hosts

    async def connect(self) -> asyncssh.SSHClientConnection:
        """Raises Blocked, AtJump, and of the box itself what asyncssh raises."""
        *jumps, box = self._hops()
        way: asyncssh.SSHClientConnection | None = None
        try:
            for hop in jumps:
                before = way
                try:
                    way = await asyncssh.connect(hop.host, tunnel=before, **self._options(hop))
                except (OSError, asyncssh.Error, TimeoutError) as fault:
                    raise AtJump(hop.host, fault) from fault
                way.set_tunnel(before)  # ends with it
            connection = await asyncssh.connect(box.host, tunnel=way, **self._options(box))
        except BaseException:
            if way is not None:
                way.abort()
            raise
        connection.set_tunnel(way)
        return connection

    def command(self) -> list[str]:
        """OpenSSH's client on the same way, with the same keys and known hosts. Raises Blocked."""
        *jumps, box = self._hops()
        return self._command(box, jumps)

    def known_as(self, host: str) -> tuple[str, int | None]:
        """The name and port by which known_hosts has it; no port where it is the usual one. Raises Blocked."""
        hop = next((hop for hop in self._hops() if hop.host == host), None)
        options = self._read(host)
        port = options.port if hop is None or hop.port is None else hop.port
        return options.host_key_alias or options.host or host, None if port == 22 else port

    # --- what is on the way -------------------------------------------------------------------------------------
    def _hops(self) -> list[Hop]:
        settings = self.settings
        port = None if settings.ssh_config is not None and settings.port == 22 else settings.port
        key = None if settings.key_file is None else str(settings.key_file)
        found = self._read(settings.host).tunnel if settings.ssh_config is not None else None
        jumps = []
        for text in found.split(",") if isinstance(found, str) else ():
            jump = JUMP.match(text.strip())
            if jump is None:
                raise Blocked(f"`ProxyJump` names no host: {text}", f"see {settings.ssh_config}")
            host = jump["host"].strip("[]")
            own = bool(self._read(host).client_keys)  # that it has been given there, else the box's
            jumps.append(Hop(host, jump["user"], int(jump["port"]) if jump["port"] else None, None if own else key))
        return [*jumps, Hop(settings.host, settings.user, port, key)]

    def _read(self, host: str) -> asyncssh.SSHClientConnectionOptions:
        settings = self.settings
        for path in (settings.ssh_config, settings.key_file):
            if path is not None and not os.access(path, os.R_OK):
                why = "does not exist" if not path.exists() else "cannot be read"
                raise Blocked(f"{path} {why}", "see `ssh_config` and `key_file` in its config")
        try:
            return asyncssh.SSHClientConnectionOptions(config=self._config(), host=host)
        except (OSError, ValueError) as fault:
            raise Blocked(_words(fault), f"see {settings.ssh_config}") from fault

    def _config(self) -> list[str]:
        return [str(self.settings.ssh_config)] if self.settings.ssh_config is not None else []

    def _options(self, hop: Hop) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "config": self._config(),
            "known_hosts": str(self.known_hosts) if self.known_hosts.exists() else NOBODY,
            "preferred_auth": "publickey",
            "keepalive_interval": settings.keepalive,
            "keepalive_count_max": LOST_AFTER,
            "connect_timeout": CONNECT,
            "login_timeout": LOGIN,
            "encryption_algs": CIPHERS,
        }
        if hop.port is not None:
            options["port"] = hop.port
        if hop.user is not None:
            options["username"] = hop.user
        if hop.key is not None:
            options["client_keys"] = self._keys(hop.key)
        if not settings.agent:
            options["agent_path"] = None
        return options

    def _keys(self, path: str) -> list[str]:
        """Raises Blocked for what cannot be used without somebody at a keyboard, unless an agent may have it."""
        try:
            asyncssh.read_private_key(path)
        except asyncssh.KeyImportError as fault:
            if not self.settings.agent:
                hint = "name a key without a passphrase, or give it to an agent: `agent = true`"
                raise Blocked(f"the key {path} cannot be used: {_words(fault).lower()}", hint) from fault
            return []
        return [path]

    def _command(self, hop: Hop, jumps: Sequence[Hop]) -> list[str]:
        settings = self.settings
        words = ["ssh", "-T", "-oBatchMode=yes", "-oStrictHostKeyChecking=yes", "-oClearAllForwardings=yes"]
        known = str(self.known_hosts).replace("%", "%%")
        words += [f'-oUserKnownHostsFile="{known}"', "-oGlobalKnownHostsFile=/dev/null"]
        words += [f"-oConnectTimeout={CONNECT:.0f}", f"-oServerAliveInterval={max(1, round(settings.keepalive))}"]
        words += [f"-oServerAliveCountMax={LOST_AFTER}", "-oControlMaster=no", "-oControlPath=none"]
        words += ["-oCompression=no", f"-oCiphers={','.join(CIPHERS)}"]
        words += ["-F", str(settings.ssh_config or "/dev/null")]
        if jumps:
            through = shlex.join(self._command(jumps[-1], jumps[:-1])[:-2]).replace("%", "%%")
            words += ["-oProxyJump=none", f"-oProxyCommand={through} -W '[%h]:%p' -- {shlex.quote(jumps[-1].host)}"]
        if hop.key is not None:
            words += ["-i", hop.key, "-oIdentitiesOnly=yes"]
        if not settings.agent:
            words += ["-oIdentityAgent=none"]
        if hop.user is not None:
            words += ["-l", hop.user]
        if hop.port is not None:
            words += ["-p", str(hop.port)]
        return [*words, "--", hop.host]


async def agent_keys() -> int | None:
    """How many keys the agent of `$SSH_AUTH_SOCK` has; None: there is no agent."""
    try:
        agent = await asyncssh.connect_agent()
        try:
            return len(list(await agent.get_keys()))
        finally:
            agent.close()
    except (OSError, asyncssh.Error, ValueError):
        return None


def _words(fault: Exception) -> str:
    return str(getattr(fault, "reason", "") or fault).strip().rstrip(".")[:300]
