"""E1–E6 of the fault matrix: what clocks do to schedules."""

from __future__ import annotations

import random
import sys
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from zoneinfo import ZoneInfo, available_timezones

import pytest
from trigger_rig import DAY, HOUR, MONDAY, HandClock, Rig, advance, clockwork, cron, every, rig, settled, us

from mlpiped.triggers.clock import Clockwork
from mlpiped.triggers.cron import parse

pytestmark = pytest.mark.anyio


async def jump(work: Clockwork, world: Rig, seconds: float) -> None:
    """The wall clock is set; the next tick of the monotonic one finds out."""
    assert isinstance(world.clock, HandClock)
    world.clock.jump(seconds)
    world.clock.advance(30)
    await settled(work, world)


@pytest.mark.parametrize("forward", [HOUR, 30 * DAY])
async def test_E1_clock_set_forward_gives_one_run_for_what_was_jumped_over(tmp_path: Path, forward: float) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=cron("*/10 * * * *")) as work:
        await jump(work, world, forward)
        (detail,) = await world.fired(1)
        assert "missed" in detail
        await advance(work, world, 600)
        await world.fired(2)


async def test_E2_clock_set_back_repeats_no_nominal_time(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=cron("*/10 * * * *")) as work:
        for _ in range(6):
            await advance(work, world, 600)
        await world.fired(6)
        await jump(work, world, -HOUR)
        for _ in range(6):
            await advance(work, world, 600)
        assert len(world.events) == 6  # 05:10 to 06:00 have been
        await advance(work, world, 600)
        assert (await world.fired(7))[-1].endswith("at 2026-11-23T06:10Z")
        assert len({e.dedupe for e in world.events}) == 7


async def test_E2_a_restart_after_the_clock_was_set_back_repeats_nothing(tmp_path: Path) -> None:
    clock = HandClock(MONDAY)
    async with rig(tmp_path, clock) as world:
        async with clockwork(world, p=cron("*/10 * * * *")) as work:
            await advance(work, world, HOUR)
            await world.fired(1)
        clock.jump(-HOUR)
        async with clockwork(world, p=cron("*/10 * * * *")) as work:
            await advance(work, world, HOUR)
            await world.fired(1)


async def test_E2_a_clock_that_stood_in_the_far_future_does_not_silence_a_schedule(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=cron("0 * * * *")) as work:
        await jump(work, world, 1500 * DAY)
        await world.fired(1)
        await jump(work, world, -1500 * DAY)
        await advance(work, world, HOUR)
        assert (await world.fired(2))[-1] == "0 * * * * at 2026-11-23T06:00Z"


async def test_E2_random_jumps_never_give_a_nominal_time_twice(tmp_path: Path) -> None:
    dice = random.Random(7)
    async with rig(tmp_path, HandClock(MONDAY)) as world:
        async with clockwork(
            world, a=cron("*/7 * * * *", catch_up="all"), b=every(300), c=cron(catch_up="skip")
        ) as work:
            for _ in range(60):
                if dice.random() < 0.3:
                    await jump(work, world, dice.choice([-1, 1]) * dice.uniform(3, 5 * HOUR))
                await advance(work, world, dice.uniform(1, 1800))
        fires = [(e.pipeline, e.cursor[1]["at"]) for e in world.events if e.cursor]
        assert len(fires) == len(set(fires)) == world.emitted > 50


@cache
def _changing_zones(first: int = 2026, last: int = 2026) -> list[tuple[str, date, timedelta]]:
    """Every date of these years on which some zone changes its clocks: (zone, day, by how much), once for all zones
    that do the same on that day."""
    found, week = {}, timedelta(days=7)
    for name in sorted(available_timezones()):
        zone, at = ZoneInfo(name), datetime(first, 1, 1)
        while at.year <= last:
            if at.replace(tzinfo=zone).utcoffset() != (at + week).replace(tzinfo=zone).utcoffset():
                for day in (at + timedelta(days=n) for n in range(7)):
                    before = day.replace(tzinfo=zone).utcoffset() or timedelta()
                    step = ((day + timedelta(days=1)).replace(tzinfo=zone).utcoffset() or timedelta()) - before
                    if step:
                        found.setdefault((day.date(), before, step), (name, day.date(), step))
            at += week
    return list(found.values())


@pytest.mark.parametrize("minutes", [0, 30, 60, 90, 120, 150, 180, 1410])
def test_E3_E4_a_daily_time_fires_once_a_day_in_every_zone_that_changes_its_clocks(minutes: int) -> None:
    zones = _changing_zones(2020, 2037)
    assert len(zones) > 300
    for name, day, _ in zones:
        calendar, zone = parse(f"{minutes % 60} {minutes // 60} * * *", name), ZoneInfo(name)
        at = us((datetime.combine(day, datetime.min.time(), zone) - timedelta(days=3)).isoformat()) - 1
        end = us((datetime.combine(day, datetime.min.time(), zone) + timedelta(days=3)).isoformat())
        fires = []
        while (at := calendar.next_after(at) or end) < end:
            fires.append(datetime.fromtimestamp(at / 1e6, zone))
        assert len(fires) == 6, (name, day, fires)
        off = [moment for moment in fires if 60 * moment.hour + moment.minute != minutes]
        assert len(off) <= 1 and all(moment.fold == 0 for moment in fires), (name, day, fires)


@pytest.mark.parametrize("expression", ["* * * * *", "*/15 * * * *", "0 * * * *"])
def test_E4_wildcard_hours_keep_their_pace_in_real_time(expression: str) -> None:
    step = {"* * * * *": 60, "*/15 * * * *": 900, "0 * * * *": 3600}[expression] * 1_000_000
    for name, day, change in _changing_zones():
        if change % timedelta(hours=1) and expression == "0 * * * *":
            continue
        at = us((datetime.combine(day, datetime.min.time(), ZoneInfo(name)) - timedelta(hours=6)).isoformat())
        calendar = parse(expression, name)
        at = calendar.next_after(at) or 0
        for _ in range(36 * 3_600_000_000 // step):
            following = calendar.next_after(at) or 0
            assert following - at == step, (name, day)
            at = following


async def test_E5_waking_from_suspend_is_a_clock_set_forward(tmp_path: Path) -> None:
    # CLOCK_MONOTONIC stands still while the machine sleeps: a suspend and a step of the wall clock look the same
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=every(900)) as work:
        await jump(work, world, 8 * HOUR)
        (detail,) = await world.fired(1)
        assert detail == "every 15m at 2026-11-23T13:00Z; 31 fires from 2026-11-23T05:15Z to 2026-11-23T12:45Z missed"


async def test_E6_a_year_of_downtime_starts_at_once_with_one_run(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world:
        async with clockwork(world, p=cron("* * * * *", timezone="Europe/Warsaw"), q=every(1)):
            pass
        world.clock.advance(366 * DAY)  # type: ignore[attr-defined]
        steps = 0

        def count(*_: object) -> None:
            nonlocal steps
            steps += 1

        sys.setprofile(count)  # no enumeration: a year has half a million minutes
        try:
            async with clockwork(world, p=cron("* * * * *", timezone="Europe/Warsaw"), q=every(1)):
                details = await world.fired(2)
        finally:
            sys.setprofile(None)
        assert steps < 200_000
        assert all("more than 1000 fires" in detail for detail in details)
