"""The computes as they are now: looked at again and again, drained by people, and written down where it must last.

One task a compute. Placement sees only what is left in its `Place`.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.backends.base import TriesAgain
from mlpiped.errors import BackendUnavailable, MlpipedError, UnknownName
from mlpiped.ledger import moves
from mlpiped.placement.breaker import Breaker
from mlpiped.placement.shares import HALF_LIFE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from anyio.abc import TaskGroup

    from mlpiped.backends.base import Backend
    from mlpiped.clock import Clock
    from mlpiped.ledger import Ledger
    from mlpiped.scheduling.dispatch import Dispatch

log = structlog.get_logger("hosts")

REMEMBERED = 4
"""Half-lives: what was before counts for a sixteenth, and is not read again after a restart."""

START = 10.0
"""Seconds that the daemon's start waits for a compute on another machine; then it is tried again while others work."""

ANSWER = 120.0
"""Seconds within which a backend must say how it is; each has shorter limits of its own for what it asks."""


class Hosts:
    """`begin` starts a backend; it is called until it goes well: another machine that is away keeps nobody waiting."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        dispatch: Dispatch,
        ledger: Ledger,
        clock: Clock,
        begin: Callable[[Backend], Awaitable[None]],
    ) -> None:
        self.backends = backends
        self.dispatch = dispatch
        self.ledger = ledger
        self.clock = clock
        self.begin = begin
        self.breakers = {name: Breaker(random.random) for name in backends}
        self._soon = {name: anyio.Event() for name in backends}
        self._failed: dict[str, list[str]] = {}  # submits that were not taken since the last look: why
        self._begun: set[str] = set()

    # --- life -------------------------------------------------------------------------------------------------
    async def restore(self) -> None:
        """What people, incidents and runs of before left behind. Before any step is placed."""
        since = self.clock.now() - int(REMEMBERED * HALF_LIFE * 1e6)
        for owner, at, slots, cards in await self.ledger.recent_use(since):
            self.dispatch.waiting.shares.past(owner, slots, cards, at / 1e6)
        for name, row in (await self.ledger.computes()).items():
            place = self.dispatch.places.get(name)
            if place is None:
                continue
            place.drained, place.drained_by, place.drained_since = _drained(row.drained_by, row.drained_at)
            if row.unwell is not None:
                self.breakers[name].incident = True
                place.unwell_since = row.unwell_at

    async def start(self) -> None:
        """The first start of each, all at once. Raises what this host's own raises: nothing works without it."""
        for backend in self.backends.values():
            if backend.kind == "local":
                await self._begin(backend)
        async with anyio.create_task_group() as tasks:
            for name, backend in self.backends.items():
                if backend.kind != "local":
                    tasks.start_soon(self._start, name, name=f"start of compute {name}")

    async def _start(self, name: str) -> None:
        why = f"it could not be started in {START:.0f} s"
        with anyio.move_on_after(START):
            try:
                await self._begin(self.backends[name])
                return
            except Exception as fault:
                why = _not_started(fault)
        self._tell(name, self.breakers[name].looked(why))

    def watch(self, tasks: TaskGroup) -> None:
        for name in self.backends:
            tasks.start_soon(self._watch, name, name=f"compute {name}")

    async def _watch(self, name: str) -> None:
        while True:
            await self.look(name)
            with anyio.move_on_after(self.breakers[name].pause()):
                await self._soon[name].wait()
            self._soon[name] = anyio.Event()

    # --- looking ----------------------------------------------------------------------------------------------
    async def look(self, name: str) -> None:
        """Ask it how it is and what it has, and place what fits now."""
        backend, breaker, place = self.backends[name], self.breakers[name], self.dispatch.places[name]
        before, why = breaker.why, await self._ask(backend)
        failed = self._failed.pop(name, [])
        turned = breaker.looked(why)
        if why is None:
            for refusal in failed:
                turned = breaker.refused(refusal) or turned
            place.offers(backend.capacity())
        self._tell(name, turned)
        if before is not None and breaker.why is None:
            self._wake(name)
        self.dispatch.place()

    def look_again(self) -> None:
        """At all of them, now: somebody says that what was wrong is mended."""
        for name, backend in self.backends.items():
            if isinstance(backend, TriesAgain):
                backend.try_again()
            self._soon[name].set()

    def _wake(self, name: str) -> None:
        """Its attempts that wait until it can be asked again need not: their pauses may have grown long."""
        for execution in self.dispatch.executions.values():
            for t in execution.tries.values():
                if t.compute == name and t.attempt is not None:
                    t.attempt.asking.well_again()

    async def _ask(self, backend: Backend) -> str | None:
        try:
            with anyio.fail_after(ANSWER):
                await self._begin(backend)
                return await backend.health()
        except TimeoutError:
            return f"it has not said in {ANSWER:.0f} s how it is"
        except BackendUnavailable as fault:
            return fault.message
        except Exception as fault:
            if backend.name in self._begun:
                log.error("a compute could not be asked", compute=backend.name, exc_info=fault)
                return f"it could not be asked: {fault}"
            return _not_started(fault)

    async def _begin(self, backend: Backend) -> None:
        if backend.name not in self._begun:
            await self.begin(backend)
        self._begun.add(backend.name)

    def unavailable(self, name: str, why: str | None) -> None:
        """It could not be asked, or did not take a submit and said `why`: look at it now."""
        if name not in self._soon or self.breakers[name].why is not None:
            return  # it is known, and looked at after its pause
        if why is not None:
            self._failed.setdefault(name, []).append(why)
        self._soon[name].set()

    def answered(self, name: str) -> None:
        """It has answered somebody: if it is not well, as far as is known, look at it now."""
        if name in self._soon and self.breakers[name].why is not None:
            self._soon[name].set()

    def took(self, name: str) -> None:
        """It has taken a submit."""
        breaker = self.breakers.get(name)
        if breaker is not None:
            self._failed.pop(name, None)
            if breaker.took():
                self._tell(name, True)

    def _tell(self, name: str, turned: bool) -> None:
        """Placement at once; who reads events, once an incident."""
        breaker, place, now = self.breakers[name], self.dispatch.places[name], self.clock.now()
        place.unwell = breaker.why
        place.unwell_since = (place.unwell_since or now) if breaker.incident else None
        if turned:
            log.warning("a compute is not well" if breaker.incident else "a compute is well again",
                        compute=name, why=breaker.why)  # fmt: skip
            self.ledger.post(moves.set_unwell(name, breaker.why, now))

    # --- people -----------------------------------------------------------------------------------------------
    async def drain(self, name: str, drained: bool, who: str) -> None:
        """Its steps finish and nothing new starts, over restarts too; or it serves again. Raises UnknownName."""
        place = self.dispatch.places.get(name)
        if place is None:
            raise UnknownName.among("compute", name, list(self.dispatch.places))
        now = self.clock.now()
        changed = (await self.ledger.write(moves.set_drained(name, drained, who, now)))[0]
        if changed:
            place.drained, place.drained_by, place.drained_since = _drained(who if drained else None, now)
        self.dispatch.place()


def _drained(who: str | None, at: int | None) -> tuple[bool, str, int | None]:
    return (False, "", None) if who is None else (True, who, at)


def _not_started(fault: Exception) -> str:
    return f"it could not be started: {fault.message if isinstance(fault, MlpipedError) else fault}"
