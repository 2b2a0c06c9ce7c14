"""What a step made, checked and taken into the store. Blocking; all outputs of one step in one go.

Order: check and hash, make read-only, fsync; then one rename each into its place; then fsync the folders. A marker
beside the output says where it went, so that a daemon that died in between finds it again. Where the file system does
so, a single file is made durable with its name, by one fsync after the rename.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlpiped import crash
from mlpiped.artifacts.checking import Found, OutputFault, check
from mlpiped.artifacts.copying import copy_tree, discard, protect, sync
from mlpiped.artifacts.places import MARKER, Recall, mark, measure, place_of, placing, syncs_names
from mlpiped.files.hashing import Hashed, Stamp, granule, stamp_of
from mlpiped.model import OutputFact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.base import JobOutput

Entry = tuple[str, Stamp, str, int]  # path, stamp, digest, hashed_ns: for Fingerprinter.remember


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
        one = item.output.kind == "file" and syncs_names(self.store)
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
        if not syncs_names(self.store):
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
            os.symlink(mark(item.digest), marker)
        except FileExistsError:
            os.unlink(marker)
            os.symlink(mark(item.digest), marker)
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
