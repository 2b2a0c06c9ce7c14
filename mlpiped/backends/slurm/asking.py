"""What is asked of `Records` on a login node: all that wants to know something while a request is under way is asked by
the next one, so that many jobs cost no more sessions there than one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Call = dict[str, Any]

MOST = 500  # calls in one request
ALONE = frozenset({"build"})  # takes long for large code, and may wait: these keep nobody else waiting


class Asking:
    def __init__(self, send: Callable[[Sequence[Call]], Awaitable[Sequence[Call]]]) -> None:
        """`send` makes these calls there, in order, and returns what each of them said. Raises BackendUnavailable."""
        self._send = send
        self._lanes = {False: _Lane(), True: _Lane()}

    async def ask(self, name: str, facts: Sequence[Any]) -> Call:
        """Raises BackendUnavailable. Whoever is cancelled does not take the others with him: they ask again."""
        lane = self._lanes[name in ALONE]
        if lane.next is None or len(lane.next.calls) >= MOST:
            lane.next = _Request()
        mine = lane.next
        place = len(mine.calls)
        mine.calls.append({"name": name, "facts": list(facts)})
        async with lane.turn:
            if not mine.over:
                if lane.next is mine:
                    lane.next = None
                try:
                    mine.said = await self._send(mine.calls)
                except BackendUnavailable as fault:
                    mine.fault = fault.message
                mine.over = True
        if mine.fault is not None:
            raise BackendUnavailable(mine.fault)
        return mine.said[place]


@dataclass(eq=False, slots=True)
class _Request:
    calls: list[Call] = field(default_factory=list)
    over: bool = False
    said: Sequence[Call] = ()
    fault: str | None = None


@dataclass(eq=False, slots=True)
class _Lane:
    next: _Request | None = None
    turn: anyio.Lock = field(default_factory=anyio.Lock)
