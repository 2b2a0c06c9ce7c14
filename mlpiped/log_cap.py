"""No step's log fills the disk: of one that grows beyond `MOST` its head and tail stay, and the middle is given back.

The step writes straight into its file and goes on, whoever lives: it appends, so a hole in the middle (fallocate's
PUNCH_HOLE) is nothing that it could notice. Offsets stay what they were. While no daemon lives a log grows as it will,
and the next one cuts it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import anyio
import structlog
from anyio import to_thread

log = structlog.get_logger("logs")

HEAD = TAIL = 64 << 20  # bytes that are kept at either end
MOST = HEAD + TAIL + (128 << 20)  # bytes on the disk above which the middle goes: not at every line
HOLE = 1 << 20  # bytes: a smaller gap is one that the step made itself
BLOCK = 1 << 16  # file systems give back whole blocks
EVERY = 1.0  # seconds: a fast disk takes a gigabyte or two in that time
FILLED = MOST // 4  # bytes: so much less is free when a log has grown by as much
ROUND = 30.0  # seconds: what others remove meanwhile hides how a log grows
KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02
STREAMS = ("stdout", "stderr")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def trim(path: str, *, head: int = HEAD, tail: int = TAIL, most: int = MOST) -> int:
    """Bytes of the disk given back. Raises OSError when the file system cannot do it; a file that is gone, or that is
    no log of ours alone, is left as it is."""
    try:
        now = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(now.st_mode) or now.st_blocks * 512 <= most:
            return 0
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    try:
        before = os.fstat(fd)
        end = (before.st_size - tail) // BLOCK * BLOCK
        if not stat.S_ISREG(before.st_mode) or before.st_nlink != 1 or end <= head:
            return 0
        if _libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, head, end - head):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return max(0, before.st_blocks - os.fstat(fd).st_blocks) * 512
    finally:
        os.close(fd)


def bounds(fd: int, offset: int) -> tuple[int, int | None]:
    """(first byte at or beyond `offset` that was kept, first byte beyond it that was not; None when all that follows
    was). `offset` itself when nothing is missing there."""
    found = os.fstat(fd)
    if found.st_blocks * 512 + HOLE > found.st_size:
        return offset, None
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as fault:  # nothing but a hole follows, or the file system knows of none
        return (found.st_size if fault.errno == errno.ENXIO and offset < found.st_size else offset), None
    if data - offset < HOLE:
        data = offset
    hole = os.lseek(fd, max(data, offset), os.SEEK_HOLE)
    return data, hole if hole > data else None


class LogCap:
    """Of the attempts whose jobs have folders below `home`. `begun` names those that have begun and not ended, and
    `printing` leaves out those that wait in a queue. There may be thousands that print nothing: all are looked at when
    a disk has filled by `filled` bytes since, or `round` seconds are over; else those that have just begun or ended."""

    def __init__(
        self,
        home: str,
        begun: Callable[[], Iterable[str]],
        printing: Callable[[], Iterable[str]] | None = None,
        *,
        every: float = EVERY,
        round: float = ROUND,
        filled: int = FILLED,
    ) -> None:
        self._home, self._begun, self._printing = home, begun, printing or begun
        self._every, self._round, self._filled = every, round, filled
        self._limiter = anyio.CapacityLimiter(1)
        self._disks: dict[int, _Disk] = {}
        self._looked = 0.0  # at all of them; monotonic
        self._cut: set[str] = set()  # logs of attempts that run, which were cut
        self._told = False  # that it cannot be done here

    async def run(self) -> None:
        """Until cancelled."""
        before: set[str] = set()
        while True:
            now = set(self._begun())
            if now or before:
                await self._look(now, before)
            before = now
            await anyio.sleep(self._every)

    async def _look(self, now: set[str], before: set[str]) -> None:
        ended = before - now  # these had their last word
        due = await to_thread.run_sync(self._due, now - before, limiter=self._limiter)
        tokens = ended | set(self._printing()) if due else now ^ before
        if tokens:
            await to_thread.run_sync(self._trim, tokens, limiter=self._limiter)
        self._cut -= {path for token in ended for path in self._paths(token)}

    def _due(self, new: set[str]) -> bool:
        """Whether all are to be looked at."""
        for token in new:
            self._note(token)
        filled = [disk.has_filled(self._filled) for disk in self._disks.values()]  # each is asked
        if not any(filled) and time.monotonic() < self._looked + self._round:
            return False
        self._looked = time.monotonic()
        for disk in self._disks.values():
            disk.free = disk.left()
        return True

    def _paths(self, token: str) -> list[str]:
        return [f"{self._home}/{token}/{stream}" for stream in STREAMS]

    def _note(self, token: str) -> None:
        """That logs are on the disk of its folder."""
        home = os.path.dirname(os.path.realpath(f"{self._home}/{token}"))
        with suppress(OSError):
            device = os.stat(home).st_dev
            if device not in self._disks:
                self._disks[device] = _Disk(home)

    def _trim(self, tokens: Iterable[str]) -> None:
        for token in tokens:
            for path in self._paths(token):
                try:
                    if trim(path) and path not in self._cut:
                        self._cut.add(path)
                        log.warning("a log is cut in its middle: it is too long", path=path, most=MOST)
                except OSError as fault:
                    if not self._told:
                        self._told = True
                        log.warning("logs are not kept from filling the disk", path=path, why=fault.strerror)


class _Disk:
    """`free`: bytes that nobody used when its logs were looked at last, or more that were since."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.free = self.left()

    def left(self) -> int:
        try:
            found = os.statvfs(self.home)
        except OSError:
            return 0
        return found.f_bfree * found.f_frsize

    def has_filled(self, by: int) -> bool:
        left = self.left()
        self.free = max(self.free, left)
        return self.free - left >= by
