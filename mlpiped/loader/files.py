"""What lies in the plugins folders now, and whether a file still is what it was: stat first, hash on doubt."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mlpiped.loader.load import digest_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_GRANULE = 50_000_000  # ns: a change this shortly after another may leave the same time stamp

Signature = tuple[int, int, int, int, int]


def ignored(name: str) -> bool:
    """Whether `name` is an editor's temporary, a cache, hidden, or half of a copy."""
    return name.startswith((".", "#")) or name.endswith(("~", ".swp", ".swx", ".tmp", ".pyc")) or name == "__pycache__"


def plugins_in(folder: str) -> list[str]:
    """The plugin files and package folders directly in `folder`, sorted. Raises OSError when it cannot be read."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if ignored(entry.name):
                continue
            if entry.name.endswith(".py"):
                if entry.name != "__init__.py":
                    found.append(entry.path)
            elif entry.is_dir() and os.path.isfile(os.path.join(entry.path, "__init__.py")):
                found.append(entry.path)
    return sorted(found)


class Digests:
    """Digests of files, hashed again only when their stat changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Signature, str]] = {}

    def of(self, path: str) -> str:
        before = _signature(path)
        seen = self._seen.get(path)
        if before is not None and seen is not None and seen[0] == before:
            return seen[1]
        digest = digest_of(path)
        if before is not None and before == _signature(path) and time.time_ns() - before[4] > _GRANULE:
            self._seen[path] = (before, digest)
        else:
            self._seen.pop(path, None)
        return digest

    def hold(self, files: Mapping[str, str]) -> bool:
        """Whether all of `files` still have these digests."""
        return all(self.of(path) == digest for path, digest in files.items())

    def forget(self) -> None:
        self._seen.clear()


def _signature(path: str) -> Signature | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def owner_of(path: str) -> str:
    """The name of the user that the file belongs to, or the number where it has none."""
    import pwd

    file = os.path.join(path, "__init__.py") if os.path.isdir(path) else path
    try:
        uid = os.stat(file).st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def folders_to_watch(folders: Iterable[str], files: Iterable[str]) -> frozenset[str]:
    """Folders in which a change may concern a plugin; none is watched below itself.

    The plugins folders with their own folders (one may become a package), their parents (to see one come back), and
    where the files of plugins lie or would lie. Only what exists, for the watcher.
    """
    wanted = {os.path.dirname(one) for one in files}
    for folder in folders:
        wanted |= {folder, os.path.dirname(folder)}
        with suppress(OSError), os.scandir(folder) as entries:
            wanted.update(one.path for one in entries if not ignored(one.name) and one.is_dir())
    return frozenset(_existing(one) for one in wanted)


def _existing(folder: str) -> str:
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return folder
