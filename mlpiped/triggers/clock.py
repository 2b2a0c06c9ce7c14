"""The clock: Cron and Every triggers become Events. It decides when, from a cursor in the ledger; it starts nothing.

The cursor of a schedule is the last nominal time that has been dealt with. It is written by the ledger in the
transaction that opens the run, so a crash between the two cannot be. A schedule seen for the first time starts with
its cursor at now, and so never fires at load. Whatever wakes us (alarm, new plugins, a jump of the clock), the same
question is asked: which due times lie between cursor and now? APScheduler is only the alarm that wakes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.date import DateTrigger

from mlpiped.clock import Clock
from mlpiped.errors import UsageError
from mlpiped.model import Cause, CauseKind, Event
from mlpiped.spec import CronSpec, EverySpec
from mlpiped.triggers.memory import Emit, Memory
from mlpiped.triggers.schedule import ScheduleView, Trigger, minute_text, schedule_id
from mlpiped.triggers.timetable import Instants, describe, timetable

log = logging.getLogger(__name__)

TICK = 30.0  # seconds between two looks at the wall clock
JUMP = 2_000_000  # microseconds that wall and monotonic clock may drift apart before it is called a jump
ON_TIME = 60_000_000  # `catch_up="skip"`: what is later than this is missed
AT_MOST = 1000  # `catch_up="all"`: fires after one downtime
ABSENT = 60_000_000  # a schedule gone for longer and back again starts afresh; a plugin's save takes less
ASTRAY = 25 * 3_600_000_000  # a cursor further ahead was written under a wrong clock


@dataclass(slots=True)
class _Schedule:
    id: str
    pipeline: str
    spec: CronSpec | EverySpec
    delay: int  # the deterministic jitter, in microseconds
    fault: str = ""
    table: Instants | None = None  # None until the cursor is known
    cursor: int = 0
    fired_at: int | None = None
    due_at: int | None = None  # the next alarm: nominal time + delay
    failed: bool = False  # to be tried again at the next tick

    @property
    def label(self) -> str:
        return describe(self.spec)

    def look_ahead(self) -> None:
        nominal = self.table.next_after(self.cursor) if self.table else None
        self.due_at = None if nominal is None else nominal + self.delay


class Clockwork:
    """`set` says what there is, `run` lives as long as the daemon, `emit` gets what is due (see `memory.Emit`)."""

    def __init__(self, memory: Memory, clock: Clock, emit: Emit) -> None:
        self._memory, self._clock, self._emit = memory, clock, emit
        self._schedules: dict[str, _Schedule] = {}
        self._gone: dict[str, int] = {}  # schedule id -> when `set` left it out
        self._poke = anyio.Event()

    # --- what people and the daemon ask -----------------------------------------------------------------------
    def set(self, specs: Mapping[str, Sequence[Trigger]]) -> None:
        """Replace the whole set: pipeline -> its triggers (others than Cron and Every are passed over)."""
        old, new = self._schedules, {}
        for pipeline, triggers in specs.items():
            for spec in triggers:
                if isinstance(spec, CronSpec | EverySpec):
                    fresh = _schedule(pipeline, spec)
                    known = old.get(fresh.id)
                    new[fresh.id] = known if known and known.spec == spec else fresh
        now = self._clock.now()
        self._gone = {i: at for i, at in self._gone.items() if i not in new or now - at > ABSENT}
        self._gone |= {i: now for i in old if i not in new}
        self._schedules = new
        self._poke.set()

    def next_fires(self) -> list[ScheduleView]:
        """Every schedule, the next to fire first."""
        views = [
            ScheduleView(
                id=s.id,
                pipeline=s.pipeline,
                kind=s.spec.kind,
                describe=s.label,
                next_us=s.due_at,
                last_us=s.fired_at,
                waits_for=s.fault or ("the ledger: tried again soon" if s.failed else ""),
                cursor={"at": s.cursor} if s.table else None,
                mode="clock",
            )
            for s in self._schedules.values()
        ]
        return sorted(views, key=lambda v: (v.next_us is None, v.next_us or 0, v.pipeline, v.id))

    # --- waking -----------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled."""
        alarm = AsyncIOScheduler(
            timezone=UTC, job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1}
        )
        alarm.start()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch_the_clock, name="triggers: clock watch")
                while True:
                    self._poke = anyio.Event()  # before the turn: a poke during it asks for another
                    await self._turn()
                    self._arm(alarm)
                    await self._poke.wait()
        finally:
            alarm.shutdown(wait=False)

    async def _ring(self) -> None:
        self._poke.set()

    def _arm(self, alarm: Any) -> None:
        due = [s.due_at for s in self._schedules.values() if s.due_at is not None and not s.failed]
        alarm.remove_all_jobs()
        if due:
            wait = timedelta(microseconds=max(0, min(due) - self._clock.now()))
            alarm.add_job(self._ring, DateTrigger(datetime.now(UTC) + wait))

    async def _watch_the_clock(self) -> None:
        """The alarm counts monotonic seconds: after a step of the wall clock or a suspend it rings at a wrong time."""
        apart = self._clock.now() - round(self._clock.monotonic() * 1e6)
        while True:
            await self._clock.sleep(TICK)
            now = self._clock.now()
            before, apart = apart, now - round(self._clock.monotonic() * 1e6)
            if abs(apart - before) > JUMP:
                log.warning("the clock was set by %+.0f s: all schedules are looked at again", (apart - before) / 1e6)
                self._poke.set()
            elif any(s.failed or (s.due_at or now + 1) <= now for s in self._schedules.values()):
                self._poke.set()

    # --- deciding ---------------------------------------------------------------------------------------------
    async def _turn(self) -> None:
        for s in list(self._schedules.values()):
            if s.fault or self._schedules.get(s.id) is not s:
                continue
            try:
                if s.table is None:
                    await self._load(s)
                if s.table is not None:
                    self._mind_a_cursor_astray(s)
                    await self._fire(s, s.table, self._clock.now() - s.delay)
                    s.look_ahead()
                s.failed = False
            except Exception:
                s.failed = True
                log.exception("the fire of `%s` (%s) could not be recorded: tried again soon", s.pipeline, s.label)

    async def _load(self, s: _Schedule) -> None:
        now = self._clock.now()
        row = await self._memory.schedule(s.id)
        absent = now - self._gone.pop(s.id, now) > ABSENT
        s.cursor = now if row is None else int(row.cursor["at"])
        s.fired_at = row.fired_at if row else None
        try:
            if row is None or absent:
                timetable(s.spec, now)  # a schedule that is wrong leaves nothing in the ledger
                s.cursor = max(now, s.cursor)
                await self._memory.put_cursor(s.id, s.pipeline, {"at": s.cursor})
            s.table = timetable(s.spec, s.cursor)
            s.look_ahead()
        except UsageError as error:
            s.fault = error.message
            log.warning("a schedule of `%s` cannot be used: %s", s.pipeline, error.message)

    def _mind_a_cursor_astray(self, s: _Schedule) -> None:
        """A clock that once stood in 2030 must not silence a schedule until then. No nominal time fires twice all
        the same: the ledger knows each by its dedupe."""
        now = self._clock.now()
        if s.cursor > now + ASTRAY:
            log.warning("the cursor of `%s` (%s) lies ahead: %s; it counts from now", s.pipeline, s.label, s.cursor)
            s.cursor = now
            s.table = timetable(s.spec, now)

    async def _fire(self, s: _Schedule, table: Instants, horizon: int) -> None:
        """Deal with every due time in (cursor, horizon]. The cursor moves only with what is durable."""
        newest = table.last_before_or_at(horizon)
        if newest is None or newest <= s.cursor:
            return
        first = table.next_after(s.cursor)
        due = _newest(table, s.cursor, newest, AT_MOST if s.spec.catch_up == "all" else 1)
        late = s.spec.catch_up == "skip" and horizon - newest >= ON_TIME
        fires = [] if late else due if s.spec.catch_up == "all" else due[-1:]
        missed = newest if late else table.last_before_or_at(fires[0] - 1)
        if missed is not None and first is not None and missed >= first:
            n = _count(table, s.cursor, missed)
            many = f"{n} fires" if n != 1 else "1 fire"
            note = f"{many} from {minute_text(first)} to {minute_text(missed)} missed"
            if s.spec.catch_up == "latest":
                await self._open(s, fires.pop(), f"{s.label} at {minute_text(newest)}; {note}")
            else:
                await self._memory.record_fire(self._event(s, missed, f"{s.label}: {note}"), "missed")
                s.cursor = missed
        for nominal in fires:
            await self._open(s, nominal, f"{s.label} at {minute_text(nominal)}")

    async def _open(self, s: _Schedule, nominal: int, detail: str) -> None:
        await self._emit(self._event(s, nominal, detail))
        s.cursor, s.fired_at = nominal, self._clock.now()

    def _event(self, s: _Schedule, at: int, detail: str) -> Event:
        return Event(s.pipeline, Cause(CauseKind.CRON, detail), dedupe=f"cron:{s.id}:{at}", cursor=(s.id, {"at": at}))


def _schedule(pipeline: str, spec: CronSpec | EverySpec) -> _Schedule:
    name = schedule_id(pipeline, spec)
    span = round(spec.jitter * 1e6)
    delay = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % span if span > 0 else 0
    return _Schedule(name, pipeline, spec, delay)


def _newest(table: Instants, after: int, newest: int, limit: int) -> list[int]:
    """The latest due times in (after, newest], at most `limit`, in order."""
    found, at = [newest], table.last_before_or_at(newest - 1)
    while at is not None and at > after and len(found) < limit:
        found.append(at)
        at = table.last_before_or_at(at - 1)
    return found[::-1]


def _count(table: Instants, after: int, last: int) -> str | int:
    """How many due times lie in (after, last], as far as it is worth counting."""
    n, at = 0, table.next_after(after)
    while at is not None and at <= last:
        n, at = n + 1, table.next_after(at)
        if n > AT_MOST:
            return f"more than {AT_MOST}"
    return n
