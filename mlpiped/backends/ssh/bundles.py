"""Many small files as one archive, and what a tree consists of as one digest. Neither needs a connection."""

from __future__ import annotations

import hashlib
import re
import tarfile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL = 256 << 10  # bytes: a larger file goes by itself
MOST_BYTES, MOST_MEMBERS = 1 << 20, 1000
PLAIN = re.compile(r"[A-Za-z0-9._/,=+@%-]*\Z")
KINDS = {"f": tarfile.REGTYPE, "x": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE}


class Small(NamedTuple):
    """`kind` as in tree.sh."""

    kind: str
    name: str
    data: bytes = b""
    target: str = ""


class Bundle:
    """Members for `tar -x`; names are relative, and of what we walked ourselves."""

    def __init__(self) -> None:
        self._members: list[Small] = []
        self._size = 0

    @property
    def full(self) -> bool:
        return self._size >= MOST_BYTES or len(self._members) >= MOST_MEMBERS

    def add(self, member: Small) -> None:
        self._members.append(member)
        self._size += len(member.data)

    def taken(self) -> list[Small]:
        """What is added from now on is the next one's."""
        members, self._members, self._size = self._members, [], 0
        return members


def archive(members: Sequence[Small]) -> bytes:
    """Without padding: `tar` is to read it whole."""
    blocks = []
    for kind, name, data, target in members:
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.linkname = KINDS[kind], len(data), target
        entry.mode = 0o644 if kind == "f" else 0o755
        blocks += [entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), data]
        blocks.append(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
    return b"".join([*blocks, b"\0" * (2 * tarfile.BLOCKSIZE)])


class Manifest:
    """What a tree must consist of, as `tree.sh` sees it: every file with its SHA-256."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def folder(self, name: str) -> None:
        self._lines.append(f"d {told(name)}\n")

    def link(self, name: str, target: str) -> None:
        self._lines.append(f"l {told(name)} {_word(target)}\n")

    def file(self, kind: str, size: int, digest: str, name: str) -> None:
        self._lines.append(f"{kind} {size} {digest} {told(name)}\n")

    def digest(self) -> str:
        return hashlib.sha256("".join(sorted(self._lines)).encode()).hexdigest()


def told(name: str) -> str:
    return _word(f"./{name}")


def _word(text: str) -> str:
    """As the box tells a name: plain, or in hexadecimal."""
    return text if PLAIN.match(text) else ":" + text.encode("utf-8", "surrogateescape").hex()
