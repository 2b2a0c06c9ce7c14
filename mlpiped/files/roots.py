"""Whether the folders of datastores are there, and which faults of a disk pass. Blocking.

A folder that has lost its mount is not one whose files were deleted: who needs it waits until it is back.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlpiped.errors import StorageAway
from mlpiped.files.hashing import printable
from mlpiped.files.mounts import mount_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSING = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV),
    }
)
"""Of a disk that is full, a server that is away: not of what was asked for. (A disk that is read-only, or closed to us,
is as somebody has set it up.)"""


class Roots:
    """Which folder each datastore was, as long as we live, and on which mount."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}  # device and inode
        self._mounts: dict[str, tuple[str, bytes]] = {}  # the folder, links resolved, and its mount point

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
        real, point = os.path.realpath(root), mount_of(os.fsencode(root)).point
        before, home = self._mounts.get(root, (real, point))
        if before == real and len(point) < len(home):
            return f"the datastore `{printable(root)}` is not mounted: what was at `{os.fsdecode(home)}` is gone"
        self._seen[root], self._mounts[root] = (st.st_dev, st.st_ino), (real, point)
        return None


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
