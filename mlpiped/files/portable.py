"""The digests that a box can make too, with sh and coreutils: SHA-256, by the rules that BLAKE3 has here.

`s2:<hex>` of a file, `s2t:<hex>` of a tree. They name outputs that stay where they were made (`keep="remote"`), and
only those: the same bytes have one of these for ever, wherever they go.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from typing import TYPE_CHECKING

from mlpiped.files.hashing import CHUNK, Unreadable, open_file
from mlpiped.files.walking import walk

if TYPE_CHECKING:
    from collections.abc import Iterable

PORTABLE = re.compile(r"s2t?:[0-9a-f]{64}")


def is_portable(digest: str) -> bool:
    return digest.startswith(("s2:", "s2t:"))


def portable_tree(entries: Iterable[tuple[bytes, str, str]]) -> str:
    """`s2t:<hex>` over what `tree_digest` takes; the payload of a file is its `s2:<hex>`."""
    lines = [b"%b\0%b%b\0" % (name, kind.encode(), os.fsencode(payload)) for name, kind, payload in sorted(entries)]
    return "s2t:" + hashlib.sha256(b"mlpiped tree 1\0" + b"".join(lines)).hexdigest()


def portable_digest(path: str) -> str:
    """Of a file or tree, read from the start. Raises OSError, PathRefused, Unreadable."""
    if stat.S_ISREG(os.lstat(path).st_mode):
        return _file(path)
    entries = []
    for member in walk(path):
        payload = member.target if member.stamp is None else _file(member.path)
        entries.append((os.fsencode(member.rel), member.kind, payload))
    return portable_tree(entries)


def _file(path: str) -> str:
    hasher = hashlib.sha256()
    with open(open_file(path), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unreadable("is not a regular file")
        while data := file.read(CHUNK):
            hasher.update(data)
    return f"s2:{hasher.hexdigest()}"
