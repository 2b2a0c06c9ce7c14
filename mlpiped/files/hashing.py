"""What a file's bytes come to: BLAKE3 of files and trees, stamps, and when a stamp may vouch for a digest.

Blocking, and meant for worker threads. Nothing here is mapped into memory: a file that is truncated while it is mapped
kills the process.
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterable

CHUNK = 1 << 20

Stamp = tuple[int, int, int, int, int]
"""(dev, ino, size, mtime_ns, ctime_ns): while it stays the same, so do the bytes, but for the racy rule (`vouches`)."""

TRIES = 3
"""So often a file is read from the start again because it changed meanwhile."""

_FINE = 20_000_000
_COARSE = 2_000_000_000
_LOCAL = frozenset({"ext4", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs", "overlay", "ramfs"})
_MOUNTS_KEPT = 60.0


class Unreadable(Exception):
    """A file that has no digest now. `args[0]` ends a sentence that begins with its name."""


class Hashed(NamedTuple):
    digest: str  # "b3:<hex>"
    stamp: Stamp  # before and after reading
    began_ns: int


class StatRow(NamedTuple):
    """A row of the ledger's stat cache: a digest, and what `stat` said. `hashed_ns`: wall clock at which hashing began,
    from when on the stamp may vouch for the digest."""

    path: bytes
    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    hashed_ns: int
    digest: str


def stamp_of(st: os.stat_result) -> Stamp:
    return (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def vouches(stamp: Stamp, hashed_at_ns: int) -> bool:
    """Whether a file with this stamp must still have the bytes that were hashed at `hashed_at_ns`.

    The kernel's clock for files ticks coarsely: a second write within the tick of the first leaves the stamp as it
    was. So a digest counts only if its reading began when that tick was over. (A writer through a shared mapping
    that is still dirty is not seen by any stamp.)
    """
    return hashed_at_ns > stamp[4] + granule(stamp)


def granule(stamp: Stamp) -> int:
    """Nanoseconds within which the file system of `stamp` may not tell two writes apart."""
    whole_seconds = stamp[4] % 1_000_000_000 == 0
    return _COARSE if whole_seconds or _mounts.kind(stamp[0]) not in _LOCAL else _FINE


def file_system(dev: int) -> str:
    """`ext4`, `nfs4`, …; empty when the kernel does not say."""
    return _mounts.kind(dev)


class _Mounts:
    """File system types by device number, read again now and then: numbers of unmounted ones are used again."""

    def __init__(self) -> None:
        self._kinds: dict[int, str] = {}
        self._read_at = -_MOUNTS_KEPT

    def kind(self, dev: int) -> str:
        if time.monotonic() - self._read_at > _MOUNTS_KEPT:
            self._kinds = self._read()
            self._read_at = time.monotonic()
        return self._kinds.get(dev, "")

    @staticmethod
    def _read() -> dict[int, str]:
        kinds = {}
        try:
            with open("/proc/self/mountinfo", errors="surrogateescape") as lines:
                for line in lines:
                    left, _, right = line.partition(" - ")
                    major, _, minor = left.split(" ", 3)[2].partition(":")
                    kinds[os.makedev(int(major), int(minor))] = right.split(" ", 1)[0]
        except (OSError, ValueError, IndexError):
            return {}
        return kinds


_mounts = _Mounts()


def open_file(path: str, *, dir_fd: int | None = None) -> int:
    """A descriptor of a regular file; a link in the last place is not followed, a FIFO does not block."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    return os.open(path, flags, dir_fd=dir_fd)


class FileHash:
    """One file on its way to a digest, a slice of time at a time, so that no huge file holds a thread for long."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._tries = 0
        self._hasher = blake3()
        self._stamp: Stamp = (0, 0, 0, 0, 0)
        self._began = 0

    def advance(self, deadline: float, buffer: bytearray) -> Hashed | None:
        """Read on until done or `deadline` (time.monotonic); None: call again. Raises Unreadable."""
        try:
            if self._fd < 0:
                self._fd = open_file(self.path)
                self._restart()
            return self._read(deadline, buffer)
        except OSError as fault:
            raise Unreadable(f"cannot be read: {(fault.strerror or str(fault)).lower()}") from fault

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _restart(self) -> None:
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._began = time.time_ns()
        st = os.fstat(self._fd)
        if not stat.S_ISREG(st.st_mode):
            raise Unreadable("is not a regular file")
        self._stamp = stamp_of(st)
        self._hasher = blake3(max_threads=1)

    def _read(self, deadline: float, buffer: bytearray) -> Hashed | None:
        view = memoryview(buffer)
        while True:
            count = os.readv(self._fd, [view])
            if count:
                self._hasher.update(view[:count])
            if count < len(buffer) and (done := self._finish(count)):
                return done
            if time.monotonic() > deadline:
                return None

    def _finish(self, count: int) -> Hashed | None:
        """At a short read: the digest, if the file is what it was at the start; else begin again."""
        now = stamp_of(os.fstat(self._fd))
        if now == self._stamp:
            if count and self._hasher_length() < now[2]:
                return None
            return Hashed(f"b3:{self._hasher.hexdigest()}", now, self._began)
        self._tries += 1
        if self._tries >= TRIES:
            raise Unreadable("changes while it is read")
        self._restart()
        return None

    def _hasher_length(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_CUR)


def hash_fd(fd: int) -> Hashed:
    """The digest of an open regular file, all of it, in this thread. Raises Unreadable when it keeps changing."""
    job = FileHash("")
    job._fd = fd
    job._restart()
    size = job._stamp[2]
    buffer = bytearray(min(max(size + 1, 512), CHUNK))
    while True:
        done = job._read(float("inf"), buffer)
        if done is not None:
            return done


def copy_fd(source: int, target: int) -> str:
    """Copy what is left to read of one descriptor to another; the digest of what was copied."""
    hasher = blake3(max_threads=1)
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    while count := os.readv(source, [view]):
        hasher.update(view[:count])
        written = 0
        while written < count:
            written += os.write(target, view[written:count])
    return f"b3:{hasher.hexdigest()}"


def tree_digest(entries: Iterable[tuple[bytes, str, str]]) -> str:
    """`b3t:<hex>` over (relative name, kind, payload) in any order.

    Kinds: `f` file and `x` executable file (payload: digest), `l` link (target), `d` folder (empty, or its digest).
    Neither names nor payloads hold a NUL, so the NULs make it unambiguous.
    """
    lines = [b"%b\0%b%b\0" % (name, kind.encode(), os.fsencode(payload)) for name, kind, payload in sorted(entries)]
    return "b3t:" + blake3(b"mlpiped tree 1\0" + b"".join(lines), max_threads=1).hexdigest()


def printable(name: str) -> str:
    """A file name as text that every terminal, database and JSON document takes; for people, not for opening."""
    if name.isprintable():
        return name
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
