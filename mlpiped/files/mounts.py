"""Which file system a path lies on, and whether the kernel reports changes there. From /proc/self/mountinfo."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

MOUNTINFO = "/proc/self/mountinfo"

_REMOTE = frozenset(
    "nfs nfs4 cifs smb2 smb3 smbfs ncpfs 9p afs ceph lustre gpfs beegfs glusterfs orangefs pvfs2 ocfs2 gfs2 virtiofs "
    "vboxsf vmhgfs prl_fs coda autofs acfs wekafs panfs".split()
)
_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    point: bytes
    fstype: str


def is_remote(fstype: str) -> bool:
    """Whether others can change files there without our kernel seeing it. Fuse counts: it may be sshfs or a cloud."""
    return fstype in _REMOTE or (fstype.startswith("fuse") and fstype not in ("fuseblk", "fusectl"))


def mount_of(path: bytes, table: bytes | None = None) -> Mount:
    """The mount that `path` lies on, links resolved. Of two at one place the later one is on top."""
    real, best = os.path.realpath(path), Mount(b"/", "")
    for mount in parse(_read() if table is None else table):
        if _holds(mount.point, real) and len(mount.point) >= len(best.point):
            best = mount
    return best


def parse(table: bytes) -> list[Mount]:
    """In the order of the kernel. Lines that are not understood are passed over."""
    found = []
    for line in table.splitlines():
        left, dash, right = line.partition(b" - ")
        fields = left.split(b" ")
        if dash and len(fields) >= 6:
            point = _ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), fields[4])
            found.append(Mount(point, right.split(b" ", 1)[0].decode("ascii", "replace")))
    return found


def _holds(point: bytes, path: bytes) -> bool:
    return point == b"/" or path == point or path.startswith(point + b"/")


def _read() -> bytes:
    try:
        with open(MOUNTINFO, "rb") as lines:
            return lines.read()
    except OSError:
        return b""
