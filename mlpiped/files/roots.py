"""Whether the folders of datastores are there, and which faults of a disk pass. Blocking.

A folder that has lost its mount is not one whose files were deleted: who needs it waits until it is back.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mlpiped.errors import StorageAway
from mlpiped.files.hashing import printable
from mlpiped.files.mounts import mount_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSING = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV),
    }
)
"""Of a disk that is full, a server that is away: not of what was asked for. (A disk that is read-only, or closed to us,
is as somebody has set it up.)"""


class Roots:
    """Which folder each datastore is, and on which mount: as long as we live, and in `file` for who comes after."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._seen: dict[str, tuple[int, int]] = {}  # device and inode
        self._homes: dict[str, list[str]] = {}  # the folder, links resolved, and its mount point
        self._told = _read(file)  # the same, by the daemon before
        self._writing = threading.Lock()

    def away(self, root: str) -> str | None:
        """Why it cannot be used now, in a sentence; None when it is there."""
        try:
            st = os.stat(root)
        except OSError as fault:
            if fault.errno in (errno.ENOENT, errno.ENOTDIR):
                return f"the datastore's folder `{printable(root)}` is not there"
            return f"the datastore's folder `{printable(root)}` cannot be read: {(fault.strerror or '').lower()}"
        if not stat.S_ISDIR(st.st_mode):
            return f"the datastore's folder `{printable(root)}` is not there"
        if self._seen.get(root) == (st.st_dev, st.st_ino):
            return None
        now = [os.path.realpath(root), os.fsdecode(mount_of(os.fsencode(root)).point)]
        home = self._homes.get(root)
        if home is None:  # after a restart a mount that is gone may be meant, if there are files
            home = self._told.get(root, now) if _is_empty(root) else now
        if home[0] == now[0] and len(now[1]) < len(home[1]):
            return f"the datastore `{printable(root)}` is not mounted: what was at `{printable(home[1])}` is gone"
        self._seen[root], self._homes[root] = (st.st_dev, st.st_ino), now
        self._tell(root, now)
        return None

    def _tell(self, root: str, home: list[str]) -> None:
        with self._writing:
            if self._file is None or self._told.get(root) == home:
                return
            self._told[root] = home
            fresh = self._file.with_name(self._file.name + ".new")
            with suppress(OSError):  # it is told the next time
                fresh.write_text(json.dumps(self._told))
                fresh.replace(self._file)


def _is_empty(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return False


def _read(file: Path | None) -> dict[str, list[str]]:
    try:
        found = json.loads(b"{}" if file is None else file.read_bytes())
        return {str(root): [str(real), str(point)] for root, (real, point) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@contextmanager
def passing(what: str) -> Iterator[None]:
    """Raises StorageAway, which begins with `what`, for an OSError that passes."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in PASSING:
            raise
        where = f": `{printable(os.fsdecode(fault.filename))}`" if fault.filename else ""
        raise StorageAway(f"{what}: {(fault.strerror or str(fault)).lower()}{where}") from fault
