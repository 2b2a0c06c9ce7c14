"""Host keys of boxes: what a box shows, which key is trusted, and how one is kept. Nothing is trusted by itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import asyncssh

from mlpiped.errors import BackendUnavailable, MlpipedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.config.computes import SshCompute

ANSWER_TIME = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Box:
    """A box as it is looked up in known_hosts: by any of `names`, and its port."""

    names: tuple[str, ...]
    port: int

    def patterns(self) -> list[str]:
        return [name if self.port == 22 else f"[{name}]:{self.port}" for name in self.names]


@dataclass(frozen=True, slots=True)
class HostKey:
    algorithm: str
    fingerprint: str  # "SHA256:…"
    text: str  # algorithm and base64, as known_hosts has them


def _key(key: asyncssh.SSHKey) -> HostKey:
    words = key.export_public_key().decode().split()
    return HostKey(words[0], key.get_fingerprint(), " ".join(words[:2]))


async def box_of(compute: SshCompute) -> Box:
    """Its names: as the config has it, and as its `ssh_config` says. Raises BackendUnavailable."""
    try:
        options = await asyncssh.SSHClientConnectionOptions.construct(
            host=compute.host, config=_config(compute), known_hosts=None, client_keys=None, agent_path=None
        )
    except (OSError, ValueError, asyncssh.Error) as fault:
        raise BackendUnavailable(f"the `ssh_config` of `{compute.host}` cannot be used: {fault}") from None
    names = (compute.host, options.host, *([options.host_key_alias] if options.host_key_alias else []))
    return Box(tuple(dict.fromkeys(names)), options.port if _port_of_config(compute) else compute.port)


def _config(compute: SshCompute) -> list[str]:
    return [] if compute.ssh_config is None else [str(compute.ssh_config)]


def _port_of_config(compute: SshCompute) -> bool:
    """`port` left alone, and an `ssh_config` that may say another."""
    return compute.ssh_config is not None and compute.port == 22


async def shown_by(compute: SshCompute) -> HostKey:
    """The key that the box shows now, to whoever asks. Raises BackendUnavailable."""
    port = () if _port_of_config(compute) else compute.port
    try:
        with anyio.fail_after(ANSWER_TIME):
            found = await asyncssh.get_server_host_key(compute.host, port, config=_config(compute))
    except (OSError, ValueError, asyncssh.Error, TimeoutError) as fault:
        raise BackendUnavailable(f"`{compute.host}` cannot be reached: {fault or 'no answer in time'}") from None
    if found is None:
        raise BackendUnavailable(f"`{compute.host}` shows no host key")
    return _key(found)


def trusted(path: Path, box: Box) -> list[HostKey]:
    """The keys that the file `path` has for `box`; none without the file. Raises MlpipedError."""
    try:
        known = asyncssh.import_known_hosts(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as fault:
        raise MlpipedError(f"the host keys in `{path}` cannot be read: {fault}") from None
    port = None if box.port == 22 else box.port
    found: Sequence[asyncssh.SSHKey] = [key for name in box.names for key in known.match(name, "", port)[0]]
    return list(dict.fromkeys(map(_key, found)))


def trust(path: Path, box: Box, key: HostKey) -> None:
    """Add a line to `path`, for whoever owns its folder. Raises MlpipedError."""
    line = f"{','.join(box.patterns())} {key.text}\n".encode()
    try:
        new = not path.exists()
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if new and os.geteuid() == 0:
                owner = os.stat(path.parent)
                os.fchown(file, owner.st_uid, owner.st_gid)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as fault:
        hint = "run it as root, or as the daemon's user" if isinstance(fault, PermissionError) else None
        raise MlpipedError(f"cannot write `{path}`: {(fault.strerror or '').lower()}", hint=hint) from None
