"""What the files are now: stat cache, hashing and walking, all of it in two threads of its own.

A digest is looked up by what `stat` says: first in memory, then in the ledger's table (one read for all that are not
in memory), and only then are bytes read. `hashing.vouches` says when a stamp may stand for bytes.
"""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
from anyio import to_thread

from mlpiped.files.hashing import CHUNK, FileHash, Hashed, Stamp, StatRow, Unreadable, stamp_of, vouches
from mlpiped.files.references import Digests, Missing, RefFact, Resolution, Seen, member_digest
from mlpiped.files.roots import Roots
from mlpiped.files.walking import Beneath, Member, PathRefused, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from mlpiped.spec import Reference

T = TypeVar("T")
PathT = TypeVar("PathT", str, bytes)

__all__ = ["Digests", "FileFact", "Fingerprinter", "Missing", "RefFact", "Seen", "StatRow", "StatTable"]

SLICE = 0.25
"""Seconds after which hashing hands its thread to whoever waits for one."""

TWO_THREADS_FROM = 8 << 20


class StatTable(Protocol):
    """What of the ledger this room needs."""

    async def stat_cache(self, paths: Sequence[bytes]) -> Mapping[bytes, Any]:
        """StatRow by path, of those that have one."""
        ...

    def post(self, *ops: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class FileFact:
    digest: str
    size: int
    mtime_ns: int
    kind: str  # "file" | "folder"


class Fingerprinter:
    """`keep` makes the op that stores stat rows (`ledger.moves.put_stat_cache`)."""

    def __init__(
        self,
        ledger: StatTable,
        keep: Callable[[Sequence[Any]], Any],
        *,
        limiter: anyio.CapacityLimiter | None = None,
        memory: int = 50_000,
        roots: Roots | None = None,
    ) -> None:
        self._ledger = ledger
        self._keep = keep
        self._limiter = limiter or anyio.CapacityLimiter(2)
        self._memory: dict[str, tuple[Stamp, str]] = {}
        self._most = memory
        self.roots = roots or Roots()
        self._flying: dict[Seen, anyio.Event] = {}
        self.bytes_read = 0  # since the start, for tests and metrics

    # --- what people ask ------------------------------------------------------------------------------------
    async def files(self, paths: Sequence[PathT]) -> dict[PathT, FileFact]:
        """Facts of files and folders, links followed. Absent: what is missing, unreadable, changing or neither."""
        names = [(path, os.fsdecode(path)) for path in paths]
        looked: dict[str, _Look] = {}

        def look() -> list[Seen]:
            seen: list[Seen] = []
            for _, name in names:
                if (found := _look(name)) is not None:
                    looked[name] = found
                    seen += found.seen()
            return seen

        def use(digests: Digests) -> dict[PathT, FileFact]:
            facts: dict[PathT, FileFact] = {}
            for path, name in names:
                if name in looked and (fact := looked[name].fact(digests)) is not None:
                    facts[path] = fact
            return facts

        return await self.survey(look, use)

    async def reference(self, root: Path, ref: Reference) -> RefFact | Missing:
        return (await self.references([(root, ref)]))[0]

    async def references(self, wanted: Sequence[tuple[Path, Reference]]) -> list[RefFact | Missing]:
        """One look for all of them; the answers in the order asked."""
        resolutions = [Resolution(str(root), ref, None) for root, ref in wanted]
        return await self._resolve(resolutions)

    async def again(self, root: Path, ref: Reference, fact: RefFact) -> RefFact | Missing:
        """What `fact` would be now. Of a glob only the paths that it had are looked at: one that arrived later is not
        among the arguments of the step that runs, so it changes nothing for it."""
        known = [path.removeprefix(f"{root}/") for path in fact.paths] if ref.glob else None
        return (await self._resolve([Resolution(str(root), ref, known)]))[0]

    async def _resolve(self, resolutions: Sequence[Resolution]) -> list[RefFact | Missing]:
        return await self.survey(*_resolving(resolutions, self.roots))

    def at_hand(self, wanted: Sequence[tuple[Path, Reference]]) -> list[RefFact | Missing] | None:
        """`references`, if nothing has to be read for it; for threads."""
        look, use = _resolving([Resolution(str(root), ref, None) for root, ref in wanted], self.roots)
        return self.survey_at_hand(look, use)

    # --- what other rooms build on --------------------------------------------------------------------------
    async def survey(self, look: Callable[[], Iterable[Seen]], use: Callable[[Digests], T]) -> T:
        """`use(digests of look())`, both in a thread: one hop when every digest is known, without a query."""
        digests, unknown, used = await self.hop(lambda: self._first(look, use))
        if used:
            return used[0]
        await self._learn(unknown, digests)
        return await self.hop(lambda: use(digests))

    def survey_at_hand(self, look: Callable[[], Iterable[Seen]], use: Callable[[Digests], T]) -> T | None:
        """`survey`, if every digest is in memory; for threads."""
        used = self._first(look, use)[2]
        return used[0] if used else None

    def _first(
        self, look: Callable[[], Iterable[Seen]], use: Callable[[Digests], T]
    ) -> tuple[Digests, list[Seen], list[T]]:
        known: dict[str, tuple[Stamp, str]] = {}
        unknown = self._recall(look(), known)
        digests = Digests(known, {})
        return digests, unknown, [] if unknown else [use(digests)]

    async def hop(self, work: Callable[[], T]) -> T:
        """Run `work` in one of this room's threads."""
        return await to_thread.run_sync(work, limiter=self._limiter)

    def recall(self, path: str, stamp: Stamp) -> str | None:
        """The digest, if memory has it. For threads."""
        entry = self._memory.get(path)
        return entry[1] if entry is not None and entry[0] == stamp else None

    def recall_now(self, path: str) -> str | None:
        """The digest of the regular file that is there now, if memory has it; for threads."""
        try:
            st = os.lstat(path)
        except (OSError, ValueError):
            return None
        return self.recall(path, stamp_of(st)) if stat.S_ISREG(st.st_mode) else None

    def remember(self, entries: Iterable[tuple[str, Stamp, str, int]]) -> None:
        """Take (path, stamp, digest, hashed_ns) into memory and the ledger; those that do not vouch are dropped."""
        rows = []
        for path, stamp, digest, hashed_ns in entries:
            if vouches(stamp, hashed_ns):
                self._memory[path] = (stamp, digest)
                rows.append(StatRow(os.fsencode(path), *stamp, hashed_ns, digest))
        self._evict()
        if rows:
            self._ledger.post(self._keep(rows))

    def _recall(self, seen: Iterable[Seen], known: dict[str, tuple[Stamp, str]]) -> list[Seen]:
        unknown = []
        memory = self._memory
        for item in seen:
            path, stamp = item
            entry = memory.get(path)
            if entry is not None and entry[0] == stamp:
                known[path] = entry
            else:
                unknown.append(item)
        return unknown

    def _evict(self) -> None:
        """The table below has them all: the oldest go when there are too many."""
        if len(self._memory) > self._most:
            for path in list(self._memory)[: len(self._memory) - self._most * 7 // 8]:
                self._memory.pop(path, None)

    # --- reading --------------------------------------------------------------------------------------------
    async def _learn(self, unknown: list[Seen], digests: Digests) -> None:
        """Put the digests of `unknown` into `digests`: from the table, else by reading."""
        rows = await self._ledger.stat_cache([os.fsencode(path) for path, _ in unknown])
        left = []
        for path, stamp in unknown:
            row = rows.get(os.fsencode(path))
            if row is not None and _stamp_in(row) == stamp and vouches(stamp, row.hashed_ns):
                digests.known[path] = self._memory[path] = (stamp, row.digest)
            else:
                left.append((path, stamp))
        self._evict()
        while left:
            others = [self._flying[item] for item in left if item in self._flying]
            mine = [item for item in left if item not in self._flying]
            left = [item for item in left if item in self._flying]
            await self._read_once(mine, digests)
            for event in others:
                await event.wait()
            left = self._recall(left, digests.known)

    async def _read_once(self, mine: Sequence[Seen], digests: Digests) -> None:
        """Read the files of `mine`; whoever wants the same meanwhile waits."""
        if not mine:
            return
        done = anyio.Event()
        self._flying.update(dict.fromkeys(mine, done))
        try:
            queue = deque(FileHash(path) for path in dict.fromkeys(path for path, _ in mine))
            found: dict[str, Hashed] = {}
            workers = 2 if len(mine) > 1 and sum(stamp[2] for _, stamp in mine) > TWO_THREADS_FROM else 1
            async with anyio.create_task_group() as tasks:
                for n in range(workers):
                    tasks.start_soon(self._drain, queue, found, digests.failed, name=f"hashing {n}")
            for path, hashed in found.items():
                digests.known[path] = (hashed.stamp, hashed.digest)
            self.remember((path, h.stamp, h.digest, h.began_ns) for path, h in found.items())
        finally:
            for item in mine:
                self._flying.pop(item, None)
            done.set()

    async def _drain(self, queue: deque[FileHash], found: dict[str, Hashed], failed: dict[str, str]) -> None:
        """Read files of `queue` until it is empty, in slices: a terabyte must not keep a one-line file waiting."""
        buffer = bytearray(CHUNK)
        current: list[FileHash] = []

        def work() -> None:
            deadline = time.monotonic() + SLICE
            while time.monotonic() < deadline:
                if not current:
                    try:
                        current.append(queue.popleft())
                    except IndexError:
                        return
                self._advance(current, deadline, buffer, found, failed)

        try:
            while queue or current:
                await self.hop(work)
        finally:
            for job in current:
                job.close()

    def _advance(
        self,
        current: list[FileHash],
        deadline: float,
        buffer: bytearray,
        found: dict[str, Hashed],
        failed: dict[str, str],
    ) -> None:
        job = current[0]
        try:
            done = job.advance(deadline, buffer)
        except Unreadable as fault:
            failed[job.path] = str(fault)
        else:
            if done is None:
                return
            found[job.path] = done
            self.bytes_read += done.stamp[2]
        current.clear()
        job.close()


def _resolving(
    resolutions: Sequence[Resolution], roots: Roots
) -> tuple[Callable[[], list[Seen]], Callable[[Digests], list[RefFact | Missing]]]:
    beneath: dict[str, tuple[Beneath, str | None]] = {}

    def look() -> list[Seen]:
        seen: list[Seen] = []
        for resolution in resolutions:
            if resolution.root not in beneath:
                beneath[resolution.root] = Beneath(resolution.root), roots.away(resolution.root)
            seen += resolution.look(*beneath[resolution.root])
        return seen

    return look, lambda digests: [resolution.fact(digests) for resolution in resolutions]


def _stamp_in(row: Any) -> Stamp:
    return (row.dev, row.ino, row.size, row.mtime_ns, row.ctime_ns)


# --- one path, as `files` sees it -------------------------------------------------------------------------------
@dataclass(slots=True)
class _Look:
    real: str
    st: os.stat_result
    members: list[Member] | None  # of a folder

    def seen(self) -> list[Seen]:
        if self.members is None:
            return [(self.real, stamp_of(self.st))]
        return [(m.path, m.stamp) for m in self.members if m.stamp is not None]

    def fact(self, digests: Digests) -> FileFact | None:
        try:
            if self.members is None:
                digests.of(self.real)
                stamp, digest = digests.known[self.real]
                return FileFact(digest, stamp[2], stamp[3], "file")
            digest = member_digest(self.members, digests)
        except Unreadable:
            return None
        size = sum(m.stamp[2] for m in self.members if m.stamp is not None)
        return FileFact(digest, size, self.st.st_mtime_ns, "folder")


def _look(path: str) -> _Look | None:
    try:
        st = os.lstat(path)
        if stat.S_ISLNK(st.st_mode):
            path = os.path.realpath(path)
            st = os.lstat(path)
        if stat.S_ISREG(st.st_mode):
            return _Look(path, st, None)
        return _Look(path, st, walk(path)) if stat.S_ISDIR(st.st_mode) else None
    except (OSError, ValueError, PathRefused):
        return None
