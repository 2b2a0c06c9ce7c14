"""Like steps that are submitted together: one array, and each element an attempt of its own (J2, J6 to J8)."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from harness import lines
from lab import slurm_rig
from slurm_backends import BOTH, WAIT, Desk, accounted, cluster, desk, plain
from slurm_submitter import Watched, effect

from mlpiped.backends.base import Exited, NeverRan
from mlpiped.backends.slurm import submission
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.backends.base import Handle, Job, Outcome
    from mlpiped.backends.slurm import SlurmBackend

__all__ = ["accounted", "cluster", "desk", "plain"]
pytestmark = [pytest.mark.anyio, pytest.mark.lab, pytest.mark.timeout(200)]
MANY = 20


class Counted(Watched):
    """Counts the commands, and may lose the answer of one."""

    def __init__(self, environ: dict[str, str]) -> None:
        super().__init__(environ)
        self.said: list[str] = []
        self.arrays: list[int] = []  # elements of each
        self.lose: str | None = None

    async def before(self, words: Sequence[str]) -> None:
        self.said += [name for name in ("sbatch", "release", "scancel") if name in words]
        self.arrays += [int(word.partition("=0-")[2]) + 1 for word in words if word.startswith("--array=")]

    async def after(self, words: Sequence[str]) -> None:
        if self.lose is not None and self.lose in words:
            raise TimeoutError


async def counted(desk: Desk, **settings: Any) -> tuple[SlurmBackend, Counted]:
    runner = Counted(desk.cluster.env)
    return await desk.backend(runner=runner, **settings), runner


async def together(backend: SlurmBackend, jobs: Sequence[Job]) -> list[Handle | Exception]:
    """Submitted at the same time."""
    found: dict[str, Handle | Exception] = {}

    async def submit(job: Job) -> None:
        try:
            found[job.token] = await backend.submit(job)
        except (BackendUnavailable, InvalidJob) as fault:
            found[job.token] = fault

    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(submit, job)
    return [found[job.token] for job in jobs]


async def submitted(backend: SlurmBackend, jobs: Sequence[Job]) -> list[Handle]:
    found = await together(backend, jobs)
    faults = [one for one in found if isinstance(one, Exception)]
    assert not faults, faults
    return [one for one in found if not isinstance(one, Exception)]


async def ends(backend: SlurmBackend, handles: Sequence[Handle]) -> list[Outcome]:
    found: dict[str, Outcome] = {}

    async def wait(handle: Handle) -> None:
        found[handle["token"]] = await backend.wait(handle)

    async with anyio.create_task_group() as group:
        for handle in handles:
            group.start_soon(wait, handle)
    return [found[handle["token"]] for handle in handles]


def good(outcomes: Sequence[object]) -> bool:
    return all(isinstance(one, Exited) and one.code == 0 for one in outcomes)


def elements(desk: Desk, array: str) -> dict[str, str]:
    """Index -> state of what the queue shows of it."""
    said = desk.cluster.command("squeue", "-h", "-r", "-t", "all", "-n", f"mlpa-{array}", "-o", "%K|%T")
    return dict(line.split("|") for line in said.splitlines())


def waiting(desk: Desk) -> list[str]:
    return desk.cluster.command("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i").split()


async def test_like_steps_that_come_together_are_one_array_and_run_once_each(desk: Desk) -> None:
    backend, runner = await counted(desk)
    jobs = [desk.effect() for _ in range(MANY)]
    handles = await submitted(backend, jobs)
    assert runner.said == ["sbatch", "release"] and runner.arrays == [MANY]
    assert len({handle["array"] for handle in handles}) == 1
    assert good(await ends(backend, handles))
    assert sorted(lines(desk.effects)) == sorted(job.token for job in jobs)


async def test_unlike_steps_are_jobs_of_their_own_and_a_lone_one_is_no_array(desk: Desk) -> None:
    backend, runner = await counted(desk)
    jobs = [desk.job("true", memory=(number + 1) << 24) for number in range(4)]
    handles = await submitted(backend, jobs)
    assert runner.arrays == [] and runner.said.count("sbatch") == 4
    assert all(isinstance(handle["job"], int) for handle in handles)
    assert good(await ends(backend, handles))


async def test_unlike_steps_that_come_together_are_released_together_however_many_came_just_before(desk: Desk) -> None:
    backend, runner = await counted(desk)
    for _ in range(4):
        runner.said.clear()
        await submitted(backend, [desk.job("true", memory=(n + 1) << 20) for n in range(3 * MANY)])
        assert runner.said.count("sbatch") == 3 * MANY and runner.said.count("release") < MANY


async def test_what_comes_while_an_sbatch_is_under_way_goes_with_the_next(desk: Desk) -> None:
    backend, runner = await counted(desk)
    desk.cluster.kill("slurmctld", signal.SIGSTOP)
    async with anyio.create_task_group() as group:
        try:
            group.start_soon(submitted, backend, [desk.effect()])
            await desk.until(lambda: runner.said == ["sbatch"], "the first is under way")
            group.start_soon(submitted, backend, [desk.effect() for _ in range(5)])
            await desk.until(lambda: len(backend._counter) == 6, "the others are ready")
        finally:
            desk.cluster.kill("slurmctld", signal.SIGCONT)
    assert runner.arrays == [5]


async def test_elements_end_each_in_its_own_way_and_one_is_tried_again_alone(desk: Desk) -> None:
    backend, runner = await counted(desk)
    jobs = [desk.job(f"echo {n} >&2; exit {n}") for n in range(4)]
    handles = await submitted(backend, jobs)
    outcomes = await ends(backend, handles)
    assert [one.code for one in outcomes if isinstance(one, Exited)] == [0, 1, 2, 3]
    assert [(desk.folder(handle) / "stderr").read_text() for handle in handles] == ["0\n", "1\n", "2\n", "3\n"]
    again = await backend.submit(desk.job("exit 0"))
    assert isinstance(again["job"], int) and good([await backend.wait(again)])
    assert runner.arrays == [4]


async def test_slurms_reason_is_told_of_each_element_that_waits(desk: Desk) -> None:
    backend = await desk.backend(options=("--nodelist=n1",))
    desk.cluster.command("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    handles = await submitted(backend, [desk.effect() for _ in range(3)])
    async with anyio.create_task_group() as group:
        group.start_soon(ends, backend, handles)
        try:
            await desk.until(
                lambda: all("Node" in (backend.waiting(handle["token"]) or "") for handle in handles), "the reason"
            )
        finally:
            await anyio.to_thread.run_sync(desk.cluster.ready)
    assert len(lines(desk.effects)) == 3


# --- cancelled ------------------------------------------------------------------------------------------------------
@BOTH
async def test_cancel_of_an_element_that_waits_leaves_the_others_alone(desk: Desk) -> None:
    backend = await desk.backend(options=("--nodelist=n1",))
    desk.cluster.command("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    try:
        handles = await submitted(backend, [desk.effect() for _ in range(6)])
        for handle in handles[2:4]:
            await backend.cancel(handle)
        outcomes = await ends(backend, handles[2:4])
        assert all(isinstance(one, Exited) and one.cancelled for one in outcomes), outcomes
        left = elements(desk, handles[0]["array"])
        rest = [*handles[:2], *handles[4:]]
        indices = {str(handle["job"]).partition("_")[2] for handle in rest}
        assert {index for index, state in left.items() if state == "PENDING"} == indices
    finally:
        await anyio.to_thread.run_sync(desk.cluster.ready)
    assert good(await ends(backend, rest))
    assert sorted(lines(desk.effects)) == sorted(handle["token"] for handle in rest)


async def test_cancel_of_an_element_that_runs_ends_it_alone(desk: Desk) -> None:
    backend = await desk.backend()
    handles = await submitted(backend, [desk.job(WAIT) for _ in range(3)])
    for handle in handles:
        await desk.started(handle)
    await backend.cancel(handles[1])
    outcome = await backend.wait(handles[1])
    assert isinstance(outcome, Exited) and outcome.cancelled
    desk.go(handles[0])
    desk.go(handles[2])
    assert good(await ends(backend, [handles[0], handles[2]]))


async def test_many_cancels_at_once_are_few_commands(desk: Desk) -> None:
    backend, runner = await counted(desk, options=("--nodelist=n1",))
    desk.cluster.command("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    try:
        handles = await submitted(backend, [desk.effect() for _ in range(MANY)])
        async with anyio.create_task_group() as group:
            for handle in handles:
                group.start_soon(backend.cancel, handle)
        outcomes = await ends(backend, handles)
    finally:
        await anyio.to_thread.run_sync(desk.cluster.ready)
    assert all(isinstance(one, Exited) and one.cancelled for one in outcomes), outcomes
    assert runner.said.count("scancel") <= MANY // 2 and lines(desk.effects) == []


@BOTH
async def test_J8_an_administrators_scancel_of_an_element_that_waits_is_told(desk: Desk) -> None:
    backend = await desk.backend(options=("--nodelist=n1",))
    desk.cluster.command("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    try:
        handles = await submitted(backend, [desk.effect() for _ in range(4)])
        found: list[Outcome] = []

        async def wait(handle: Handle) -> None:
            found.append(await backend.wait(handle))

        async with anyio.create_task_group() as group:
            for handle in handles:
                group.start_soon(wait, handle)
            await desk.until(
                lambda: all("Node" in (backend.waiting(handle["token"]) or "") for handle in handles), "they wait"
            )
            desk.cluster.command("scancel", str(handles[1]["job"]))
            await desk.until(lambda: len(found) == 1, "the one is told of")
            desk.cluster.command("scancel", str(handles[0]["job"]).partition("_")[0])
    finally:
        await anyio.to_thread.run_sync(desk.cluster.ready)
    says = "cancelled in Slurm, not by mlpiped, before it started"
    assert [one.error for one in found if isinstance(one, Exited)] == [says] * 4, found
    assert lines(desk.effects) == []


# --- J2: what was said, and what is so ------------------------------------------------------------------------------
@pytest.mark.parametrize("recovery", ["fence", "find"])
async def test_J2_an_array_that_sbatch_did_not_speak_of_is_adopted_element_by_element(
    desk: Desk, recovery: str
) -> None:
    backend, runner = await counted(desk)
    runner.lose = "sbatch"
    jobs = [desk.effect() for _ in range(6)]
    assert all(isinstance(one, BackendUnavailable) for one in await together(backend, jobs))
    assert runner.arrays == [6]
    late = await desk.backend()
    if recovery == "find":
        found = await late.find([job.token for job in jobs])
        handles = [found[job.token] for job in jobs]
    else:
        fenced = [await late.fence(job.token) for job in jobs]
        handles = [one for one in fenced if not isinstance(one, NeverRan)]
    assert len(handles) == 6 and good(await ends(late, handles))
    assert sorted(lines(desk.effects)) == sorted(job.token for job in jobs)


async def test_J2_elements_that_were_fenced_are_taken_out_one_by_one_and_the_others_run(desk: Desk) -> None:
    backend, runner = await counted(desk)
    await backend._queue.fresh()
    jobs = [desk.effect() for _ in range(6)]
    desk.cluster.kill("slurmctld", signal.SIGSTOP)
    async with anyio.create_task_group() as group:
        found: list[Handle | Exception] = []

        async def submit() -> None:
            found.extend(await together(backend, jobs))

        group.start_soon(submit)
        try:
            await desk.until(lambda: runner.arrays == [6], "it is under way")
            for job in jobs[1:3]:  # as a daemon does that asks the folder alone
                await backend._files.fence(job.token)
        finally:
            desk.cluster.kill("slurmctld", signal.SIGCONT)
    assert [isinstance(one, BackendUnavailable) for one in found] == [False, True, True, False, False, False]
    handles = [one for one in found if not isinstance(one, Exception)]
    assert good(await ends(backend, handles))
    assert sorted(lines(desk.effects)) == sorted(handle["token"] for handle in handles)
    assert "PENDING" not in elements(desk, handles[0]["array"]).values()


async def test_J2_a_late_array_of_fenced_tokens_is_taken_out_of_the_queue(desk: Desk) -> None:
    backend, runner = await counted(desk)
    runner.lose = "sbatch"
    jobs = [desk.effect() for _ in range(4)]
    await together(backend, jobs)
    for job in jobs[:3]:
        await backend._files.fence(job.token)
    runner.lose = None
    kept = await backend.fence(jobs[3].token)
    assert not isinstance(kept, NeverRan)
    array = kept["array"]
    assert good([await backend.wait(kept)])
    awake = await backend.submit(desk.job(WAIT))  # somebody waits, so the queue is looked at
    async with anyio.create_task_group() as group:
        group.start_soon(backend.wait, awake)
        await desk.until(lambda: "PENDING" not in elements(desk, array).values(), "they are taken out")
        desk.go(awake)
    assert lines(desk.effects) == [jobs[3].token]


async def test_J2_two_arrays_of_the_same_tokens_are_one_execution_each(desk: Desk) -> None:
    backend, runner = await counted(desk)
    runner.lose = "sbatch"
    jobs = [desk.effect() for _ in range(4)]
    await together(backend, jobs)
    runner.lose = None
    handles = await submitted(backend, jobs)
    assert runner.arrays == [4, 4] and good(await ends(backend, handles))
    awake = await backend.submit(desk.job(WAIT))
    async with anyio.create_task_group() as group:
        group.start_soon(backend.wait, awake)
        await desk.until(lambda: not waiting(desk), "the first is taken out")
        desk.go(awake)
    assert sorted(lines(desk.effects)) == sorted(job.token for job in jobs)


@pytest.mark.parametrize(
    ("when", "what", "handle_is_durable"),
    [("before", "sbatch", False), ("after", "sbatch", True), ("before", "release", True), ("after", "release", True)],
)
async def test_J2_a_daemon_killed_while_it_submits_an_array_starts_each_step_once(
    desk: Desk, when: str, what: str, handle_is_durable: bool
) -> None:
    tokens = [f"t-{secrets.token_hex(6)}" for _ in range(5)]
    command = [sys.executable, str(slurm_rig.__file__).replace("slurm_rig", "slurm_submitter")]
    command += [str(desk.place), ",".join(tokens), str(desk.effects), when, what]
    killed = await anyio.run_process(command, env=desk.cluster.env, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if what == "sbatch":
        assert lines(desk.effects) == []
    if (when, what) == ("before", "sbatch"):  # it had started, and was not told what to submit
        assert waiting(desk) == []
    backend = await desk.backend()
    found = await backend.find(tokens)
    assert len(found) == (5 if handle_is_durable else 0)
    if not found:
        fenced = [await backend.fence(token) for token in tokens]
        assert all(isinstance(one, NeverRan) for one in fenced)
        tokens = [f"t-{secrets.token_hex(6)}" for _ in range(5)]
        again = [effect(token, str(desk.effects)) for token in tokens]
        found = {handle["token"]: handle for handle in await submitted(backend, again)}
    assert all("array" in handle for handle in found.values())
    assert good(await ends(backend, list(found.values())))
    assert sorted(lines(desk.effects)) == sorted(tokens)


async def test_J2_an_array_of_which_half_is_recorded_is_taken_on_whole_by_the_next_daemon(desk: Desk) -> None:
    backend, runner = await counted(desk)
    runner.lose = "sbatch"
    jobs = [desk.effect() for _ in range(6)]
    await together(backend, jobs)
    number = int(waiting(desk)[0].partition("_")[0])
    array = desk.cluster.command("squeue", "-h", "-j", str(number), "-o", "%j").split()[0].removeprefix("mlpa-")
    half = {
        job.token: submission.submitted(f"{number}_{index}", 3.0, array) for index, job in enumerate(jobs) if index % 2
    }
    assert await backend._files.settle(half) == half
    late = await desk.backend()
    found = await late.find([job.token for job in jobs])
    assert [found[job.token]["job"] for job in jobs] == [f"{number}_{index}" for index in range(6)]
    assert good(await ends(late, list(found.values())))
    assert sorted(lines(desk.effects)) == sorted(job.token for job in jobs)


@pytest.mark.parametrize("recovery", ["fence", "find"])
async def test_J2_an_element_whose_order_was_not_written_never_runs_and_is_taken_out(desk: Desk, recovery: str) -> None:
    """The daemon was killed when sbatch had heard the script, and not all orders were there."""
    backend, runner = await counted(desk)
    runner.lose = "sbatch"
    jobs = [desk.effect() for _ in range(4)]
    await together(backend, jobs)
    for job in jobs[2:]:
        (desk.place / "slurm" / "orders" / job.token).unlink()
    late = await desk.backend()
    if recovery == "find":
        assert set(await late.find([job.token for job in jobs])) == {job.token for job in jobs[:2]}
    found = [await late.fence(job.token) for job in jobs]
    assert [isinstance(one, NeverRan) for one in found] == [False, False, True, True]
    handles = [one for one in found if not isinstance(one, NeverRan)]
    assert good(await ends(late, handles))
    await late._queue.fresh()
    await desk.until(lambda: not waiting(desk), "the others are taken out")
    assert sorted(lines(desk.effects)) == sorted(job.token for job in jobs[:2])


async def test_an_array_is_made_durable_at_once_however_many_its_elements_are(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, runner = await counted(desk)
    await backend._queue.fresh()
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd))[1])
    counts = []
    for many in (3, 60):
        synced.clear()
        handles = await submitted(backend, [desk.job("true") for _ in range(many)])
        counts.append(len(synced))
        for handle in handles:
            assert (desk.place / "slurm" / "records" / handle["token"]).exists()
    assert runner.arrays == [3, 60] and counts[0] == counts[1], counts


async def test_nothing_of_a_discarded_element_is_left_and_its_order_goes_when_it_starts(desk: Desk) -> None:
    backend = await desk.backend()
    handles = await submitted(backend, [desk.job(WAIT, env={"SECRET": "s3cret"}) for _ in range(3)])
    for handle in handles:
        await desk.started(handle)
        assert not (desk.folder(handle) / "job.json").exists()
        desk.go(handle)
    assert os.listdir(desk.place / "slurm" / "orders") == []
    assert good(await ends(backend, handles))
    await backend.discard(handles[0]["token"], keep_logs=False)
    await backend.discard(handles[1]["token"], keep_logs=True)
    left = {path.name for path in desk.place.rglob("t-*")}
    assert left == {handle["token"] for handle in handles[1:]}
    assert desk.folder(handles[1]).is_dir() and not desk.folder(handles[0]).exists()


# --- J4, J7 ---------------------------------------------------------------------------------------------------------
@BOTH
async def test_J4_elements_that_slurm_has_forgotten_are_told_by_their_exit_files(desk: Desk) -> None:
    backend = await desk.backend()
    handles = await submitted(backend, [desk.job(f"exit {n}") for n in range(3)])
    await desk.until(lambda: all((desk.folder(h) / "exit.json").exists() for h in handles), "the witnesses")
    await desk.until(lambda: not elements(desk, handles[0]["array"]), "Slurm has forgotten them", 150)
    outcomes = await ends(await desk.backend(), handles)
    assert [one.code for one in outcomes if isinstance(one, Exited)] == [0, 1, 2]


async def test_J7_an_array_that_a_killed_controller_forgot_never_ran_and_its_id_is_anothers(desk: Desk) -> None:
    backend = await desk.backend()
    desk.cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    state, before = desk.cluster.folder / "state", desk.cluster.folder / "state.before"
    desk.cluster.kill("slurmctld", signal.SIGTERM)
    shutil.copytree(state, before)
    desk.cluster.restart()
    handles = await submitted(backend, [desk.effect() for _ in range(3)])
    number = int(str(handles[0]["job"]).partition("_")[0])
    desk.cluster.kill("slurmctld")
    shutil.rmtree(state)
    before.rename(state)
    desk.cluster.restart()
    taken = 0
    other = ["sbatch", "--parsable", "--array=0-2", "--output=/dev/null", "--job-name=mlpa-0123456789abcdef"]
    while taken < number:
        taken = int(desk.cluster.command(*other, f"--wrap=echo other >> {desk.effects}"))
    try:
        assert taken == number
        assert all(isinstance(one, NeverRan) for one in await ends(backend, handles))
        for handle in handles:
            await backend.cancel(handle)
            await backend._controller.cancel(handle["job"], f"{handle['array']}/0")
        assert list(elements(desk, "0123456789abcdef").values()) == ["PENDING"] * 3 * (taken - number + 1)
    finally:
        await anyio.to_thread.run_sync(desk.cluster.ready)


# --- how many -------------------------------------------------------------------------------------------------------
async def test_an_array_is_no_longer_than_the_site_allows(desk: Desk) -> None:
    backend, runner = await counted(desk)
    await backend._queue.fresh()
    backend._queue.config = {**(backend._queue.config or {}), "MaxArraySize": "8"}
    handles = await submitted(backend, [desk.effect() for _ in range(20)])
    assert sorted(runner.arrays) == [4, 8, 8]
    assert good(await ends(backend, handles))


async def test_where_arrays_are_not_allowed_there_are_none(desk: Desk) -> None:
    backend, runner = await counted(desk)
    await backend._queue.fresh()
    backend._queue.config = {**(backend._queue.config or {}), "MaxArraySize": "0"}
    handles = await submitted(backend, [desk.effect() for _ in range(3)])
    assert runner.arrays == [] and good(await ends(backend, handles))


async def test_an_array_that_asks_for_what_there_is_not_is_refused_for_good(desk: Desk) -> None:
    backend = await desk.backend(options=("--gres=nosuch:1",))
    jobs = [desk.job("true") for _ in range(3)]
    found = await together(backend, jobs)
    assert all(isinstance(one, InvalidJob) for one in found)
    for job in jobs:
        assert isinstance(await backend.fence(job.token), NeverRan)
    assert os.listdir(desk.place / "slurm" / "orders") == []


# --- a full queue ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cluster", ["accounted"], indirect=True)  # such limits come with accounting
@pytest.mark.parametrize(
    ("what", "limit", "words"),
    [
        (("user", "root"), "MaxSubmitJobs", "AssocMaxSubmitJobLimit"),
        (("qos", "normal"), "MaxSubmitJobsPerUser", "QOSMaxSubmitJobPerUserLimit"),
    ],
)
async def test_an_array_that_is_more_than_the_site_takes_goes_in_parts_and_waits(
    desk: Desk, what: tuple[str, str], limit: str, words: str
) -> None:
    desk.cluster.command("sacctmgr", "-i", "modify", *what, "set", f"{limit}=3")
    try:
        backend, runner = await counted(desk)
        jobs = [desk.job(WAIT) for _ in range(7)]
        found: list[Handle | Exception] = []

        async def submit() -> None:
            found.extend(await together(backend, jobs))

        async with anyio.create_task_group() as group:
            group.start_soon(submit)
            folders = [desk.place / "jobs" / job.token for job in jobs]
            await desk.until(lambda: len(started(folders)) == 3, "as many as may run do")
            await desk.until(lambda: backend._controller.full is not None, "the queue is full")
            waits = [job.token for job in jobs if backend.waiting(job.token) is not None]
            assert len(waits) == 4 and all(words in (backend.waiting(token) or "") for token in waits)
            for job in jobs:
                desk.go({"token": job.token})
        assert not [one for one in found if isinstance(one, Exception)]
        assert good(await ends(backend, [one for one in found if not isinstance(one, Exception)]))
        assert runner.arrays[:2] == [7, 3]
    finally:
        desk.cluster.command("sacctmgr", "-i", "modify", *what, "set", f"{limit}=-1")


def started(folders: Sequence[Path]) -> list[Path]:
    return [folder for folder in folders if (folder / "stdout").exists()]


@pytest.mark.timeout(400)
async def test_a_controller_that_holds_no_more_jobs_means_wait(tmp_path: Path) -> None:
    """It does not refuse: it lets sbatch ask again and again, for longer than anybody waits for a command."""
    with slurm_rig.running(min_job_age=2, more="MaxJobCount=4\n") as cluster:
        async with AsyncExitStack() as stack:
            desk = Desk(cluster, tmp_path, stack)
            backend = await desk.backend()
            jobs = [desk.job(WAIT) for _ in range(6)]
            folders = [desk.place / "jobs" / job.token for job in jobs]
            found: list[Handle | Exception] = []

            async def submit() -> None:
                found.extend(await together(backend, jobs))

            async with anyio.create_task_group() as group:
                group.start_soon(submit)
                await desk.until(lambda: backend._controller.full is not None, "it is told that it is full", 100)
                await desk.until(lambda: len(started(folders)) >= 2, "some run", 100)
                await desk.until(lambda: backend._controller.full is not None, "it is full again", 100)
                assert found == [] and "temporarily unable to accept" in str(backend._controller.full)
                for job in jobs:
                    desk.go({"token": job.token})
            handles = [one for one in found if not isinstance(one, Exception)]
            assert len(handles) == 6 and good(await ends(backend, handles))
