"""Files that are new and not yet taken: which are complete, and until when the others are waited for. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlpiped.triggers.scan import Stamp

AHEAD = 1.0  # seconds by which a ctime may lie in the future before it is not believed
NEVER = float("inf")


@dataclass(slots=True)
class Pending:
    """One file. `due` is monotonic; NEVER while it waits for its marker, or cannot be read."""

    stamp: Stamp
    due: float
    old: bool = False  # it lay there when the first look was taken, and `catch_up="skip"` passes it over
    held: bool = False  # complete, but there are too few of them
    offered: bool = False  # nobody took the event (a paused pipeline): it is offered again when due


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


def ready(pending: Mapping[bytes, Pending], mono: float, *, each: bool) -> list[bytes]:
    """Those that may be taken now, sorted. Without `each` a file that still moves holds back all others."""
    if not each and any(mono < p.due < NEVER for p in pending.values()):
        return []
    return sorted(path for path, p in pending.items() if p.due <= mono)


def next_due(pending: Mapping[bytes, Pending], *, each: bool) -> float:
    """When `ready` is to be asked again; NEVER when that depends on something other than time."""
    open_ones: Iterable[float] = [p.due for p in pending.values() if not p.held and p.due < NEVER]
    return (min if each else max)(open_ones, default=NEVER)
