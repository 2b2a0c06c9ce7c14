"""Files that are new and not yet taken: which are complete, and until when the others are waited for. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlpiped.triggers.packed import NEVER, Pending, Stamp

SORTED = 10_000  # files
AHEAD = 1.0  # seconds by which a ctime may lie in the future before it is not believed


def due_at(stamp: Stamp, settle: float, *, wall: float, mono: float, local: bool) -> float:
    """When a file will have held still for `settle` seconds, if nothing more happens to it.

    A local kernel notes each write and rename in the ctime, so the time that has passed since then counts already. A
    server's clock may differ, and a ctime in the future is a clock that was set: then it counts from now.
    """
    age = wall - stamp.ctime_ns / 1e9
    if not local or age < -AHEAD:
        age = 0.0
    return mono + max(0.0, settle - max(age, 0.0))


def marked_due(stamp: Stamp, marker_ctime_ns: int | None, settled: float, mono: float) -> float:
    """A file whose marker came after it is complete at once; a marker from before (of the last delivery) is no proof
    that it is all there, so the file must hold still as well."""
    if marker_ctime_ns is None:
        return NEVER
    return mono if marker_ctime_ns >= stamp.ctime_ns else settled


def ready(pending: Iterable[tuple[bytes, Pending]], mono: float, *, each: bool) -> list[bytes]:
    """Those that may be taken now, sorted unless they are very many: no other thread runs during a sort. Without `each`
    a file that still moves holds back all others."""
    due: list[bytes] = []
    for path, p in pending:
        if p.due <= mono:
            due.append(path)
        elif p.due < NEVER and not each:
            return []
    return sorted(due) if len(due) <= SORTED else due


@dataclass(frozen=True, slots=True)
class Sum:
    """Of all that is waited for: how many move, are held, are offered, and the first and last time that is due."""

    moving: int = 0
    held: int = 0
    offered: int = 0
    first: float = NEVER
    last: float = NEVER  # NEVER when nothing is due
    last_moving: float = 0.0

    def next_due(self, *, each: bool) -> float:
        """When `ready` is to be asked again; NEVER when that depends on something other than time."""
        return self.first if each else self.last


def summed(pending: Iterable[Pending], so_far: Sum) -> Sum:
    """`so_far` and these."""
    moving, held, offered = so_far.moving, so_far.held, so_far.offered
    first, last, last_moving = so_far.first, -NEVER if so_far.last == NEVER else so_far.last, so_far.last_moving
    for p in pending:
        held += p.held
        offered += p.offered
        if p.held or p.due == NEVER:
            continue
        first, last = min(first, p.due), max(last, p.due)
        if not p.offered:
            moving, last_moving = moving + 1, max(last_moving, p.due)
    return Sum(moving, held, offered, first, NEVER if last == -NEVER else last, last_moving)
