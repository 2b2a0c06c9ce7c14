"""Who gets which place: waiting steps and free capacity in, leases out, with the reason for each refusal. Pure.

Order: higher priority first, then the older run, then the order of steps in the pipeline. A step that does not fit now
(memory, say) does not hold up smaller ones behind it, up to LOOK_AHEAD of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOOK_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Need:
    """One step that waits for a place. `computes`: names in order of preference, empty for any."""

    run: int
    index: int
    priority: int = 0
    slots: int = 1
    cpus: float = 1.0
    memory: int | None = None
    computes: tuple[str, ...] = ()

    def rank(self) -> tuple[int, int, int]:
        return (-self.priority, self.run, self.index)


@dataclass(slots=True)
class Place:
    """One compute: what it has and what is taken. `unwell` is a sentence while nothing may be sent there."""

    name: str
    slots: int
    cpus: float | None = None
    memory: int | None = None
    used_slots: int = 0
    used_cpus: float = 0.0
    used_memory: int = 0
    unwell: str | None = None
    holders: dict[tuple[int, int], Need] = field(default_factory=dict)

    def refusal(self, need: Need) -> str | None:
        """Why `need` cannot have a place here now, or None."""
        if self.unwell:
            return f"{self.name}: {self.unwell}"
        if need.slots > self.slots:
            return f"{self.name} has {self.slots} slots in all, {need.slots} are asked for"
        if self.memory is not None and (need.memory or 0) > self.memory:
            return f"{self.name} has {_bytes(self.memory)} of memory in all, {_bytes(need.memory or 0)} are asked for"
        if self.cpus is not None and need.cpus > self.cpus:
            return f"{self.name} has {self.cpus:g} CPUs in all, {need.cpus:g} are asked for"
        if self.used_slots + need.slots > self.slots:
            return f"{self.name} has {self.slots} {'slot' if self.slots == 1 else 'slots'}, {self.used_slots} in use"
        if self.cpus is not None and self.used_cpus + need.cpus > self.cpus:
            return f"{self.name} has {self.cpus - self.used_cpus:g} CPUs free, {need.cpus:g} are asked for"
        if self.memory is not None and self.used_memory + (need.memory or 0) > self.memory:
            free = self.memory - self.used_memory
            return f"{self.name} has {_bytes(free)} of memory free, {_bytes(need.memory or 0)} are asked for"
        return None

    def could_ever(self, need: Need) -> bool:
        """Whether `need` fits when nothing else is here."""
        return Place(self.name, self.slots, self.cpus, self.memory).refusal(need) is None

    def take(self, need: Need) -> None:
        self.holders[need.run, need.index] = need
        self.used_slots += need.slots
        self.used_cpus += need.cpus
        self.used_memory += need.memory or 0

    def give_back(self, run: int, index: int) -> None:
        need = self.holders.pop((run, index), None)
        if need is not None:
            self.used_slots -= need.slots
            self.used_cpus -= need.cpus
            self.used_memory -= need.memory or 0

    def full(self) -> bool:
        return self.unwell is not None or self.used_slots >= self.slots


class Waiting:
    """The steps that wait for a place, best first."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Need]] = []
        self._gone: set[tuple[int, int]] = set()
        self._here: dict[tuple[int, int], Need] = {}

    def __len__(self) -> int:
        return len(self._here)

    def add(self, need: Need) -> None:
        spot = (need.run, need.index)
        if spot in self._gone:  # an old heap entry of the same step would shadow this one
            self._gone.discard(spot)
            self._heap = [entry for entry in self._heap if (entry[1].run, entry[1].index) != spot]
            heapify(self._heap)
        self._here[spot] = need
        heappush(self._heap, (need.rank(), need))

    def remove(self, run: int, index: int) -> bool:
        if self._here.pop((run, index), None) is None:
            return False
        self._gone.add((run, index))
        return True

    def remove_run(self, run: int) -> None:
        for spot in [spot for spot in self._here if spot[0] == run]:
            self.remove(*spot)

    def get(self, run: int, index: int) -> Need | None:
        return self._here.get((run, index))

    def first(self, count: int) -> list[Need]:
        """The best `count` of those who wait, in order."""
        found: list[tuple[tuple[int, int, int], Need]] = []
        while self._heap and len(found) < count:
            entry = heappop(self._heap)
            spot = (entry[1].run, entry[1].index)
            if spot in self._gone:
                self._gone.discard(spot)
            else:
                found.append(entry)
        for entry in found:
            heappush(self._heap, entry)
        return [need for _, need in found]

    def place(self, places: Sequence[Place]) -> Iterator[tuple[Need, Place]]:
        """Take leases for as many as fit, best first."""
        passed: list[tuple[tuple[int, int, int], Need]] = []
        try:
            while self._heap and len(passed) < LOOK_AHEAD and not all(place.full() for place in places):
                entry = heappop(self._heap)
                need = entry[1]
                spot = (need.run, need.index)
                if spot in self._gone:
                    self._gone.discard(spot)
                    continue
                place = choose(need, places)
                if place is None:
                    passed.append(entry)
                    continue
                del self._here[spot]
                place.take(need)
                yield need, place
        finally:  # whoever takes the leases may stop early
            for entry in passed:
                heappush(self._heap, entry)


def candidates(need: Need, places: Sequence[Place]) -> list[Place]:
    if not need.computes:
        return list(places)
    by_name = {place.name: place for place in places}
    return [by_name[name] for name in need.computes if name in by_name]


def choose(need: Need, places: Sequence[Place]) -> Place | None:
    for place in candidates(need, places):
        if place.refusal(need) is None:
            return place
    return None


def refusals(need: Need, places: Sequence[Place]) -> list[str]:
    """For each compute that could take it, why not now."""
    found = candidates(need, places)
    if not found:
        return [f"no compute named {' or '.join(f'`{name}`' for name in need.computes)} in the config"]
    return [reason for place in found if (reason := place.refusal(need)) is not None]


def _bytes(n: int) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n}B"
