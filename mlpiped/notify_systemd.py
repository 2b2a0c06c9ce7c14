"""sd_notify: what the daemon tells systemd about itself. Outside systemd every call does nothing."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def send(message: str, env: Mapping[str, str] = os.environ, fds: Sequence[int] = ()) -> bool:
    """One datagram of `KEY=value` lines to `$NOTIFY_SOCKET`; whether it was sent. Never raises, never waits."""
    address = env.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as channel:
            channel.connect(address)
            socket.send_fds(channel, [message.encode()], fds)
    except OSError:
        return False
    return True


def ready(status: str = "", env: Mapping[str, str] = os.environ) -> bool:
    return send("READY=1" + _status(status), env)


def reloading(env: Mapping[str, str] = os.environ) -> bool:
    """To be followed by `ready` when the reload is done."""
    return send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", env)


def stopping(status: str = "", env: Mapping[str, str] = os.environ) -> bool:
    return send("STOPPING=1" + _status(status), env)


def status(text: str, env: Mapping[str, str] = os.environ) -> bool:
    """The line that `systemctl status` shows."""
    return send(_status(text).lstrip("\n"), env)


def keep(fd: int, name: str, env: Mapping[str, str] = os.environ) -> bool:
    """systemd holds a duplicate of `fd` over a restart and passes it to the next process, as far as the unit's
    `FileDescriptorStoreMax=` allows."""
    return send(f"FDSTORE=1\nFDNAME={name}", env, (fd,))


def let_go(name: str, env: Mapping[str, str] = os.environ) -> bool:
    """The opposite of `keep`."""
    return send(f"FDSTOREREMOVE=1\nFDNAME={name}", env)


def watchdog(env: Mapping[str, str] = os.environ) -> bool:
    return send("WATCHDOG=1", env)


def watchdog_interval(env: Mapping[str, str] = os.environ) -> float | None:
    """Seconds within which systemd wants a `watchdog()`; None when it wants none of this process."""
    pid, microseconds = env.get("WATCHDOG_PID"), env.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or int(microseconds) == 0 or (pid is not None and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1_000_000


def _status(text: str) -> str:
    line = " ".join(text.split())
    return f"\nSTATUS={line}" if line else ""
