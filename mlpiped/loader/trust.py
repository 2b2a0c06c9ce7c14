"""Who may have written a plugin: its bytes, read once from a descriptor that was checked, or a sentence why not.

A plugin runs as the daemon's user. So whoever may write its file, or the folder it lies in, must be meant to:
the folders, from `/` down, belong to root, to the daemon's user or to one of `authors`, and not everybody may write
them (a sticky folder is fine on the way, but not as the last one). A group that may write the folder is the group
of authors, and a file there may belong to any member of it.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


class Refused(Exception):
    """A sentence, and the next action."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def read_plugin(path: str, most: int) -> tuple[bytes, os.stat_result]:
    """The bytes of a regular file; no link is followed, no pipe waited for. Raises Refused, FileNotFoundError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if os.path.islink(path):
            raise Refused("a symbolic link is not loaded", "put the file itself into the folder") from None
        raise Refused(f"cannot be read: {error.strerror}") from None
    with open(file, "rb") as opened:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise Refused("not a regular file")
        data = opened.read(most + 1)
    if len(data) > most:
        raise Refused(f"larger than {most >> 20} MiB")
    return data, found


def check_file(path: str, found: os.stat_result) -> None:
    """Raises Refused where somebody else than its owner and group may write the open file."""
    if found.st_mode & 0o002:
        raise Refused(f"everybody may write it: mode {found.st_mode & 0o7777:04o}", f"chmod o-w {path}")
    if found.st_nlink != 1:
        raise Refused("it has a second name (a hard link)", "put a copy into the folder")


def check_folders(folder: str, authors: Collection[int] = ()) -> None:
    """Raises Refused where a folder on the way to a plugin lets others in."""
    trusted = {0, os.geteuid(), *authors}
    real = os.path.realpath(folder)
    path = real
    while True:
        found = os.stat(path)
        if found.st_uid not in trusted:
            raise Refused(
                f"its folder `{path}` belongs to uid {found.st_uid}",
                f"chown {os.geteuid()} {path}",
            )
        sticky_on_the_way = found.st_mode & stat.S_ISVTX and path != real
        if found.st_mode & 0o002 and not sticky_on_the_way:
            raise Refused(
                f"everybody may write its folder `{path}`: mode {found.st_mode & 0o7777:04o}",
                f"chmod o-w {path}",
            )
        parent = os.path.dirname(path)
        if parent == path:
            return
        path = parent
