from __future__ import annotations

import asyncio
import itertools
import os
import random
from pathlib import Path
from typing import Any

import anyio
import pytest
from ledger_scene import NOW, event, opened, opening, running

from mlpiped.errors import IllegalMove, LedgerError
from mlpiped.ledger import moves
from mlpiped.ledger.db import Db
from mlpiped.ledger.store import BEHIND, Ledger
from mlpiped.model import CauseKind, RunOutcome

pytestmark = pytest.mark.anyio


async def test_a_write_has_returned_only_when_it_can_be_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        for n in range(1, 20):
            assert await ledger.write(opening(event())) == [n]
            assert (await ledger.latest()) is not None and (await ledger.last_event()) == n


async def test_writers_of_one_moment_share_a_commit_and_each_gets_its_own_results(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        results: dict[int, list[Any]] = {}

        async def write(n: int) -> None:
            results[n] = await ledger.write(opening(event(f"p{n}")), lambda c: n)

        before = ledger.commits
        async with anyio.create_task_group() as group:
            for n in range(200):
                group.start_soon(write, n)
        assert ledger.commits - before <= 2
        assert {n: r[1] for n, r in results.items()} == {n: n for n in range(200)}
        runs = {run.id: run.pipeline for run in await ledger.runs(limit=500)}
        assert all(runs[r[0]] == f"p{n}" for n, r in results.items())


async def test_a_caller_s_error_undoes_that_caller_only(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        outcome: dict[int, str] = {}

        async def write(n: int) -> None:
            try:
                await ledger.write(opening(event(f"p{n}")), moves.start_run(999 if n % 2 else n + 1, NOW))
                outcome[n] = "ok"
            except IllegalMove as error:
                outcome[n] = error.message

        with ledger.subscribe() as stream:
            async with anyio.create_task_group() as group:
                for n in range(4):
                    group.start_soon(write, n)
            kinds = [e.kind for e in await stream.receive()]
        assert outcome[1] == outcome[3] == "no run has the number 999"
        assert outcome[0] == "ok"
        names = [run.pipeline for run in await ledger.runs()]
        assert "p1" not in names and "p3" not in names and "p0" in names
        assert kinds == [e.kind for e in await ledger.events()]  # none of an operation that was undone


async def test_a_cancelled_caller_has_written_and_leaves_no_open_transaction(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        chance = random.Random(1)
        for _ in range(150):
            with anyio.move_on_after(chance.random() * 0.0005):
                await ledger.write(opening(event()), opening(event()))
        await ledger.write(opening(event("last")))
        runs = await ledger.runs(limit=1000)
        assert len(runs) % 2 == 1 and runs[0].pipeline == "last"
        assert not await ledger._db.call(lambda c: c.in_transaction)


CANCELS = int(os.environ.get("MLPIPED_CANCELS", "10000"))


@pytest.mark.timeout(60 + CANCELS // 50)
async def test_C8_ten_thousand_callers_cancelled_at_random_leave_no_half_and_no_open_transaction(
    tmp_path: Path,
) -> None:
    """At each await there is: before it is queued, while it is queued, on the thread, and when it has its answer."""
    chance = random.Random(8)
    async with opened(tmp_path) as ledger:
        told: dict[str, list[int]] = {}

        async def caller(name: str) -> None:
            pair = opening(event(name)), opening(event(name))
            if chance.random() < 0.1:
                ledger.post(*pair)
            else:
                told[name] = await ledger.write(*pair)
            if chance.random() < 0.1:
                await chance.choice([ledger.runs, ledger.counts, ledger.checkpoint, ledger.prove])()

        async def victim(name: str) -> bool:
            task = asyncio.create_task(caller(name))
            for _ in range(chance.choice([0, 1, 2, 3, 5, 10])):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.02)
            if chance.random() < 0.03:
                await asyncio.wait([task])  # however slow the disk is, some have their answer
            task.cancel()
            return isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)

        cancelled = 0
        for wave in itertools.count():
            cancelled += sum(await asyncio.gather(*[victim(f"v{wave}-{n}") for n in range(250)]))
            if wave % 4 == 0:
                assert not await ledger._db.call(lambda c: c.in_transaction)
                assert len(await ledger.write(opening(event("kept")))) == 1
            if cancelled >= CANCELS:
                break
        numbers: dict[str, list[int]] = {}
        for run in await ledger.runs(limit=10 * CANCELS):
            numbers.setdefault(run.pipeline, []).insert(0, run.id)
        assert len(numbers.pop("kept")) == wave // 4 + 1
        assert {len(pair) for pair in numbers.values()} == {2}, "both of a caller's operations or none"
        assert told.items() <= numbers.items()
        assert len(numbers) > len(told) > CANCELS // 100, "some were cancelled when it was done, some had their answer"
        assert await ledger.faults() == []


async def test_a_write_is_carried_out_though_its_caller_was_cancelled_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        async with anyio.create_task_group() as group:
            group.start_soon(ledger.write, opening(event("kept")))
            await asyncio.sleep(0)  # it has been queued
            group.cancel_scope.cancel()
        await ledger.write(opening(event("other")))
        assert {run.pipeline for run in await ledger.runs()} == {"kept", "other"}


async def test_a_posted_write_rides_with_the_next_commit(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        before = ledger.commits
        ledger.post(opening(event("posted")))
        await ledger.write(opening(event("written")))
        assert ledger.commits - before == 1
        assert [run.pipeline for run in await ledger.runs()] == ["written", "posted"]


async def test_a_posted_write_needs_no_other_to_be_committed(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        with ledger.subscribe() as stream, anyio.fail_after(5):
            ledger.post(opening(event("posted")))
            [row] = await stream.receive()
        assert row.facts == {"pipeline": "posted"}


async def test_a_write_that_takes_posted_ones_along_ends_their_wait(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.post(opening(event("posted")))
        assert ledger._writer._timers
        await ledger.write(opening(event("written")))
        assert not ledger._writer._timers  # one that is left would commit what is posted next before its time


async def test_what_is_posted_during_a_commit_waits_for_company_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpiped.ledger.writer.POST_DELAY", 60.0)
    async with opened(tmp_path) as ledger:
        before = ledger.commits
        async with anyio.create_task_group() as group:
            group.start_soon(ledger.write, opening(event("first")))
            while ledger._writer._under_way is None:
                await asyncio.sleep(0)
            ledger.post(opening(event("posted")))
        for _ in range(10):
            await asyncio.sleep(0)  # turns of the loop in which it could be handed over
        await ledger.write(opening(event("second")))
        assert ledger.commits - before == 2
    async with opened(tmp_path) as ledger:
        assert {run.pipeline for run in await ledger.runs()} == {"first", "posted", "second"}


async def test_closing_commits_what_was_posted_during_the_last_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpiped.ledger.writer.POST_DELAY", 60.0)
    async with opened(tmp_path) as ledger:
        async with anyio.create_task_group() as group:
            group.start_soon(ledger.write, opening(event("first")))
            while ledger._writer._under_way is None:
                await asyncio.sleep(0)
            ledger.post(opening(event("posted")))
            with anyio.fail_after(10):
                await ledger.close()
    async with opened(tmp_path) as ledger:
        assert {run.pipeline for run in await ledger.runs()} == {"first", "posted"}


async def test_a_posted_write_that_is_illegal_is_logged_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as ledger:
        ledger.post(moves.start_run(7, NOW))
        assert await ledger.write(opening(event())) == [1]
        assert "no run has the number 7" in caplog.text


async def test_closing_commits_what_was_posted(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.post(opening(event("posted")))
    async with opened(tmp_path) as ledger:
        assert [run.pipeline for run in await ledger.runs()] == ["posted"]
    with pytest.raises(LedgerError, match="closed"):
        await ledger.write(opening(event()))
    with pytest.raises(LedgerError, match="closed"):
        await ledger.runs()


async def test_event_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.write(opening(event()), opening(event()))
    async with opened(tmp_path) as ledger:
        await ledger.write(opening(event()))
        assert [e.id for e in await ledger.events()] == [1, 2, 3]
        assert [e.id for e in await ledger.events(1, 1)] == [2]


async def test_subscribers_see_committed_events_of_their_runs(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        first, second = await running(ledger, ()), await running(ledger, ())
        with ledger.subscribe(runs={second}) as stream:
            await ledger.write(moves.finish_run(first, RunOutcome.FAILED, NOW))
            await ledger.write(moves.finish_run(second, RunOutcome.SUCCEEDED, NOW))
            [row] = await stream.receive()
        assert (row.run_id, row.facts) == (second, {"outcome": "succeeded"})
        assert await ledger.events(row.id - 1) == [row]


async def test_a_subscriber_that_does_not_read_is_closed_and_blocks_nobody(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        with ledger.subscribe() as slow:
            for n in range(BEHIND + 2):
                await ledger.write(moves.set_paused("p", n % 2 == 0, "alice", NOW))
            received = [batch async for batch in slow]
        assert len(received) == BEHIND


async def test_the_thread_runs_a_function_to_its_end_whatever_becomes_of_the_caller(tmp_path: Path) -> None:
    """The contract of the private parts of aiosqlite that `Db` is built on."""
    db = await Db(tmp_path / "x.sqlite3", readonly=False).open()
    ran: list[int] = []
    db.submit(lambda c: ran.append(c.execute("SELECT 7").fetchone()[0])).cancel()
    assert await db.call(lambda c: type(c).__name__) == "Connection"
    with pytest.raises(ZeroDivisionError):
        await db.call(lambda c: 1 // 0)
    assert db._db._thread.daemon
    await db.close()
    db._db._thread.join(10)
    assert ran == [7] and not db._db._thread.is_alive()
    with pytest.raises(LedgerError, match="closed"):
        db.submit(lambda c: None)


async def test_waiting_for_another_program_s_lock_loses_no_write(tmp_path: Path, monkeypatch: Any) -> None:
    async with opened(tmp_path) as ledger:
        await ledger._db.call(lambda c: c.execute("PRAGMA busy_timeout = 20").fetchall())
        other = await Db(ledger.path, readonly=False).open()
        await other.call(lambda c: c.execute("BEGIN IMMEDIATE"))
        async with anyio.create_task_group() as group:
            group.start_soon(ledger.write, opening(event()))
            while not ledger._writer._locked:
                await anyio.sleep(0.005)
            assert await ledger.runs() == []
            await other.call(lambda c: c.execute("ROLLBACK"))
        assert len(await ledger.runs()) == 1
        await other.close()


async def test_a_lock_that_is_never_given_back_is_an_error_for_the_caller(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mlpiped.ledger.writer.LOCKED_TRIES", 2)
    async with opened(tmp_path) as ledger:
        await ledger._db.call(lambda c: c.execute("PRAGMA busy_timeout = 1").fetchall())
        other = await Db(ledger.path, readonly=False).open()
        await other.call(lambda c: c.execute("BEGIN IMMEDIATE"))
        with pytest.raises(LedgerError, match="locked"):
            await ledger.write(opening(event()))
        await other.close()
        assert await ledger.write(opening(event())) == [1]


async def test_open_is_undone_when_it_is_cancelled(tmp_path: Path) -> None:
    from mlpiped.clock import SystemClock

    opened_in_vain: list[Ledger] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        opened_in_vain.append(await Ledger.open(tmp_path, SystemClock()))
    for ledger in opened_in_vain:
        await ledger.close()
    async with opened(tmp_path) as ledger:
        assert await ledger.write(opening(event())) == [1]
        assert (await ledger.runs())[0].cause.kind is CauseKind.MANUAL
