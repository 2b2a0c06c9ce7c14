"""Which files there are below a folder, and never outside it: globs, single paths and whole trees. Blocking.

Names are `str` with surrogate escapes, so that every byte sequence that a file system allows survives.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

from mlpiped.errors import MlpipedError
from mlpiped.files.hashing import Stamp, printable, stamp_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MAGIC = re.compile(r"[*?\[]")


class PathRefused(MlpipedError):
    """a path leads outside its folder"""

    http_status = 400


class Member(NamedTuple):
    """Something in a tree. `stamp` is that of a file; `target` that of a link."""

    rel: str
    kind: str  # f, x (executable), l, d
    path: str
    stamp: Stamp | None = None
    target: str = ""


class Place(NamedTuple):
    """Something that a reference names: `path` as it is shown, `real` with every link resolved."""

    rel: str
    path: str
    real: str
    st: os.stat_result


def parts_of(path: str) -> list[str]:
    """The parts of a relative path. Raises PathRefused for what could leave the folder that it is relative to."""
    if "\0" in path:
        raise PathRefused(f"the path `{printable(path)}` has a NUL in it")
    if path.startswith("/"):
        raise PathRefused(f"the path `{printable(path)}` is absolute", hint="write it relative to its folder")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PathRefused(f"the path `{printable(path)}` has `..` in it", hint="name a path below its folder")
    return parts


def is_beneath(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def kind_of(mode: int) -> str:
    return "x" if mode & 0o111 else "f"


def walk(top: str) -> list[Member]:
    """Everything below `top`, in no order. Raises PathRefused for what is no file, folder or link; OSError."""
    found: list[Member] = []
    pending = [("", top)]
    while pending:
        prefix, folder = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                rel = prefix + entry.name
                if entry.is_symlink():
                    found.append(Member(rel, "l", entry.path, None, os.readlink(entry.path)))
                elif entry.is_dir(follow_symlinks=False):
                    found.append(Member(rel, "d", entry.path))
                    pending.append((rel + "/", entry.path))
                elif entry.is_file(follow_symlinks=False):
                    st = entry.stat(follow_symlinks=False)
                    found.append(Member(rel, kind_of(st.st_mode), entry.path, stamp_of(st)))
                else:
                    raise PathRefused(f"`{printable(entry.path)}` is neither a file nor a folder")
    return found


class Beneath:
    """Looks things up below one folder. Links are followed only to places below it; folders are checked once."""

    def __init__(self, root: str) -> None:
        self.shown = root.rstrip("/") or "/"
        self.root = os.path.realpath(root)
        self._folders: dict[str, str | None] = {"": self.root}
        self._listings: dict[str, list[os.DirEntry[str]]] = {}

    def place(self, parts: Sequence[str]) -> Place | None:
        """What lies at this path, or None. Raises PathRefused when a link on the way leads outside."""
        if not parts:
            return self._placed("", self.root, None)
        folder = self._folder("/".join(parts[:-1]))
        return None if folder is None else self._placed("/".join(parts), f"{folder}/{parts[-1]}", None)

    def glob(self, parts: Sequence[str]) -> list[Place]:
        """What matches, sorted by the bytes of the relative names.

        As the shell does it: `*` and `?` stay within a name and match a leading dot only where the pattern writes it;
        `**` is any number of folders that are neither hidden nor links; a last `**` is every file below.
        """
        found = {place.rel: place for place in self._expand("", list(parts))}
        return [found[rel] for rel in sorted(found, key=os.fsencode)]

    def _expand(self, rel: str, parts: list[str]) -> Iterator[Place]:
        part, rest = parts[0], parts[1:]
        if part == "**":
            yield from self._deep(rel, rest)
            return
        if not _MAGIC.search(part):
            names: Iterator[tuple[str, os.DirEntry[str] | None]] = iter([(part, None)])
        else:
            match = re.compile(fnmatch.translate(part)).match
            dotted = part.startswith(".")
            names = ((e.name, e) for e in self._list(rel) if (dotted or not e.name.startswith(".")) and match(e.name))
        for name, entry in names:
            below = f"{rel}/{name}" if rel else name
            if rest:
                if self._folder(below) is not None:
                    yield from self._expand(below, rest)
                continue
            place = self._placed(below, f"{self._folder(rel)}/{name}", entry)
            if place is not None:
                yield place

    def _deep(self, rel: str, rest: list[str]) -> Iterator[Place]:
        while rest and rest[0] == "**":
            rest = rest[1:]
        pending = [rel]
        while pending:
            at = pending.pop()
            if rest:
                yield from self._expand(at, rest)
            for entry in self._list(at):
                if entry.name.startswith("."):
                    continue
                below = f"{at}/{entry.name}" if at else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(below)
                elif not rest:
                    place = self._placed(below, f"{self._folder(at)}/{entry.name}", entry)
                    if place is not None and stat.S_ISREG(place.st.st_mode):
                        yield place

    def _list(self, rel: str) -> list[os.DirEntry[str]]:
        if rel not in self._listings:
            folder = self._folder(rel)
            if folder is None:
                return []
            with os.scandir(folder) as entries:
                self._listings[rel] = list(entries)
        return self._listings[rel]

    def _folder(self, rel: str) -> str | None:
        """The real path of a folder below the root; None if there is none."""
        if rel not in self._folders:
            parent, _, name = rel.rpartition("/")
            above = self._folder(parent)
            place = None if above is None else self._placed(rel, f"{above}/{name}", None)
            self._folders[rel] = place.real if place is not None and stat.S_ISDIR(place.st.st_mode) else None
        return self._folders[rel]

    def _placed(self, rel: str, real: str, entry: os.DirEntry[str] | None) -> Place | None:
        """A regular file or folder, links resolved; None for anything else."""
        try:
            st = entry.stat(follow_symlinks=False) if entry is not None else os.lstat(real)
            if stat.S_ISLNK(st.st_mode):
                real = os.path.realpath(real)
                if not is_beneath(real, self.root):
                    raise PathRefused(
                        f"`{printable(rel)}` is a link that leads outside `{printable(self.shown)}`",
                        hint="copy the data into the datastore, or make a datastore of where it lies",
                    )
                st = os.lstat(real)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not (stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)):
            return None
        return Place(rel, f"{self.shown}/{rel}" if rel else self.shown, real, st)
