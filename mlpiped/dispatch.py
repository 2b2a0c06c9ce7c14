"""Places and shared work for all runs: who waits, who holds what, and who shares whose attempt.

Two steps with the same key, of whatever runs, never run at the same time: the first leads, the others follow; when
the leader is settled each follower is decided again, and then reuses what the leader made or becomes the leader.

Where leases are short, those who are next get ready meanwhile, many with one commit: their intents are durable when
their turns come. They wait in the same order as before, and who comes late and is better goes first.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mlpiped.placement import Need, Place, Waiting, candidates, refusals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.run import Execution

BRISK = 0.25  # seconds: after a lease that was shorter, the next ones get ready
AHEAD, FEW = 12, 4  # so many for each slot, as soon as there are only a few

Spot = tuple[int, int]
"""(run id, step index)"""


class Dispatch:
    """The `Dispatcher` of `run.py`. `pools`: name -> names of computes."""

    def __init__(self, places: Sequence[Place], pools: Mapping[str, Sequence[str]], max_running: int | None) -> None:
        self.places = {place.name: place for place in places}
        self.pools = pools
        self.max_running = max_running
        self.paused: str | None = None  # why nothing is dispatched at all, if so
        self.waiting = Waiting()
        self.executions: dict[int, Execution] = {}
        self._leaders: dict[str, Spot] = {}
        self._keys: dict[Spot, str] = {}
        self._followers: dict[str, dict[Spot, None]] = {}  # in the order in which they came
        self._follows: dict[Spot, str] = {}
        self._since: dict[Spot, float] = {}  # of each lease
        self._ready: dict[Spot, str] = {}  # who waits and got ready, for which compute
        self._placing = False

    # --- what runs ask ----------------------------------------------------------------------------------------
    def request(self, execution: Execution, index: int, need: Need, share: str | None) -> None:
        spot = (execution.id, index)
        if share is not None:
            leader = self._leaders.setdefault(share, spot)
            if leader != spot:
                self._followers.setdefault(share, {})[spot] = None
                self._follows[spot] = share
                return
            self._keys[spot] = share
        self.waiting.add(self._resolved(need))
        self.place()

    def withdraw(self, execution: Execution, index: int) -> None:
        self.waiting.remove(execution.id, index)
        self._ready.pop((execution.id, index), None)
        key = self._follows.pop((execution.id, index), None)
        if key is not None:
            del self._followers[key][execution.id, index]

    def occupy(self, execution: Execution, index: int, need: Need, compute: str, share: str | None) -> None:
        spot = (execution.id, index)
        if share is not None:
            self._leaders[share] = spot
            self._keys[spot] = share
        if compute in self.places:
            self.places[compute].take(need)

    def release(self, run: int, index: int) -> None:
        leased = self._since.pop((run, index), None)
        held = [place for place in self.places.values() if (run, index) in place.holders]
        if not held:
            return
        for place in held:
            place.give_back(run, index)
        self.place()
        if leased is not None and time.monotonic() - leased < BRISK:
            for place in held:
                self._get_ready(place)

    def pressed(self) -> bool:
        return len(self.waiting) > 0

    def settled(self, run: int, index: int) -> None:
        key = self._keys.pop((run, index), None)
        if key is None:
            return
        del self._leaders[key]
        for follower, step in self._followers.pop(key, ()):
            del self._follows[follower, step]
            if follower in self.executions:
                self.executions[follower].decide_again(step)

    def forget(self, run: int) -> None:
        """The run's walk was interrupted: nothing of it waits, holds or leads any more."""
        for index in [i for place in self.places.values() for r, i in place.holders if r == run]:
            for place in self.places.values():
                place.give_back(run, index)
        self.waiting.remove_run(run)
        for spot in [spot for spot in (*self._since, *self._ready) if spot[0] == run]:
            self._since.pop(spot, None)
            self._ready.pop(spot, None)
        for spot in [spot for spot in self._follows if spot[0] == run]:
            del self._followers[self._follows.pop(spot)][spot]
        for spot in [spot for spot in self._keys if spot[0] == run]:
            self.settled(*spot)
        self.place()

    # --- what the scheduler does ------------------------------------------------------------------------------
    def place(self) -> None:
        """Lease what is free to those who wait, best first. Not re-entered: a grant may end in a new request."""
        if self._placing or self.paused is not None:
            return
        self._placing = True
        try:
            if self._room():
                for need, place in self.waiting.place(list(self.places.values())):
                    self._ready.pop((need.run, need.index), None)
                    self._since[need.run, need.index] = time.monotonic()
                    self.executions[need.run].granted(need.index, place.name)
                    if not self._room():
                        break
        finally:
            self._placing = False

    def _get_ready(self, place: Place) -> None:
        """Let those who are next begin, up to their turn: only who can run here and nowhere else."""
        if self.paused is not None or sum(name == place.name for name in self._ready.values()) > FEW * place.slots:
            return
        for need in self.waiting.first(place.slots * AHEAD):
            spot = (need.run, need.index)
            if spot not in self._ready and candidates(need, list(self.places.values())) == [place]:
                self._ready[spot] = place.name
                self.executions[need.run].get_ready(need.index, place.name)

    def _room(self) -> bool:
        return self.max_running is None or sum(len(p.holders) for p in self.places.values()) < self.max_running

    def _resolved(self, need: Need) -> Need:
        """Pools -> their computes."""
        if not any(name in self.pools for name in need.computes):
            return need
        names = [n for name in need.computes for n in self.pools.get(name, (name,))]
        return Need(
            need.run, need.index, need.priority, need.slots, need.cpus, need.memory, tuple(dict.fromkeys(names))
        )

    # --- what people ask --------------------------------------------------------------------------------------
    def why_waiting(self, run: int, index: int) -> str | None:
        """Present tense: why the queued step has no place yet."""
        key = self._follows.get((run, index))
        if key is not None:
            leader, step = self._leaders[key]
            name = self.executions[leader].graph.steps[step].name
            return f"shares the attempt of run {leader}/{name}, which has the same key"
        need = self.waiting.get(run, index)
        if need is None:
            return None
        if self.paused is not None:
            return f"nothing is started: {self.paused}"
        if not self._room():
            return f"max_running_steps = {self.max_running} is reached"
        places = candidates(need, list(self.places.values()))
        lead = "waits for a place" if any(place.could_ever(need) for place in places) else "can never have a place"
        return f"{lead}: " + "; ".join(f"{reason}{self._held_by(place)}" for place, reason in self._refusals(need))

    def _refusals(self, need: Need) -> list[tuple[Place | None, str]]:
        found = refusals(need, list(self.places.values()))
        named = [(self.places.get(reason.split(maxsplit=1)[0].rstrip(":")), reason) for reason in found]
        return list(named) or [(None, "its turn has not come")]

    def _held_by(self, place: Place | None) -> str:
        if place is None or not place.holders:
            return ""
        runs = list(dict.fromkeys(run for run, _ in place.holders))
        words = [f"run {r} ({self.executions[r].row.owner})" for r in runs[:3] if r in self.executions]
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        return f", held by {', '.join(words)}{more}" if words else ""
