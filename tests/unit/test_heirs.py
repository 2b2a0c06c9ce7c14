"""An attempt outlives the cancelling of its step when another run needs what it makes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import pytest
from test_run import Lab, lab

from mlpiped.backends.base import Exited
from mlpiped.backends.fake import FakeBackend
from mlpiped.inquiry import why_waiting
from mlpiped.model import AttemptEnd, RunOutcome, StepOutcome, StepState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mlpiped.backends.base import Handle, Job
    from mlpiped.dispatch import Dispatch
    from mlpiped.run import Execution

__all__ = ["lab"]

pytestmark = pytest.mark.anyio


async def seen(look: Callable[[], Any]) -> None:
    with anyio.fail_after(20):
        while not look():
            await anyio.sleep(0.001)


def places(execution: Execution) -> Dispatch:
    return cast("Dispatch", execution.dispatcher)


@asynccontextmanager
async def sharing(lab: Lab, many: int = 2, **step: Any) -> AsyncIterator[tuple[list[Execution], dict[int, RunOutcome]]]:
    """Runs of one step: the first one's attempt runs, and the others follow it, in their order."""
    lab.backend.run_for = 3600
    runs = [await lab.open({"name": "a", **step}) for _ in range(many)]
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
        end(lab)
    assert told[second.id] is RunOutcome.SUCCEEDED
    assert (await lab.ends(first), await lab.ends(second)) == ([], [AttemptEnd.COMMITTED])
    assert place.holders == {} and place.used_slots == 0


async def test_those_who_follow_are_next_when_the_heir_is_cancelled_too_and_the_last_one_ends_the_attempt(
    lab: Lab,
) -> None:
    async with sharing(lab, 3) as ((first, second, third), told):
        for execution, heir in ((first, second), (second, third)):
            await execution.cancel()
            await seen(lambda e=execution: e.id in told)
            await seen(lambda e=heir: e.tries[0].state is StepState.RUNNING)
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
