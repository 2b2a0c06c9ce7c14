"""The truth about a place where data arrives: which files lie there and are not as the ledger knows them. Blocking.

A pattern means here what it means where a step's inputs are resolved: `*` and `?` stay within a name, `**` is any
number of folders, a folder that matches stands for all files below it. Hidden files and the drafts of editors,
browsers and copy programs are no data, unless the pattern names them. A link counts when it ends below the
datastore's root. Only what differs is kept, so that a scan of 100,000 known files leaves nothing behind.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from mlpiped.files.mounts import Mount, mount_of
from mlpiped.spec import ArrivalSpec
from mlpiped.triggers.packed import Found, Known, Stamp, Waiting

DRAFTS = (b"~", b".swp", b".swx", b".part", b".tmp", b".crdownload", b".partial", b".filepart")
_NOWHERE = Mount(b"/", "")
_MAGIC = re.compile(rb"[*?\[]")


@dataclass(frozen=True, slots=True)
class Target:
    """What a trigger looks at. Paths are bytes, as the file system has them."""

    root: bytes
    parts: tuple[bytes, ...]
    glob: bool
    marker: bytes | None = None  # `_SUCCESS`, or `{name}.done` beside each file

    @classmethod
    def of(cls, root: bytes, spec: ArrivalSpec) -> Target:
        parts = tuple(p for p in os.fsencode(spec.source.path).split(b"/") if p not in (b"", b"."))
        marker = os.fsencode(spec.marker) if spec.marker else None
        return cls(root.rstrip(b"/") or b"/", parts, spec.source.glob, marker)

    @property
    def prefix(self) -> tuple[bytes, ...]:
        """The parts before the first one with a wildcard."""
        if not self.glob:
            return self.parts
        n = next((i for i, part in enumerate(self.parts) if _MAGIC.search(part)), len(self.parts) - 1)
        return self.parts[:n]

    @property
    def flat(self) -> bool:
        """Whether all it can match lies in one folder, so that a path alone says if it does."""
        return self.glob and self.parts[-1] != b"**" and len(self.prefix) == len(self.parts) - 1

    def is_marker(self, name: bytes) -> bool:
        if self.marker is None:
            return False
        head, braces, tail = self.marker.partition(b"{name}")
        if not braces:
            return name == self.marker
        return len(name) > len(head) + len(tail) and name.startswith(head) and name.endswith(tail)

    def marked_at(self, path: bytes) -> int | None:
        """The ctime of the marker that says that `path` is complete. One without `{name}` may lie in any folder above
        the file, up to the first part of the pattern that has a wildcard."""
        assert self.marker is not None
        folder, name = os.path.split(path)
        if b"{name}" in self.marker:
            return _ctime(os.path.join(folder, self.marker.replace(b"{name}", name)))
        top = os.path.join(self.root, *self.prefix)
        while len(folder) >= len(self.root):
            found = _ctime(os.path.join(folder, self.marker))
            if found is not None or folder == top or not folder.startswith(top):
                return found
            folder = os.path.dirname(folder)
        return None


class Point(NamedTuple):
    """A folder to watch, and who it is: a folder that was replaced is another one."""

    path: bytes
    deep: bool
    dev: int
    ino: int


@dataclass(slots=True)
class Look:
    """What a scan found."""

    changed: Found = field(default_factory=Found)
    waiting: int = 0  # files that are as they were already waited for, and not in `changed`
    gone: list[bytes] = field(default_factory=list)  # what was waited for and is no more
    seen: int = 0
    deep: bool = False  # it went into folders that the pattern does not name one by one
    mount: Mount = _NOWHERE
    point: Point | None = None
    missing: bytes = b""  # the part of the prefix that is not there
    fault: str = ""  # why the root cannot be used at all


def scan(target: Target, known: Known, waiting: Waiting) -> Look:
    """Everything at `target` that is neither as in `known` nor as in `waiting`."""
    look = Look()
    try:
        if not stat.S_ISDIR(os.stat(target.root).st_mode):
            look.fault = "is not a folder"
            return look
        walk = _Walk(target, known, look, waiting)
        walk.expand(target.root, target.parts)
        if look.waiting + sum(path in waiting for path in look.changed) < len(waiting):
            paths, _ = waiting.copy()
            look.gone = [path for path in paths if path not in look.changed and not walk.still_waits(path)]
        look.point, look.missing = _point(target, look.deep)
        look.mount = mount_of(look.point.path)  # the folder's own: it may be mounted below the root
    except FileNotFoundError:
        look.fault = "is missing"
    except OSError as error:
        look.fault = f"cannot be read: {(error.strerror or str(error)).lower()}"
    return look


def touched(target: Target, known: Known, paths: Iterable[bytes]) -> Look:
    """As `scan`, for some paths of a flat target. `deep`: a folder is among them, and only a scan can tell."""
    look = Look()
    walk, part = _Walk(target, known, look), target.parts[-1]
    match, wanted = re.compile(fnmatch.translate(part.decode("latin-1"))).match, _wanted(part)
    for path in paths:
        name = os.path.basename(path)
        if match(name.decode("latin-1")) and wanted(name):
            st = walk.beneath(path)
            if st is not None and stat.S_ISREG(st.st_mode):
                walk.take(path, st)
            elif st is not None and stat.S_ISDIR(st.st_mode):
                look.deep = True
    return look


def stamps(paths: Iterable[bytes]) -> dict[bytes, Stamp]:
    """What those files are now; absent when they are gone."""
    found = {}
    for path in paths:
        try:
            st = os.stat(path)
        except OSError:
            continue
        if stat.S_ISREG(st.st_mode):
            found[path] = _stamp(st)
    return found


def identity(path: bytes) -> tuple[int, int] | None:
    try:
        st = os.stat(path)
    except OSError:
        return None
    return (st.st_dev, st.st_ino)


class _Walk:
    def __init__(self, target: Target, known: Known, look: Look, waiting: Waiting | None = None) -> None:
        self.target, self.known, self.look = target, known, look
        self.waiting = Waiting() if waiting is None else waiting
        self.real_root = os.path.realpath(target.root)

    def expand(self, folder: bytes, parts: tuple[bytes, ...]) -> None:
        if not parts:
            self.tree(folder)
            return
        part, rest = parts[0], parts[1:]
        if not (self.target.glob and _MAGIC.search(part)):
            self.literal(os.path.join(folder, part), rest)
        elif part == b"**":
            self.deep(folder, rest)
        else:
            self.wild(folder, part, rest)

    def literal(self, path: bytes, rest: tuple[bytes, ...]) -> None:
        st = self.beneath(path)
        if st is None:
            return
        if stat.S_ISDIR(st.st_mode):
            self.expand(path, rest)
        elif not rest:
            self.take(path, st)

    def wild(self, folder: bytes, part: bytes, rest: tuple[bytes, ...]) -> None:
        match, wanted = re.compile(fnmatch.translate(part.decode("latin-1"))).match, _wanted(part)
        with _entries(folder) as entries:
            for entry in entries:
                if not match(entry.name.decode("latin-1")):
                    continue
                if rest:
                    if (part.startswith(b".") or not entry.name.startswith(b".")) and self.is_folder(entry):
                        self.look.deep = True
                        self.expand(entry.path, rest)
                elif wanted(entry.name):
                    self.member(entry)

    def deep(self, folder: bytes, rest: tuple[bytes, ...]) -> None:
        self.look.deep = True
        if not rest:
            self.tree(folder)
            return
        pending = [folder]
        while pending:
            at = pending.pop()
            if rest[0] != b"**":
                self.expand(at, rest)
            with _entries(at) as entries:
                pending += [e.path for e in entries if not e.name.startswith(b".") and _is_own_folder(e)]
        if rest[0] == b"**":
            self.deep(folder, rest[1:])

    def tree(self, folder: bytes) -> None:
        self.look.deep = True
        wanted, pending = _wanted(b"*"), [folder]
        while pending:
            with _entries(pending.pop()) as entries:
                for entry in entries:
                    if _is_own_folder(entry):
                        if not entry.name.startswith(b"."):
                            pending.append(entry.path)
                    elif wanted(entry.name):
                        self.member(entry, folders=False)

    def member(self, entry: os.DirEntry[bytes], *, folders: bool = True) -> None:
        try:
            st = self.beneath(entry.path) if entry.is_symlink() else entry.stat(follow_symlinks=False)
        except OSError:
            return  # gone between the listing and the look
        if st is None:
            return
        if stat.S_ISREG(st.st_mode):
            self.take(entry.path, st)
        elif stat.S_ISDIR(st.st_mode) and folders:
            self.tree(entry.path)

    def take(self, path: bytes, st: os.stat_result) -> None:
        if self.target.is_marker(os.path.basename(path)):
            return
        self.look.seen += 1
        stamp = _stamp(st)
        if self.known.has(path, stamp):
            return
        if self.waiting.waits(path, stamp):
            self.look.waiting += 1
        else:
            self.look.changed[path] = stamp

    def still_waits(self, path: bytes) -> bool:
        st = self.beneath(path)
        return st is not None and stat.S_ISREG(st.st_mode) and not self.known.has(path, _stamp(st))

    def is_folder(self, entry: os.DirEntry[bytes]) -> bool:
        if not entry.is_symlink():
            return _is_own_folder(entry)
        st = self.beneath(entry.path)
        return st is not None and stat.S_ISDIR(st.st_mode)

    def beneath(self, path: bytes) -> os.stat_result | None:
        """What lies at `path`, links followed, unless they end outside the root."""
        try:
            real = os.path.realpath(path)
            if real != self.real_root and not real.startswith(self.real_root.rstrip(b"/") + b"/"):
                return None
            return os.stat(real)
        except OSError:
            return None


class _entries:
    """`os.scandir`, empty for a folder that is gone or closed to us: the next scan sees it again."""

    def __init__(self, folder: bytes) -> None:
        self.folder = folder

    def __enter__(self) -> Iterable[os.DirEntry[bytes]]:
        try:
            self._it: os._ScandirIterator[bytes] | None = os.scandir(self.folder)
        except OSError:
            self._it = None
            return ()
        return self._it

    def __exit__(self, *_: object) -> None:
        if self._it is not None:
            self._it.close()


def _wanted(part: bytes) -> Callable[[bytes], bool]:
    """Whether a name is data, and not somebody's draft, for the last part of a pattern."""
    drafts = tuple(end for end in DRAFTS if not part.endswith(end))
    hidden = part.startswith(b".")
    return lambda name: (hidden or not name.startswith(b".")) and not name.endswith(drafts)


def _point(target: Target, deep: bool) -> tuple[Point, bytes]:
    """The folder to watch: as much of the prefix as exists. Until all of it does, the rest is awaited there."""
    at = target.root
    for i, part in enumerate(target.prefix):
        below = os.path.join(at, part)
        if not os.path.isdir(below):
            missing = b"" if os.path.exists(below) else b"/".join(target.prefix[: i + 1])
            return Point(at, False, *(identity(at) or (0, 0))), missing
        at = below
    return Point(at, deep or not target.glob, *(identity(at) or (0, 0))), b""


def _is_own_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _ctime(path: bytes) -> int | None:
    try:
        return os.stat(path).st_ctime_ns
    except OSError:
        return None


def _stamp(st: os.stat_result) -> Stamp:
    return Stamp(st.st_size, st.st_mtime_ns, st.st_ino, st.st_ctime_ns)
