"""Where outputs lie in the store, and what lies somewhere now. Blocking.

    <state>/artifacts/<2 hex of the digest>/<the rest>/<file name>

What has the same bytes lies in one place, under as many names as it was given.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable

from mlpiped.errors import MlpipedError
from mlpiped.files.hashing import Stamp, Unreadable, file_system, hash_fd, open_file, stamp_of, tree_digest
from mlpiped.files.walking import walk

MARKER = ".mlpiped-collected"  # beside an output's old place: a link whose text says where it went
DIGEST = re.compile(r"b3t?:[0-9a-f]{64}")

Recall = Callable[[str, Stamp], "str | None"]  # a digest that is known already


def place_of(store: str, digest: str) -> str:
    plain = digest.rpartition(":")[2]
    return f"{store}/{plain[:2]}/{plain[2:]}"


def mark(digest: str) -> str:
    """Short enough for the inode of a link: it takes no block of its own."""
    kind, _, plain = digest.partition(":")
    return f"{kind}:{b64encode(bytes.fromhex(plain), b'-_').decode()}"


def unmarked(text: str) -> str:
    """The digest of a mark; earlier ones have it in hex."""
    kind, _, short = text.partition(":")
    try:
        return f"{kind}:{b64decode(short, b'-_', validate=True).hex()}" if len(short) == 44 else text
    except ValueError:
        return text


_ONE_IS_ENOUGH = frozenset({"ext4", "xfs", "btrfs"})
"""Where making a folder and naming it above is one journal entry: what makes the folder durable makes its name so.

There fsync of a file makes its last rename durable too: that is in the journal no later than what it changed of the
file. (ext4 without a journal goes up from a file that was named anew, and writes its folders.)
"""

_kinds: dict[str, bool] = {}


def syncs_names(store: str) -> bool:
    if store not in _kinds:
        _kinds[store] = file_system(os.stat(store).st_dev) in _ONE_IS_ENOUGH
    return _kinds[store]


_locks = [threading.Lock() for _ in range(64)]


def placing(digest: str) -> threading.Lock:
    """Two steps may make the same bytes at the same moment; and what is made just now is not garbage."""
    return _locks[int(digest[-2:], 16) % len(_locks)]


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
