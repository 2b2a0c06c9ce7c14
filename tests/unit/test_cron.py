from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpiped.errors import UsageError
from mlpiped.triggers.cron import Calendar, parse

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def us(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp()) * 1_000_000


def local(moment: int | None, zone: str = "UTC") -> str:
    assert moment is not None
    return (EPOCH + timedelta(microseconds=moment)).astimezone(ZoneInfo(zone)).strftime("%Y-%m-%dT%H:%M:%S%z")


def fires(expression: str, zone: str, start: str, end: str) -> list[str]:
    """The due times in [start, end), as local times."""
    calendar, at, found = parse(expression, zone), us(start) - 1, []
    while (at := calendar.next_after(at) or us(end)) < us(end):  # type: ignore[assignment]
        found.append(local(at, zone))
    return found


# --- what the fields mean -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0 6 * * mon", "2026-11-23T06:00:00+0000"),
        ("0 6 * * 0", "2026-11-29T06:00:00+0000"),
        ("0 6 * * 7", "2026-11-29T06:00:00+0000"),
        ("0 6 * * SUN", "2026-11-29T06:00:00+0000"),
        ("0 0 * * fri-mon", "2026-11-23T00:00:00+0000"),
        ("0 0 * * sat-tue", "2026-11-23T00:00:00+0000"),
        ("0 0 * * 5-7", "2026-11-27T00:00:00+0000"),
        ("0 0 29 2 *", "2028-02-29T00:00:00+0000"),
        ("0 0 13 * 5", "2026-11-27T00:00:00+0000"),  # either day field
        ("0 0 */2 * sat", "2027-01-09T00:00:00+0000"),  # begins with a star: both day fields
        ("5/20 3 * jan,jul *", "2027-01-01T03:05:00+0000"),
        ("@hourly", "2026-11-22T13:00:00+0000"),
        ("@daily", "2026-11-23T00:00:00+0000"),
        ("@midnight", "2026-11-23T00:00:00+0000"),
        ("@weekly", "2026-11-29T00:00:00+0000"),
        ("@monthly", "2026-12-01T00:00:00+0000"),
        ("@yearly", "2027-01-01T00:00:00+0000"),
        ("@ANNUALLY", "2027-01-01T00:00:00+0000"),
    ],
)
def test_a_line_means_what_cron_makes_of_it(expression: str, expected: str) -> None:
    start = us("2026-11-22T12:34:00+00:00")  # a Sunday
    if "*/2" in expression:
        start = us("2026-12-30T00:00:00+00:00")
    assert local(parse(expression).next_after(start)) == expected


def test_a_weekday_range_wraps_around_the_weekend() -> None:
    week = fires("0 0 * * fri-mon", "UTC", "2026-11-23T00:00+00:00", "2026-11-30T00:00+00:00")
    assert [day[8:10] for day in week] == ["23", "27", "28", "29"]
    assert fires("0 0 * * fri-mon/2", "UTC", "2026-11-23T00:00+00:00", "2026-11-30T00:00+00:00") == [
        "2026-11-27T00:00:00+0000",
        "2026-11-29T00:00:00+0000",
    ]


@pytest.mark.parametrize(
    ("expression", "field", "says"),
    [
        ("61 * * * *", "minute", "61 is not between 0 and 59"),
        ("* 24 * * *", "hour", "24"),
        ("* * 0 * *", "day-of-month", "0"),
        ("* * * 13 *", "month", "13"),
        ("* * * foo *", "month", "`foo`"),
        ("* * * * 8", "day-of-week", "8"),
        ("* * * * monday", "day-of-week", "`monday`"),
        ("*/0 * * * *", "minute", "/0"),
        ("*/x * * * *", "minute", "/x"),
        ("* 22-4 * * *", "hour", "ends before it starts"),
        ("1,, * * * *", "minute", "``"),
        ("* * L * *", "day-of-month", "`l`"),
        ("-1 * * * *", "minute", "``"),
        ("٣ * * * *", "minute", "`٣`"),
        ("0 0 31 2 *", "day-of-month", "never"),
        ("0 0 31 4,6,9,11 *", "day-of-month", "never"),
        ("0 0 30 feb */2", "day-of-month", "never"),
    ],
)
def test_a_wrong_line_is_refused_with_its_field_named(expression: str, field: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(expression)
    assert field in caught.value.message
    assert says in caught.value.message


@pytest.mark.parametrize("expression", ["", "* * * *", "* * * * * *", "@reboot", "@every 5m"])
def test_a_line_of_the_wrong_shape_is_refused(expression: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(expression)
    assert caught.value.hint


@pytest.mark.parametrize("zone", ["Europe/Warsow", "", "../etc/passwd", "CET+1+1", "\0"])
def test_an_unknown_zone_is_refused(zone: str) -> None:
    with pytest.raises(UsageError, match="unknown time zone"):
        parse("* * * * *", zone)


def test_a_misspelt_zone_gets_the_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        parse("* * * * *", "Europe/Warsow")
    assert "`Europe/Warsaw`" in str(caught.value.hint)


# --- where the clocks change --------------------------------------------------------------------------------
NEW_YORK, WARSAW = "America/New_York", "Europe/Warsaw"
LORD_HOWE, CASABLANCA = "Australia/Lord_Howe", "Africa/Casablanca"


@pytest.mark.parametrize(
    ("expression", "zone", "day", "expected"),
    [
        # E3, the gap: once, at the first instant after it
        ("30 2 * * *", NEW_YORK, "2026-03-08", ["03:00:00-0400"]),
        ("30 2 * * *", WARSAW, "2026-03-29", ["03:00:00+0200"]),
        ("0,30 2 * * *", WARSAW, "2026-03-29", ["03:00:00+0200"]),
        ("*/20 2 * * *", WARSAW, "2026-03-29", ["03:00:00+0200"]),
        ("0 2,3 * * *", WARSAW, "2026-03-29", ["03:00:00+0200"]),
        ("15 2 * * *", LORD_HOWE, "2026-10-04", ["02:30:00+1100"]),
        ("30 2 * * *", CASABLANCA, "2026-03-22", ["03:00:00+0100"]),
        ("30 0 * * *", "Africa/Cairo", "2026-04-24", ["01:00:00+0300"]),
        ("0 0 * * *", "Africa/Cairo", "2026-04-24", ["01:00:00+0300"]),
        ("0 * * * *", WARSAW, "2026-03-29", [f"{h:02}:00:00+0{1 + (h > 2)}00" for h in range(24) if h != 2]),
        # E4, the overlap: fixed hours the first time only, wildcard hours each real occurrence
        ("30 1 * * *", NEW_YORK, "2026-11-01", ["01:30:00-0400"]),
        ("30 2 * * *", WARSAW, "2026-10-25", ["02:30:00+0200"]),
        ("*/20 2 * * *", WARSAW, "2026-10-25", ["02:00:00+0200", "02:20:00+0200", "02:40:00+0200"]),
        ("45 1 * * *", LORD_HOWE, "2026-04-05", ["01:45:00+1100"]),
        ("30 2 * * *", CASABLANCA, "2026-02-15", ["02:30:00+0100"]),
        ("30 23 * * *", "Africa/Cairo", "2026-10-29", ["23:30:00+0300"]),
    ],
)
def test_fires_on_the_day_the_clocks_change(expression: str, zone: str, day: str, expected: list[str]) -> None:
    start = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
    end = (start.replace(tzinfo=None) + timedelta(days=1)).replace(tzinfo=ZoneInfo(zone))
    assert [fire[11:] for fire in fires(expression, zone, start.isoformat(), end.isoformat())] == expected


def test_every_quarter_runs_through_both_repeated_hours() -> None:
    night = fires("*/15 * * * *", WARSAW, "2026-10-25T00:00+00:00", "2026-10-25T02:00+00:00")
    assert len(night) == 8
    assert night[0].endswith("02:00:00+0200") and night[4].endswith("02:00:00+0100")


def test_a_day_that_does_not_exist_counts_at_its_end() -> None:
    got = fires("0 12 30 12 *", "Pacific/Apia", "2011-12-28T00:00+00:00", "2012-01-03T00:00+00:00")
    assert got == ["2011-12-31T00:00:00+1400"]


def test_an_overlap_across_midnight_keeps_the_order_of_real_time() -> None:
    # St. John's, 2010: 00:01 went back to 23:01 of the day before
    got = fires("*/30 * * * *", "America/St_Johns", "2010-11-07T02:00+00:00", "2010-11-07T04:00+00:00")
    assert [fire[8:16] for fire in got] == ["06T23:30", "07T00:00", "06T23:30", "07T00:00"]


# --- against other machines ---------------------------------------------------------------------------------
def values(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    pairs = st.tuples(number, number).map(sorted).filter(lambda pair: pair[0] < pair[1])  # cronsim: `3-3/2` is `3/2`
    span = pairs.map(lambda pair: f"{pair[0]}-{pair[1]}")
    step = st.integers(1, 20)
    term = st.one_of(
        number.map(str), span, st.tuples(span | st.just("*") | number.map(str), step).map(lambda p: f"{p[0]}/{p[1]}")
    )
    return st.just("*") | st.lists(term, min_size=1, max_size=3).map(",".join)


EXPRESSIONS = st.tuples(values(0, 59), values(0, 23), values(1, 31), values(1, 12), values(0, 7)).map(" ".join)
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2037, 12, 31)).map(lambda d: d.replace(microsecond=0))


def accepted(expression: str) -> bool:
    try:
        CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC))
    except Exception:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS, MOMENTS)
def test_equals_cronsim_in_utc_forwards_and_backwards(expression: str, moment: datetime) -> None:
    at = moment.replace(tzinfo=UTC)
    if not accepted(expression):
        with pytest.raises(UsageError):
            parse(expression)
        return
    calendar = parse(expression)
    ahead, mine = CronSim(expression, at), us(at.isoformat())
    for _ in range(5):
        mine = calendar.next_after(mine)  # type: ignore[assignment]
        assert local(mine) == next(ahead).strftime("%Y-%m-%dT%H:%M:%S%z")
    back, mine = CronSim(expression, at, reverse=True), us(at.isoformat()) - 1
    for _ in range(5):
        mine = calendar.last_before_or_at(mine)  # type: ignore[assignment]
        assert local(mine) == next(back).strftime("%Y-%m-%dT%H:%M:%S%z")
        mine -= 1


CHANGES = [
    (zone, us(moment))
    for zone, moment in [
        (NEW_YORK, "2026-03-08T07:00+00:00"),
        (NEW_YORK, "2026-11-01T06:00+00:00"),
        (WARSAW, "2026-03-29T01:00+00:00"),
        (WARSAW, "2026-10-25T01:00+00:00"),
        (LORD_HOWE, "2026-04-04T15:00+00:00"),
        (LORD_HOWE, "2026-10-03T15:30+00:00"),
        (CASABLANCA, "2026-02-15T02:00+00:00"),
        (CASABLANCA, "2026-03-22T02:00+00:00"),
        ("Africa/Cairo", "2026-04-23T22:00+00:00"),
        ("Africa/Cairo", "2026-10-29T21:00+00:00"),
        ("America/St_Johns", "2010-03-14T03:31+00:00"),
        ("America/St_Johns", "2010-11-07T02:31+00:00"),
        ("Pacific/Apia", "2011-12-30T10:00+00:00"),
        ("Europe/Dublin", "2026-10-25T01:00+00:00"),
        ("Asia/Kathmandu", "2026-10-25T01:00+00:00"),
    ]
]


def around(calendar: Calendar, change: int) -> list[int]:
    at, found = change - 6 * 3_600_000_000, []
    while (at := calendar.next_after(at) or 1 << 62) < change + 30 * 3_600_000_000:  # type: ignore[assignment]
        found.append(at)
    return found


def walked(expression: str, zone: str, change: int) -> list[int]:
    """The contract by brute force: look at every local minute of three days, and at every real minute."""
    tz, minute = ZoneInfo(zone), 60_000_000
    low, high = change - 6 * 3_600_000_000, change + 30 * 3_600_000_000
    matches = set(_naive_matches(expression, change))
    real = [low - 6 * 60 * minute + k * minute for k in range(42 * 60 + 1)]
    found, seen, before = set(), set(), None
    for at in real:
        here = (EPOCH + timedelta(microseconds=at)).astimezone(tz).replace(tzinfo=None)
        if expression.split()[1].startswith("*"):
            if here in matches:
                found.add(at)
        else:
            if here in matches and here not in seen:
                found.add(at)
            if before is not None and here - before > timedelta(minutes=1):  # a gap: what was jumped over
                if any(before < t < here for t in matches):
                    found.add(at)
            seen.add(here)
        before = here
    return sorted(at for at in found if low < at < high)


def _naive_matches(expression: str, change: int) -> list[datetime]:
    start = EPOCH + timedelta(microseconds=change) - timedelta(days=2)
    end, found = start + timedelta(days=5), []
    for moment in CronSim(expression, start):
        if moment > end:
            break
        found.append(moment.replace(tzinfo=None))
    return found


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS.filter(accepted), st.sampled_from(CHANGES))
def test_keeps_the_contract_wherever_the_clocks_change(expression: str, where: tuple[str, int]) -> None:
    minutes, hours = expression.split()[:2]
    expression = f"{minutes} {hours} * * *"  # every day, or nearly all examples would miss the day
    assert around(parse(expression, where[0]), where[1]) == walked(expression, *where)


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS.filter(accepted), st.sampled_from(CHANGES))
def test_equals_cronsim_where_the_clocks_change(expression: str, where: tuple[str, int]) -> None:
    """Deviation 1: minutes that begin with `*` under fixed hours (cronsim drops the gap and doubles the overlap).
    Deviation 2: cronsim names an instant twice when a gap shifts one fire onto another."""
    minutes, hours = expression.split()[:2]
    if minutes.startswith("*") and not hours.startswith("*"):
        minutes = minutes.replace("*", "0-59")
    expression, (zone, change) = f"{minutes} {hours} * * *", where
    if hours.startswith("*") and zone in (LORD_HOWE, "America/St_Johns"):
        return  # cronsim walks by whole hours and so leaves out minutes of a half-hour change: see the walk above
    simulated, end = CronSim(expression, _start(zone, change)), change + 30 * 3_600_000_000
    theirs: list[int] = []
    for moment in simulated:
        at = us(moment.isoformat())
        if at >= end:
            break
        if at > change - 6 * 3_600_000_000 and at not in theirs:
            theirs.append(at)
    assert around(parse(expression, zone), change) == theirs


def _start(zone: str, change: int) -> datetime:
    return (EPOCH + timedelta(microseconds=change) - timedelta(days=1)).astimezone(ZoneInfo(zone))


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS.filter(accepted), st.sampled_from(CHANGES))
def test_backwards_is_forwards_reversed(expression: str, where: tuple[str, int]) -> None:
    minutes, hours = expression.split()[:2]
    calendar = parse(f"{minutes} {hours} * * *", where[0])
    ahead = around(calendar, where[1])
    at, back = where[1] + 30 * 3_600_000_000 - 1, []
    while (at := calendar.last_before_or_at(at) or 0) > where[1] - 6 * 3_600_000_000:  # type: ignore[assignment]
        back.append(at)
        at -= 1
    assert back[::-1] == ahead


# --- cost ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("expression", ["* * * * *", "0 0 29 2 */7", "59 23 31 12 *"])
def test_the_latest_due_time_is_found_without_walking_through_those_before_it(
    expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpiped.triggers import cron

    days: list[object] = []
    instants = cron._instants
    monkeypatch.setattr(cron, "_instants", lambda calendar, day: (days.append(day), instants(calendar, day))[1])
    assert parse(expression, WARSAW).last_before_or_at(us("2026-11-23T06:00+00:00")) is not None
    assert len(days) <= 4
