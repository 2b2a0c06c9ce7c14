"""Copies of files and trees, and their removal: durable when asked, links as links, exec bits kept. Blocking."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import suppress

from mlpiped.files.hashing import copy_fd, open_file
from mlpiped.files.walking import walk


def copy_tree(source: str, target: str, *, durable: bool, readable: int = 0o755) -> None:
    """Copy a file or tree, links as links, exec bits kept; others may read what `readable` (a folder's mode) allows."""
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.mkdir(target, 0o700)
        for name in sorted(os.listdir(source)):
            copy_tree(f"{source}/{name}", f"{target}/{name}", durable=durable, readable=readable)
        os.chmod(target, 0o700 | (readable & 0o055))
        if durable:
            sync_folder(target)
    else:
        _copy_file(source, target, durable, readable)


_FICLONE = 0x40049409


def _copy_file(source: str, target: str, durable: bool, readable: int) -> None:
    with open(open_file(source), "rb") as old, open(target, "xb") as new:
        mode = 0o600 | (readable & 0o044)
        executable = os.fstat(old.fileno()).st_mode & 0o111
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            copy_fd(old.fileno(), new.fileno())
        os.fchmod(new.fileno(), mode | ((mode & 0o444) >> 2 if executable else 0))
        if durable:
            os.fsync(new.fileno())


def protect(path: str) -> None:
    """Read-only; the top folder of a tree stays writable, for the rename that follows."""
    if os.path.isfile(path):
        os.chmod(path, 0o555 if os.lstat(path).st_mode & 0o111 else 0o444)
        return
    for member in walk(path):
        if member.kind != "l":
            os.chmod(member.path, 0o444 if member.kind == "f" else 0o555)


def discard(path: str, incoming: str) -> None:
    """Remove a file or a read-only tree: out of the way by one rename, then for good."""
    aside = f"{incoming}/{secrets.token_hex(8)}.gone"
    os.makedirs(incoming, exist_ok=True)
    if os.path.isdir(path) and not os.path.islink(path):
        os.chmod(path, 0o700)
    os.rename(path, aside)
    erase(aside)


def erase(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        for folder, _, _ in os.walk(path):
            os.chmod(folder, 0o700)
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    sync(path, os.O_DIRECTORY)


def sync(path: str, kind: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | kind)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
