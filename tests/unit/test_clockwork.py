from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from trigger_rig import DAY, HOUR, MONDAY, HandClock, advance, clockwork, cron, every, rig, settled, us

from mlpiped.clock import SystemClock
from mlpiped.errors import LedgerFull
from mlpiped.triggers.schedule import schedule_id, span_text

pytestmark = pytest.mark.anyio


async def test_a_new_schedule_does_not_fire_at_load(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=[cron(), every(60)]) as work:
        assert world.emitted == 0
        assert [view.next_us for view in work.next_fires()] == [MONDAY + 60_000_000, us("2026-11-23T06:00+00:00")]


async def test_a_due_time_fires_once_with_its_nominal_time(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=cron("0 6 * * mon")) as work:
        await advance(work, world, HOUR + 1)
        assert await world.fired(1) == ["0 6 * * mon at 2026-11-23T06:00Z"]
        (event,) = world.events
        name = schedule_id("p", cron("0 6 * * mon"))
        assert event.dedupe == f"cron:{name}:{us('2026-11-23T06:00+00:00')}"
        assert event.cursor == (name, {"at": us("2026-11-23T06:00+00:00")})
        await advance(work, world, HOUR)
        assert world.emitted == 1
        assert work.next_fires()[0].next_us == us("2026-11-30T06:00+00:00")
        assert work.next_fires()[0].last_us == world.clock.now() - 3_600_000_000


async def test_every_counts_from_its_first_registration(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world:
        async with clockwork(world, p=every(900)) as work:
            await advance(work, world, 901)
            await world.fired(1)
        world.clock.advance(600)  # type: ignore[attr-defined]
        async with clockwork(world, p=every(900)) as work:
            assert work.next_fires()[0].next_us == MONDAY + 1_800_000_000
            await advance(work, world, 300)
            assert await world.fired(2) == [
                "every 15m at 2026-11-23T05:15Z",
                "every 15m at 2026-11-23T05:30Z",
            ]


D23, D24, D25 = "2026-11-23T06:00Z", "2026-11-24T06:00Z", "2026-11-25T06:00Z"


@pytest.mark.parametrize(
    ("policy", "down", "details", "missed"),
    [
        ("latest", 3 * DAY, [f"0 6 * * * at {D25}; 2 fires from {D23} to {D24} missed"], []),
        ("skip", 3 * DAY, [], [f"0 6 * * *: 3 fires from {D23} to {D25} missed"]),
        ("skip", DAY + HOUR + 30, [f"0 6 * * * at {D24}"], [f"0 6 * * *: 1 fire from {D23} to {D23} missed"]),
        ("all", 3 * DAY, [f"0 6 * * * at {day}" for day in (D23, D24, D25)], []),
        ("latest", HOUR / 2, [], []),
    ],
)
async def test_what_fell_into_a_downtime_follows_the_policy(
    tmp_path: Path, policy: str, down: float, details: list[str], missed: list[str]
) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world:
        async with clockwork(world, p=cron(catch_up=policy)):
            pass
        world.clock.advance(down)  # type: ignore[attr-defined]
        async with clockwork(world, p=cron(catch_up=policy)) as work:
            assert world.details == details
            recorded = [e.facts["detail"] for e in await world.ledger.events() if e.kind == "fire.missed"]
            assert recorded == missed
            assert (work.next_fires()[0].next_us or 0) > world.clock.now()
        async with clockwork(world, p=cron(catch_up=policy)):
            assert world.details == details  # and once only


async def test_all_is_bounded_and_the_rest_is_recorded(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world:
        async with clockwork(world, p=every(1, catch_up="all")):
            pass
        world.clock.advance(1500)  # type: ignore[attr-defined]
        async with clockwork(world, p=every(1, catch_up="all")):
            assert len(world.events) == 1000
            assert world.details[-1] == "every 1s at 2026-11-23T05:25Z"
            recorded = [e.facts["detail"] for e in await world.ledger.events(limit=10_000) if e.kind == "fire.missed"]
            assert recorded == ["every 1s: 500 fires from 2026-11-23T05:00:01Z to 2026-11-23T05:08:20Z missed"]


async def test_start_and_end_bound_the_fires(tmp_path: Path) -> None:
    bounded = cron("0 * * * *", start="2026-11-23T07:00:00Z", end="2026-11-23T08:00:00Z", catch_up="all")
    grid = every(HOUR, start="2026-11-23T06:30:00Z", end="2026-11-23T08:00:00Z", catch_up="all")
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, a=bounded, b=grid) as work:
        await advance(work, world, 12 * HOUR)
        assert sorted(world.details) == [
            "0 * * * * at 2026-11-23T07:00Z",
            "0 * * * * at 2026-11-23T08:00Z",
            "every 1h at 2026-11-23T06:30Z",
            "every 1h at 2026-11-23T07:30Z",
        ]
        assert [view.next_us for view in work.next_fires()] == [None, None]


async def test_jitter_is_a_fixed_delay_per_schedule(tmp_path: Path) -> None:
    plain, late = cron("0 * * * *"), cron("0 * * * *", jitter=600)
    async with rig(tmp_path, HandClock(MONDAY + 1)) as world, clockwork(world, a=late, b=late, c=plain) as work:
        first = {view.pipeline: view.next_us or 0 for view in work.next_fires()}
        six = us("2026-11-23T06:00+00:00")
        assert first["c"] == six
        assert six < first["a"] < six + 600_000_000 and six < first["b"] < six + 600_000_000
        assert first["a"] != first["b"]
        await advance(work, world, HOUR - 1)
        assert [e.pipeline for e in world.events] == []
        await advance(work, world, 600)
        assert {e.pipeline for e in world.events} == {"a", "b", "c"}
        assert all("06:00Z" in detail for detail in world.details)
        second = {view.pipeline: view.next_us or 0 for view in work.next_fires()}
        assert second["a"] - first["a"] == 3_600_000_000


async def test_an_edited_schedule_starts_afresh_but_a_new_policy_does_not(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world:
        async with clockwork(world, p=cron("0 6 * * *")):
            pass
        world.clock.advance(2 * HOUR)  # type: ignore[attr-defined]
        async with clockwork(world, p=cron("30 6 * * *")):
            assert world.emitted == 0  # 06:30 has passed, but was not this schedule's yet
        async with clockwork(world, p=cron("0 6 * * *", catch_up="all", jitter=5)):
            assert len(world.events) == 1


async def test_a_schedule_that_was_taken_out_does_not_catch_up_when_it_is_put_back(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=cron()) as work:
        work.set({})
        await advance(work, world, 2 * DAY)
        work.set({"p": [cron()]})
        await settled(work, world)
        assert world.emitted == 0
        work.set({})  # an editor's save: gone for a moment
        world.clock.advance(20)  # type: ignore[attr-defined]
        work.set({"p": [cron()]})
        await settled(work, world)
        await advance(work, world, DAY)
        await world.fired(1)


async def test_a_wrong_schedule_is_shown_and_harms_nobody(tmp_path: Path) -> None:
    bad = [cron("0 25 * * *"), cron(timezone="Mars/Olympus"), every(0), cron("@daily", start="soon")]
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, bad=bad, good=cron()) as work:
        faults = {view.waits_for for view in work.next_fires() if view.pipeline == "bad"}
        assert len(faults) == 4 and all(faults)
        assert await world.ledger.schedule(schedule_id("bad", bad[0])) is None
        await advance(work, world, 2 * HOUR)
        assert [e.pipeline for e in world.events] == ["good"]


async def test_a_fire_that_cannot_be_recorded_is_tried_again(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world, clockwork(world, p=cron()) as work:
        world.broken = LedgerFull()
        world.clock.advance(HOUR)  # type: ignore[attr-defined]
        await world.until(lambda: world.emitted == 1)
        await world.until(lambda: "tried again" in work.next_fires()[0].waits_for)
        assert (await world.ledger.schedule(work.next_fires()[0].id)).cursor == {"at": MONDAY}  # type: ignore[union-attr]
        world.broken = None
        world.clock.advance(30)  # type: ignore[attr-defined]
        assert await world.fired(1) == ["0 6 * * * at 2026-11-23T06:00Z"]


async def test_the_alarm_rings_by_the_real_clock_never_early_and_for_each_time(tmp_path: Path) -> None:
    clock = SystemClock()
    async with rig(tmp_path, clock) as world, clockwork(world, p=every(0.25, catch_up="all")) as work:
        due = work.next_fires()[0].next_us or 0
        await world.until(lambda: len(world.events) >= 1, 5)
        assert clock.now() >= due
        await world.until(lambda: len(world.events) >= 3, 5)
        assert [e.cursor[1]["at"] - due for e in world.events[:3] if e.cursor] == [0, 250_000, 500_000]


async def test_run_ends_at_once_when_cancelled(tmp_path: Path) -> None:
    async with rig(tmp_path, HandClock(MONDAY)) as world:
        with anyio.fail_after(1):
            async with clockwork(world, p=cron()):
                pass


def test_spans_are_written_as_people_write_them() -> None:
    assert [span_text(s) for s in (900, 5400, 1.5, 86_400, 0.25, 90061)] == [
        "15m",
        "1h30m",
        "1.5s",
        "1d",
        "0.25s",
        "1d1h1m1s",
    ]
