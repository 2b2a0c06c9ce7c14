"""Whose turn it is: the steps that wait, in their order, and the places that are kept for those that need much. Pure.

Order: higher priority first; then the owner who has had less lately; then the older run; then the order of steps.

A step that does not fit now holds up none that does, unless it would wait for ever: the best of the waiting steps that
does not fit has a place kept for it, and those behind it may only take there what leaves room for it once what runs
there now has ended (backfill as EASY does it; without an estimate of run times, which a lab's first tries do not have).
Steps before it in the order are not bound. So it starts at the latest when those that were there before it end, and a
card may stand idle until then: better that than a step for two cards that a stream of steps for one starves.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

from mlpiped.placement.decide import candidates, choose
from mlpiped.placement.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlpiped.placement.decide import Need, Place, Spot

LOOK_AHEAD = 256
"""So many shapes of steps that do not fit are passed over at a time."""

_Key = tuple[str, tuple[object, ...]]  # owner, shape
_Rank = tuple[int, float, int, int]


class Waiting:
    """The steps that wait for a place. Steps of one owner and shape stand in one queue: if the first of them does not
    fit, none does, so a look costs by the number of queues and each lease O(log n)."""

    def __init__(self) -> None:
        self.shares = Shares()
        self.kept: dict[str, Need] = {}  # place -> who it is kept for, as of the last look
        self._queues: dict[_Key, list[tuple[tuple[int, int, int], int, Need]]] = {}
        self._here: dict[Spot, Need] = {}
        self._slotless: set[Spot] = set()  # of those here: they fit where no slot is free
        self._numbers = count()
        self._added = False

    def __len__(self) -> int:
        return len(self._here)

    def add(self, need: Need) -> None:
        self._here[need.spot] = need
        if not need.slots:
            self._slotless.add(need.spot)
        queue = self._queues.setdefault((need.owner, need.shape()), [])
        heappush(queue, (need.rank(), next(self._numbers), need))
        self._added = True

    def remove(self, run: int, index: int) -> bool:
        self._slotless.discard((run, index))
        return self._here.pop((run, index), None) is not None  # its entry in a queue means nothing from now on

    def remove_run(self, run: int) -> None:
        for spot in [spot for spot in self._here if spot[0] == run]:
            self.remove(*spot)

    def get(self, run: int, index: int) -> Need | None:
        return self._here.get((run, index))

    def first(self, count: int, now: float = 0.0) -> list[Need]:
        """The best `count` of those who wait, in order as far as that can be known."""
        heads, alone = self._heads(now)
        taken: list[tuple[_Key, tuple[tuple[int, int, int], int, Need]]] = []
        while heads and len(taken) < count:
            _, n, key = heappop(heads)
            taken.append((key, heappop(self._queues[key])))
            following = self._head(key)
            if following is not None:
                heappush(heads, (self._rank(following, now, alone), n, key))
        for key, entry in taken:
            heappush(self._queues.setdefault(key, []), entry)
        return [entry[2] for _, entry in taken]

    def place(self, places: Sequence[Place], now: float = 0.0) -> Iterator[tuple[Need, Place, tuple[str, ...]]]:
        """Take leases for as many as fit, best first: (who, where, which cards). Time in seconds.

        Who takes them may stop early, and may add steps meanwhile.
        """
        self._added = True
        while self._added:
            self._added = False
            yield from self._look(places, now)

    def _look(self, places: Sequence[Place], now: float) -> Iterator[tuple[Need, Place, tuple[str, ...]]]:
        if self._all_full(places):
            return
        before, self.kept = self.kept, {}
        heads, alone = self._heads(now)
        blocked: set[tuple[object, ...]] = set()
        while heads and len(blocked) < LOOK_AHEAD:
            rank, n, key = heappop(heads)
            need = self._head(key)
            if need is None or key[1] in blocked:
                continue
            if (truly := self._rank(need, now, alone)) > rank:  # its owner has got something since
                heappush(heads, (truly, n, key))
                continue
            place = choose(need, places, self.kept)
            if place is None:
                blocked.add(key[1])
                self._keep(need, places, before)
                continue
            heappop(self._queues[key])
            self.remove(*need.spot)
            cards = place.take(need, late=place.name in self.kept)
            self.shares.begin(need.owner, need.slots, need.gpus, now)
            following = self._head(key)
            if following is not None:
                heappush(heads, (self._rank(following, now, alone), n, key))
            yield need, place, cards
            if self._all_full(places):
                break

    def _all_full(self, places: Sequence[Place]) -> bool:
        return not self._slotless and all(place.full() for place in places)

    def _heads(self, now: float) -> tuple[list[tuple[_Rank, int, _Key]], bool]:
        """A heap of the first of each queue, and whether one owner has them all."""
        alone = len({owner for owner, _ in self._queues}) == 1
        heads: list[tuple[_Rank, int, _Key]] = []
        for n, key in enumerate(list(self._queues)):
            head = self._head(key)
            if head is not None:
                heads.append((self._rank(head, now, alone), n, key))
        heapify(heads)
        return heads, alone

    def _rank(self, need: Need, now: float, alone: bool) -> _Rank:
        share = 0.0 if alone else self.shares.of(need.owner, now)
        return (-need.priority, share, need.run, need.index)

    def _head(self, key: _Key) -> Need | None:
        """The first of a queue; an empty one is forgotten."""
        queue = self._queues.get(key)
        while queue:
            need = queue[0][2]
            if self._here.get(need.spot) is need:
                return need
            heappop(queue)
        self._queues.pop(key, None)
        return None

    def _keep(self, need: Need, places: Sequence[Place], before: dict[str, Need]) -> None:
        """A place for it, if there is one that would do: the one that was kept for it, or that lacks the least."""
        able = [p for p in candidates(need, places) if p.name not in self.kept and p.could_soon(need)]
        if able:
            best = min(able, key=lambda p: (before.get(p.name) is not need, *_lacking(p, need)))
            self.kept[best.name] = need


def _lacking(place: Place, need: Need) -> tuple[int, int]:
    return need.gpus - len(place.pick(need)), max(0, place.used_slots + need.slots - place.slots)
