"""All files that one trigger waits for or has taken. A million of them are gone through a part at a time."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import anyio.lowlevel

from mlpiped.model import Arrival
from mlpiped.triggers.packed import Batch, Known, Pending, Waiting, unpacked
from mlpiped.triggers.settling import Sum, summed

T = TypeVar("T")
PART = 2000  # files that are dealt with before the loop gets its turn


class Crowd:
    """`sum` is of `pending` as it was when it was last added up."""

    def __init__(self) -> None:
        self.pending = Waiting()
        self.known = Known()
        self.sum = Sum()

    def forget(self) -> None:
        """Nothing is waited for."""
        self.pending.clear()
        self.sum = Sum()

    def waiting(self) -> Iterator[tuple[bytes, Pending]]:
        """As it is now, whatever changes meanwhile."""
        paths, rows = self.pending.copy()
        return zip(paths, unpacked(rows), strict=True)

    def waiting_of(self, arrivals: Iterable[Arrival]) -> Iterator[tuple[bytes, Pending]]:
        """Those that are still waited for."""
        for a in arrivals:
            if (p := self.pending.get(a.path)) is not None:
                yield a.path, p

    async def put(self, entries: Iterable[tuple[bytes, Pending]]) -> None:
        async for part in in_parts(entries):
            for path, p in part:
                self.pending[path] = p

    async def drop(self, paths: Iterable[bytes]) -> None:
        async for part in in_parts(paths):
            for path in part:
                self.pending.drop(path)

    async def taken(self, arrivals: Iterable[Arrival]) -> None:
        async for part in in_parts(arrivals):
            for a in part:
                self.pending.drop(a.path)
                self.known.put(a.path, a.size, a.mtime_ns, a.ino)

    async def add_up(self) -> None:
        _, rows = self.pending.copy()
        found = Sum()
        async for part in in_parts(rows):
            found = summed(unpacked(part), found)
        self.sum = found


class Lot:
    """What is complete, by what becomes of it: content that has fired before, what is passed over, and news."""

    def __init__(self, schedule: str) -> None:
        self.same, self.passed, self.news = Batch(schedule), Batch(schedule), Batch(schedule)


def key_of(batch: Sequence[Arrival]) -> str:
    """Names a batch by its contents, whatever the files are called."""
    digests = batch.digests() if isinstance(batch, Batch) else sorted({a.digest for a in batch})
    whole = hashlib.sha256()
    for i, digest in enumerate(digests):
        whole.update(f"\n{digest}".encode() if i else digest.encode())
    return whole.hexdigest()[:32]


async def in_parts(items: Iterable[T]) -> AsyncIterator[list[T]]:
    """Lists of at most `PART` of them, with a turn of the loop between two."""
    rest = iter(items)
    while part := list(islice(rest, PART)):
        yield part
        if len(part) < PART:
            return
        await anyio.lowlevel.checkpoint()
