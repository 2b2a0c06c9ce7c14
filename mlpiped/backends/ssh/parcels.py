"""Files and folders as one stream of bytes (the format: `tree.sh`), made and taken apart without a connection. Blocks.

What is sent is hashed on the way: a content is put where others will find it by its digest, so it must be that content.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from mlpiped.backends.ssh.agent import encoded
from mlpiped.files.hashing import open_file, tree_digest
from mlpiped.files.walking import kind_of, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mlpiped.backends.ssh.progress import Moving

CHUNK = 1 << 20


class Changed(Exception):
    """a file is not what it was said to be"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file or folder, to lie under `name` in the place that is sent. `digest`: what it must turn out to be."""

    path: str
    name: str
    digest: str | None = None


def size_of(path: str) -> int:
    """Bytes of a file, or of all files in a folder. Raises OSError."""
    st = os.stat(path)
    if not stat.S_ISDIR(st.st_mode):
        return st.st_size
    return sum(member.stamp[2] for member in walk(path) if member.stamp is not None)


def outgoing(pieces: Sequence[Piece]) -> Iterator[bytes]:
    """The stream of `pieces`. Raises Changed, OSError, PathRefused: it has no `end` then, and nothing of it is kept."""
    made: set[str] = set()
    for piece in pieces:
        parts = piece.name.split("/")[:-1]
        for folder in ("/".join(parts[: n + 1]) for n in range(len(parts))):
            if folder not in made:
                made.add(folder)
                yield b"d %b\n" % encoded(folder)
        yield from _one(piece)
    yield b"end\n"


def _one(piece: Piece) -> Iterator[bytes]:
    if not stat.S_ISDIR(os.stat(piece.path).st_mode):
        hasher = blake3(max_threads=1)
        yield from _file(os.path.realpath(piece.path), piece.name, hasher)
        found = f"b3:{hasher.hexdigest()}"
    else:
        lines = []
        yield b"d %b\n" % encoded(piece.name)
        for member in sorted(walk(piece.path), key=lambda member: member.rel.split("/")):
            name, payload = f"{piece.name}/{member.rel}", ""
            if member.kind == "d":
                yield b"d %b\n" % encoded(name)
            elif member.stamp is None:
                payload = member.target
                yield b"l %b %b\n" % (encoded(name), encoded(payload))
            else:
                hasher = blake3(max_threads=1)
                yield from _file(member.path, name, hasher)
                payload = f"b3:{hasher.hexdigest()}"
            lines.append((os.fsencode(member.rel), member.kind, payload))
        found = tree_digest(lines)
    if piece.digest not in (None, found):
        raise Changed(f"`{piece.path}` is not what it was when it was looked at")


def _file(path: str, name: str, hasher: blake3) -> Iterator[bytes]:
    fd = open_file(path)
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise Changed(f"`{path}` is not a regular file")
        left = st.st_size
        yield b"%b %d %b\n" % (kind_of(st.st_mode).encode(), left, encoded(name))
        while left:
            chunk = os.read(fd, min(left, CHUNK))
            if not chunk:
                raise Changed(f"`{path}` became shorter while it was sent")
            hasher.update(chunk)
            left -= len(chunk)
            yield chunk
    finally:
        os.close(fd)


class Garbled(Exception):
    """what came is not what was sent"""


class Incoming:
    """Takes a stream apart into a folder, which must be empty. Feed it until `done`; `big`: nothing came."""

    def __init__(self, folder: Path, moving: Moving | None = None) -> None:
        self.folder = os.fspath(folder)
        self.done = self.big = False
        self._moving = moving
        self._buffer = b""
        self._listed: list[tuple[str, int, str, str]] = []  # kind, size, sha256, path: their bytes come later
        self._file: int | None = None
        self._left = 0
        self._hash = hashlib.sha256()

    def feed(self, data: bytes) -> None:
        """Raises Garbled, OSError."""
        if self._moving is not None:
            self._moving.moved(len(data))
        self._buffer += data
        while self._buffer and not self.done:
            if self._file is not None:
                taken, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
                self._write(taken)
                continue
            line, newline, rest = self._buffer.partition(b"\n")
            if not newline:
                if len(line) > 65536:
                    raise Garbled("a line without an end")
                return
            self._buffer = rest
            self._take(line.decode("ascii", "replace").split(" "))

    def _take(self, words: list[str]) -> None:
        match words:
            case ["end"]:
                self.done = not self._listed
            case ["t", size] if size.isdigit():
                if self._moving is not None:
                    self._moving.total = int(size)
            case ["big"]:
                self.done = self.big = True
            case ["bytes"]:
                self._next()
                return
            case ["d", name]:
                os.makedirs(self._path(name), exist_ok=True)
            case ["l", name, target]:
                os.symlink(decoded(target), self._path(name))
            case ["s", name]:
                os.mkfifo(self._path(name))  # whoever collects it complains of it
            case [("f" | "x") as kind, size, digest, name] if size.isdigit():
                self._listed.append((kind, int(size), digest, self._path(name)))
            case _:
                raise Garbled(f"no entry: {words!r:.200}")
        if words == ["end"] and self._listed:
            raise Garbled("files without their bytes")

    def _next(self) -> None:
        """Open the file whose bytes come now; those that are empty are done at once."""
        while self._listed:
            kind, self._left, _, path = self._listed[0]
            os.makedirs(os.path.dirname(path), exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(path, flags, 0o755 if kind == "x" else 0o644)
            self._hash = hashlib.sha256()
            if self._left:
                return
            self._close()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._hash.update(data)
        self._left -= len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        if not self._left:
            self._close()
            self._next()

    def _close(self) -> None:
        assert self._file is not None
        os.close(self._file)
        self._file = None
        _, _, digest, path = self._listed.pop(0)
        if self._hash.hexdigest() != digest:
            raise Garbled(f"`{os.path.relpath(path, self.folder)}` did not arrive as it is on the box")

    def _path(self, name: str) -> str:
        plain = decoded(name)
        parts = plain.split("/")
        if not plain or "\0" in plain or any(part in ("", ".", "..") for part in parts):
            raise Garbled(f"no name for a file: {plain!r:.200}")
        # A link that came earlier leads nowhere: what lies below it is refused, by makedirs or by this.
        at = self.folder
        for part in parts[:-1]:
            at = f"{at}/{part}"
            if os.path.islink(at):
                raise Garbled(f"a file below a link: {plain!r:.200}")
        return f"{self.folder}/{plain}"

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def decoded(name: str) -> str:
    if name.startswith(":"):
        if not re.fullmatch(r"(?:[0-9a-f]{2})*", name[1:]):
            raise Garbled(f"no name: {name!r:.200}")
        return os.fsdecode(bytes.fromhex(name[1:]))
    return name
