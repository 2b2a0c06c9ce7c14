"""The artifact store: what steps made, addressed by content, immutable, committed by one rename.

artifacts/<hh>/<rest of the hex>/<file name>     a file or a tree, read-only; further names of the content beside it
incoming/                                        what is on its way in or out: nothing that anybody refers to
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlpiped.artifacts import admitting, collecting, copying
from mlpiped.artifacts.checking import OutputFault
from mlpiped.artifacts.copying import sync_folder
from mlpiped.artifacts.crew import Crew
from mlpiped.artifacts.places import place_of, placing
from mlpiped.errors import Conflict, UnknownName
from mlpiped.files.hashing import printable, stamp_of, tree_digest
from mlpiped.files.portable import is_portable
from mlpiped.files.walking import PathRefused, is_beneath, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mlpiped.backends.base import JobOutput
    from mlpiped.files.fingerprint import Fingerprinter
    from mlpiped.files.references import Digests, Seen
    from mlpiped.files.walking import Member
    from mlpiped.model import OutputFact

__all__ = ["OutputFault", "Store"]

T = TypeVar("T")

_HEX = re.compile(r"[0-9a-f]{62}")


class Store:
    """`state_dir` is on one file system with the job folders, or collecting copies."""

    def __init__(self, state_dir: Path, fingerprinter: Fingerprinter) -> None:
        self.state_dir = Path(os.path.abspath(state_dir))
        self.root = self.state_dir / "artifacts"
        self.incoming = self.state_dir / "incoming"
        self.root.mkdir(parents=True, exist_ok=True)
        self.incoming.mkdir(exist_ok=True)
        self._fingerprinter = fingerprinter
        self._crew = Crew(4, "store")  # its own: waiting for a disk must not keep `plan` waiting

    async def collect(
        self, folder: Path, outputs: Sequence[JobOutput], wanted: Callable[[], bool] | None = None
    ) -> list[OutputFact] | None:
        """Take `folder`/out/<name>/<file_name> of each output into the store; durable on return.

        `wanted` is asked first, in the same thread: None and nothing is taken if it says no. Raises OutputFault (the
        step's fault: missing, wrong kind, a link that leads outside, …) or OSError (the machine's). May be repeated for
        the same folder, also by a later daemon.
        """

        def work() -> tuple[list[OutputFact], list[collecting.Entry]] | None:
            if wanted is not None and not wanted():
                return None
            return collecting.collect(str(folder), outputs, str(self.state_dir), self._fingerprinter.recall)

        taken = await self._hop(work)
        if taken is None:
            return None
        facts, entries = taken
        if entries:
            self._fingerprinter.remember(entries)
        return facts

    async def intact(self, facts: Sequence[OutputFact]) -> set[int]:
        """The indexes of those that are NOT what they were: gone, changed in any byte, name or exec bit.

        What a compute keeps and has not come home is taken for what it was: see `kept`.
        """
        return await self._fingerprinter.survey(*self._looking(facts)) if facts else set()

    def intact_at_hand(self, facts: Sequence[OutputFact]) -> set[int] | None:
        """`intact`, if nothing has to be read for it; for threads."""
        return self._fingerprinter.survey_at_hand(*self._looking(facts)) if facts else set()

    @staticmethod
    def _looking(facts: Sequence[OutputFact]) -> tuple[Callable[[], list[Seen]], Callable[[Digests], set[int]]]:
        trees: dict[int, list[Member]] = {}
        wanted: dict[int, str | None] = {}  # digests of the store's kind; None: it is elsewhere

        def look() -> list[Seen]:
            seen: list[Seen] = []
            for index, fact in enumerate(facts):
                wanted[index] = admitting.came_home(fact.path) if is_portable(fact.digest) else fact.digest
                try:
                    if fact.kind == "file":
                        st = os.lstat(fact.path)
                        if stat.S_ISREG(st.st_mode):
                            seen.append((fact.path, stamp_of(st)))
                    else:
                        trees[index] = walk(_real(fact.path))
                        seen += [(m.path, m.stamp) for m in trees[index] if m.stamp is not None]
                except (OSError, PathRefused):
                    trees.pop(index, None)
            return seen

        def use(digests: Digests) -> set[int]:
            known = digests.known
            bad = set()
            for index, fact in enumerate(facts):
                digest = wanted[index]
                if digest is None:
                    good = fact.compute is not None
                elif fact.kind == "file":
                    entry = known.get(fact.path)
                    good = entry is not None and entry[1] == digest
                else:
                    good = index in trees and _same(digest, trees[index], digests)
                if not good:
                    bad.add(index)
            return bad

        return look, use

    def path_of(self, digest: str, file_name: str) -> str:
        """Where a content lies in the store under that name, if it does."""
        return f"{place_of(str(self.root), digest)}/{file_name}"

    async def admit(self, came: Path, fact: OutputFact) -> bool:
        """Take what a compute kept to `fact.path`, durable on return; `came` is gone then. False: it is not that."""
        try:
            return await self._hop(lambda: admitting.admit(str(came), fact, str(self.state_dir)))
        finally:
            await self._hop(lambda: copying.erase(str(came)))

    async def get(self, fact: OutputFact, dest: Path, *, force: bool = False) -> Path:
        """Copy an artifact out, writable by its owner; into `dest` if that is a folder. Returns where it is.

        Raises Conflict if something is there and `force` is not set, or if the artifact is gone or damaged.
        """
        await self._check(fact)
        return await self._hop(lambda: _copy_out(fact, dest, force, None))

    async def publish(self, fact: OutputFact, dest: Path, *, root: Path | None = None) -> Path:
        """Put an artifact at exactly `dest`, replacing what is there by one rename. Folders on the way are made.

        With `root`, raises PathRefused if a link on the way leads outside it.
        """
        await self._check(fact)
        return await self._hop(lambda: _copy_out(fact, dest, True, root, exactly=True))

    # --- room ---------------------------------------------------------------------------------------------
    async def remove(self, digests: Iterable[str], *, min_age: float | None = None) -> int:
        """Drop what is held for these digests, under all its names. Returns the bytes freed.

        With `min_age`, what was collected in the last so many seconds stays: its commit may be on its way.
        """
        wanted, root, incoming = list(digests), str(self.root), str(self.incoming)
        before = None if min_age is None else time.time() - min_age
        return await self._hop(lambda: sum(_removed(root, digest, incoming, before) for digest in wanted))

    async def listed(self, *, min_age: float) -> list[str]:
        """Digests (bare hex) in the store that have not been touched for `min_age` seconds, sorted; a younger one may
        belong to a commit on its way."""
        return await self._hop(lambda: _listed(str(self.root), time.time() - min_age))

    async def bytes_of(self, digests: Iterable[str]) -> int:
        """What `remove` would free."""
        places = [place_of(str(self.root), digest) for digest in digests]
        return await self._hop(lambda: sum(_size(place) for place in places))

    async def sweep(self, *, min_age: float = 86_400.0) -> int:
        """Remove what an earlier daemon left in incoming/. Returns how many."""
        return await self._hop(lambda: _swept(str(self.incoming), time.time() - min_age))

    async def _check(self, fact: OutputFact) -> None:
        if await self.intact([fact]):
            raise Conflict(
                f"the artifact of output `{fact.name}` is gone or damaged: {fact.digest}",
                hint="run its step again with --force",
            )

    async def _hop(self, work: Callable[[], T]) -> T:
        return await self._crew.do(work)


def _real(path: str) -> str:
    """A second name of a tree is a link to its first, beside it."""
    if not os.path.islink(path):
        return path
    target = os.readlink(path)
    if "/" in target:
        raise PathRefused(f"`{printable(path)}` leads out of the store")
    return f"{os.path.dirname(path)}/{target}"


def _same(digest: str, members: Sequence[Member], digests: Digests) -> bool:
    lines = []
    for member in members:
        entry = digests.known.get(member.path) if member.stamp is not None else ((), member.target)
        if entry is None:
            return False
        lines.append((os.fsencode(member.rel), member.kind, entry[1]))
    return tree_digest(lines) == digest


# --- out of the store ------------------------------------------------------------------------------------------------
def _copy_out(fact: OutputFact, dest: Path, force: bool, root: Path | None, *, exactly: bool = False) -> Path:
    source = os.path.realpath(fact.path)
    if exactly:
        _make_folders(dest.parent, root)
        if fact.kind == "file" and dest.is_dir():
            raise Conflict(f"`{printable(str(dest))}` is a folder: output `{fact.name}` cannot replace it")
    elif dest.is_dir():
        dest = dest / os.path.basename(fact.path)
    if not dest.parent.is_dir():
        raise UnknownName(f"no folder `{printable(str(dest.parent))}`")
    if os.path.lexists(dest) and not force:
        raise Conflict(
            f"`{printable(str(dest))}` is there already", hint="name another place, or overwrite it with --force"
        )
    staged = dest.parent / f".{dest.name[:200]}.{secrets.token_hex(4)}.tmp"  # hidden: no glob takes it up half done
    try:
        readable = dest.parent.stat().st_mode
        copying.copy_tree(source, str(staged), durable=exactly, readable=readable)
        _rename(staged, dest, force)
    finally:
        if os.path.lexists(staged):
            copying.erase(str(staged))
    if exactly:
        sync_folder(str(dest.parent))
    return dest


def _rename(staged: Path, dest: Path, force: bool) -> None:
    """A file replaces a file in one step; a folder that is there is moved aside first."""
    if not force and not staged.is_dir():
        try:
            os.link(staged, dest)  # unlike a rename, never over something that came meanwhile
        except FileExistsError:
            raise Conflict(f"`{printable(str(dest))}` is there already") from None
        except OSError:
            staged.rename(dest)  # a file system without hard links
        return
    aside = None
    if force and os.path.lexists(dest) and (staged.is_dir() or (dest.is_dir() and not dest.is_symlink())):
        aside = staged.with_name(staged.name + ".old")
        dest.rename(aside)
    staged.rename(dest)
    if aside is not None:
        copying.erase(str(aside))


def _make_folders(folder: Path, root: Path | None) -> None:
    if root is not None and not is_beneath(os.path.realpath(folder), os.path.realpath(root)):
        raise PathRefused(f"`{printable(str(folder))}` leads outside `{printable(str(root))}`")
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        path.chmod(stat.S_IMODE(path.parent.stat().st_mode) | 0o700)  # who reads the datastore reads what is new in it
        sync_folder(str(path.parent))


# --- room ------------------------------------------------------------------------------------------------------------
def _removed(root: str, digest: str, incoming: str, before: float | None) -> int:
    place = place_of(root, digest)
    try:
        with placing(digest):
            if before is not None and os.stat(place).st_mtime >= before:
                return 0
            size = _size(place)
            copying.discard(place, incoming)
    except FileNotFoundError:
        return 0
    return size


def _size(place: str) -> int:
    """Bytes of all files, of two names of one file once; 0 when there is nothing."""
    inodes: dict[tuple[int, int], int] = {}
    try:
        for member in walk(place):
            if member.stamp is not None:
                inodes[member.stamp[:2]] = member.stamp[2]
    except FileNotFoundError:
        return 0
    return sum(inodes.values())


def _listed(root: str, before: float) -> list[str]:
    found: list[str] = []
    for head in sorted(os.listdir(root)):
        if len(head) != 2:
            continue
        with os.scandir(f"{root}/{head}") as entries:
            found += [
                head + entry.name for entry in entries if _HEX.fullmatch(entry.name) and entry.stat().st_mtime < before
            ]
    return sorted(found)


def _swept(incoming: str, before: float) -> int:
    count = 0
    with os.scandir(incoming) as entries:
        for entry in list(entries):
            if entry.stat(follow_symlinks=False).st_ctime < before:
                copying.erase(entry.path)
                count += 1
    return count
