"""The faults of a Slurm cluster (J1 to J8), by a real one: controllers that are killed, stopped and forget; jobs that
others end; queues that are full; names that try to be somebody else's.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from harness import lines
from lab import slurm_rig
from slurm_backends import BOTH, WAIT, Desk, accounted, cluster, desk, plain
from slurm_submitter import effect

from mlpiped.backends.base import Exited, Lost, NeverRan
from mlpiped.backends.slurm import submission, tools
from mlpiped.errors import InvalidJob

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from mlpiped.backends.base import Handle

__all__ = ["accounted", "cluster", "desk", "plain"]
pytestmark = [pytest.mark.anyio, pytest.mark.lab, pytest.mark.timeout(200)]
SUBMITTER = Path(__file__).with_name("slurm_submitter.py")


# --- J1: no controller ----------------------------------------------------------------------------------------------
async def test_J1_a_controller_that_is_gone_is_no_answer_and_the_step_goes_on(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job(WAIT))
    await desk.started(handle)
    desk.cluster.save()
    desk.cluster.kill("slurmctld")
    try:
        assert "does not answer" in await desk.refused(lambda: backend.wait(handle))
        assert "does not answer" in (await backend.health() or "")
        desk.go(handle)
        exit_file = desk.folder(handle) / "exit.json"
        await desk.until(exit_file.exists, "the witness")
        assert await backend.wait(handle) == await (await desk.backend()).wait(handle)
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.code == 0
    finally:
        desk.cluster.restart()
    await anyio.to_thread.run_sync(desk.cluster.ready)
    assert await backend.health() is None


async def test_J1_what_is_submitted_while_the_controller_is_gone_waits_and_then_runs_once(desk: Desk) -> None:
    backend = await desk.backend()
    job = desk.effect()
    desk.cluster.save()
    desk.cluster.kill("slurmctld")
    try:
        await desk.refused(lambda: backend.submit(job))
        await desk.refused(lambda: backend.fence(job.token))
    finally:
        desk.cluster.restart()
    assert isinstance(await backend.fence(job.token), NeverRan)
    again = desk.effect()
    outcome = await backend.wait(await backend.submit(again))
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert lines(desk.effects) == [again.token]


# --- J2: sbatch says no, the controller says yes --------------------------------------------------------------------
async def test_J2_a_job_that_sbatch_did_not_hear_of_is_adopted_and_runs_once(desk: Desk) -> None:
    backend = await desk.backend()
    job = desk.effect()
    desk.cluster.kill("slurmctld", signal.SIGSTOP)
    try:
        await desk.refused(lambda: backend.submit(job))
    finally:
        desk.cluster.kill("slurmctld", signal.SIGCONT)
    name = f"mlp-{job.token}"
    await desk.until(lambda: name in {n for _, n in desk.cluster.jobs().values()}, "it was taken all the same")
    assert desk.reason(job.token) == "JobHeldUser" and lines(desk.effects) == []
    handle = await (await desk.backend()).fence(job.token)
    assert not isinstance(handle, NeverRan)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert lines(desk.effects) == [job.token]


async def test_J2_a_late_twin_of_a_fenced_token_never_runs_and_is_taken_out(desk: Desk) -> None:
    backend = await desk.backend()
    job = desk.effect()
    assert isinstance(await backend.fence(job.token), NeverRan)
    late = desk.cluster.command(*_sbatch(desk, job.token, "--hold"), stdin=_script(desk, job.token))
    awake = await backend.submit(desk.job(WAIT))  # somebody waits, so the queue is looked at
    async with anyio.create_task_group() as group:
        group.start_soon(backend.wait, awake)
        await desk.until(
            lambda: desk.cluster.jobs().get(int(late), ("", ""))[0] in ("CANCELLED", ""), "it is taken out"
        )
        desk.go(awake)
    assert lines(desk.effects) == []


async def test_J2_three_jobs_of_one_token_are_one_execution(desk: Desk) -> None:
    backend = await desk.backend()
    job = desk.effect()
    handle = await backend.submit(job)
    script = _script(desk, job.token)
    twins = [int(desk.cluster.command(*_sbatch(desk, job.token), stdin=script)) for _ in range(2)]
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    over = ("COMPLETED", "FAILED", "")
    await desk.until(
        lambda: all(desk.cluster.jobs().get(twin, ("", ""))[0] in over for twin in twins), "the twins are over"
    )
    assert lines(desk.effects) == [job.token]


def _sbatch(desk: Desk, token: str, *more: str) -> list[str]:
    return ["sbatch", "--parsable", f"--job-name=mlp-{token}", "--output=/dev/null", "--export=NONE", *more]


def _script(desk: Desk, token: str) -> str:
    return tools.script(str(desk.place), token, tools.install(desk.place), sys.executable).decode()


@pytest.mark.parametrize(
    ("when", "what", "handle_is_durable"),
    [("before", "sbatch", False), ("after", "sbatch", True), ("before", "release", True), ("after", "release", True)],
)
@pytest.mark.parametrize("recovery", ["fence", "find"])
async def test_J2_a_daemon_killed_while_it_submits_starts_the_step_once(
    desk: Desk, when: str, what: str, handle_is_durable: bool, recovery: str
) -> None:
    token = f"t-{secrets.token_hex(6)}"
    command = [sys.executable, str(SUBMITTER), str(desk.place), token, str(desk.effects), when, what]
    killed = await anyio.run_process(command, env=desk.cluster.env, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if (when, what) == ("after", "sbatch"):
        assert desk.reason(token) == "JobHeldUser"  # nothing runs of which nobody knows the id
    backend = await desk.backend()
    if recovery == "fence":
        found = await backend.fence(token)
        handle = None if isinstance(found, NeverRan) else found
    else:
        handle = (await backend.find([token])).get(token)
    assert (handle is not None) == handle_is_durable
    if handle is None:
        assert isinstance(await backend.fence(token), NeverRan)
        handle = await backend.submit(effect(token := f"t-{secrets.token_hex(6)}", str(desk.effects)))
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert lines(desk.effects) == [token]


# --- J3: the cluster takes the machine away -------------------------------------------------------------------------
@BOTH
async def test_J3_a_node_that_fails_loses_the_attempt(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job(WAIT))
    await desk.started(handle)
    node = desk.cluster.command("squeue", "-h", "-j", str(handle["job"]), "-o", "%N").strip()
    desk.cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        outcome = await backend.wait(handle)
    finally:
        await anyio.to_thread.run_sync(desk.cluster.ready)
    assert isinstance(outcome, Lost) and "its node failed" in outcome.reason


@BOTH
async def test_J3_preemption_loses_the_attempt_and_says_so(desk: Desk) -> None:
    backend = await desk.backend(partition="main")
    handle = await backend.submit(desk.job(WAIT))
    await desk.started(handle)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    desk.cluster.command(*urgent)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Lost) and "preempted" in outcome.reason


async def test_J3_a_requeue_cannot_start_the_step_again(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job(f"echo {{}} >> {desk.effects}; {WAIT}"))
    await desk.started(handle)
    job = str(handle["job"])
    desk.cluster.command("scontrol", "requeue", job, check=False)  # refused: --no-requeue
    assert desk.cluster.jobs()[handle["job"]][0] == "RUNNING"
    desk.cluster.command("scontrol", "update", f"jobid={job}", "requeue=1")
    desk.cluster.command("scontrol", "requeue", job)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Lost) and "requeued" in outcome.reason
    over = ("COMPLETED", "FAILED", "CANCELLED", "")
    await desk.until(lambda: desk.cluster.jobs().get(handle["job"], ("", ""))[0] in over, "it is out of the queue")
    assert len(lines(desk.effects)) == 1
    assert await (await desk.backend()).wait(handle) == outcome  # we took it out: nobody else has cancelled it


async def test_J3_a_node_that_cannot_start_a_job_has_not_cancelled_the_step(tmp_path: Path) -> None:
    prolog, broken = tmp_path / "prolog", tmp_path / "broken"
    prolog.write_text(f"#!/bin/sh\ntest ! -e {broken}\n")
    prolog.chmod(0o755)
    with slurm_rig.running(more=f"Prolog={prolog}\n") as cluster:
        async with AsyncExitStack() as stack:
            desk = Desk(cluster, tmp_path, stack)
            backend = await desk.backend()
            broken.touch()
            outcome = await backend.wait(await backend.submit(desk.effect()))
            assert isinstance(outcome, NeverRan) and "its node did not start" in outcome.reason
            broken.unlink()
            await anyio.to_thread.run_sync(cluster.ready)
            again = await backend.submit(desk.effect())
            assert isinstance(await backend.wait(again), Exited)
            assert lines(desk.effects) == [again["token"]]


# --- J4: forgotten --------------------------------------------------------------------------------------------------
@BOTH
async def test_J4_a_job_that_slurm_has_forgotten_is_told_by_its_exit_file(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job("exit 7"))
    await desk.until((desk.folder(handle) / "exit.json").exists, "the witness")
    await desk.forgotten(handle)
    outcome = await (await desk.backend()).wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 7


@BOTH
async def test_J4_without_a_witness_it_is_lost_in_the_end(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job(WAIT))
    await desk.started(handle)
    claim = submission.folders.read_claim(desk.folder(handle))
    assert claim is not None
    os.kill(claim["pid"], signal.SIGKILL)  # the supervisor; Slurm ends what it leaves
    await desk.forgotten(handle)
    outcome = await (await desk.backend()).wait(handle)
    assert isinstance(outcome, Lost)
    says = "Slurm calls it FAILED" if desk.cluster.accounting else "Slurm does not know it any more"
    assert says in outcome.reason


# --- J5: names ------------------------------------------------------------------------------------------------------
async def test_J5_names_of_other_jobs_cannot_speak_for_ours(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job(WAIT))
    await desk.started(handle)
    job, token = handle["job"], handle["token"]
    names = [
        f"x\n{job}|FAILED|mlp-{token}|None",
        f"{job}|CANCELLED|mlp-{token}",
        f"mlp-{token}|FAILED|None\n{job}|NODE_FAIL|mlp-{token}|None\n",
        "a|b|c", "\t\x1b[31m", "mlp-../../etc", "żółw" * 20,
    ]  # fmt: skip
    common = ["sbatch", "--parsable", "--output=/dev/null", "--chdir=/tmp", "--wrap=sleep 300"]
    for number, name in enumerate(names):
        desk.cluster.command(*common, f"--job-name={name}", user=65534 if number % 2 else None)
    try:
        looks = backend._queue.looks
        async with anyio.create_task_group() as group:
            outcomes: list[object] = []

            async def wait() -> None:
                outcomes.append(await backend.wait(handle))

            group.start_soon(wait)
            await desk.until(lambda: backend._queue.looks >= looks + 5, "it has looked")
            assert outcomes == []
            desk.go(handle)
        assert isinstance(outcomes[0], Exited) and outcomes[0].code == 0
    finally:
        desk.cluster.command("scancel", "-u", "nobody")


# --- J7: the controller forgets, and gives the id to another --------------------------------------------------------
@BOTH
async def test_J7_a_job_that_a_killed_controller_forgot_never_ran_and_its_id_is_anothers(desk: Desk) -> None:
    backend = await desk.backend()
    desk.cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    with desk.cluster.forgetting():
        handle = await backend.submit(desk.effect())
    other = [
        "sbatch",
        "--parsable",
        "--output=/dev/null",
        "--job-name=mlp-other",
        f"--wrap=echo other >> {desk.effects}",
    ]
    taken = 0
    while taken < handle["job"]:
        taken = int(desk.cluster.command(*other))
    assert taken == handle["job"]
    outcome = await backend.wait(handle)
    assert isinstance(outcome, NeverRan)
    await backend.cancel(handle)
    assert desk.cluster.jobs()[taken][0] == "PENDING"  # it is not ours to cancel
    await anyio.to_thread.run_sync(desk.cluster.ready)
    await desk.until(lambda: lines(desk.effects), "the other job has run")
    assert set(lines(desk.effects)) == {"other"}


async def test_J7_a_release_that_a_killed_controller_forgot_is_given_again_and_a_person_s_hold_is_left(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await desk.backend()
    release, first, released = backend._controller.release, backend._controller.release_named, []

    async def forgotten(naming: Awaitable[Sequence[int | str]]) -> None:
        released.append(await asyncio.shield(asyncio.ensure_future(naming)))
        with desk.cluster.forgetting():
            await first(asyncio.ensure_future(naming))

    async def again(jobs: Sequence[int | str]) -> None:
        released.append(jobs)
        await release(jobs)

    monkeypatch.setattr(backend._controller, "release_named", forgotten)
    monkeypatch.setattr(backend._controller, "release", again)
    desk.cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    handle = await backend.submit(desk.effect())
    job = str(handle["job"])
    assert desk.reason(handle["token"]) == "JobHeldUser"
    outcomes = []
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            outcomes.append(await backend.wait(handle))

        group.start_soon(wait)
        freed = lambda: "T" in desk.cluster.command("squeue", "-h", "-O", "AccrueTime")  # noqa: E731
        await desk.until(freed, "it is released again")
        desk.cluster.command("scontrol", "uhold", job)
        await anyio.to_thread.run_sync(desk.cluster.ready)
        looks = backend._queue.looks
        await desk.until(lambda: backend._queue.looks > looks + 3, "the queue is looked at")
        assert desk.reason(handle["token"]) == "JobHeldUser" and not outcomes
        desk.cluster.command("scontrol", "release", job)
    assert isinstance(outcomes[0], Exited) and outcomes[0].code == 0
    assert len(released) == 2 and lines(desk.effects) == [handle["token"]]


async def test_J7_what_a_killed_controller_holds_again_after_its_end_is_taken_out_each_time(desk: Desk) -> None:
    backend = await desk.backend()
    desk.cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    handle = await backend.submit(desk.effect())
    desk.cluster.command("scontrol", "uhold", str(handle["job"]))  # as it was before it was released
    state, before = desk.cluster.folder / "state", desk.cluster.folder / "state.before"
    desk.cluster.kill("slurmctld", signal.SIGTERM)
    shutil.copytree(state, before)
    desk.cluster.restart()
    desk.cluster.command("scontrol", "release", str(handle["job"]))
    await anyio.to_thread.run_sync(desk.cluster.ready)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    for _ in range(2):
        desk.cluster.kill("slurmctld")
        shutil.rmtree(state)
        shutil.copytree(before, state)
        desk.cluster.restart()
        await anyio.to_thread.run_sync(desk.cluster.ready)
        gone = lambda: desk.cluster.jobs().get(handle["job"], ("",))[0] != "PENDING"  # noqa: E731
        await desk.until(gone, "it is out of the queue, though nobody waits for anything")
    assert lines(desk.effects) == [handle["token"]]


# --- J8: ended by others, or by its limits --------------------------------------------------------------------------
@BOTH
async def test_J8_an_administrators_scancel_is_a_failure_and_no_cancellation_of_ours(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job(WAIT))
    await desk.started(handle)
    desk.cluster.command("scancel", str(handle["job"]))
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and not outcome.cancelled
    assert outcome.error == "cancelled in Slurm, not by mlpiped"


@BOTH
async def test_J8_a_scancel_before_the_start_is_told_too(desk: Desk) -> None:
    backend = await desk.backend()
    desk.cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    try:
        handle = await backend.submit(desk.effect())
        desk.cluster.command("scancel", str(handle["job"]))
        outcome = await backend.wait(handle)
    finally:
        await anyio.to_thread.run_sync(desk.cluster.ready)
    assert isinstance(outcome, Exited) and not outcome.cancelled
    assert outcome.error == "cancelled in Slurm, not by mlpiped, before it started"
    assert lines(desk.effects) == []


async def test_J8_slurms_own_time_limit_is_a_timeout(desk: Desk) -> None:
    backend = await desk.backend(time="1m")
    handle = await backend.submit(desk.job(WAIT))
    await desk.started(handle)
    desk.cluster.command("scontrol", "update", f"jobid={handle['job']}", "EndTime=now+5seconds")
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.timed_out and not outcome.cancelled


async def test_J8_a_step_over_its_memory_is_told_so(desk: Desk) -> None:
    backend = await desk.backend()
    hungry = "exec python3 -c 'import time; kept = bytearray(300 << 20); print(len(kept)); time.sleep(300)'"
    job = desk.job(hungry, memory=64 << 20)
    outcome = await backend.wait(await backend.submit(job))
    assert isinstance(outcome, Exited) and outcome.error is not None and outcome.error.startswith("out of memory")


async def test_J8_a_drained_cluster_is_a_reason_to_wait_and_to_be_unwell(desk: Desk) -> None:
    backend = await desk.backend(partition="main")
    desk.cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    try:
        words = "no node of partition `main` is up: 2 down or drained; n[1-2] drained: test"
        assert await backend.health() == words
        handle = await backend.submit(desk.effect())
        async with anyio.create_task_group() as group:
            group.start_soon(backend.wait, handle)
            token = handle["token"]
            await desk.until(lambda: "Node" in (backend.waiting(token) or ""), "Slurm's own reason")
            assert backend.cluster().jobs == {"PENDING": 1}
            (away,) = backend.cluster().away
            assert (away.nodes, away.state, away.reason) == ("n[1-2]", "drained", "test")
            await anyio.to_thread.run_sync(desk.cluster.ready)
            await desk.until(lambda: backend.waiting(token) is None, "it waits no more")
    finally:
        await anyio.to_thread.run_sync(desk.cluster.ready)
    assert lines(desk.effects) == [handle["token"]]


# --- the queue ------------------------------------------------------------------------------------------------------
async def test_one_squeue_an_interval_however_many_jobs(desk: Desk, tmp_path: Path) -> None:
    asked, tools = tmp_path / "asked", tmp_path / "bin"
    tools.mkdir()
    real = shutil.which("squeue", path=desk.cluster.env["PATH"])
    (tools / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexec {real} "$@"\n')
    (tools / "squeue").chmod(0o755)
    backend = await desk.backend(
        {**desk.cluster.env, "PATH": f"{tools}:{desk.cluster.env['PATH']}"}, poll_interval="1s"
    )
    began = time.monotonic()
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(backend.wait, await backend.submit(desk.job("true")))
    intervals = (time.monotonic() - began) / 1.0
    assert 2 <= len(lines(asked)) <= intervals + 1


async def test_a_job_that_no_node_can_hold_fails_and_is_taken_out(desk: Desk) -> None:
    backend = await desk.backend()
    handle = await backend.submit(desk.job("true", memory=1 << 42))
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited)
    assert outcome.error == "Slurm says that no node can ever hold it: BadConstraints"
    assert desk.cluster.jobs().get(handle["job"], ("CANCELLED", ""))[0] == "CANCELLED"


async def test_a_job_that_asks_for_what_there_is_not_is_refused_for_good(desk: Desk) -> None:
    backend = await desk.backend(options=("--gres=nosuch:1",))
    job = desk.job("true")
    with pytest.raises(InvalidJob, match="Slurm refuses the job"):
        await backend.submit(job)
    assert not (desk.place / "slurm" / "orders" / job.token).exists()
    assert isinstance(await backend.fence(job.token), NeverRan)


@pytest.mark.parametrize("cluster", ["accounted"], indirect=True)  # such limits come with accounting
async def test_a_full_queue_means_wait(desk: Desk) -> None:
    desk.cluster.command("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=1")
    try:
        backend = await desk.backend()
        first = await backend.submit(desk.job(WAIT))
        await desk.started(first)
        async with anyio.create_task_group() as group:
            handles: list[Handle] = []

            async def second() -> None:
                handles.append(await backend.submit(desk.effect()))

            group.start_soon(second)
            await desk.until(lambda: backend._controller.full is not None, "the queue is full")
            assert handles == []
            desk.go(first)
        outcome = await backend.wait(handles[0])
        assert isinstance(outcome, Exited) and outcome.code == 0
    finally:
        desk.cluster.command("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=-1")


async def test_gpus_are_slurms_to_give(desk: Desk) -> None:
    backend = await desk.backend(partition="main")
    assert await backend.health() is None
    cards = backend.capacity().cards
    assert len(cards) == 2 * slurm_rig.GPUS
    handle = await backend.submit(desk.job('echo "$CUDA_VISIBLE_DEVICES"', gpus=tuple(c.uuid for c in cards[:2])))
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert (desk.folder(handle) / "stdout").read_text() == "0,1\n"


async def test_a_work_folder_of_its_own_is_found_from_the_state_folder(desk: Desk, tmp_path: Path) -> None:
    backend = await desk.backend(work_dir=tmp_path / "shared")
    handle = await backend.submit(desk.job("echo said"))
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert (desk.folder(handle) / "stdout").read_text() == "said\n"
    assert desk.folder(handle).resolve() == tmp_path / "shared" / "jobs" / handle["token"]
    await backend.discard(handle["token"], keep_logs=True)
    assert (desk.folder(handle) / "stdout").read_text() == "said\n"
    await backend.discard(handle["token"], keep_logs=False)
    assert not desk.folder(handle).is_symlink() and not (tmp_path / "shared" / "jobs" / handle["token"]).exists()


def test_the_cluster_leaves_nothing_behind(tmp_path: Path) -> None:
    """The rig itself: what it starts is gone when it is closed."""
    with slurm_rig.running() as cluster:
        cluster.command("sbatch", "--output=/dev/null", "--wrap=sleep 300")
        cluster.wait_for(lambda: "RUNNING" in str(cluster.jobs()), "the job runs")
        left = list(cluster._left())
        assert left
    assert not cluster.folder.exists()
    alive = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(map(str, left))], capture_output=True, text=True)
    assert not [line for line in alive.stdout.split() if not line.startswith("Z")]
