"""Space kept back for the day the disk is full: without it not even the end of a running step could be recorded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 16 * 2**20


class Ballast:
    """A file that is allocated while there is space and removed when there is none. Blocking: for a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def hold(self) -> bool:
        """Have the space. False when the disk has less than twice as much as is to be kept back."""
        try:
            if self._path.exists():
                return True
            disk = os.statvfs(self._path.parent)
            size = min(SIZE, disk.f_blocks * disk.f_frsize // 8)
            if disk.f_bavail * disk.f_frsize < 2 * size:
                return False
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError:
                self._path.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
        except OSError:
            return False
        return True

    def drop(self) -> bool:
        """Give the space back. False when there was none."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
