"""What triggers remember: cursors, and what has arrived. The ledger seen from here.

Triggers and ledger are rooms of one rank and do not import each other; whoever builds both hands over the ledger and
its moves: `LedgerMemory(ledger, moves, clock)`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from mlpiped.clock import Clock
from mlpiped.model import Arrival, Event

Emit = Callable[[Event], Awaitable[None]]
"""Hands a finding to the scheduler. Returns when what became of it is durable; raises when it is not, and is
called again with the same event later."""


class CursorRow(Protocol):
    @property
    def cursor(self) -> dict[str, Any]: ...
    @property
    def fired_at(self) -> int | None: ...


class SeenRow(Protocol):
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def ino(self) -> int: ...


class Memory(Protocol):
    """Each write returns when it is durable."""

    async def schedule(self, schedule: str) -> CursorRow | None: ...

    async def arrivals(self, schedule: str, after: bytes, limit: int) -> Mapping[bytes, SeenRow]:
        """What lay at each path when it was last taken: the first so many beyond `after`, in the order of paths."""
        ...

    async def arrival_digests(self, schedule: str, digests: Sequence[str]) -> set[str]:
        """Those of `digests` that were ever taken."""
        ...

    async def fired(self, dedupe: str) -> bool:
        """Whether anything became of that fire."""
        ...

    async def record_fire(self, event: Event, verdict: str) -> None:
        """A finding that opens nothing, and why: its dedupe, cursor and arrivals."""
        ...

    async def put_cursor(self, schedule: str, pipeline: str, cursor: Mapping[str, Any]) -> None: ...

    async def put_arrivals(self, arrivals: Sequence[Arrival]) -> None:
        """Files that need no fire: a touch or a copy of what has fired before."""
        ...


class _Ledger(Protocol):
    async def write(self, *ops: Any) -> list[Any]: ...
    async def schedule(self, schedule_id: str, /) -> CursorRow | None: ...
    async def arrivals(self, schedule_id: str, after: bytes, limit: int, /) -> Mapping[bytes, SeenRow]: ...
    async def arrival_digests(self, schedule_id: str, digests: Sequence[str], /) -> set[str]: ...
    async def fire(self, dedupe: str, /) -> object | None: ...


class LedgerMemory:
    """`moves` is the module `mlpiped.ledger.moves`."""

    def __init__(self, ledger: _Ledger, moves: Any, clock: Clock) -> None:
        self._ledger, self._moves, self._clock = ledger, moves, clock

    async def schedule(self, schedule: str) -> CursorRow | None:
        return await self._ledger.schedule(schedule)

    async def arrivals(self, schedule: str, after: bytes, limit: int) -> Mapping[bytes, SeenRow]:
        return await self._ledger.arrivals(schedule, after, limit)

    async def arrival_digests(self, schedule: str, digests: Sequence[str]) -> set[str]:
        return await self._ledger.arrival_digests(schedule, digests)

    async def fired(self, dedupe: str) -> bool:
        return await self._ledger.fire(dedupe) is not None

    async def record_fire(self, event: Event, verdict: str) -> None:
        await self._ledger.write(self._moves.record_fire(event, self._clock.now(), verdict))

    async def put_cursor(self, schedule: str, pipeline: str, cursor: Mapping[str, Any]) -> None:
        await self._ledger.write(self._moves.put_cursor(schedule, pipeline, cursor, self._clock.now()))

    async def put_arrivals(self, arrivals: Sequence[Arrival]) -> None:
        await self._ledger.write(self._moves.put_arrivals(arrivals))
