"""Files and folders as one stream of bytes (the format: `tree.sh`), made without a connection. Blocks.

What is sent is hashed on the way: a content is put where others will find it by its digest, so it must be that content.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from mlpiped.backends.ssh.agent import encoded
from mlpiped.backends.ssh.bundles import SMALL, Bundle, Manifest, Small, archive
from mlpiped.files.hashing import open_file, tree_digest
from mlpiped.files.walking import kind_of, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

CHUNK = 1 << 18


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


@dataclass(frozen=True, slots=True)
class Start:
    """Where a stream goes on that was cut: so many units are there, and so many bytes of the file that comes next."""

    units: int = 0
    offset: int = 0


ANEW = Start()


@dataclass(slots=True)
class Unit:
    """An entry as it travels. `data` is to be read to its end: it is hashed on the way."""

    kind: str
    size: int = 0
    name: bytes = b""
    data: Iterable[bytes] = ()

    def stream(self, offset: int = 0) -> Iterator[bytes]:
        """From the byte `offset` of its data on."""
        if self.kind in "dl":
            yield b"%b %b\n" % (self.kind.encode(), self.name)
            return
        more = b"+" if offset else b""
        name = b" %b" % self.name if self.name else b""
        yield b"%b%b %d%b\n" % (self.kind.encode(), more, self.size - offset, name)
        for chunk in self.data:
            yield chunk[offset:]
            offset = max(0, offset - len(chunk))


def outgoing(
    pieces: Sequence[Piece], *, tar: bool = False, start: Start = ANEW, skipped: Callable[[int], object] = int
) -> Iterator[bytes]:
    """The stream of `pieces`, small files in archives if the box has `tar`; from `start` on it says what it leaves out.

    What another try has left there is judged by a digest of all; what comes in one go needs none.
    Raises Changed, OSError, PathRefused: it has no `end` then, and nothing of it is taken for whole.
    """
    manifest = None if start == ANEW else Manifest()
    for number, unit in enumerate(_Units(tar, manifest).of(pieces)):
        if number < start.units:
            skipped(sum(len(chunk) for chunk in unit.data))
        elif number == start.units and unit.kind in "fx" and start.offset <= unit.size:
            skipped(start.offset)
            yield from unit.stream(start.offset)
        else:
            yield from unit.stream()
    yield b"end\n" if manifest is None else b"end %b\n" % manifest.digest().encode()


class _Units:
    """The same of the same pieces, whenever it is asked: who goes on counts them."""

    def __init__(self, tar: bool, manifest: Manifest | None) -> None:
        self._tar, self._manifest = tar, manifest
        self._bundle = Bundle()
        self._hasher = blake3(max_threads=1)

    def of(self, pieces: Sequence[Piece]) -> Iterator[Unit]:
        made: set[str] = set()
        for piece in pieces:
            parts = piece.name.split("/")[:-1]
            for folder in ("/".join(parts[: n + 1]) for n in range(len(parts))):
                if folder not in made:
                    made.add(folder)
                    yield from self._folder(folder)
            yield from self._piece(piece)
        yield from self._rest()

    def _piece(self, piece: Piece) -> Iterator[Unit]:
        if not stat.S_ISDIR(os.stat(piece.path).st_mode):
            yield from self._file(os.path.realpath(piece.path), piece.name)
            found = f"b3:{self._hasher.hexdigest()}"
        else:
            lines = []
            yield from self._folder(piece.name)
            for member in sorted(walk(piece.path), key=lambda member: member.rel.split("/")):
                name, payload = f"{piece.name}/{member.rel}", ""
                if member.kind == "d":
                    yield from self._folder(name)
                elif member.stamp is None:
                    payload = member.target
                    yield from self._link(name, payload)
                else:
                    yield from self._file(member.path, name)
                    payload = f"b3:{self._hasher.hexdigest()}"
                lines.append((os.fsencode(member.rel), member.kind, payload))
            found = tree_digest(lines)
        if piece.digest not in (None, found):
            raise Changed(f"`{piece.path}` is not what it was when it was looked at")

    def _folder(self, name: str) -> Iterator[Unit]:
        if self._manifest is not None:
            self._manifest.folder(name)
        yield from self._small(Small("d", name))

    def _link(self, name: str, target: str) -> Iterator[Unit]:
        if self._manifest is not None:
            self._manifest.link(name, target)
        yield from self._small(Small("l", name, target=target))

    def _file(self, path: str, name: str) -> Iterator[Unit]:
        fd = open_file(path)
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise Changed(f"`{path}` is not a regular file")
            kind, size, sha = kind_of(st.st_mode), st.st_size, hashlib.sha256()
            self._hasher = blake3(max_threads=1)
            data = self._read(path, fd, size, sha)
            if self._tar and size <= SMALL:
                yield from self._small(Small(kind, name, b"".join(data)))
            else:
                yield from self._rest()
                yield Unit(kind, size, encoded(name), data)
            if self._manifest is not None:
                self._manifest.file(kind, size, sha.hexdigest(), name)
        finally:
            os.close(fd)

    def _read(self, path: str, fd: int, left: int, sha: hashlib._Hash) -> Iterator[bytes]:
        while left:
            chunk = os.read(fd, min(left, CHUNK))
            if not chunk:
                raise Changed(f"`{path}` became shorter while it was sent")
            self._hasher.update(chunk)
            if self._manifest is not None:
                sha.update(chunk)
            left -= len(chunk)
            yield chunk

    def _small(self, member: Small) -> Iterator[Unit]:
        self._bundle.add(member)
        if self._bundle.full or not self._tar:
            yield from self._rest()

    def _rest(self) -> Iterator[Unit]:
        members = self._bundle.taken()
        if len(members) > 1:
            together = archive(members)
            yield Unit("T", len(together), data=(together,))
            return
        for kind, name, data, target in members:
            to = b" %b" % encoded(target) if kind == "l" else b""
            yield Unit(kind, len(data), encoded(name) + to, (data,))
