"""The processes of jobs on this host, as the daemon sees them: found by what cannot be reused, signalled by pidfd."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import TYPE_CHECKING

from mlpiped.backends.supervisor import open_process, pids

if TYPE_CHECKING:
    from mlpiped.backends.base import Handle


def open_supervisor(handle: Handle, boot: str) -> int | None:
    """A pidfd of the job's supervisor; None when it is gone (or of another boot). The caller closes it."""
    if handle.get("boot") != boot or not handle.get("pid") or handle.get("start") is None:
        return None
    return open_process(handle["pid"], handle["start"])


def ended(pidfd: int, within: float = 0.0) -> bool:
    poll = select.poll()  # select() refuses descriptors above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within * 1000))


def terminate(handle: Handle, boot: str) -> bool:
    """SIGTERM to the job's supervisor, never to a stranger that has its pid now. False: it is gone."""
    fd = open_supervisor(handle, boot)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def bearers(token: str) -> list[int]:
    """Pidfds of the processes whose environment has this MLPIPED_TOKEN. The caller closes them."""
    mark = b"MLPIPED_TOKEN=" + token.encode()
    found = []
    for pid in pids():
        fd = open_process(pid, None) if pid != os.getpid() else None
        if fd is None:
            continue
        try:  # read after the pidfd is open: what is read belongs to the process that will get the signal, or to none
            with open(f"/proc/{pid}/environ", "rb") as file:
                bears = mark in file.read().split(b"\0")
        except OSError:
            bears = False
        if bears:
            found.append(fd)
        else:
            os.close(fd)
    return found


def sweep(token: str, patience: float = 10.0) -> bool:
    """SIGKILL to every process of a job that lost its supervisor. False: some live on after `patience` seconds."""
    until = time.monotonic() + patience
    while fds := bearers(token):  # again and again: one may have forked while we looked
        for fd in fds:
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for fd in fds:
            ended(fd, max(0.0, until - time.monotonic()))
            os.close(fd)
        if time.monotonic() > until:
            return False
    return True
