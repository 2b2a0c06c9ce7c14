"""One OnArrival trigger: look, wait until what is new is complete, hash it, say so. Its own task, so that a file
system that hangs holds up nobody else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import anyio
from anyio import to_thread

from mlpiped.files.hashing import printable
from mlpiped.files.mounts import is_remote
from mlpiped.model import Arrival, Cause, CauseKind, Event
from mlpiped.spec import ArrivalSpec
from mlpiped.triggers.crowd import PART, Crowd, Lot, in_parts, key_of
from mlpiped.triggers.packed import NEVER, Found, Pending, Stamp
from mlpiped.triggers.scan import Look, Point, Target, scan, stamps, touched
from mlpiped.triggers.schedule import ScheduleView
from mlpiped.triggers.settling import due_at, marked_due, ready
from mlpiped.triggers.world import Root, World

S = TypeVar("S")
T = TypeVar("T")
log = logging.getLogger(__name__)

RECONCILE = 60.0  # seconds between two looks that nobody asked for
AGAIN = 10.0  # seconds until a batch that nobody took is offered again
ECHOES = (0.25, 1.0)  # after a hint: a folder that is being filled is watched a moment too late
TOUCHED = 1000  # paths that are looked at one by one; more of them are a scan
AT_ONCE = 64  # events of single files that are handed over together
PAGE = 20_000  # rows of the ledger that are read at once


class Follower:
    def __init__(self, id: str, pipeline: str, spec: ArrivalSpec, root: Root, world: World) -> None:
        self.id, self.pipeline, self.spec, self.root, self.world = id, pipeline, spec, root, world
        self.target = Target.of(os.fsencode(root.path), spec)
        self.look: Look | None = None  # the last one
        self.crowd = Crowd()
        self._fresh = False  # the last look found nothing that the one before had not
        self.fired_at: int | None = None
        self._first = True  # no good look has been taken since the start
        self._at_once = False  # what nobody took is offered again
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
            self.crowd.forget()
            self.hint()
        self.spec, self.target = spec, Target.of(self.target.root, spec)

    def hint(self) -> None:
        """Something may have changed: look soon, but spend most of the time not looking."""
        now = self.world.clock.monotonic()
        self._fresh = False
        self._scan_at = min(self._scan_at, max(now, self._not_before))
        self._echoes = [now + echo for echo in ECHOES]
        self._poke.set()

    def offer_again(self) -> None:
        """At once, what nobody took."""
        self._at_once = True
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
            cursor={"files": len(self.crowd.known)},
            mode=self.mode,
        )

    def _waits_for(self) -> str:
        if self.look is None:
            return "the first look"
        if self.look.fault:
            return self._unavailable(self.look.fault)
        found = self.crowd.sum
        if found.moving:
            left = max(0.0, found.last_moving - self.world.clock.monotonic())
            return f"{_files(found.moving)} settling: {left:.0f} s left"
        if found.offered:
            return f"the pipeline to take {_files(found.offered)}"
        if found.held:
            return f"{self.spec.min_files} files: {found.held} so far"
        if self.crowd.pending:
            without = f"`{self.spec.marker}`: {_files(len(self.crowd.pending))} without it"
            return without if self.spec.marker else f"{_files(len(self.crowd.pending))} that cannot be read"
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
        self.crowd, after = Crowd(), b""
        while page := await self.world.memory.arrivals(self.id, after, PAGE):
            for path, seen in page.items():
                self.crowd.known.put(path, seen.size, seen.mtime_ns, seen.ino)
            after = path
        self.fired_at = row.fired_at if row else None
        home = row.cursor.get("mount") if row else None
        self._home = os.fsencode(home) if home else None

    async def _step(self) -> None:
        now = self.world.clock.monotonic()
        self._poke = anyio.Event()
        if self._at_once:
            self._at_once = False
            await self.crowd.put((path, p._replace(due=now)) for path, p in self.crowd.waiting() if p.offered)
            await self.crowd.add_up()
        settled = self.crowd.sum.next_due(each=self.spec.batch == "file")
        if self._touched:
            await self._look_at_touched()
        elif settled <= now and (self._fresh or len(self.crowd.pending) <= TOUCHED):
            await self._take()
        elif min(settled, self._scan_at) <= now:  # so many came that the kernel may not have told of all
            await self._scan()
        else:
            with anyio.move_on_after(min(self._scan_at, settled) - now):
                await self._poke.wait()

    async def _scan(self) -> None:
        began = self.world.clock.monotonic()
        self._echoes = [at for at in self._echoes if at > began]
        look = await to_thread.run_sync(
            scan, self.target, self.crowd.known, self.crowd.pending, limiter=self.world.limiter, abandon_on_cancel=True
        )
        if not look.fault and self._is_unmounted(look):
            look.fault = f"is not mounted: what was at `{printable(os.fsdecode(self._home or b'/'))}` is gone"
        before, self.look = self.point, look
        now = self.world.clock.monotonic()
        self._not_before = now + min(4 * (now - began), 5.0)
        self._scan_at = min([now + self.interval, *(max(at, self._not_before) for at in self._echoes)])
        if look.fault:
            look.point = None
            self.crowd.forget()
        else:
            self._home = look.mount.point
            self._fresh = not look.changed and not look.gone
            await self._note(look.changed, look.gone, first=self._first)
            self._first = False
        look.gone = []
        self._report(look.fault)
        if self.point != before:
            self.world.rearm()

    def _is_unmounted(self, look: Look) -> bool:
        """The root lies on a mount further up than it did. After a restart that may be meant, if there are files."""
        return self._home is not None and len(look.mount.point) < len(self._home) and not (self._first and look.seen)

    async def _look_at_touched(self) -> None:
        paths, self._touched = self._touched, set()
        look = await to_thread.run_sync(
            touched, self.target, self.crowd.known, paths, limiter=self.world.limiter, abandon_on_cancel=True
        )
        await self._note(look.changed, paths - {*look.changed})
        if look.deep:
            self.hint()

    async def _note(self, changed: Found, gone: Iterable[bytes], *, first: bool = False) -> None:
        """`changed` is to be waited for too, `gone` no more."""
        await self.crowd.drop(gone)
        waiting, pending = self._waiting, self.crowd.pending
        await self.crowd.put((path, waiting(path, s, pending.get(path), first=first)) for path, s in changed.drain())
        await self.crowd.add_up()

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
        paths = await self._in_thread(lambda now: ready(self.crowd.waiting(), now, each=each), self._now())
        moved = Found()
        gone: list[bytes] = []
        async for part in in_parts(paths):
            stamped = await self._in_thread(stamps, part)
            for path in part:
                p = self.crowd.pending.get(path)
                if path not in stamped or p is None:
                    gone.append(path)
                elif stamped[path] != p.stamp:
                    moved[path] = stamped[path]
        if moved or gone:
            paths = [path for path in paths if path in self.crowd.pending and path not in moved]
            await self._note(moved, gone)
            if not each:
                return
        lot, moving = Lot(self.id), False
        async for part in in_parts(paths):
            moving |= await self._sort(part, lot)
        if each or not moving:
            await self._offer(lot)
        await self.crowd.add_up()

    async def _sort(self, paths: Sequence[bytes], lot: Lot) -> bool:
        """Hash files that are complete, and put them where they belong: content that has fired before, what lay there
        all along, and what is news. Whether one of them still moves."""
        facts = await self.world.hasher.files(paths)
        stamped = await self._in_thread(stamps, paths)
        known = await self.world.memory.arrival_digests(self.id, [fact.digest for fact in facts.values()])
        moving = False
        for path in paths:
            p, fact = self.crowd.pending.get(path), facts.get(path)
            if p is None:  # the trigger was changed meanwhile
                continue
            same = fact is None or (fact.size, fact.mtime_ns) == (p.stamp.size, p.stamp.mtime_ns)
            if stamped.get(path) != p.stamp or not same:
                self.crowd.pending[path], moving = p._replace(due=self._now() + self.spec.settle), True
            elif fact is None:  # closed to us: looked at again with each scan, and holds nobody up
                self.crowd.pending[path] = p._replace(due=NEVER)
            else:
                batch = lot.same if fact.digest in known else lot.passed if p.old else lot.news
                batch.append(path, fact.digest, fact.size, fact.mtime_ns, p.stamp.ino)
        return moving

    async def _offer(self, lot: Lot) -> None:
        if lot.same:
            await self.world.memory.put_arrivals(lot.same)
            await self.crowd.taken(lot.same)
        news: Sequence[Arrival] = lot.news
        if lot.passed:
            verdict = "skipped: it lay there before the daemon looked"
            await self.world.memory.record_fire(await self._event(lot.passed), verdict)
            await self.crowd.taken(lot.passed)
            passed = {*lot.passed.digests()}
            news = [arrival for arrival in lot.news if arrival.digest not in passed]
        if len(news) < self.spec.min_files:
            await self.crowd.put((path, p._replace(held=True)) for path, p in self.crowd.waiting_of(news))
        elif self.spec.batch == "all" and news:
            await self._fire(news)
        else:
            contents: dict[str, list[Arrival]] = {}
            for arrival in news:
                contents.setdefault(arrival.digest, []).append(arrival)
            batches = list(contents.values())
            for i in range(0, len(batches), AT_ONCE):
                async with anyio.create_task_group() as tasks:
                    for batch in batches[i : i + AT_ONCE]:
                        tasks.start_soon(self._fire, batch)

    async def _fire(self, batch: Sequence[Arrival]) -> None:
        """Only what the ledger has is taken. The scheduler may let an event pass (a paused pipeline): the files
        then stay, and are offered again."""
        event = await self._event(batch)
        assert event.dedupe is not None
        taken = False
        try:
            await self.world.emit(event)
            taken = await self.world.memory.fired(event.dedupe)
        except Exception:
            log.exception("the arrival of %s for `%s` could not be recorded", event.cause.detail, self.pipeline)
        if taken:
            await self.crowd.taken(batch)
            self.fired_at = self.world.clock.now()
            return
        due = self._now() + AGAIN
        await self.crowd.put(
            (path, p._replace(offered=True, held=False, due=due)) for path, p in self.crowd.waiting_of(batch)
        )

    async def _event(self, batch: Sequence[Arrival]) -> Event:
        if len(batch) > PART:
            key, detail = await self._in_thread(lambda batch: (key_of(batch), self._detail(batch)), batch)
        else:
            key, detail = key_of(batch), self._detail(batch)
        parameters: dict[str, Any] = {}
        if self.spec.batch == "file" and self.spec.parameter:
            parameters[self.spec.parameter] = os.fsdecode(batch[0].path)
        return Event(
            self.pipeline,
            Cause(CauseKind.ARRIVAL, detail),
            dedupe=f"arrival:{self.id}:{key}",
            parameters=parameters,
            cursor=(self.id, {"at": self.world.clock.now(), "mount": os.fsdecode(self._home or b"/")}),
            arrivals=batch,
        )

    def _detail(self, batch: Sequence[Arrival]) -> str:
        changed = sum(a.path in self.crowd.known for a in batch)
        if len(batch) == 1:
            name = printable(os.fsdecode(os.path.relpath(batch[0].path, self.target.root)))
            return f"{name} {'changed' if changed else 'is new'}"
        new = len(batch) - changed
        if not changed or not new:
            return f"{_files(len(batch))} {'new' if new else 'changed'}"
        return f"{_files(new)} new, {changed} changed"

    def _now(self) -> float:
        return self.world.clock.monotonic()

    async def _in_thread(self, work: Callable[[S], T], what: S) -> T:
        return await to_thread.run_sync(work, what, limiter=self.world.limiter, abandon_on_cancel=True)


def _files(n: int) -> str:
    return "1 file" if n == 1 else f"{n} files"
