"""What the core relies on, whatever a backend's machines are: tokens, handles, outcomes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import anyio
import pytest

from mlpiped.backends.base import Exited, NeverRan
from mlpiped.errors import BackendUnavailable

from .conftest import ALL

if TYPE_CHECKING:
    from mlpiped.backends.base import Backend

    from .conftest import Bench

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("bench", ALL, indirect=True)]


async def test_a_job_that_ends_well_exits_with_code_0(bench: Bench, backend: Backend) -> None:
    outcome = await backend.wait(await backend.submit(bench.script(backend)))
    assert isinstance(outcome, Exited)
    assert (outcome.code, outcome.signal, outcome.error) == (0, None, None)
    assert not outcome.timed_out and not outcome.cancelled


async def test_the_exit_code_of_a_failure_is_told(bench: Bench, backend: Backend) -> None:
    outcome = await backend.wait(await backend.submit(bench.script(backend, exit_code=3)))
    assert isinstance(outcome, Exited) and outcome.code == 3


async def test_a_job_over_its_time_is_ended_and_says_so(bench: Bench, backend: Backend) -> None:
    outcome = await backend.wait(await backend.submit(bench.script(backend, run_for=300, timeout=0.2)))
    assert isinstance(outcome, Exited)
    assert outcome.timed_out and not outcome.cancelled and outcome.code != 0


async def test_a_cancelled_job_ends_and_says_so(bench: Bench, backend: Backend) -> None:
    handle = await backend.submit(bench.script(backend, run_for=300))
    await backend.cancel(handle)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited)
    assert outcome.cancelled and not outcome.timed_out and outcome.code != 0


async def test_cancelling_a_job_that_has_ended_changes_nothing(bench: Bench, backend: Backend) -> None:
    handle = await backend.submit(bench.script(backend))
    before = await backend.wait(handle)
    await backend.cancel(handle)
    assert await backend.wait(handle) == before


async def test_an_outcome_can_be_waited_for_by_many_and_again(bench: Bench, backend: Backend) -> None:
    handle = await backend.submit(bench.script(backend, run_for=0.1, exit_code=4))
    outcomes = []

    async def wait() -> None:
        outcomes.append(await backend.wait(handle))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(wait)
    outcomes.append(await backend.wait(handle))
    assert {outcome.code for outcome in outcomes} == {4}


async def test_a_wait_that_is_cancelled_leaves_the_job_alone(bench: Bench, backend: Backend) -> None:
    handle = await backend.submit(bench.script(backend, run_for=0.5))
    with anyio.move_on_after(0.05) as scope:
        await backend.wait(handle)
    assert scope.cancelled_caught
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0


async def test_a_token_submitted_twice_gives_one_job(bench: Bench, backend: Backend) -> None:
    job = bench.script(backend, run_for=0.2)
    handles = []

    async def submit() -> None:
        handles.append(await backend.submit(job))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(submit)
    await backend.wait(handles[0])
    handles.append(await backend.submit(job))
    assert all(handle == handles[0] for handle in handles)


async def test_a_handle_is_plain_json_with_a_version_and_serves_the_next_daemon(bench: Bench, backend: Backend) -> None:
    handle = await backend.submit(bench.script(backend, run_for=0.2, exit_code=5))
    stored = json.loads(json.dumps(handle))
    assert stored == handle and stored["v"] == 1
    outcome = await (await bench.another()).wait(stored)
    assert isinstance(outcome, Exited) and outcome.code == 5


async def test_the_next_daemon_can_cancel(bench: Bench, backend: Backend) -> None:
    handle = await backend.submit(bench.script(backend, run_for=300))
    later = await bench.another()
    await later.cancel(handle)
    outcome = await later.wait(handle)
    assert isinstance(outcome, Exited) and outcome.cancelled


async def test_find_gives_the_jobs_that_began_and_no_others(bench: Bench, backend: Backend) -> None:
    ended = await backend.submit(bench.script(backend, token="ended"))
    await backend.wait(ended)
    runs = await backend.submit(bench.script(backend, token="runs", run_for=300))
    await backend.fence("fenced")
    found = await (await bench.another()).find(["ended", "runs", "fenced", "unknown"])
    assert found == {"ended": ended, "runs": runs}
    await backend.cancel(runs)
    await backend.wait(runs)


async def test_A2_a_fence_before_the_start_holds_for_ever(bench: Bench, backend: Backend) -> None:
    job = bench.script(backend)
    assert isinstance(await backend.fence(job.token), NeverRan)
    with pytest.raises(BackendUnavailable):
        await backend.submit(job)
    assert await backend.find([job.token]) == {}
    assert isinstance(await (await bench.another()).fence(job.token), NeverRan)


async def test_A3_a_fence_after_the_start_gives_the_handle(bench: Bench, backend: Backend) -> None:
    handle = await backend.submit(bench.script(backend, exit_code=6))
    adopted = await (await bench.another()).fence(handle["token"])
    assert adopted == handle
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 6


async def test_fence_and_submit_at_once_have_one_winner(bench: Bench, backend: Backend) -> None:
    for _ in range(20):
        job = bench.script(backend)
        seen: dict[str, object] = {}

        async def submit(job: object = job, seen: dict[str, object] = seen) -> None:
            try:
                seen["submit"] = await backend.submit(job)  # type: ignore[arg-type]
            except BackendUnavailable:
                seen["submit"] = None

        async with anyio.create_task_group() as group:
            group.start_soon(submit)
            seen["fence"] = await backend.fence(job.token)
        if isinstance(seen["fence"], NeverRan):
            assert seen["submit"] is None
        else:
            assert seen["fence"] == seen["submit"]
            await backend.wait(seen["fence"])  # type: ignore[arg-type]


async def test_many_jobs_at_once_each_have_their_own_outcome(bench: Bench, backend: Backend) -> None:
    codes: dict[int, int | None] = {}

    async def one(number: int) -> None:
        outcome = await backend.wait(await backend.submit(bench.script(backend, exit_code=number)))
        assert isinstance(outcome, Exited)
        codes[number] = outcome.code

    async with anyio.create_task_group() as group:
        for number in range(bench.crowd):
            group.start_soon(one, number)
    assert codes == {number: number for number in range(bench.crowd)}


async def test_what_is_well_says_nothing_of_its_health(bench: Bench, backend: Backend) -> None:
    assert await backend.health() is None
    assert backend.capacity().slots == 2
