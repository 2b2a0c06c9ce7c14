"""A Slurm cluster whose commands run on a login node: a real sshd, and the ways in which it can be away."""

from __future__ import annotations

import secrets
import shutil
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from harness import lines
from lab import slurm_rig, ssh_rig
from lab.ssh_daemon import Daemon
from slurm_submitter import effect

from mlpiped.backends.base import Exited, Job, NeverRan, Part
from mlpiped.backends.slurm import LoginRunner, SlurmBackend
from mlpiped.backends.ssh import LoginShell
from mlpiped.config.computes import SlurmCompute
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AsyncExitStack
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.lab, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_rig.Cluster]:
    with slurm_rig.running() as found:
        yield found


class Desk:
    """Who submits through the box, from one state folder. Settings of sbatch lie in wait in its environment."""

    def __init__(self, cluster: slurm_rig.Cluster, lab: ssh_rig.Lab, place: Path, stack: AsyncExitStack) -> None:
        self.cluster, self.place, self.stack = cluster, place, stack
        self.slow, tools = place / "slow", place / "bin"
        tools.mkdir()
        real = shutil.which("sbatch", path=cluster.env["PATH"])
        late = f'answer=$({real} "$@"); code=$?; while test -e {self.slow}; do sleep 0.05; done'
        (tools / "sbatch").write_text(f'#!/bin/sh\n{late}; echo "$answer"; exit $code\n')
        (tools / "sbatch").chmod(0o755)
        self.box = lab.box(
            path=[tools, *cluster.env["PATH"].split(":")],
            SLURM_CONF=str(cluster.conf),
            SBATCH_PARTITION="nowhere",
            max_sessions=4,
        )
        self.cable = ssh_rig.Cable(self.box)
        self.effects = place / "effects"
        self.daemon = Daemon(self.box, place, cable=self.cable, max_sessions=4, gpus=0)

    async def backend(self, **settings: Any) -> SlurmBackend:
        login = await self.daemon.life(self.stack, "login")
        compute = SlurmCompute(kind="slurm", via="login", poll_interval="200ms", **settings)
        runner = LoginRunner(LoginShell(login.link))
        backend = SlurmBackend("cluster", self.place, compute, instance="0" * 32, runner=runner, patience=5.0)
        await backend.start(self.stack)
        return backend

    def effect(self) -> Job:
        return effect(f"t-{secrets.token_hex(6)}", str(self.effects))

    def close(self) -> None:
        self.cable.close()
        self.box.thaw()
        self.box.stop()
        self.cluster.command("scancel", "-u", "root", check=False)


@pytest.fixture
async def desk(
    cluster: slurm_rig.Cluster, ssh_lab: ssh_rig.Lab, tmp_path: Path, stack: AsyncExitStack
) -> AsyncIterator[Desk]:
    desk = Desk(cluster, ssh_lab, tmp_path, stack)
    yield desk
    desk.close()


async def ends_well(backend: SlurmBackend, handle: Any) -> None:
    """As an attempt waits: what cannot be asked now is asked again."""
    with anyio.fail_after(120):
        while True:
            try:
                outcome = await backend.wait(handle)
                break
            except BackendUnavailable:
                await anyio.sleep(0.2)
    assert isinstance(outcome, Exited) and outcome.code == 0, outcome


async def test_jobs_go_through_one_connection_whatever_the_login_has_in_its_environment(desk: Desk) -> None:
    backend = await desk.backend()
    assert await backend.health() is None
    jobs = [desk.effect() for _ in range(5)]
    async with anyio.create_task_group() as group:

        async def one(job: Job) -> None:
            await ends_well(backend, await backend.submit(job))

        for job in jobs:
            group.start_soon(one, job)
    assert sorted(lines(desk.effects)) == sorted(job.token for job in jobs)
    assert desk.box.connections() == 1


async def test_J2_a_connection_cut_while_sbatch_ran_leaves_one_execution(desk: Desk) -> None:
    backend = await desk.backend()
    assert await backend.health() is None
    job = desk.effect()
    desk.slow.touch()  # sbatch has not answered when the connection is cut
    async with anyio.create_task_group() as group:

        async def lost() -> None:
            with pytest.raises(BackendUnavailable, match="the connection to `login` was lost"):
                await backend.submit(job)

        group.start_soon(lost)
        name = f"mlp-{job.token}"
        await anyio.to_thread.run_sync(
            lambda: desk.cluster.wait_for(lambda: name in {n for _, n in desk.cluster.jobs().values()}, "it was taken")
        )
        desk.cable.cut()
    desk.slow.unlink()
    assert lines(desk.effects) == []  # held: nothing runs of which nobody knows the id
    with anyio.fail_after(60):
        while True:
            try:
                handle = await backend.fence(job.token)
                break
            except BackendUnavailable:
                await anyio.sleep(0.2)
    assert not isinstance(handle, NeverRan)
    await ends_well(backend, handle)
    assert lines(desk.effects) == [job.token]


async def test_J1_a_login_node_that_is_away_is_no_answer_and_the_step_goes_on(desk: Desk) -> None:
    backend = await desk.backend()
    script = "echo started; while ! test -e go; do sleep 0.05; done"
    job = Job(token=f"t-{secrets.token_hex(6)}", arguments=((Part("text", script),),), shell=True)
    handle = await backend.submit(job)
    folder = desk.place / "jobs" / job.token
    await anyio.to_thread.run_sync(lambda: desk.cluster.wait_for((folder / "stdout").exists, "it has started"))
    desk.box.stop()
    with pytest.raises(BackendUnavailable, match="login"):
        await backend.wait(handle)
    assert "Slurm does not answer" in (await backend.health() or "")
    with pytest.raises(BackendUnavailable):
        await backend.submit(desk.effect())
    desk.box.start()
    (folder / "work" / "go").touch()
    await ends_well(backend, handle)
    assert lines(desk.effects) == []
