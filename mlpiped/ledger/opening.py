"""The way to a ledger that may be written: whose folder it is, whether the file can be trusted, and its version.

The order matters: the lock before any look, every look read-only before the first write, and a new file under another
name until it is whole. So a ledger that cannot be read, or is too new, is left exactly as it was, and an empty file is
always a damaged one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlpiped.errors import LedgerBusy, LedgerError, LedgerFull, LedgerTooNew, LedgerUnwritable
from mlpiped.ledger.db import APPLICATION_ID, DatabaseError, connect, in_our_words, one, unreadable
from mlpiped.ledger.log import damaged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mlpiped.ledger.db import Connection

NAME = "ledger.sqlite3"
BALLAST = "ballast"
MARK = f"{NAME}.open"
"""There while a daemon has the ledger open, and after one that was killed: the write-ahead log must be there too."""
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "ocfs2"}

_log = logging.getLogger("mlpiped.ledger")


def migrations() -> list[str]:
    """The scripts in order; the first makes version 1."""
    found = sorted(f.name for f in files("mlpiped.ledger").joinpath("migrations").iterdir() if f.name.endswith(".sql"))
    if [int(name[:4]) for name in found] != list(range(1, len(found) + 1)):
        raise RuntimeError(f"the migrations are not numbered from 1 on: {found}")
    return [files("mlpiped.ledger").joinpath("migrations", name).read_text() for name in found]


# --- whose folder ---------------------------------------------------------------------------------------------
def lock(state_dir: Path) -> int:
    """Own `state_dir` until the file descriptor is closed, or the process ends however it ends.

    The lock is on the folder itself: a lock file could be deleted, and then be locked twice.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(state_dir, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _owner(state_dir, fd)
            who = f"pid {pid}" if pid else "its pid is not known"
            raise LedgerBusy(
                f"another mlpiped owns the state folder: `{state_dir}`: {who}",
                hint="stop that daemon, or give this one a state_dir of its own",
            ) from None
        _leave_pid(state_dir, fd)
    except OSError as error:
        os.close(fd)
        raise _unusable(state_dir, error) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _leave_pid(state_dir: Path, fd: int) -> None:
    note = os.open("pid", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644, dir_fd=fd)
    try:
        give_to_owner(note, state_dir)
        os.write(note, b"%d\n" % os.getpid())
    finally:
        os.close(note)


def _unusable(state_dir: Path, error: OSError) -> LedgerError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LedgerFull(f"no space left for the state folder: `{state_dir}`", hint="free space on that disk")
    return LedgerUnwritable(
        f"the state folder cannot be used: `{state_dir}`: {error.strerror}", hint="look at its disk and its mount"
    )


def _owner(state_dir: Path, fd: int) -> int | None:
    inode = f":{os.fstat(fd).st_ino}"
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(inode) and int(words[4]) > 0:
                return int(words[4])
        return int((state_dir / "pid").read_text())
    except (OSError, ValueError, IndexError):
        return None


def give_to_owner(fd: int, state_dir: Path) -> None:
    """What root makes in the state folder of another user must be that user's, or his daemon does not start again."""
    owner = os.stat(state_dir)
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(fd, owner.st_uid, owner.st_gid)


def warn_of_network(state_dir: Path) -> None:
    """SQLite's shared memory does not work over a network: a warning, as the owner may know better."""
    place, kind = "", ""
    try:
        lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    except OSError:
        return
    where = f"{state_dir.resolve()}/"
    for line in lines:
        left, _, right = line.partition(" - ")
        # octal escapes stand for single bytes
        mount = os.fsdecode(os.fsencode(left.split()[4]).decode("unicode_escape").encode("latin-1"))
        if where.startswith(mount.rstrip("/") + "/") and len(mount) >= len(place):
            place, kind = mount, right.split()[0]
    if kind in REMOTE or kind.startswith("fuse."):
        _log.warning(
            "the state folder is on a network or user-space file system, which can damage the ledger: `%s` (%s)",
            state_dir,
            kind,
        )


# --- which file -----------------------------------------------------------------------------------------------
def prepare(path: Path, scripts: Sequence[str]) -> None:
    """Leave at `path` a ledger of the newest version, or raise and leave what is there as it is."""
    try:
        if not path.exists():
            _refuse_if_used(path)
            _create(path, scripts)
        _refuse_without_log(path)
        version = check(path, len(scripts))
        unmark(path.parent)  # the next statement may fold the log in and remove it
        conn = connect(path)
        try:
            if version < len(scripts):
                migrate(conn, scripts, path.with_name(f"{path.name}.v{version}"))
            conn.execute("PRAGMA journal_mode = WAL").fetchall()  # a backup is a single file, and has none
            # Statistics of a ledger that was small make SQLite scan the one that it has become; without any, the
            # statements go by the indexes that were made for them.
            for table in ("sqlite_stat1", "sqlite_stat4"):
                conn.execute(f"DROP TABLE IF EXISTS {table}")
        finally:
            conn.close()
    except DatabaseError as error:
        raise in_our_words(error, path) from error
    except OSError as error:
        raise LedgerError(f"the ledger cannot be used: `{path}`: {error.strerror}") from error


def _refuse_if_used(path: Path) -> None:
    left = [name for name in (f"{NAME}-wal", BALLAST) if path.with_name(name).exists()]
    if left:
        error = unreadable(path, f"it is missing, but `{left[0]}` is there")
        error.hint = "bring back a backup with `mlpiped restore FILE`; to begin anew, move the whole state folder away"
        raise error


def _refuse_without_log(path: Path) -> None:
    """Without it SQLite would read an older ledger, and what ran since would be run again."""
    mark, wal = path.with_name(MARK), path.with_name(f"{NAME}-wal")
    if mark.exists() and not wal.exists():
        error = unreadable(path, f"it was not closed, and its write-ahead log is missing: `{wal.name}`")
        error.hint = (
            "put that file back, or bring back a backup with `mlpiped restore FILE`; if another SQLite program has had"
            f" the ledger open since, nothing is lost: remove `{mark}` and start again"
        )
        raise error


def mark(state_dir: Path) -> None:
    """To be called after a commit: only then is the write-ahead log's name on the disk, too."""
    os.close(os.open(state_dir / MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    sync_folder(state_dir)


def unmark(state_dir: Path) -> None:
    try:
        (state_dir / MARK).unlink()
    except FileNotFoundError:
        return
    sync_folder(state_dir)


def _create(path: Path, scripts: Sequence[str]) -> None:
    new = path.with_name(f"{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-wal"), new.with_name(f"{new.name}-shm")):
        left.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    conn = connect(new)
    try:
        conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        conn.execute("PRAGMA journal_mode = WAL")
        migrate(conn, scripts, None)
    finally:
        conn.close()
    os.rename(new, path)
    sync_folder(path.parent)


def check(path: Path, newest: int) -> int:
    """The version of the ledger at `path`, which is sound and not too new; nothing is written."""
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise unreadable(path, "it is empty" if not header else "it is no SQLite file")
    if struct.unpack(">I", header[68:72])[0] != APPLICATION_ID:
        raise unreadable(path, "it is some other program's SQLite file")
    _refuse_newer(path, struct.unpack(">I", header[60:64])[0], newest)
    conn = connect(path, readonly=True)
    try:
        version = int(conn.execute("PRAGMA user_version").fetchone()[0])  # the WAL may know better than the header
        _refuse_newer(path, version, newest)
        faults = [row[0] for row in conn.execute("PRAGMA quick_check(1)").fetchall()]
        if faults != ["ok"] or version < 1:
            raise unreadable(path, " ".join(faults[0].split()) if faults != ["ok"] else "it has no version")
        if damaged(path):
            raise unreadable(path, f"its write-ahead log is damaged: `{path.name}-wal`")
    finally:
        conn.close()
    return version


def _refuse_newer(path: Path, version: int, newest: int) -> None:
    if version > newest:
        raise LedgerTooNew(
            f"the ledger was written by a newer mlpiped: `{path}`: version {version}, this one knows {newest}",
            hint="install the newer mlpiped again; nothing was changed",
        )


def migrate(conn: Connection, scripts: Sequence[str], backup: Path | None) -> None:
    """Bring the ledger to the newest version, one transaction a script; first a copy to `backup`."""
    version = int(conn.execute("PRAGMA user_version").fetchone()[0])
    if backup is not None and version < len(scripts):
        partial = backup.with_name(f"{backup.name}.part")
        partial.unlink(missing_ok=True)
        conn.execute("VACUUM INTO ?", (os.fsdecode(partial),))
        os.chmod(partial, 0o600)
        sync_file(partial)
        os.replace(partial, backup)
    for number in range(version + 1, len(scripts) + 1):
        script = scripts[number - 1]
        try:
            conn.executescript(f"BEGIN IMMEDIATE;\n{script}\n;PRAGMA user_version = {number};\nCOMMIT;")
        except BaseException:
            if conn.in_transaction:
                conn.execute("ROLLBACK")
            raise
    # The header on the disk then tells older programs the truth too.
    conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# --- copies ---------------------------------------------------------------------------------------------------
def copy(source: Path, dest: Path) -> None:
    """A consistent, checked, single-file copy of a ledger that may be written meanwhile. Replaces `dest` at once."""
    with _arriving(dest) as partial:
        reader, target = connect(source, readonly=True), connect(partial)
        try:
            reader.backup(target)
            target.execute("PRAGMA journal_mode = DELETE").fetchall()
        finally:
            target.close()
            reader.close()


def receive(chunks: Iterable[bytes], dest: Path) -> None:
    """A copy that comes in pieces, checked as any other. Replaces `dest` at once."""
    with _arriving(dest) as partial, partial.open("r+b") as file:
        for chunk in chunks:
            file.write(chunk)


@contextmanager
def _arriving(dest: Path) -> Iterator[Path]:
    """A new file beside `dest`, which takes its place when it is a sound ledger, and durable."""
    partial = dest.with_name(f"{dest.name}.part")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield partial
        check(partial, len(migrations()))
        sync_file(partial)
        os.replace(partial, dest)
        sync_folder(dest.parent)
    finally:
        partial.unlink(missing_ok=True)


class Contents(NamedTuple):
    """What a copy holds. Times in µs."""

    version: int
    runs: int
    until: int | None  # when the last thing happened that it knows of


def contents(path: Path) -> Contents:
    """Of a copy that was checked; never of a ledger that this process has open."""
    conn = connect(path, readonly=True)
    try:
        version = int(conn.execute("PRAGMA user_version").fetchone()[0])
        return Contents(version, one(conn, "count_all_runs")[0], one(conn, "newest_event")[0])
    finally:
        conn.close()


def restore(state_dir: Path, source: Path) -> Path | None:
    """Put the copy `source` in the ledger's place, with no daemon running. Gives where the old one was moved to.

    Raises LedgerBusy, and LedgerUnreadable or LedgerTooNew when `source` is no ledger to go on with.
    """
    fd = lock(state_dir)
    try:
        path, aside = state_dir / NAME, None
        try:
            check(source, len(migrations()))
            copy(source, state_dir / f"{NAME}.restored")
        except DatabaseError as error:
            raise in_our_words(error, source) from error
        new = os.open(state_dir / f"{NAME}.restored", os.O_RDONLY)
        give_to_owner(new, state_dir)
        os.close(new)
        place = _free_name(path.with_name(f"{NAME}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"))
        for suffix in ("", "-wal", "-shm"):  # they belong together: a WAL left behind would be played onto the copy
            part = path.with_name(f"{NAME}{suffix}")
            if part.exists():
                aside = place
                os.rename(part, place.with_name(f"{place.name}{suffix}"))
        unmark(state_dir)
        os.rename(state_dir / f"{NAME}.restored", path)
        sync_folder(state_dir)
        return aside
    except OSError as error:
        raise LedgerError(f"the backup cannot be restored: `{source}`: {error.strerror}") from error
    finally:
        os.close(fd)


def _free_name(path: Path) -> Path:
    """`path`, or with a number behind it: what was put aside before stays too."""
    found, n = path, 1
    while any(found.with_name(f"{found.name}{suffix}").exists() for suffix in ("", "-wal", "-shm")):
        n += 1
        found = path.with_name(f"{path.name}.{n}")
    return found


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
