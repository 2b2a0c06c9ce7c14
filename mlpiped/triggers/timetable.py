"""When a Cron or Every trigger is due: one shape for both, with the author's `start` and `end` put on. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from mlpiped.errors import UsageError
from mlpiped.spec import CronSpec, EverySpec
from mlpiped.triggers import cron
from mlpiped.triggers.schedule import span_text


class Instants(Protocol):
    def next_after(self, us: int) -> int | None: ...
    def last_before_or_at(self, us: int) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Grid:
    """Whole multiples of `period` after `anchor`, itself not included."""

    anchor: int
    period: int

    def next_after(self, us: int) -> int | None:
        return self.anchor + (max(us - self.anchor, 0) // self.period + 1) * self.period

    def last_before_or_at(self, us: int) -> int | None:
        steps = (us - self.anchor) // self.period
        return self.anchor + steps * self.period if steps > 0 else None


@dataclass(frozen=True, slots=True)
class Window:
    """Those of `inner` that lie in [start, end]."""

    inner: Instants
    start: int | None
    end: int | None

    def next_after(self, us: int) -> int | None:
        found = self.inner.next_after(us if self.start is None else max(us, self.start - 1))
        return None if found is None or (self.end is not None and found > self.end) else found

    def last_before_or_at(self, us: int) -> int | None:
        found = self.inner.last_before_or_at(us if self.end is None else min(us, self.end))
        return None if found is None or (self.start is not None and found < self.start) else found


def timetable(spec: CronSpec | EverySpec, cursor: int) -> Instants:
    """The due times of `spec`; those of an Every without `start` count from `cursor`. UsageError where it is wrong."""
    if isinstance(spec, CronSpec):
        inner: Instants = cron.parse(spec.expression, spec.timezone)
        start, end = _moment(spec.start, spec.timezone, "start"), _moment(spec.end, spec.timezone, "end")
        return Window(inner, start, end) if start is not None or end is not None else inner
    period = round(spec.seconds * cron.SECOND)
    if period <= 0:
        raise UsageError(f"the time between two fires must be longer than nothing: `{spec.seconds:g}s`")
    start, end = _moment(spec.start, "UTC", "start"), _moment(spec.end, "UTC", "end")
    grid = Grid(cursor if start is None else start - period, period)
    return Window(grid, None, end) if end is not None else grid


def describe(spec: CronSpec | EverySpec) -> str:
    if isinstance(spec, EverySpec):
        return f"every {span_text(spec.seconds)}"
    return spec.expression if spec.timezone == "UTC" else f"{spec.expression} ({spec.timezone})"


def _moment(text: str | None, zone: str, name: str) -> int | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"`{name}` is not a date or time: `{text}`", hint="as in `2026-11-23T06:00:00Z`") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=cron.zone_named(zone))
    return (moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
