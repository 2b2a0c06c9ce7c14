"""Files by the million: what is known of each, packed. As objects they would take four times the memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, MutableMapping, Sequence
from struct import Struct
from typing import NamedTuple, overload

from mlpiped.model import Arrival

NEVER = float("inf")
SORTED = 100_000  # digests that are sorted together

_STAMP = Struct("=qqQq")
_PENDING = Struct("=qqQqdB")
_SEEN = Struct("=qqQ")
_DUE = Struct("=d")
_OLD, _HELD, _OFFERED = 1, 2, 4


class Stamp(NamedTuple):
    size: int
    mtime_ns: int
    ino: int
    ctime_ns: int


class Pending(NamedTuple):
    """One file. `due` is monotonic; NEVER while it waits for its marker, or cannot be read."""

    stamp: Stamp
    due: float
    old: bool = False  # it lay there when the first look was taken, and `catch_up="skip"` passes it over
    held: bool = False  # complete, but there are too few of them
    offered: bool = False  # nobody took the event (a paused pipeline): it is offered again when due


class Waiting(MutableMapping[bytes, Pending]):
    """Path -> `Pending`."""

    def __init__(self) -> None:
        self._rows: dict[bytes, bytes] = {}

    def __getitem__(self, path: bytes) -> Pending:
        return _unpacked(self._rows[path])

    def __setitem__(self, path: bytes, p: Pending) -> None:
        flags = p.old * _OLD | p.held * _HELD | p.offered * _OFFERED
        self._rows[path] = _PENDING.pack(*p.stamp, p.due, flags)

    def __delitem__(self, path: bytes) -> None:
        del self._rows[path]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, path: object) -> bool:
        return path in self._rows

    def drop(self, path: bytes) -> None:
        self._rows.pop(path, None)

    def clear(self) -> None:
        self._rows = {}

    def waits(self, path: bytes, stamp: Stamp) -> bool:
        """Whether it is there with this stamp, and a time alone will make it complete."""
        row = self._rows.get(path)
        return row is not None and row.startswith(_STAMP.pack(*stamp)) and _DUE.unpack_from(row, 32)[0] < NEVER

    def copy(self) -> tuple[list[bytes], list[bytes]]:
        """(paths, rows) as they are now, for whoever goes through all of them a part at a time: see `unpacked`."""
        return list(self._rows), list(self._rows.values())


def unpacked(rows: Sequence[bytes]) -> Iterator[Pending]:
    return map(_unpacked, rows)


def _unpacked(row: bytes) -> Pending:
    *stamp, due, flags = _PENDING.unpack(row)
    return Pending(Stamp(*stamp), due, bool(flags & _OLD), bool(flags & _HELD), bool(flags & _OFFERED))


class Found:
    """Path -> `Stamp`, to be emptied by whoever reads it."""

    def __init__(self) -> None:
        self._rows: dict[bytes, bytes] = {}

    def __setitem__(self, path: bytes, stamp: Stamp) -> None:
        self._rows[path] = _STAMP.pack(*stamp)

    def __getitem__(self, path: bytes) -> Stamp:
        return Stamp(*_STAMP.unpack(self._rows[path]))

    def __contains__(self, path: object) -> bool:
        return path in self._rows

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def drain(self) -> Iterator[tuple[bytes, Stamp]]:
        """All of it, and none is left behind: what comes of them needs the memory."""
        while self._rows:
            path, row = self._rows.popitem()
            yield path, Stamp(*_STAMP.unpack(row))


class Known:
    """What lay at each path when it was last taken."""

    def __init__(self) -> None:
        self._rows: dict[bytes, bytes] = {}

    def put(self, path: bytes, size: int, mtime_ns: int, ino: int) -> None:
        self._rows[path] = _SEEN.pack(size, mtime_ns, ino)

    def has(self, path: bytes, stamp: Stamp) -> bool:
        """Whether exactly this was taken from there."""
        row = self._rows.get(path)
        return row is not None and row == _SEEN.pack(stamp.size, stamp.mtime_ns, stamp.ino)

    def __contains__(self, path: object) -> bool:
        return path in self._rows

    def __len__(self) -> int:
        return len(self._rows)


class Batch(Sequence[Arrival]):
    """Arrivals of one trigger; each is made when it is looked at. The digests are those of files: `b3:<hex>`."""

    def __init__(self, schedule: str) -> None:
        self._schedule = schedule
        self._paths: list[bytes] = []
        self._numbers = array("q")  # size and mtime_ns of each
        self._inodes = array("Q")
        self._digests = bytearray()

    def append(self, path: bytes, digest: str, size: int, mtime_ns: int, ino: int) -> None:
        kind, _, text = digest.partition(":")
        raw = bytes.fromhex(text)
        assert (kind, len(raw)) == ("b3", 32), digest
        self._paths.append(path)
        self._numbers.extend((size, mtime_ns))
        self._inodes.append(ino)
        self._digests += raw

    @property
    def paths(self) -> Sequence[bytes]:
        return self._paths

    def digest(self, i: int) -> str:
        return f"b3:{self._digests[32 * i : 32 * i + 32].hex()}"

    def digests(self) -> Iterator[str]:
        """Each once, sorted: by their first bytes, a few of these at a time. All at once would take as much memory as
        the batch, and no other thread runs during a sort."""
        firsts = bytes(self._digests[::32])
        span = max(1, 256 * SORTED // max(SORTED, len(firsts)))
        for least in range(0, 256, span):
            parts: list[set[bytes]] = [set() for _ in range(span)]
            for i, first in enumerate(firsts):
                if least <= first < least + span:
                    parts[first - least].add(bytes(self._digests[32 * i : 32 * i + 32]))
            for part in parts:
                yield from (f"b3:{raw.hex()}" for raw in sorted(part))

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, i: int) -> Arrival: ...
    @overload
    def __getitem__(self, i: slice) -> list[Arrival]: ...
    def __getitem__(self, i: int | slice) -> Arrival | list[Arrival]:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        size, mtime_ns = self._numbers[2 * i : 2 * i + 2]
        return Arrival(self._schedule, self._paths[i], self.digest(i), size, mtime_ns, self._inodes[i])
