"""What a step made, checked and taken into the store. Blocking; all outputs of one step in one go.

Order: check and hash, make read-only, fsync; then one rename each into its place; then fsync the folders. A marker
beside the output says where it went, so that a daemon that died in between finds it again. Where the file system does
so, a single file is made durable with its name, by one fsync after the rename.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlpiped import crash
from mlpiped.artifacts.copying import copy_tree, discard, protect, sync
from mlpiped.errors import MlpipedError
from mlpiped.files.hashing import (
    Hashed,
    Stamp,
    Unreadable,
    file_system,
    granule,
    hash_fd,
    open_file,
    printable,
    stamp_of,
    tree_digest,
)
from mlpiped.files.walking import is_beneath, kind_of, walk
from mlpiped.model import OutputFact

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlpiped.backends.base import JobOutput

MARKER = ".mlpiped-collected"
MOST_MEMBERS = 1_000_000
DEEPEST = 200
_DIGEST = re.compile(r"b3t?:[0-9a-f]{64}")
WORTH_WAITING = 4 << 20
"""Bytes. Before a larger file is hashed, the tick of its last write is waited out: it need not be read again later."""

Entry = tuple[str, Stamp, str, int]  # path, stamp, digest, hashed_ns: for Fingerprinter.remember
Recall = Callable[[str, Stamp], "str | None"]  # a digest that is known already


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


def _mark(digest: str) -> str:
    """Short enough for the inode of a link: it takes no block of its own."""
    kind, _, plain = digest.partition(":")
    return f"{kind}:{b64encode(bytes.fromhex(plain), b'-_').decode()}"


def _unmarked(text: str) -> str:
    """The digest of a mark; earlier ones have it in hex."""
    kind, _, short = text.partition(":")
    try:
        return f"{kind}:{b64decode(short, b'-_', validate=True).hex()}" if len(short) == 44 else text
    except ValueError:
        return text


def place_of(store: str, digest: str) -> str:
    plain = digest.rpartition(":")[2]
    return f"{store}/{plain[:2]}/{plain[2:]}"


# --- check --------------------------------------------------------------------------------------------------------
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
                durable = not _syncs_names(store)
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
    digest = _unmarked(os.readlink(MARKER, dir_fd=parent))
    if not _DIGEST.fullmatch(digest):
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


# --- what lies somewhere now ----------------------------------------------------------------------------------------
def measure(path: str, kind: str, recall: Recall) -> tuple[int, str | None]:
    """(size, digest) of a file or tree, by `recall` where it knows; (0, None) when it is not that, or not there."""
    try:
        if kind == "file":
            st = os.lstat(path)
            if not stat.S_ISREG(st.st_mode):
                return 0, None
            return st.st_size, recall(path, stamp_of(st)) or _digest(path)
        size, lines = 0, []
        for member in walk(os.path.realpath(path)):
            payload = member.target
            if member.stamp is not None:
                size += member.stamp[2]
                payload = recall(member.path, member.stamp) or _digest(member.path)
            lines.append((os.fsencode(member.rel), member.kind, payload))
        return size, tree_digest(lines)
    except (OSError, Unreadable, MlpipedError):
        return 0, None


def _digest(path: str) -> str:
    fd = open_file(path)
    try:
        return hash_fd(fd).digest
    finally:
        os.close(fd)


# --- into the store ---------------------------------------------------------------------------------------------------
def collect(
    folder: str, outputs: Sequence[JobOutput], state: str, recall: Recall
) -> tuple[list[OutputFact], list[Entry]]:
    """Everything that a step made: facts in the order of `outputs`, and what the stat cache may learn from it.

    Either all of them are in the store at the end, or OutputFault (or OSError, when the machine is at fault) is raised
    and those that are there already are what nobody refers to.
    """
    store = f"{state}/artifacts"
    found = [check(folder, output, store) for output in outputs]
    entries: list[Entry] = []
    touched: dict[str, None] = {}
    for item in found:
        crash.point("mid_collect")
        if item.folder:
            with placing(item.digest):
                _Shelf(state, store, recall, entries, touched).put(item)
            crash.point("after_rename")
    for path in touched:
        sync(path)
    facts = [
        OutputFact(
            item.output.name,
            item.digest,
            item.output.kind,
            item.size,
            f"{place_of(store, item.digest)}/{item.output.file_name}",
        )
        for item in found
    ]
    return facts, entries


_ONE_IS_ENOUGH = frozenset({"ext4", "xfs", "btrfs"})
"""Where making a folder and naming it above is one journal entry: what makes the folder durable makes its name so.

There fsync of a file makes its last rename durable too: that is in the journal no later than what it changed of the
file. (ext4 without a journal goes up from a file that was named anew, and writes its folders.)
"""

_kinds: dict[str, bool] = {}


def _syncs_names(store: str) -> bool:
    if store not in _kinds:
        _kinds[store] = file_system(os.stat(store).st_dev) in _ONE_IS_ENOUGH
    return _kinds[store]


_locks = [threading.Lock() for _ in range(64)]


def placing(digest: str) -> threading.Lock:
    """Two steps may make the same bytes at the same moment; and what is made just now is not garbage."""
    return _locks[int(digest[-2:], 16) % len(_locks)]


@dataclass(slots=True)
class _Shelf:
    state: str
    store: str
    recall: Recall
    entries: list[Entry]
    touched: dict[str, None]  # what is to be made durable

    def put(self, item: Found) -> None:
        place, new = self._made(item.digest)
        final = f"{place}/{item.output.file_name}"
        if not new:
            names = os.listdir(place)
            for name in sorted(names, key=lambda name: name != item.output.file_name):
                path = f"{place}/{name}"
                if os.path.islink(path):
                    continue
                before, began = stamp_of(os.lstat(path)), time.time_ns()
                if measure(path, item.output.kind, self.recall)[1] == item.digest:
                    self.touched[place] = None
                    if item.output.kind == "file":
                        self.touched[path] = None  # whoever put it there may not have come so far
                    if path != final:
                        self._alias(path, Hashed(item.digest, before, began), final, item)
                    return  # the same content is here, and intact: the new copy stays where it is and goes with its job
            if os.path.lexists(final):
                discard(final, f"{self.state}/incoming")
        self._move(item, final)
        one = item.output.kind == "file" and _syncs_names(self.store)
        self.touched[final if one else place] = None

    def _made(self, digest: str) -> tuple[str, bool]:
        """(the place, whether it was not there)."""
        place, new = place_of(self.store, digest), True
        try:
            os.mkdir(place)
        except FileNotFoundError:
            os.makedirs(place, exist_ok=True)
        except FileExistsError:
            new = False
            os.utime(place)  # wanted now, whatever the ledger says until the commit: `Store.remove` looks at it
        if not _syncs_names(self.store):
            self.touched[os.path.dirname(place)] = self.touched[self.store] = None
        return place, new

    def _alias(self, path: str, known: Hashed, final: str, item: Found) -> None:
        """The same content under a second name."""
        if item.output.kind == "folder" and os.path.islink(final) and os.readlink(final) == os.path.basename(path):
            return
        if os.path.lexists(final):
            discard(final, f"{self.state}/incoming")
        if item.output.kind == "folder":
            os.symlink(os.path.basename(path), final)
            return
        os.link(path, final)
        for name in (path, final):  # linking has set ctime
            self._vouch(name, known, item)

    def _move(self, item: Found, final: str) -> None:
        source = f"{item.folder}/{item.output.file_name}"
        if item.foreign:
            self._copy(item, source, final)
            return
        marker = f"{item.folder}/{MARKER}"
        try:
            os.symlink(_mark(item.digest), marker)
        except FileExistsError:
            os.unlink(marker)
            os.symlink(_mark(item.digest), marker)
        try:
            os.rename(source, final)
        except OSError as fault:
            if fault.errno == errno.EXDEV:
                self._copy(item, source, final)
                return
            raise
        for rel in ["", *item.folders] if item.output.kind == "folder" else []:
            os.chmod(f"{final}/{rel}", 0o555)
        for rel, hashed in item.files:
            self._vouch(f"{final}/{rel}" if rel else final, hashed, item)

    def _vouch(self, path: str, hashed: Hashed, item: Found) -> None:
        """After the rename (which sets ctime): still the file that was hashed, by its inode, size and mtime.

        If hashing began a tick after the last write, a later write would show in mtime: then the new stamp vouches.
        """
        now = stamp_of(os.lstat(path))
        if now[:4] != hashed.stamp[:4]:
            raise OutputFault(f"output `{item.output.name}` was changed while it was kept")
        if hashed.began_ns > now[3] + granule(now):
            self.entries.append((path, now, hashed.digest, now[4] + granule(now) + 1))

    def _copy(self, item: Found, source: str, final: str) -> None:
        """From another file system, or of another owner: copied, durable, and then the one rename."""
        staged = f"{self.state}/incoming/{secrets.token_hex(8)}"
        os.makedirs(os.path.dirname(staged), exist_ok=True)
        try:
            copy_tree(source, staged, durable=True)
            if measure(staged, item.output.kind, lambda path, stamp: None)[1] != item.digest:
                raise OutputFault(f"output `{item.output.name}` was changed while it was kept")
            protect(staged)
            os.rename(staged, final)
            if os.path.isdir(final):
                os.chmod(final, 0o555)
        finally:
            if os.path.lexists(staged):
                discard(staged, f"{self.state}/incoming")
