"""How much of the machines each owner has had lately. Pure: whoever asks says what time it is.

An owner's share is the sum of slot-seconds and, GPU_WEIGHT times, card-seconds, each halved for every HALF_LIFE since.
All fade alike, so instead of fading what was, what comes is counted for more: only then does an owner's share change.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

HALF_LIFE = 86400.0
"""Seconds: what somebody ran overnight counts in the morning, and last week's hardly. HTCondor's default, too."""

GPU_WEIGHT = 8.0
"""A card is as scarce as so many slots: a box has about eight cores to a card."""

LEAST = 1.0
"""Seconds for which each start counts at once: or whoever starts many at one moment would have started none."""

_REBASE = 500.0  # half-lives after which the numbers are made small again


@dataclass(slots=True)
class _Owner:
    used: float = 0.0  # until `since`
    rate: float = 0.0  # slots and weighed cards that it holds
    since: float = 0.0


class Shares:
    """Times are seconds."""

    def __init__(self) -> None:
        self._owners: dict[str, _Owner] = {}
        self._zero: float | None = None

    def begin(self, owner: str, slots: int, cards: int, now: float) -> None:
        """A step starts to hold so much."""
        at = self._settled(owner, now)
        weight = _weight(slots, cards)
        at.used += weight * LEAST * self._worth(now)
        at.rate += weight

    def end(self, owner: str, slots: int, cards: int, now: float) -> None:
        at = self._settled(owner, now)
        at.rate = max(0.0, at.rate - _weight(slots, cards))

    def past(self, owner: str, slot_seconds: float, card_seconds: float, when: float) -> None:
        """What it has had around `when`, as the ledger tells."""
        at = self._settled(owner, when)
        at.used += (slot_seconds + GPU_WEIGHT * card_seconds) * self._worth(when)

    def of(self, owner: str, now: float) -> float:
        """Fit to be compared with another's of this moment."""
        return self._settled(owner, now).used if owner in self._owners else 0.0

    def _settled(self, owner: str, now: float) -> _Owner:
        if self._zero is None or now - self._zero > _REBASE * HALF_LIFE:
            self._rebase(now)
        at = self._owners.setdefault(owner, _Owner(since=now))
        if at.rate and now > at.since:
            at.used += at.rate * HALF_LIFE / log(2) * (self._worth(now) - self._worth(at.since))
        at.since = max(at.since, now)
        return at

    def _worth(self, when: float) -> float:
        """Of a second at that time, in seconds at the zero."""
        assert self._zero is not None
        return float(2.0 ** max(-_REBASE, (when - self._zero) / HALF_LIFE))

    def _rebase(self, now: float) -> None:
        before, self._zero = self._zero, now
        if before is not None:
            for at in self._owners.values():
                at.used *= 2.0 ** ((before - now) / HALF_LIFE)


def _weight(slots: int, cards: int) -> float:
    return slots + GPU_WEIGHT * cards
