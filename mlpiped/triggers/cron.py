"""The calendar of a crontab line: pure arithmetic, no clock. Times are integer microseconds since the epoch, UTC.

What a line means is what Debian's cron makes of it:

- five fields `minute hour day-of-month month day-of-week`; lists, ranges, steps, names; 0 and 7 are Sunday;
  a range of weekdays may wrap (`fri-mon`); `@hourly @daily @midnight @weekly @monthly @yearly @annually`;
- where neither day field begins with `*`, a day counts when *either* matches, otherwise when both do
  (so `0 0 */2 * mon` is "Mondays on odd days");
- where the clocks change, the hour field decides. With fixed hours (`30 2 * * *`) a local time that does not exist
  counts at the first instant after the gap, and one that occurs twice counts the first time. With an hour
  field that begins with `*` every real occurrence counts, so `*/15 * * * *` goes on through a repeated hour.
  (Debian also treats `*/20 2 * * *` as a wildcard, and so drops it for the whole day of the gap: we do not.)

All steps are taken in UTC or over plain dates: `aware datetime + timedelta` is wrong around a change of clocks.
"""

from __future__ import annotations

import calendar
import re
from bisect import bisect_right
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from mlpiped.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
SECOND = 1_000_000
MINUTE = 60 * SECOND
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HORIZON = 366 * 48  # days: 29 February on one given weekday is at most 40 years away
_NUMBER = re.compile(r"[0-9]{1,4}\Z")


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()
    wraps: bool = False


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day-of-month", 1, 31),
    _Field("month", 1, 12, tuple("jan feb mar apr may jun jul aug sep oct nov dec".split())),
    _Field("day-of-week", 0, 7, tuple("sun mon tue wed thu fri sat".split()), wraps=True),
)


def parse(expression: str, timezone: str = "UTC") -> Calendar:
    """The calendar of `expression` in `timezone`; UsageError with a sentence that names the field at fault."""
    zone = zone_named(timezone)
    line = expression.strip().lower()
    if line.startswith("@"):
        if line not in MACROS:
            known = ", ".join(f"`{name}`" for name in MACROS)
            raise UsageError(f"unknown cron macro: `{expression.strip()}`", hint=f"the macros are {known}")
        line = MACROS[line]
    words = line.split()
    if len(words) != len(_FIELDS):
        raise UsageError(
            f"a cron expression has five fields, this one has {len(words)}: `{expression}`",
            hint="minute hour day-of-month month day-of-week, as in `0 6 * * mon`",
        )
    minutes, hours, days, months, weekdays = (_values(f, w) for f, w in zip(_FIELDS, words, strict=True))
    both = words[2].startswith("*") or words[4].startswith("*")
    if both and min(days) > max(_longest(month) for month in months):
        raise UsageError(
            f"the day-of-month field never comes true: `{words[2]}` in month `{words[3]}`",
            hint="no such month has so many days",
        )
    return Calendar(
        expression=expression.strip(),
        zone=zone,
        minutes=tuple(60 * h + m for h in sorted(hours) for m in sorted(minutes)),
        days=days,
        months=months,
        weekdays=frozenset(day % 7 for day in weekdays),
        both_days=both,
        each_occurrence=words[1].startswith("*"),
    )


def zone_named(name: str) -> ZoneInfo:
    """The time zone `name` ("Area/City"); UsageError where there is none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        near = get_close_matches(name, sorted(available_timezones()), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "as in `Europe/Warsaw`"
        raise UsageError(f"unknown time zone: `{name}`", hint=hint) from None


def _longest(month: int) -> int:
    return calendar.monthrange(2024, month)[1]


def _values(field: _Field, text: str) -> frozenset[int]:
    return frozenset(value for term in text.split(",") for value in _term(field, term, text))


def _term(field: _Field, term: str, text: str) -> range:
    body, slash, step_text = term.partition("/")
    step = 1
    if slash:
        if not _NUMBER.match(step_text) or int(step_text) == 0:
            raise _bad(field, text, f"the step `/{step_text}` is not a positive number")
        step = int(step_text)
    if body == "*":
        return range(field.low, field.high + 1, step)
    first, dash, last = body.partition("-")
    start = _number(field, first, text)
    if not dash:
        return range(start, (field.high if slash else start) + 1, step)
    end = _number(field, last, text)
    if end < start:
        if not field.wraps:
            raise _bad(
                field,
                text,
                f"the range `{body}` ends before it starts",
                hint=f"write `{start}-{field.high},{field.low}-{end}`",
            )
        end += 7  # reduced modulo 7 by the caller
    return range(start, end + 1, step)


def _number(field: _Field, word: str, text: str) -> int:
    if word in field.names:
        return field.names.index(word) + field.low
    if not _NUMBER.match(word):
        hint = f"the names are {' '.join(field.names)}" if field.names else None
        raise _bad(field, text, f"`{word}` is not a number" + (" or a name" if field.names else ""), hint=hint)
    if not field.low <= int(word) <= field.high:
        raise _bad(field, text, f"{word} is not between {field.low} and {field.high}")
    return int(word)


def _bad(field: _Field, text: str, fault: str, hint: str | None = None) -> UsageError:
    return UsageError(f"wrong {field.name} field in the cron expression: `{text}`: {fault}", hint=hint)


@dataclass(frozen=True, eq=False)  # by identity: it is the key of a cache, and a hash over 1,440 minutes is not free
class Calendar:
    """When a crontab line is due. `minutes` are minutes of a local day; the rest says which days count."""

    expression: str
    zone: ZoneInfo
    minutes: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0 is Sunday
    both_days: bool
    each_occurrence: bool

    def next_after(self, us: int) -> int | None:
        """The first due time later than `us`."""
        found = None
        for day in self._days(self._local_date(us) - timedelta(days=1), +1):
            if found is not None and day > found[0] + timedelta(days=1):
                break
            instants = _instants(self, day)
            at = bisect_right(instants, us)
            if at < len(instants) and (found is None or instants[at] < found[1]):
                # a repeated hour across midnight mixes two days: look at the day after, too
                found = (day if found is None else found[0], instants[at])
        return found[1] if found else None

    def last_before_or_at(self, us: int) -> int | None:
        """The latest due time that is not later than `us`."""
        found = None
        for day in self._days(self._local_date(us) + timedelta(days=1), -1):
            if found is not None and day < found[0] - timedelta(days=1):
                break
            instants = _instants(self, day)
            at = bisect_right(instants, us)
            if at and (found is None or instants[at - 1] > found[1]):
                found = (day if found is None else found[0], instants[at - 1])
        return found[1] if found else None

    def _local_date(self, us: int) -> date:
        return (_EPOCH + timedelta(microseconds=us)).astimezone(self.zone).date()

    def _counts(self, day: date) -> bool:
        dom, dow = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return (dom and dow) if self.both_days else (dom or dow)

    def _days(self, day: date, step: int) -> Iterator[date]:
        """The matching days from `day` on, forwards or backwards, as far as one can be expected."""
        one, far = timedelta(days=step), day + timedelta(days=step * _HORIZON)
        while day != far:
            if day.month not in self.months:
                length = calendar.monthrange(day.year, day.month)[1]
                skip = length - day.day + 1 if step > 0 else day.day
                day += one * min(skip, abs((far - day).days))
            else:
                if self._counts(day):
                    yield day
                day += one


@lru_cache(maxsize=512)
def _plain_midnight(zone: ZoneInfo, day: date) -> int | None:
    """The UTC microseconds of local midnight, or None where the clocks change on that day."""
    hours = [datetime(day.year, day.month, day.day, h, m, tzinfo=zone) for h in range(24) for m in (0, 30)]
    offsets = {offset for hour in hours for offset in (hour.utcoffset(), hour.replace(fold=1).utcoffset())}
    last = datetime(day.year, day.month, day.day, 23, 59, 59, tzinfo=zone)
    offsets |= {last.utcoffset(), last.replace(fold=1).utcoffset()}
    return _us(hours[0]) if len(offsets) == 1 else None


@lru_cache(maxsize=64)
def _instants(of: Calendar, day: date) -> tuple[int, ...]:
    """Every due time that belongs to the local day, in order."""
    midnight = _plain_midnight(of.zone, day)
    if midnight is not None:
        return tuple(midnight + minute * MINUTE for minute in of.minutes)
    found: set[int] = set()
    for minute in of.minutes:
        first = datetime(day.year, day.month, day.day, minute // 60, minute % 60, tzinfo=of.zone)
        second = first.replace(fold=1)
        if first.utcoffset() < second.utcoffset():  # type: ignore[operator]
            if not of.each_occurrence:
                found.add(_after_gap(second, first))
        else:
            found.add(_us(first))
            if of.each_occurrence:
                found.add(_us(second))
    return tuple(sorted(found))


def _after_gap(early: datetime, late: datetime) -> int:
    """The first instant after the gap that holds a local time: `early` and `late` read it with either offset."""
    zone, low, high = early.tzinfo, _us(early) // SECOND, _us(late) // SECOND
    before = (_EPOCH + timedelta(seconds=low)).astimezone(zone).utcoffset()
    while low < high:
        middle = (low + high) // 2
        if (_EPOCH + timedelta(seconds=middle)).astimezone(zone).utcoffset() == before:
            low = middle + 1
        else:
            high = middle
    return high * SECOND


def _us(moment: datetime) -> int:
    """Integer arithmetic throughout: a float timestamp loses microseconds."""
    since = moment.astimezone(UTC) - _EPOCH
    return (since.days * 86_400 + since.seconds) * SECOND + since.microseconds


def check(expression: str, timezone: str) -> str | None:
    """What is wrong with an expression, as a sentence, or None."""
    try:
        parse(expression, timezone)
    except UsageError as fault:
        return fault.message
    return None
