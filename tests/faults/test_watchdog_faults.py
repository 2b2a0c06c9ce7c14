"""B2: systemd's watchdog is fed only while the loop is in time and the ledger answers. Threads are really stopped."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Iterable, Iterator

import pytest
from harness import Daemon, until

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
SEIZE, INTERRUPT, DETACH, WALL = 0x4206, 0x4207, 17, 0x40000000
PATIENCE = 3  # seconds that systemd would wait; a third of it is the pace at which it is fed


class Systemd:
    """What the daemon takes for systemd."""

    def __init__(self, ear: socket.socket) -> None:
        self.ear = ear

    def fed(self, within: float) -> bool:
        """Whether the watchdog is fed from now on, within so many seconds."""
        self.ear.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.ear.recv(4096):
                pass
        until = time.monotonic() + within
        while (left := until - time.monotonic()) > 0:
            self.ear.settimeout(left)
            with contextlib.suppress(TimeoutError):
                if b"WATCHDOG=1" in self.ear.recv(4096):
                    return True
        return False


@pytest.fixture
def watched() -> Iterator[tuple[Daemon, Systemd]]:
    name = f"mlpiped-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(f"\0{name}")
        with Daemon(env={"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": str(PATIENCE * 1_000_000)}) as daemon:
            yield daemon, Systemd(ear)


@contextlib.contextmanager
def frozen(threads: Iterable[int]) -> Iterator[None]:
    """These threads stand still, and no others; they go on at the end, or when we die."""
    held = []
    try:
        for thread in threads:
            if LIBC.ptrace(SEIZE, thread, None, None):
                pytest.skip(f"threads may not be stopped here: {os.strerror(ctypes.get_errno())}")
            held.append(thread)
            LIBC.ptrace(INTERRUPT, thread, None, None)
            os.waitpid(thread, WALL)
        yield
    finally:
        for thread in held:
            LIBC.ptrace(DETACH, thread, None, None)


def _threads(pid: int) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{pid}/task")}


@pytest.mark.parametrize("what", ["the loop", "the ledger"])
def test_B2_the_watchdog_is_not_fed_while_a_part_of_the_daemon_hangs(
    watched: tuple[Daemon, Systemd], what: str
) -> None:
    daemon, systemd = watched
    assert systemd.fed(20), "a daemon that is well feeds it"
    loop = {daemon.pid}
    with frozen(loop if what == "the loop" else _threads(daemon.pid) - loop):
        systemd.fed(1)  # one may have been on its way
        assert not systemd.fed(PATIENCE + 1)
        if what == "the ledger":
            assert daemon.accepts(), "its loop is alive all the while"
    until(lambda: systemd.fed(1), "it is fed again", pause=0)
    assert daemon.json("status")["daemon"]["pid"] == daemon.pid
