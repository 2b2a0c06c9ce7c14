"""What a step made, checked: it is what was declared, nobody writes there any more, and it is hashed and durable.

Blocking. What passes is read-only from then on.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlpiped.artifacts.places import DIGEST, MARKER, measure, place_of, placing, syncs_names, unmarked
from mlpiped.errors import MlpipedError
from mlpiped.files.hashing import Hashed, Unreadable, granule, hash_fd, open_file, printable, stamp_of, tree_digest
from mlpiped.files.walking import is_beneath, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlpiped.backends.base import JobOutput

MOST_MEMBERS = 1_000_000
DEEPEST = 200
WORTH_WAITING = 4 << 20
"""Bytes. Before a larger file is hashed, the tick of its last write is waited out: it need not be read again later."""


class OutputFault(MlpipedError):
    """an output cannot be kept"""


@dataclass(slots=True)
class Found:
    """An output that passed: where it lies, what it is, and each of its files."""

    output: JobOutput
    digest: str
    size: int
    folder: str  # that holds it; "" when it is in the store already
    files: list[tuple[str, Hashed]] = field(default_factory=list)  # relative name ("" for a single file)
    folders: list[str] = field(default_factory=list)
    foreign: bool = False  # owned by somebody else: must be copied


def check(folder: str, output: JobOutput, store: str) -> Found:
    """The output below `folder`/out, hashed, its files read-only and durable. Raises OutputFault."""
    name = output.file_name
    if "/" in name or name in ("", ".", "..", MARKER) or "/" in output.name or output.name in ("", ".", ".."):
        raise OutputFault(f"output `{printable(output.name)}` has a file name that is none: `{printable(name)}`")
    try:
        with _opened_folder(f"{folder}/out") as out, _opened_folder(output.name, out) as parent:
            found = Found(output, "", 0, f"{folder}/out/{output.name}")
            st = _lstat(name, parent)
            if st is None:
                return _collected_before(output, parent, store)
            _check_kind(output, st)
            if output.kind == "file":
                durable = not syncs_names(store)
                hashed = _take_file(parent, name, found, f"output `{output.name}`", durable)
                found.digest, found.files = hashed.digest, [("", hashed)]
                found.size = hashed.stamp[2]
            else:
                _take_tree(parent, name, found)
            return found
    except FileNotFoundError as fault:
        raise OutputFault(f"output `{output.name}` is missing: the step wrote nothing there") from fault
    except OSError as fault:
        if fault.errno in (
            errno.ENOSPC,
            errno.EIO,
            errno.EDQUOT,
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
            errno.EROFS,
        ):
            raise  # the machine's fault, not the step's
        raise OutputFault(f"output `{output.name}` cannot be read: {(fault.strerror or '').lower()}") from fault


def _check_kind(output: JobOutput, st: os.stat_result) -> None:
    names = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    what = names.get(stat.S_IFMT(st.st_mode), "neither a file nor a folder")
    if what != f"a {output.kind}":
        raise OutputFault(f"output `{output.name}` should be a {output.kind}, and is {what}")


def _collected_before(output: JobOutput, parent: int, store: str) -> Found:
    """An earlier daemon has moved it already. Raises FileNotFoundError."""
    digest = unmarked(os.readlink(MARKER, dir_fd=parent))
    if not DIGEST.fullmatch(digest):
        raise FileNotFoundError(errno.ENOENT, "no output", output.file_name)
    path = f"{place_of(store, digest)}/{output.file_name}"
    with placing(digest), suppress(FileNotFoundError):
        os.utime(place_of(store, digest))
    size, now = measure(path, output.kind, lambda path, stamp: None)
    if now != digest:
        raise OutputFault(f"output `{output.name}` was changed while it was kept")
    return Found(output, digest, size, "")


def _take_file(parent: int, name: str, found: Found, spoken: str, durable: bool = True) -> Hashed:
    fd = open_file(name, dir_fd=parent)
    try:
        st = os.fstat(fd)
        if st.st_nlink > 1:
            raise OutputFault(f"{spoken} has another name (a hard link)", hint="write a copy instead")
        if st.st_mode & (stat.S_ISUID | stat.S_ISGID):
            raise OutputFault(f"{spoken} has the set-user-id or set-group-id bit")
        if st.st_size > WORTH_WAITING:
            wait = (st.st_mtime_ns + granule(stamp_of(st)) - time.time_ns()) / 1e9
            time.sleep(min(max(wait, 0.0), 0.1))
        try:
            hashed = hash_fd(fd)
        except Unreadable as fault:
            raise OutputFault(f"{spoken} {fault}: something that the step started still writes there") from fault
        if st.st_uid != os.geteuid():
            found.foreign = True
        else:
            os.fchmod(fd, 0o555 if st.st_mode & 0o111 else 0o444)
        if durable:
            os.fsync(fd)
        now = stamp_of(os.fstat(fd))
        if now[:4] != hashed.stamp[:4]:
            raise OutputFault(f"{spoken} is still written to by something that the step started")
        return hashed._replace(stamp=now)
    finally:
        os.close(fd)


def _take_tree(parent: int, name: str, found: Found) -> None:
    top = os.path.realpath(f"{found.folder}/{name}")
    lines: list[tuple[bytes, str, str]] = []
    with _opened_folder(name, parent) as fd:
        _take_members(fd, "", found, lines, top)
    if all(kind == "d" for _, kind, _ in lines):
        raise OutputFault(f"output `{found.output.name}` is an empty folder")
    found.digest = tree_digest(lines)
    found.size = sum(hashed.stamp[2] for _, hashed in found.files)


def _take_members(fd: int, prefix: str, found: Found, lines: list[tuple[bytes, str, str]], top: str) -> None:
    with os.scandir(fd) as listing:
        entries = [(entry.name, entry.stat(follow_symlinks=False)) for entry in listing]
    if len(lines) + len(entries) > MOST_MEMBERS or prefix.count("/") > DEEPEST:
        raise OutputFault(f"output `{found.output.name}` has more than {MOST_MEMBERS} files or {DEEPEST} levels")
    for name, st in entries:
        rel = prefix + name
        spoken = f"`{printable(rel)}` in output `{found.output.name}`"
        if stat.S_ISREG(st.st_mode):
            hashed = _take_file(fd, name, found, spoken)
            found.files.append((rel, hashed))
            lines.append((os.fsencode(rel), kind_of(st.st_mode), hashed.digest))
        elif stat.S_ISDIR(st.st_mode):
            lines.append((os.fsencode(rel), "d", ""))
            found.folders.append(rel)
            with _opened_folder(name, fd) as child:
                _take_members(child, rel + "/", found, lines, top)
        elif stat.S_ISLNK(st.st_mode):
            target = os.readlink(name, dir_fd=fd)
            if target.startswith("/") or not is_beneath(os.path.realpath(f"{top}/{rel}"), top):
                raise OutputFault(f"{spoken} is a link that leads outside", hint="write a copy of what it names")
            lines.append((os.fsencode(rel), "l", target))
        else:
            raise OutputFault(f"{spoken} is neither a file nor a folder")
    os.fsync(fd)


def _lstat(name: str, parent: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


@contextmanager
def _opened_folder(name: str, parent: int | None = None) -> Iterator[int]:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)
