"""Whether work is sent to a compute: a circuit that opens when it fails, and closes by itself. Pure.

It opens when the compute says that it is not well, or after SUBMITS submits in a row that it did not take, well as it
says it is. While it is open the compute is asked again after growing pauses. An incident lasts until it is well again;
one that failed submits began, until a submit goes well: what looked well before may be tried once, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK = 15.0  # seconds between two looks at a compute that is well
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 120.0  # seconds until it is asked again
SPREAD = 0.2  # of a pause, either way: computes that fell together are not asked together
SUBMITS = 3


@dataclass(slots=True)
class Breaker:
    """`random` gives numbers from 0 to 1. Each method says whether an incident has begun or ended by it."""

    random: Callable[[], float]
    why: str | None = None  # nothing is sent there now: a sentence
    incident: bool = False
    _refused: int = 0  # submits in a row
    _tries: int = 0  # looks since it opened

    def looked(self, why: str | None) -> bool:
        """What the compute says of itself."""
        if why is not None:
            return self._open(why)
        if self.why is not None and self._refused >= SUBMITS:
            self._refused = SUBMITS - 1  # once more
            self.why = None
            return False
        self.why = None
        return self._refused < SUBMITS - 1 and self._close()

    def refused(self, why: str) -> bool:
        """A submit was not taken, and the compute says that it is well."""
        self._refused += 1
        return self._refused >= SUBMITS and self._open(why)

    def took(self) -> bool:
        """A submit went well."""
        self._refused = 0
        return self.why is None and self._close()

    def pause(self) -> float:
        """Seconds until the next look."""
        if self.why is None:
            return LOOK
        base = min(FIRST_PAUSE * 2.0 ** min(self._tries - 1, 30), LONGEST_PAUSE)
        return base * (1 + SPREAD * (2 * self.random() - 1))

    def _open(self, why: str) -> bool:
        self.why = why
        self._tries += 1
        begins, self.incident = not self.incident, True
        return begins

    def _close(self) -> bool:
        self._tries = 0
        ends, self.incident = self.incident, False
        return ends
