"""What to let go of: artifacts by age, size and what they would cost to make again, job folders by age. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

T = TypeVar("T")


PAGE = 500  # runs, tokens or digests asked about at once
TICK = 0.1  # seconds: no file system that holds a state folder notes times more coarsely


@dataclass(frozen=True, slots=True)
class Part:
    """What goes, or went, of one kind. `seconds`: what it took to make."""

    what: str
    count: int
    bytes: int = 0
    seconds: float = 0.0


class ArtifactLike(Protocol):
    @property
    def digest(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def used_at(self) -> int: ...  # µs: last made or reused
    @property
    def cost_us(self) -> int: ...  # what the step took that made it


class Removal(NamedTuple):
    digest: str
    bytes: int
    seconds: float  # to make it again
    reason: str


def gc_plan(
    rows: Iterable[ArtifactLike],
    *,
    now: int,
    max_age: float | None = None,
    budget: int | None = None,
    keep: Collection[str] = (),
) -> list[Removal]:
    """What to remove, in this order: first what was not used for `max_age` seconds, then, until the rest fits into
    `budget` bytes, what frees the most bytes for the least work, weighed by how long it has not been used.

    `keep` (digests that active runs build on) counts against the budget but is never removed. A digest that occurs
    more than once counts once: latest use, highest cost. Times are µs.
    """
    merged: dict[str, _Held] = {}
    for row in rows:
        held = _Held(row.digest, row.size, row.used_at, row.cost_us)
        before = merged.get(row.digest)
        merged[row.digest] = held if before is None else before.merged(held)
    total = sum(held.size for held in merged.values())
    free = sorted((held for held in merged.values() if held.digest not in keep), key=lambda h: (h.used_at, h.digest))
    plan: list[Removal] = []
    left = []
    for held in free:
        age = (now - held.used_at) / 1e6
        if max_age is not None and age > max_age:
            plan.append(held.removal(f"not used for {_days(age)}"))
            total -= held.size
        else:
            left.append(held)
    if budget is not None:
        for held in sorted(left, key=lambda h: (h.worth(now), h.digest)):
            if total <= budget:
                break
            if held.size:
                plan.append(held.removal(f"over the budget of {_bytes(budget)}"))
                total -= held.size
    return plan


class JobFolder(NamedTuple):
    """A job's folder and what the ledger knows of its token. Times are µs."""

    token: str
    known: bool  # the ledger has an attempt of that token
    ended_at: int | None  # when its run ended; None while it has not
    changed_at: int  # the folder itself


STRANGER_AGE = 7 * 86_400.0
"""Seconds that a folder stays whose token the ledger does not know (it was restored from a backup): for a look."""


def spent_jobs(folders: Iterable[JobFolder], *, now: int, logs: float | None) -> list[str]:
    """Tokens whose folders have outlived `logs` seconds: of runs that have ended, or of none that is known."""
    if logs is None:
        return []
    before, stranger = now - int(logs * 1e6), now - int(max(logs, STRANGER_AGE) * 1e6)
    return [
        f.token
        for f in folders
        if (f.known and f.ended_at is not None and f.ended_at < before) or (not f.known and f.changed_at < stranger)
    ]


class Span(NamedTuple):
    """A place on the wall clock, and on the one that nobody can set. µs and seconds."""

    wall: int
    monotonic: float


LEAP = 86_400.0
"""Seconds by which the wall clock may run away from the other before retention distrusts it."""


def leapt(before: Span, now: Span) -> float:
    """Seconds by which the wall clock was set forward (or the machine slept) since; 0.0 when that is within reason."""
    ahead = (now.wall - before.wall) / 1e6 - (now.monotonic - before.monotonic)
    return ahead if ahead > LEAP else 0.0


class _Held(NamedTuple):
    digest: str
    size: int
    used_at: int
    cost_us: int

    def merged(self, other: _Held) -> _Held:
        return self._replace(used_at=max(self.used_at, other.used_at), cost_us=max(self.cost_us, other.cost_us))

    def removal(self, reason: str) -> Removal:
        return Removal(self.digest, self.size, self.cost_us / 1e6, reason)

    def worth(self, now: int) -> float:
        """Seconds of work a byte, less the longer nobody asked for it: what goes first has the least."""
        idle_days = max(0, now - self.used_at) / 86_400e6
        return (self.cost_us / 1e6 + 1.0) / max(self.size, 1) / (1.0 + idle_days)


def _days(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:.0f} days" if days >= 2 else f"{seconds / 3600:.0f} hours"


def _bytes(size: int) -> str:
    number = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def pages(values: Sequence[T], size: int = PAGE) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
