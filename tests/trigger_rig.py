"""Triggers over a real ledger: a stand-in for the scheduler that opens runs, and a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio

from mlpiped.clock import Clock, SystemClock
from mlpiped.files.fingerprint import Fingerprinter
from mlpiped.ledger import moves
from mlpiped.ledger.store import Ledger
from mlpiped.model import Event
from mlpiped.spec import ArrivalSpec, CronSpec, EverySpec, Reference, Where
from mlpiped.triggers.arrivals import Arrivals
from mlpiped.triggers.clock import Clockwork
from mlpiped.triggers.follower import Follower
from mlpiped.triggers.memory import LedgerMemory

WHERE = Where(file="plugin.py", line=1)
HOUR, DAY = 3600.0, 86_400.0


class HandClock:
    """Stands still until `advance`; `jump` moves the wall clock alone, as NTP or an operator does."""

    def __init__(self, wall_us: int) -> None:
        self.wall, self.mono = wall_us, 1000.0
        self._sleepers: list[tuple[float, anyio.Event]] = []

    def now(self) -> int:
        return self.wall

    def monotonic(self) -> float:
        return self.mono

    async def sleep(self, seconds: float) -> None:
        event = anyio.Event()
        self._sleepers.append((self.mono + seconds, event))
        await event.wait()

    def jump(self, seconds: float) -> None:
        self.wall += round(seconds * 1e6)

    def advance(self, seconds: float) -> None:
        self.jump(seconds)
        self.mono += seconds
        woken = [event for at, event in self._sleepers if at <= self.mono]
        self._sleepers = [(at, event) for at, event in self._sleepers if at > self.mono]
        for event in woken:
            event.set()


class Rig:
    """`events` are those that opened a run: what the ledger knew already is not among them."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self.ledger, self.clock = ledger, clock
        self.memory = LedgerMemory(ledger, moves, clock)
        self.events: list[Event] = []
        self.emitted = 0
        self.broken: Exception | None = None
        self.paused = False
        self.changed = anyio.Event()

    async def emit(self, event: Event) -> None:
        self.emitted += 1
        if self.broken:
            self._wake()
            raise self.broken
        if not self.paused:
            (run,) = await self.ledger.write(
                moves.open_run(event, version="v", experiment="e", owner="o", tags={}, options={}, now=self.clock.now())
            )
            if run is not None:
                self.events.append(event)
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """As soon as an event or a turn of the loop makes it true."""
        with anyio.fail_after(seconds):
            while not condition():
                with anyio.move_on_after(0.02):
                    await self.changed.wait()

    async def fired(self, n: int, seconds: float = 10.0) -> list[str]:
        await self.until(lambda: len(self.events) >= n, seconds)
        assert len(self.events) == n, self.details
        return self.details

    @property
    def details(self) -> list[str]:
        return [event.cause.detail for event in self.events]


@asynccontextmanager
async def rig(state: Path, clock: Clock | None = None) -> AsyncIterator[Rig]:
    clock = clock or SystemClock()
    ledger = await Ledger.open(state, clock)
    try:
        yield Rig(ledger, clock)
    finally:
        with anyio.CancelScope(shield=True):
            await ledger.close()


@dataclass(frozen=True)
class Folder:
    """A datastore's settings."""

    path: Path
    watch: str = "auto"
    poll_interval: float = 0.2


def arrival(path: str = "in/*.csv", **options: Any) -> ArrivalSpec:
    glob = options.pop("glob", any(c in path for c in "*?["))
    source = Reference(datastore="lab", path=path, glob=glob)
    return ArrivalSpec(**{"where": WHERE, "source": source, "settle": 0.3} | options)


class Landing:
    """Arrivals at work in the datastore `lab`, with a folder `in`."""

    def __init__(self, world: Rig, arrivals: Arrivals, root: Path) -> None:
        self.world, self.arrivals, self.root = world, arrivals, root

    def drop(self, name: str, text: str = "", *, folder: str = "in") -> Path:
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or name)
        return path

    @property
    def waits(self) -> str:
        return self.arrivals.status()[0].waits_for

    @property
    def mode(self) -> str:
        return self.arrivals.status()[0].mode

    @property
    def followers(self) -> list[Follower]:
        return list(self.arrivals._followers.values())

    async def looked(self) -> None:
        """Another look at everything has been taken."""
        before = {id(f.look): f.look for f in self.followers}
        self.arrivals.look()
        await self.world.until(lambda: all(id(f.look) not in before for f in self.followers))

    async def still(self, n: int) -> None:
        """Nothing more comes, although everything has been looked at twice."""
        for _ in range(2):
            await self.looked()
            await self.world.until(lambda: "settling" not in self.waits)
        assert len(self.world.events) == n, self.world.details


@asynccontextmanager
async def landing(
    world: Rig, root: Path, *specs: ArrivalSpec, store: Folder | None = None, **options: Any
) -> AsyncIterator[Landing]:
    """Running, watching, and through with its first look."""
    printer = Fingerprinter(world.ledger, moves.put_stat_cache)
    arrivals = Arrivals(
        world.memory, printer, world.clock, world.emit, {"lab": store or Folder(root)}, **{"reconcile": 30.0} | options
    )
    place = Landing(world, arrivals, root)
    arrivals.set({"p": specs})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(arrivals.run)
        await world.until(lambda: all(view.waits_for != "the first look" for view in arrivals.status()))
        points = {f.point.path for f in place.followers if f.point and not f.polls}
        await world.until(lambda: points <= arrivals._watcher.armed | arrivals._watcher.refused.keys())
        yield place
        tasks.cancel_scope.cancel()


# --- schedules of Cron and Every -----------------------------------------------------------------------------
def us(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1e6)


def cron(expression: str = "0 6 * * *", **options: Any) -> CronSpec:
    return CronSpec(where=WHERE, expression=expression, **options)


def every(seconds: float, **options: Any) -> EverySpec:
    return EverySpec(where=WHERE, seconds=seconds, **options)


@asynccontextmanager
async def clockwork(world: Rig, **specs: Any) -> AsyncIterator[Clockwork]:
    """Running, and through with its first look."""
    work = Clockwork(world.memory, world.clock, world.emit)
    work.set({pipeline: triggers if isinstance(triggers, list) else [triggers] for pipeline, triggers in specs.items()})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work.run)
        await settled(work, world)
        yield work
        tasks.cancel_scope.cancel()


async def settled(work: Clockwork, world: Rig) -> None:
    """Until everything is loaded and nothing more is due."""

    def done() -> bool:
        now = world.clock.now()
        return all(v.waits_for or (v.cursor and (v.next_us or now + 1) > now) for v in work.next_fires())

    await anyio.wait_all_tasks_blocked()  # whom the clock has woken looks at it now
    await world.until(done)


async def advance(work: Clockwork, world: Rig, seconds: float) -> None:
    assert isinstance(world.clock, HandClock)
    world.clock.advance(seconds)
    await settled(work, world)


MONDAY = us("2026-11-23T05:00:00+00:00")
