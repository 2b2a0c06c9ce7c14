"""One OnArrival trigger: look, wait until what is new is complete, hash it, say so. Its own task, so that a file
system that hangs holds up nobody else."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
from anyio import to_thread

from mlpiped.clock import Clock
from mlpiped.files.hashing import printable
from mlpiped.model import Arrival, Cause, CauseKind, Event
from mlpiped.spec import ArrivalSpec
from mlpiped.triggers.memory import Emit, Memory, SeenRow
from mlpiped.triggers.mounts import is_remote
from mlpiped.triggers.scan import Look, Point, Stamp, Target, scan, stamps, touched
from mlpiped.triggers.schedule import ScheduleView
from mlpiped.triggers.settling import NEVER, Pending, due_at, marked_due, next_due, ready

log = logging.getLogger(__name__)

RECONCILE = 60.0  # seconds between two looks that nobody asked for
AGAIN = 10.0  # seconds until a batch that nobody took is offered again
ECHOES = (0.25, 1.0)  # after a hint: a folder that is being filled is watched a moment too late
TOUCHED = 1000  # paths that are looked at one by one; more of them are a scan
AT_ONCE = 64  # events of single files that are handed over together


class Root(Protocol):
    """A datastore's settings."""

    @property
    def path(self) -> os.PathLike[str]: ...
    @property
    def watch(self) -> str: ...
    @property
    def poll_interval(self) -> float: ...


class FileFact(Protocol):
    @property
    def digest(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


class Hasher(Protocol):
    """What of the Fingerprinter is used here."""

    async def files(self, paths: Sequence[bytes], /) -> Mapping[bytes, FileFact]: ...


@dataclass(frozen=True, slots=True)
class World:
    """What all followers share. `rearm` is called when a follower's watch point changes."""

    memory: Memory
    hasher: Hasher
    clock: Clock
    emit: Emit
    limiter: anyio.CapacityLimiter
    reconcile: float
    rearm: Callable[[], None]
    refused: Callable[[bytes], str]  # why the kernel does not watch this folder, or nothing


@dataclass(frozen=True, slots=True)
class _Row:
    digest: str
    size: int
    mtime_ns: int
    ino: int


class Follower:
    def __init__(self, id: str, pipeline: str, spec: ArrivalSpec, root: Root, world: World) -> None:
        self.id, self.pipeline, self.spec, self.root, self.world = id, pipeline, spec, root, world
        self.target = Target.of(os.fsencode(root.path), spec)
        self.look: Look | None = None  # the last one
        self.pending: dict[bytes, Pending] = {}
        self.known: dict[bytes, SeenRow] = {}
        self.digests: set[str] = set()
        self.fired_at: int | None = None
        self._first = True  # no good look has been taken since the start
        self._poke = anyio.Event()
        self._scan_at = 0.0  # monotonic, as all of these
        self._not_before = 0.0
        self._echoes: list[float] = []
        self._touched: set[bytes] = set()
        self._fault = ""  # as it was last logged
        self._home: bytes | None = None  # the mount point that the root lies on

    # --- what others say and ask ------------------------------------------------------------------------------
    def update(self, spec: ArrivalSpec) -> None:
        """Another policy for the same place."""
        if spec.model_dump(exclude={"where"}) != self.spec.model_dump(exclude={"where"}):
            self.pending.clear()
            self.hint()
        self.spec, self.target = spec, Target.of(self.target.root, spec)

    def hint(self) -> None:
        """Something may have changed: look soon, but spend most of the time not looking."""
        now = self.world.clock.monotonic()
        self._scan_at = min(self._scan_at, max(now, self._not_before))
        self._echoes = [now + echo for echo in ECHOES]
        self._poke.set()

    def offer_again(self) -> None:
        """At once, what nobody took."""
        for p in self.pending.values():
            if p.offered:
                p.due = self.world.clock.monotonic()
        self.hint()

    def hinted(self, path: bytes) -> None:
        """The kernel named a path. In a folder of 100,000 files it is much cheaper to look at that alone."""
        point, look = self.point, self.look
        if point is None or look is None or not (path + b"/").startswith(point.path.rstrip(b"/") + b"/"):
            return
        alone = path != point.path and self.target.flat and not (look.deep or look.missing or self.spec.marker)
        if alone and len(self._touched) < TOUCHED:
            self._touched.add(path)
            self._poke.set()
        else:
            self.hint()

    @property
    def fault(self) -> str:
        return self.look.fault if self.look else ""

    @property
    def polls(self) -> str:
        """Why the kernel is not asked, or nothing."""
        fstype = self.look.mount.fstype if self.look else ""
        if self.root.watch == "poll":
            return "as configured"
        return fstype if self.root.watch == "auto" and is_remote(fstype) else ""

    @property
    def mode(self) -> str:
        why = self.polls or (self.world.refused(self.point.path) if self.point else "")
        return f"poll ({why})" if why else "inotify"

    @property
    def point(self) -> Point | None:
        return self.look.point if self.look else None

    @property
    def interval(self) -> float:
        return self.world.reconcile if self.mode == "inotify" else min(self.root.poll_interval, self.world.reconcile)

    def view(self) -> ScheduleView:
        return ScheduleView(
            id=self.id,
            pipeline=self.pipeline,
            kind="arrival",
            describe=f"{self.spec.source.datastore}: {self.spec.source.path}",
            last_us=self.fired_at,
            waits_for=self._waits_for(),
            cursor={"files": len(self.known)},
            mode=self.mode,
        )

    def _waits_for(self) -> str:
        if self.look is None:
            return "the first look"
        if self.look.fault:
            return self._unavailable(self.look.fault)
        waiting = self.pending.values()
        moving = [p.due for p in waiting if not p.held and not p.offered and p.due < NEVER]
        if moving:
            left = max(0.0, max(moving) - self.world.clock.monotonic())
            return f"{_files(len(moving))} settling: {left:.0f} s left"
        if offered := sum(p.offered for p in waiting):
            return f"the pipeline to take {_files(offered)}"
        if held := sum(p.held for p in waiting):
            return f"{self.spec.min_files} files: {held} so far"
        if waiting:
            without = f"`{self.spec.marker}`: {_files(len(waiting))} without it"
            return without if self.spec.marker else f"{_files(len(waiting))} that cannot be read"
        if self.look.missing:
            return f"`{printable(os.fsdecode(self.look.missing))}`: it does not exist"
        return "new files"

    def _unavailable(self, fault: str) -> str:
        return f"datastore `{self.spec.source.datastore}` unavailable: `{os.fspath(self.root.path)}` {fault}"

    # --- the loop ---------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled."""
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._load()
                    loaded = True
                await self._step()
            except Exception:
                log.exception("the arrivals of `%s` could not be looked at: tried again soon", self.pipeline)
                await anyio.sleep(AGAIN / 2)

    async def _load(self) -> None:
        row = await self.world.memory.schedule(self.id)
        self.known = dict(await self.world.memory.arrivals(self.id))
        self.digests = set(await self.world.memory.arrival_digests(self.id))
        self.fired_at = row.fired_at if row else None
        home = row.cursor.get("mount") if row else None
        self._home = os.fsencode(home) if home else None

    async def _step(self) -> None:
        now = self.world.clock.monotonic()
        self._poke = anyio.Event()
        settled = next_due(self.pending, each=self.spec.batch == "file")
        if self._touched:
            await self._look_at_touched()
        elif settled <= now:
            await self._take()
        elif self._scan_at <= now:
            await self._scan()
        else:
            with anyio.move_on_after(min(self._scan_at, settled) - now):
                await self._poke.wait()

    async def _scan(self) -> None:
        began = self.world.clock.monotonic()
        self._echoes = [at for at in self._echoes if at > began]
        look = await to_thread.run_sync(
            scan, self.target, self.known, limiter=self.world.limiter, abandon_on_cancel=True
        )
        if not look.fault and self._is_unmounted(look):
            look.fault = f"is not mounted: what was at `{printable(os.fsdecode(self._home or b'/'))}` is gone"
        before, self.look = self.point, look
        now = self.world.clock.monotonic()
        self._not_before = now + min(4 * (now - began), 5.0)
        self._scan_at = min([now + self.interval, *(max(at, self._not_before) for at in self._echoes)])
        if look.fault:
            look.point = None
            self.pending.clear()
        else:
            self._home = look.mount.point
            self._note(look.changed, first=self._first)
            self._first = False
        self._report(look.fault)
        if self.point != before:
            self.world.rearm()

    def _is_unmounted(self, look: Look) -> bool:
        """The root lies on a mount further up than it did. After a restart that may be meant, if there are files."""
        return self._home is not None and len(look.mount.point) < len(self._home) and not (self._first and look.seen)

    async def _look_at_touched(self) -> None:
        paths, self._touched = self._touched, set()
        look = await to_thread.run_sync(
            touched, self.target, self.known, paths, limiter=self.world.limiter, abandon_on_cancel=True
        )
        for path in paths - look.changed.keys():
            self.pending.pop(path, None)
        for path, stamp in look.changed.items():
            self.pending[path] = self._waiting(path, stamp, self.pending.get(path))
        if look.deep:
            self.hint()

    def _note(self, changed: Mapping[bytes, Stamp], *, first: bool = False) -> None:
        """`changed` is all there is to wait for."""
        old = self.pending
        self.pending = {p: self._waiting(p, stamp, old.get(p), first=first) for p, stamp in changed.items()}

    def _waiting(self, path: bytes, stamp: Stamp, was: Pending | None, *, first: bool = False) -> Pending:
        """A file, and the time from which on it is complete if nothing more happens to it."""
        same = was is not None and was.stamp == stamp
        if was is not None and same and was.due < NEVER:
            return was
        wall, mono = self.world.clock.now() / 1e6, self.world.clock.monotonic()
        local = self.look is not None and not is_remote(self.look.mount.fstype)
        due = due_at(stamp, self.spec.settle, wall=wall, mono=mono, local=local)
        if self.spec.marker:
            due = marked_due(stamp, self.target.marked_at(path), due, mono)
        passed = was.old if was is not None and same else first and self.spec.catch_up == "skip"
        return Pending(stamp, due, old=passed)

    def _report(self, fault: str) -> None:
        if fault != self._fault:
            if fault:
                log.warning("%s: `%s` waits for it", self._unavailable(fault), self.pipeline)
            else:
                log.info("datastore `%s` is back for `%s`", self.spec.source.datastore, self.pipeline)
        self._fault = fault

    # --- taking what is complete ------------------------------------------------------------------------------
    async def _take(self) -> None:
        each = self.spec.batch == "file"
        paths = ready(self.pending, self.world.clock.monotonic(), each=each)
        now = await to_thread.run_sync(stamps, paths, limiter=self.world.limiter, abandon_on_cancel=True)
        still = [path for path in paths if now.get(path) == self.pending[path].stamp]
        if len(still) < len(paths):
            moved = {path: now[path] for path in paths if path in now}
            self._note({path: p.stamp for path, p in self.pending.items() if path not in paths} | moved)
            if not each:
                return
        facts = await self.world.hasher.files(still)
        now = await to_thread.run_sync(stamps, still, limiter=self.world.limiter, abandon_on_cancel=True)
        arrivals, moving = [], False
        for path in still:
            p, fact = self.pending[path], facts.get(path)
            if now.get(path) != p.stamp or (fact and (fact.size, fact.mtime_ns) != (p.stamp.size, p.stamp.mtime_ns)):
                p.due, moving = self.world.clock.monotonic() + self.spec.settle, True
            elif fact is None:  # closed to us: looked at again with each scan, and holds nobody up
                p.due = NEVER
            else:
                arrivals.append(Arrival(self.id, path, fact.digest, fact.size, fact.mtime_ns, p.stamp.ino))
        if arrivals and (each or not moving):
            await self._offer(arrivals)

    async def _offer(self, arrivals: Sequence[Arrival]) -> None:
        """Sort what has come: content that has fired before, what lay there all along, and what is news."""
        same = [a for a in arrivals if a.digest in self.digests]
        if same:
            await self.world.memory.put_arrivals(same)
            self._taken(same)
        news = [a for a in arrivals if a.digest not in self.digests]
        passed = [a for a in news if self.pending[a.path].old]
        if passed:
            verdict = "skipped: it lay there before the daemon looked"
            await self.world.memory.record_fire(self._event(passed), verdict)
            self._taken(passed)
        news = [a for a in news if a.digest not in self.digests]
        contents: dict[str, list[Arrival]] = {}
        for arrival in news:
            contents.setdefault(arrival.digest, []).append(arrival)
        if len(news) < self.spec.min_files:
            for arrival in news:
                self.pending[arrival.path].held = True
        elif self.spec.batch == "all" and news:
            await self._fire(news)
        else:
            batches = list(contents.values())
            for i in range(0, len(batches), AT_ONCE):
                async with anyio.create_task_group() as tasks:
                    for batch in batches[i : i + AT_ONCE]:
                        tasks.start_soon(self._fire, batch)

    async def _fire(self, batch: Sequence[Arrival]) -> None:
        """Only what the ledger has is taken. The scheduler may let an event pass (a paused pipeline): the files
        then stay, and are offered again."""
        event = self._event(batch)
        assert event.dedupe is not None
        taken = False
        try:
            await self.world.emit(event)
            taken = await self.world.memory.fired(event.dedupe)
        except Exception:
            log.exception("the arrival of %s for `%s` could not be recorded", event.cause.detail, self.pipeline)
        if taken:
            self._taken(batch)
            self.fired_at = self.world.clock.now()
            return
        for arrival in batch:
            p = self.pending[arrival.path]
            p.offered, p.held, p.due = True, False, self.world.clock.monotonic() + AGAIN

    def _taken(self, arrivals: Sequence[Arrival]) -> None:
        for a in arrivals:
            self.pending.pop(a.path, None)
            self.known[a.path] = _Row(a.digest, a.size, a.mtime_ns, a.ino)
            self.digests.add(a.digest)

    def _event(self, batch: Sequence[Arrival]) -> Event:
        digests = sorted({a.digest for a in batch})
        key = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]
        parameters: dict[str, Any] = {}
        if self.spec.batch == "file" and self.spec.parameter:
            parameters[self.spec.parameter] = os.fsdecode(batch[0].path)
        return Event(
            self.pipeline,
            Cause(CauseKind.ARRIVAL, self._detail(batch)),
            dedupe=f"arrival:{self.id}:{key}",
            parameters=parameters,
            cursor=(self.id, {"at": self.world.clock.now(), "mount": os.fsdecode(self._home or b"/")}),
            arrivals=tuple(batch),
        )

    def _detail(self, batch: Sequence[Arrival]) -> str:
        changed = sum(a.path in self.known for a in batch)
        if len(batch) == 1:
            name = printable(os.fsdecode(os.path.relpath(batch[0].path, self.target.root)))
            return f"{name} {'changed' if changed else 'is new'}"
        new = len(batch) - changed
        if not changed or not new:
            return f"{_files(len(batch))} {'new' if new else 'changed'}"
        return f"{_files(new)} new, {changed} changed"


def _files(n: int) -> str:
    return "1 file" if n == 1 else f"{n} files"
