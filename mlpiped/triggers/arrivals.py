"""Data that arrives: OnArrival triggers become Events. Looks at files, and starts nothing.

The truth is a scan of the place against what the ledger says has been taken; inotify only says when to look. So a scan
is made at the start (what came while the daemon was down), after each hint, and now and then for what the kernel did
not tell. Per trigger there is one `Follower`; here is what they share: the watcher, and the guard that finds folders
that were replaced, unmounted or have come back, of which inotify says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import anyio
from anyio import to_thread

from mlpiped.clock import Clock
from mlpiped.spec import ArrivalSpec
from mlpiped.triggers.follower import RECONCILE, Follower
from mlpiped.triggers.memory import Emit, Memory
from mlpiped.triggers.scan import Point, identity
from mlpiped.triggers.schedule import ScheduleView, Trigger, schedule_id
from mlpiped.triggers.watching import Watcher
from mlpiped.triggers.world import Hasher, Root, World

log = logging.getLogger(__name__)

GUARD = 2.0  # seconds between two looks at who the watched folders are
RETRY = 60.0  # seconds until the kernel is asked again for watches that it refused


class Arrivals:
    """`set` says what there is, `run` lives as long as the daemon, `emit` gets what has arrived (see `memory.Emit`)."""

    def __init__(
        self,
        memory: Memory,
        hasher: Hasher,
        clock: Clock,
        emit: Emit,
        roots: Mapping[str, Root],
        *,
        reconcile: float = RECONCILE,
    ) -> None:
        self._roots, self._clock = dict(roots), clock
        self._watcher = Watcher(self._hint)
        limiter = anyio.CapacityLimiter(4)
        self._world = World(
            memory,
            hasher,
            clock,
            emit,
            limiter,
            reconcile,
            self._rearm,
            lambda path: self._watcher.refused.get(path, ""),
        )
        self._guard_limiter = anyio.CapacityLimiter(2)
        self._followers: dict[str, Follower] = {}
        self._lost: dict[str, ScheduleView] = {}  # triggers that cannot be followed at all
        self._armed: dict[bytes, Point] = {}
        self._poke = anyio.Event()

    # --- what people and the daemon ask -----------------------------------------------------------------------
    def set(self, specs: Mapping[str, Sequence[Trigger]]) -> None:
        """Replace the whole set: pipeline -> its triggers (others than OnArrival are passed over)."""
        followers: dict[str, Follower] = {}
        self._lost = {}
        for pipeline, triggers in specs.items():
            for spec in triggers:
                if isinstance(spec, ArrivalSpec):
                    self._add(followers, pipeline, spec)
        self._followers = followers
        self._poke.set()

    def look(self, pipeline: str | None = None) -> None:
        """Look now, as when a pipeline is resumed."""
        for follower in self._followers.values():
            if pipeline in (None, follower.pipeline):
                follower.offer_again()

    def status(self) -> list[ScheduleView]:
        return sorted(
            [*(f.view() for f in self._followers.values()), *self._lost.values()], key=lambda v: (v.pipeline, v.id)
        )

    def _add(self, followers: dict[str, Follower], pipeline: str, spec: ArrivalSpec) -> None:
        name, store = schedule_id(pipeline, spec), spec.source.datastore
        root = self._roots.get(store)
        if root is None:
            fault = f"datastore `{store}`: the config has none of that name"
            self._lost[name] = ScheduleView(name, pipeline, "arrival", f"{store}: {spec.source.path}", waits_for=fault)
            return
        follower = followers.get(name) or self._followers.get(name)
        if follower is None:
            follower = Follower(name, pipeline, spec, root, self._world)
        else:
            follower.update(spec)
        followers[name] = follower

    # --- running ----------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled."""
        running: dict[Follower, anyio.CancelScope] = {}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watcher.run, name="triggers: watcher")
            tasks.start_soon(self._guard, name="triggers: guard")
            while True:
                self._poke = anyio.Event()
                wanted = set(self._followers.values())
                for follower in running.keys() - wanted:
                    running.pop(follower).cancel()
                for follower in wanted - running.keys():
                    running[follower] = anyio.CancelScope()
                    name = f"triggers: arrivals of {follower.pipeline}"
                    tasks.start_soon(_within, running[follower], follower, name=name)
                self._rearm()
                await self._poke.wait()

    def _hint(self, path: bytes) -> None:
        for follower in self._followers.values():
            follower.hinted(path)

    def _rearm(self) -> None:
        """Watch what the followers want watched. A folder that is another one by now needs a new watch."""
        points = [f.point for f in self._followers.values() if f.point and not f.polls]
        armed = {point.path: point for point in points}
        replaced = any(path in self._armed and self._armed[path][2:] != point[2:] for path, point in armed.items())
        self._armed = armed
        deep = frozenset(point.path for point in points if point.deep)
        self._watcher.want(frozenset(point.path for point in points) - deep, deep, again=replaced)

    async def _guard(self) -> None:
        retry = self._clock.monotonic() + RETRY
        while True:
            await anyio.sleep(GUARD)
            if self._watcher.refused and self._clock.monotonic() > retry:
                retry = self._clock.monotonic() + RETRY
                self._armed = {}
                self._watcher.again()
            for follower in list(self._followers.values()):
                if follower.look is None or (follower.polls and not follower.fault):
                    continue
                path = follower.point.path if follower.point else follower.target.root
                with anyio.move_on_after(GUARD):
                    now = await to_thread.run_sync(identity, path, limiter=self._guard_limiter, abandon_on_cancel=True)
                    was = follower.point[2:] if follower.point else None
                    if now != was or (follower.fault and now is not None):
                        follower.hint()


async def _within(scope: anyio.CancelScope, follower: Follower) -> None:
    with scope:
        await follower.run()
