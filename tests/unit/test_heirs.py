"""An attempt outlives the cancelling of its step when another run needs what it makes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import pytest
from test_run import MAKES, Lab, lab

from mlpiped.backends.base import Capacity, Card, Exited
from mlpiped.backends.fake import FakeBackend
from mlpiped.inquiry import why_waiting
from mlpiped.model import AttemptEnd, RunOutcome, StepOutcome, StepState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from mlpiped.backends.base import Handle, Job
    from mlpiped.execution.run import Execution
    from mlpiped.scheduling.dispatch import Dispatch

__all__ = ["lab"]

pytestmark = pytest.mark.anyio


async def seen(look: Callable[[], Any]) -> None:
    with anyio.fail_after(20):
        while not look():
            await anyio.sleep(0.001)


def places(execution: Execution) -> Dispatch:
    return cast("Dispatch", execution.dispatcher)


@asynccontextmanager
async def sharing(
    lab: Lab, many: int = 2, others: dict[str, Any] | None = None, **step: Any
) -> AsyncIterator[tuple[list[Execution], dict[int, RunOutcome]]]:
    """Runs of one step: the first one's attempt runs, and the others follow it, in their order. `others`: what of the
    step is not as the first one's in them."""
    lab.backend.run_for = 3600
    runs = [await lab.open({"name": "a", **step, **((others or {}) if n else {})}) for n in range(many)]
    told: dict[int, RunOutcome] = {}

    async def go(execution: Execution) -> None:
        told[execution.id] = await execution.run()

    async with anyio.create_task_group() as tasks:
        for execution in runs:
            execution.dispatcher = runs[0].dispatcher
            places(execution).executions[execution.id] = execution
            tasks.start_soon(go, execution)
            if execution is runs[0]:
                await seen(lambda: lab.backend.world)
            else:
                await seen(lambda e=execution: (places(e).why_waiting(e.id, 0) or "").startswith("shares"))
        yield runs, told


def end(lab: Lab, code: int = 0) -> None:
    [entry] = lab.backend.world.values()
    assert entry is not None and entry[1] == Exited(0), "it runs"
    entry[:2] = 0.0, Exited(code)
    entry[2].set()


@pytest.mark.parametrize("step", [None, 0])
async def test_an_attempt_of_a_cancelled_step_goes_on_for_the_run_that_shares_it(lab: Lab, step: int | None) -> None:
    async with sharing(lab) as ((first, second), told):
        await seen(lambda: first.tries[0].state is StepState.RUNNING)
        await first.cancel(step)
        await seen(lambda: first.id in told)
        [left] = await lab.ledger.steps(first.id)
        assert (told[first.id], left.outcome) == (RunOutcome.CANCELLED, StepOutcome.CANCELLED)
        assert left.why == f"cancelled; its attempt goes on for run {second.id}/a"
        await seen(lambda: second.tries[0].state is StepState.RUNNING)
        scheduler = type("Scheduler", (), {"executions": places(first).executions, "clock": lab.clock})
        why = f"; goes on with the attempt of run {first.id}/a, which was cancelled"
        assert (why_waiting(cast(Any, scheduler), second.id, "a") or "").endswith(why)
        place = places(first).places["fake"]
        assert list(place.holders) == [(second.id, 0)] and place.used_slots == 1
        assert list(lab.world.begun) == list(lab.backend.world)
        end(lab)
    assert told[second.id] is RunOutcome.SUCCEEDED
    assert (await lab.ends(first), await lab.ends(second)) == ([], [AttemptEnd.COMMITTED])
    assert place.holders == {} and place.used_slots == 0
    assert lab.world.begun == {}


async def test_those_who_follow_are_next_when_the_heir_is_cancelled_too_and_the_last_one_ends_the_attempt(
    lab: Lab,
) -> None:
    async with sharing(lab, 3) as ((first, second, third), told):
        for execution, heir in ((first, second), (second, third)):
            await execution.cancel()
            await seen(lambda e=execution: e.id in told)
            await seen(lambda e=heir: e.tries[0].state is StepState.RUNNING)
            if heir is second:
                why = f"shares the attempt of run {second.id}/a, which has the same key"
                assert places(third).why_waiting(third.id, 0) == why
        assert places(third).places["fake"].used_slots == 1
        await third.cancel()
    assert set(told.values()) == {RunOutcome.CANCELLED}
    assert [await lab.ends(each) for each in (first, second, third)] == [[], [], [AttemptEnd.CANCELLED]]


async def test_an_heir_s_failure_is_its_own_and_it_tries_again(lab: Lab) -> None:
    async with sharing(lab, retry={"attempts": 2, "delay": 0}) as ((first, second), told):
        await first.cancel()
        await seen(lambda: first.id in told)
        lab.backend.run_for = 0
        end(lab, code=3)
    assert told[second.id] is RunOutcome.SUCCEEDED
    assert await lab.ends(second) == [AttemptEnd.FAILED, AttemptEnd.COMMITTED]


class Slow(FakeBackend):
    """A submit that lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.go = anyio.Event()

    async def submit(self, job: Job) -> Handle:
        handle = await super().submit(job)
        await self.go.wait()
        return handle


async def test_an_attempt_that_is_cancelled_while_it_is_submitted_is_handed_over_when_it_is_there(lab: Lab) -> None:
    lab.backend = slow = Slow()
    async with sharing(lab) as ((first, second), told):
        await first.cancel()
        assert first.id not in told
        slow.go.set()
        await seen(lambda: first.id in told)
        end(lab)
    assert (told[first.id], told[second.id]) == (RunOutcome.CANCELLED, RunOutcome.SUCCEEDED)
    assert await lab.ends(second) == [AttemptEnd.COMMITTED]


async def test_who_is_cancelled_while_the_attempt_is_handed_over_to_it_ends_the_attempt(lab: Lab) -> None:
    write = lab.ledger.write
    async with sharing(lab) as ((first, second), told):

        async def write_when_the_heir_is_cancelled(*ops: Any, **facts: Any) -> list[Any]:
            if any("hand_over" in op.__qualname__ for op in ops):
                await second.cancel()
                await first.cancel()  # again: it must not end what is another's
            return await write(*ops, **facts)

        cast(Any, lab.ledger).write = write_when_the_heir_is_cancelled
        await first.cancel()
    assert set(told.values()) == {RunOutcome.CANCELLED}
    assert (await lab.ends(first), await lab.ends(second)) == ([], [AttemptEnd.CANCELLED])
    assert places(first).places["fake"].used_slots == 0


async def test_a_daemon_that_dies_after_the_handing_over_leaves_the_attempt_to_the_heir(lab: Lab) -> None:
    async with anyio.create_task_group() as daemon:
        async with sharing(lab) as ((first, second), told):
            await first.cancel()
            await seen(lambda: first.id in told)
            daemon.cancel_scope.cancel()
            await anyio.lowlevel.checkpoint()
    later = await lab.execution(second.id)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(later.run)
        await seen(lambda: 0 in later.tries and later.tries[0].state is StepState.RUNNING)
        end(lab)
    assert [row.outcome for row in await lab.ledger.steps(second.id)] == [StepOutcome.SUCCEEDED]
    assert await lab.ends(second) == [AttemptEnd.COMMITTED]
    assert len(lab.backend.world) == 1


class Away(FakeBackend):
    """It does not answer while it is `away`."""

    away = False

    async def _call(self) -> None:
        self.unavailable_for = int(self.away)
        await super()._call()


async def test_an_attempt_is_handed_over_at_once_although_its_backend_is_away(lab: Lab) -> None:
    lab.backend = away = Away()
    async with sharing(lab) as ((first, second), told):
        await seen(lambda: first.tries[0].state is StepState.RUNNING)
        away.away = True
        attempt = first.tries[0].attempt
        assert attempt is not None and attempt._question is not None
        attempt._question.cancel()  # it is asked anew
        await seen(lambda: attempt.held)
        await first.cancel()
        await seen(lambda: first.id in told)
        await seen(lambda: second.tries[0].attempt is not None and second.tries[0].attempt.held)
        away.away = False
        end(lab)
    assert (told[first.id], told[second.id]) == (RunOutcome.CANCELLED, RunOutcome.SUCCEEDED)
    assert await lab.ends(second) == [AttemptEnd.COMMITTED]


class Slowly(FakeBackend):
    """Outputs come home when it says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.begun, self.home = folder, 0, anyio.Event()

    async def fetch(self, handle: Handle, into: Path) -> Path:
        self.begun += 1
        await self.home.wait()
        made = self.folder / "job" / "out" / "model"
        made.mkdir(parents=True)
        (made / "model.bin").write_text("made")
        return self.folder / "job"


async def test_what_comes_home_for_a_cancelled_step_is_brought_for_the_run_that_shares_it(lab: Lab) -> None:
    lab.backend = slowly = Slowly(lab.folder)
    async with sharing(lab, **MAKES) as ((first, second), told):
        end(lab)
        await seen(lambda: slowly.begun == 1)
        await first.cancel()
        await seen(lambda: first.id in told)
        await seen(lambda: slowly.begun == 2)
        slowly.home.set()
    assert (told[first.id], told[second.id]) == (RunOutcome.CANCELLED, RunOutcome.SUCCEEDED)
    assert (await lab.ends(first), await lab.ends(second)) == ([], [AttemptEnd.COMMITTED])
    assert len(lab.backend.world) == 1
    assert places(first).places["fake"].used_slots == 0


class Cards(FakeBackend):
    def capacity(self) -> Capacity:
        return Capacity(2, cards=(Card("GPU-0", 0, "H100", 80 << 30),))


async def test_the_cards_of_an_attempt_are_leased_to_the_heir(lab: Lab) -> None:
    lab.backend = Cards()
    async with sharing(lab, resources={"gpus": 1}) as ((first, second), told):
        await seen(lambda: first.tries[0].state is StepState.RUNNING)
        await first.cancel()
        await seen(lambda: first.id in told)
        assert places(first).places["fake"].leased == {"GPU-0": {(second.id, 0): None}}
        attempt = second.tries[0].attempt
        assert attempt is not None and attempt.cards == ("GPU-0",)
        end(lab)
    assert not places(first).places["fake"].leased
    [row] = await lab.ledger.attempts(second.id, 0)
    assert row.cards == ("GPU-0",)


@pytest.mark.parametrize("others", [{"timeout": 7200.0}, {"resources": {"memory": 1 << 30}}, {"grace": 1.0}])
async def test_who_wants_other_limits_runs_the_step_itself_when_the_attempt_that_it_shared_is_cancelled(
    lab: Lab, others: dict[str, Any]
) -> None:
    async with sharing(lab, others=others) as ((first, second), told):
        await first.cancel()
        await seen(lambda: first.id in told)
        await seen(lambda: second.tries[0].state is StepState.RUNNING)
        [old, new] = lab.backend.world.values()
        assert old is not None and new is not None
        new[:2] = 0.0, Exited(0)
        new[2].set()
    assert (await lab.ends(first), await lab.ends(second)) == ([AttemptEnd.CANCELLED], [AttemptEnd.COMMITTED])
    assert told[second.id] is RunOutcome.SUCCEEDED


async def test_an_attempt_whose_backend_has_heard_of_a_cancel_is_nobody_else_s_any_more(lab: Lab) -> None:
    class Stubborn(FakeBackend):
        """Its jobs take no notice."""

        heard = 0

        async def cancel(self, handle: Handle) -> None:
            self.heard += 1

    lab.backend = stubborn = Stubborn()
    async with sharing(lab, 1) as ((first,), told):
        await first.cancel(0)
        await seen(lambda: stubborn.heard == 1)
        second = await lab.open({"name": "a"})
        second.dispatcher = first.dispatcher
        places(first).executions[second.id] = second
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(second.run)
            await seen(lambda: (places(first).why_waiting(second.id, 0) or "").startswith("shares"))
            await first.cancel(0)
            await seen(lambda: stubborn.heard == 2)
            end(lab, code=1)
            await seen(lambda: first.id in told)
            await seen(lambda: len(stubborn.world) == 2)
            for entry in stubborn.world.values():
                assert entry is not None
                entry[:2] = 0.0, Exited(0)
                entry[2].set()
    assert (await lab.ends(first), await lab.ends(second)) == ([AttemptEnd.CANCELLED], [AttemptEnd.COMMITTED])


async def test_an_heir_whose_attempt_was_ended_by_an_earlier_cancel_runs_the_step_again_and_pays_no_retry(
    lab: Lab,
) -> None:
    async with sharing(lab) as ((first, second), told):
        await first.cancel()
        await seen(lambda: first.id in told)
        lab.backend.run_for = 0
        [entry] = lab.backend.world.values()
        assert entry is not None
        entry[:2] = 0.0, Exited(None, signal=15, cancelled=True)  # a kill that was on its way
        entry[2].set()
    assert told[second.id] is RunOutcome.SUCCEEDED
    assert await lab.ends(second) == [AttemptEnd.CANCELLED, AttemptEnd.COMMITTED]


async def test_a_run_that_is_cancelled_too_inherits_nothing(lab: Lab) -> None:
    async with sharing(lab, 3) as ((first, second, third), told):
        second.cancelled = True  # it is being written down
        await first.cancel()
        await seen(lambda: first.id in told)
        [left] = await lab.ledger.steps(first.id)
        assert left.why == f"cancelled; its attempt goes on for run {third.id}/a"
        second.cancelled = False
        await second.cancel()
        end(lab)
    assert await lab.ends(third) == [AttemptEnd.COMMITTED]


async def test_the_heir_s_owner_pays_for_the_place_from_then_on(lab: Lab) -> None:
    async with sharing(lab) as ((first, second), told):
        second.row = replace(second.row, owner="b")
        await first.cancel()
        await seen(lambda: first.id in told)
        [need] = places(first).places["fake"].holders.values()
        assert (need.owner, need.spot) == ("b", (second.id, 0))
        end(lab)
    assert told[second.id] is RunOutcome.SUCCEEDED
