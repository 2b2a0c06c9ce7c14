"""How far the things are that travel to and from a box, in words. From memory."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))


@dataclass(slots=True)
class Moving:
    """`total` None: nobody knows, or it is no matter of bytes."""

    what: str
    total: int | None = None
    done: int = 0

    def moved(self, count: int) -> None:
        self.done += count

    def counted(self, stream: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in stream:
            self.done += len(chunk)
            yield chunk

    def __str__(self) -> str:
        if self.total is None:
            return self.what
        unit, size = next((pair for pair in UNITS if self.total >= pair[1]), UNITS[-1])
        digits = 1 if size > 1 else 0
        return f"{self.what}: {min(self.done, self.total) / size:.{digits}f} of {self.total / size:.{digits}f} {unit}"


class Progress:
    """What moves has a place, and jobs wait for places: what one brings others may need too."""

    def __init__(self) -> None:
        self._moving: dict[str, Moving] = {}
        self._waits: dict[str, str] = {}  # token -> place

    def of(self, token: str) -> str | None:
        moving = self._moving.get(self._waits.get(token, ""))
        return None if moving is None else str(moving)

    @contextmanager
    def wait(self, token: str, place: str) -> Iterator[None]:
        self._waits[token] = place
        try:
            yield
        finally:
            self._waits.pop(token, None)

    @contextmanager
    def move(self, place: str, what: str, total: int | None = None) -> Iterator[Moving]:
        moving = self._moving[place] = Moving(what, total)
        try:
            yield moving
        finally:
            self._moving.pop(place, None)
