"""Places and shared work for all runs: who waits, who holds what, and who shares whose attempt.

Two steps with the same key, of whatever runs, never run at the same time: the first leads, the others follow; when
the leader is settled each follower is decided again, and then reuses what the leader made or becomes the leader. Until
the leader has a place each of them waits for one too, and whoever gets the first one leads: what the others ask for,
and how long they would wait, keeps nobody waiting.

Where leases are short, those who are next get ready meanwhile, many with one commit: their intents are durable when
their turns come. They wait in the same order as before, and who comes late and is better goes first.
"""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from mlpiped.placement.decide import Need, Place, candidates, refusals
from mlpiped.placement.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mlpiped.execution.run import Execution
    from mlpiped.ledger import AttemptRow
    from mlpiped.placement.decide import Refusal, Spot

BRISK = 0.25  # seconds: after a lease that was shorter, the next ones get ready
AHEAD, FEW = 12, 4  # so many for each slot, as soon as there are only a few


class Dispatch:
    """The `Dispatcher` of `run.py`. `pools`: name -> names of computes; `now`: microseconds since the epoch."""

    def __init__(
        self,
        places: Sequence[Place],
        pools: Mapping[str, Sequence[str]],
        max_running: int | None,
        now: Callable[[], int] = lambda: 0,
    ) -> None:
        self.places = {place.name: place for place in places}
        leased: dict[str, dict[Spot, int | None]] = {}
        for place in places:
            place.leased = leased  # a card may be offered by two computes: this host, and an engine on it
        self.now = now
        self.on_unavailable: Callable[[str, str | None], None] = lambda compute, why: None
        self.on_taken: Callable[[str], None] = lambda compute: None
        self.on_answered: Callable[[str], None] = lambda compute: None
        self.pools = pools
        self.max_running = max_running
        self.paused: str | None = None  # why nothing is dispatched at all, if so
        self.waiting = Waiting()
        self.executions: dict[int, Execution] = {}
        self._leaders: dict[str, Spot] = {}
        self._keys: dict[Spot, str] = {}
        self._followers: dict[str, dict[Spot, Need]] = {}  # in the order in which they came
        self._follows: dict[Spot, str] = {}
        self._since: dict[Spot, float] = {}  # of each lease
        self._ready: dict[Spot, str] = {}  # who waits and got ready, for which compute
        self._placing = False
        self._expected: set[int] = set()  # runs that are taken up again: what they hold is not known yet
        self._early: dict[Spot, tuple[Execution, int, Need, str | None]] = {}  # who asked before it is

    # --- what runs ask ----------------------------------------------------------------------------------------
    def request(self, execution: Execution, index: int, need: Need, share: str | None) -> None:
        spot = (execution.id, index)
        if self._expected:
            self._early[spot] = execution, index, need, share
            return
        need = self._resolved(need)
        self._ready.pop(spot, None)  # it asks anew: its turn had not come in time
        if share is not None:
            leader = self._leaders.setdefault(share, spot)
            if leader != spot:
                self._followers.setdefault(share, {})[spot] = need
                self._follows[spot] = share
                if leader in self._ready or self.waiting.get(*leader) is None:
                    return
            else:
                self._keys[spot] = share
                for other in self._followers.get(share, {}).values():
                    self.waiting.add(other)
        self.waiting.add(need)
        self.place()

    def withdraw(self, execution: Execution, index: int) -> None:
        self.waiting.remove(execution.id, index)
        self._ready.pop((execution.id, index), None)
        self._early.pop((execution.id, index), None)
        key = self._follows.pop((execution.id, index), None)
        if key is not None:
            del self._followers[key][execution.id, index]
        if any(first.spot == (execution.id, index) for first in self.waiting.kept.values()):
            self.place()

    def occupy(self, need: Need, attempt: AttemptRow, share: str | None) -> None:
        if share is not None:
            self._leaders[share] = need.spot
            self._keys[need.spot] = share
        if attempt.compute in self.places:
            self.places[attempt.compute].take(need, attempt.cards)
            since = attempt.submitted_at or attempt.intent_at
            self.waiting.shares.begin(need.owner, need.slots, need.gpus, since / 1e6)

    def expect(self, runs: Iterable[int]) -> None:
        """These are taken up again: nothing is leased until each of them is `restored`."""
        self._expected.update(runs)

    def restored(self, run: int) -> None:
        self._expected.discard(run)
        if not self._expected:
            early, self._early = self._early, {}
            for asked in early.values():
                self.request(*asked)

    def followers(self, run: int, index: int) -> list[tuple[Execution, int]]:
        key = self._keys.get((run, index), "")
        return [
            (self.executions[other], step) for other, step in self._followers.get(key, ()) if other in self.executions
        ]

    def hand_over(self, run: int, index: int, heir: Execution, step: int, cards: Sequence[str]) -> None:
        old, new = (run, index), (heir.id, step)
        key = self._keys.pop(old)
        self._leaders[key], self._keys[new] = new, key
        self._follows.pop(new, None)
        self._followers[key].pop(new, None)
        if old in self._since:
            self._since[new] = self._since.pop(old)
        for place in self.places.values():
            late, need = old in place.late, place.give_back(run, index)
            if need is not None:
                now, inherited = self.now() / 1e6, replace(need, run=heir.id, index=step, owner=heir.row.owner)
                place.take(inherited, cards, late=late)
                self.waiting.shares.end(need.owner, need.slots, need.gpus, now)
                self.waiting.shares.begin(inherited.owner, need.slots, need.gpus, now)

    def release(self, run: int, index: int) -> None:
        leased = self._since.pop((run, index), None)
        held = [place for place in self.places.values() if (run, index) in place.holders]
        if not held:
            return
        self._free(run, index)
        self.place()
        if leased is not None and time.monotonic() - leased < BRISK:
            for place in held:
                self._get_ready(place)

    def pressed(self) -> bool:
        return len(self.waiting) > 0

    def _free(self, run: int, index: int) -> None:
        for place in self.places.values():
            need = place.give_back(run, index)
            if need is not None:
                self.waiting.shares.end(need.owner, need.slots, need.gpus, self.now() / 1e6)

    def unavailable(self, compute: str, why: str | None) -> None:
        self.on_unavailable(compute, why)

    def answered(self, compute: str) -> None:
        self.on_answered(compute)

    def taken(self, compute: str) -> None:
        self.on_taken(compute)

    def settled(self, run: int, index: int) -> None:
        key = self._keys.pop((run, index), None)
        if key is None:
            return
        del self._leaders[key]
        for follower, step in self._followers.pop(key, ()):
            del self._follows[follower, step]
            self.waiting.remove(follower, step)
            if follower in self.executions:
                self.executions[follower].decide_again(step)

    def forget(self, run: int) -> None:
        """The run's walk was interrupted: nothing of it waits, holds or leads any more."""
        for index in [i for place in self.places.values() for r, i in place.holders if r == run]:
            self._free(run, index)
        self.waiting.remove_run(run)
        self._early = {spot: asked for spot, asked in self._early.items() if spot[0] != run}
        for spot in [spot for spot in (*self._since, *self._ready) if spot[0] == run]:
            self._since.pop(spot, None)
            self._ready.pop(spot, None)
        for spot in [spot for spot in self._follows if spot[0] == run]:
            del self._followers[self._follows.pop(spot)][spot]
        for spot in [spot for spot in self._keys if spot[0] == run]:
            self.settled(*spot)
        self.restored(run)
        self.place()

    # --- what the scheduler does ------------------------------------------------------------------------------
    def place(self) -> None:
        """Lease what is free to those who wait, best first. Not re-entered: a grant may end in a new request."""
        if self._placing or self.paused is not None:
            return
        self._placing = True
        try:
            if self._room():
                for need, place, cards in self.waiting.place(list(self.places.values()), self.now() / 1e6):
                    self._ready.pop(need.spot, None)
                    self._since[need.spot] = time.monotonic()
                    self._leads(need.spot)
                    self.executions[need.run].granted(need.index, place.name, cards)
                    if not self._room():
                        break
        finally:
            self._placing = False

    def _leads(self, spot: Spot) -> None:
        """It has a place: those of its key, who waited for one too, follow it."""
        key = self._follows.pop(spot, None)
        if key is not None:
            before = self._leaders[key]
            del self._followers[key][spot], self._keys[before]
            if (waits := self.waiting.get(*before)) is not None:
                self._followers[key][before] = waits
            self._leaders[key], self._keys[spot], self._follows[before] = spot, key, key
        for other in self._followers.get(self._keys.get(spot, ""), ()):
            self.waiting.remove(*other)

    def _get_ready(self, place: Place) -> None:
        """Let those who are next begin, up to their turn: only who can run here and nowhere else."""
        away = self.paused is not None or place.unwell is not None or place.drained
        if away or sum(name == place.name for name in self._ready.values()) > FEW * place.slots:
            return
        for need in self.waiting.first(place.slots * AHEAD, self.now() / 1e6):
            if need.gpus or need.spot in self._ready:  # which cards it will have, its intent must say
                continue
            if need.spot in self._follows or self._followers.get(self._keys.get(need.spot, "")):
                # another one may lead
                continue
            if candidates(need, list(self.places.values())) == [place]:
                self._ready[need.spot] = place.name
                self.executions[need.run].get_ready(need.index, place.name)

    def _room(self) -> bool:
        return self.max_running is None or sum(len(p.holders) for p in self.places.values()) < self.max_running

    def _resolved(self, need: Need) -> Need:
        """Pools -> their computes."""
        if not any(name in self.pools for name in need.computes):
            return need
        names = [n for name in need.computes for n in self.pools.get(name, (name,))]
        return replace(need, computes=tuple(dict.fromkeys(names)))

    # --- what people ask --------------------------------------------------------------------------------------
    def never(self, need: Need) -> str | None:
        """Why a step can never have a place, whatever goes on; None if it can."""
        need, places = self._resolved(need), list(self.places.values())
        if any(place.could_ever(need) for place in candidates(need, places)):
            return None
        return "can never have a place: " + "; ".join(reason.text() for reason in refusals(need, places))

    def why_waiting(self, run: int, index: int) -> str | None:
        """Present tense: why the queued step has no place yet."""
        need, key = self.waiting.get(run, index), self._follows.get((run, index))
        if need is None:
            return None if key is None else f"shares the attempt of {self._named(key)}, which has the same key"
        waits = self._waits(need)
        return waits if key is None else f"{waits}; or for {self._named(key)}, which has the same key and waits too"

    def _named(self, key: str) -> str:
        leader, step = self._leaders[key]
        return f"run {leader}/{self.executions[leader].graph.steps[step].name}"

    def _waits(self, need: Need) -> str:
        never = self.never(need)
        if never is not None:
            return never
        if self.paused is not None:
            return f"nothing is started: {self.paused}"
        if not self._room():
            return f"max_running_steps = {self.max_running} is reached"
        reasons = refusals(need, list(self.places.values()))
        words = [reason.text(self._held_by(reason)) + self._ill_since(reason) for reason in reasons]
        words += self._kept_from(need)
        if any(reason.kind == "gpu" for reason in reasons):
            lead = "waits for a GPU" if need.gpus == 1 else f"waits for {need.gpus} GPUs"
        else:
            lead = "waits for a place"
        return f"{lead}: {'; '.join(words) or 'its turn has not come'}"

    def _kept_from(self, need: Need) -> list[str]:
        """Where it would fit, if a place were not kept for another."""
        found = []
        for place in candidates(need, list(self.places.values())):
            first = self.waiting.kept.get(place.name)
            if first is not None and first.spot != need.spot and place.refusal(need) is None:
                what = f"{first.gpus} GPUs" if first.gpus > 1 else f"{first.slots} slots" if first.slots > 1 else "room"
                found.append(f"{place.name} is kept for {self._run(first.run)}, which waits for {what} there")
        return found

    def _held_by(self, reason: Refusal) -> str:
        """`run 31 (bob, 40 min so far) and run 32 (alice, 5 s so far)`"""
        found: dict[int, int | None] = {}
        for run, index in reason.spots:
            if run in self.executions:
                since = self.executions[run].since(index)
                found[run] = min(filter(None, (found.get(run), since)), default=None)
        words = [self._run(run, since) for run, since in list(found.items())[:3]]
        more = [f"{len(found) - 3} more"] if len(found) > 3 else []
        return " and ".join(filter(None, (", ".join((words + more)[:-1]), (words + more)[-1]))) if words else ""

    def _ill_since(self, reason: Refusal) -> str:
        """Local time of day; with the date, unless it is today's."""
        if reason.since is None:
            return ""
        when, today = datetime.fromtimestamp(reason.since / 1e6), datetime.fromtimestamp(self.now() / 1e6)
        return f" (since {when:%H:%M})" if when.date() == today.date() else f" (since {when:%Y-%m-%d %H:%M})"

    def _run(self, run: int, since: int | None = None) -> str:
        owner = self.executions[run].row.owner if run in self.executions else ""
        so_far = f"{_lasting(self.now() - since)} so far" if since is not None else ""
        inner = ", ".join(filter(None, (owner, so_far)))
        return f"run {run} ({inner})" if inner else f"run {run}"


def _lasting(us: int) -> str:
    seconds = max(0, us) // 1_000_000
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
