"""Who submits to a cluster, from one state folder; and the two clusters, with accounting and without."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from lab import slurm_rig
from slurm_submitter import effect

from mlpiped.backends.base import Job, Part
from mlpiped.backends.slurm import SlurmBackend
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.config.computes import SlurmCompute
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from mlpiped.backends.base import Handle

WAIT = "echo started; while ! test -e go; do sleep 0.05; done"
BOTH = pytest.mark.parametrize("cluster", ["plain", "accounted"], indirect=True)


@pytest.fixture(scope="module")
def plain() -> Iterator[slurm_rig.Cluster]:
    """Without accounting. It forgets what has ended as soon as Slurm allows, as the other does."""
    with slurm_rig.running(min_job_age=2, preempt="CANCEL") as found:
        yield found


@pytest.fixture(scope="module")
def accounted() -> Iterator[slurm_rig.Cluster]:
    with slurm_rig.running(accounting=True, min_job_age=2, preempt="CANCEL") as found:
        yield found


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> slurm_rig.Cluster:
    found: slurm_rig.Cluster = request.getfixturevalue(getattr(request, "param", "plain"))
    return found


class Desk:
    """Who submits to the cluster, from one state folder."""

    def __init__(self, cluster: slurm_rig.Cluster, place: Path, stack: AsyncExitStack) -> None:
        self.cluster, self.place, self.stack = cluster, place, stack
        self.effects = place / "effects"

    async def backend(
        self, environ: dict[str, str] | None = None, runner: HostRunner | None = None, **settings: Any
    ) -> SlurmBackend:
        settings.setdefault("poll_interval", "200ms")
        compute = SlurmCompute(kind="slurm", **settings)
        runner = runner or HostRunner(environ or self.cluster.env)
        backend = SlurmBackend("cluster", self.place, compute, instance="0" * 32, runner=runner, patience=2.0)
        await backend.start(self.stack)
        return backend

    def job(self, script: str, **fields: Any) -> Job:
        fields.setdefault("token", f"t-{secrets.token_hex(6)}")
        fields.setdefault("grace", 3.0)
        return Job(arguments=((Part("text", script),),), shell=True, **fields)

    def effect(self) -> Job:
        return effect(f"t-{secrets.token_hex(6)}", str(self.effects))

    def folder(self, handle: Handle) -> Path:
        return self.place / "jobs" / str(handle["token"])

    def go(self, handle: Handle) -> None:
        """Whether it has started or not."""
        work = self.folder(handle) / "work"
        work.mkdir(parents=True, exist_ok=True)
        (work / "go").touch()

    async def until(self, look: Callable[[], object], what: str, timeout: float = 60.0) -> None:
        with anyio.move_on_after(timeout):
            while not await anyio.to_thread.run_sync(look):
                await anyio.sleep(0.05)
            return
        raise AssertionError(f"not within {timeout:g} s: {what}\n{self.cluster.last_words()}")

    async def started(self, handle: Handle) -> None:
        out = self.folder(handle) / "stdout"
        await self.until(lambda: out.exists() and out.read_text() == "started\n", "the step has started")

    async def forgotten(self, handle: Handle) -> None:
        await self.until(lambda: handle["job"] not in self.cluster.jobs(), "Slurm has forgotten the job", 150)

    def reason(self, token: str) -> str:
        return self.cluster.command("squeue", "-h", "-n", f"mlp-{token}", "-o", "%r").strip()

    async def refused(self, what: Callable[[], Any]) -> str:
        with pytest.raises(BackendUnavailable) as caught:
            await what()
        return caught.value.message


@pytest.fixture
async def desk(cluster: slurm_rig.Cluster, tmp_path: Path, anyio_backend: str) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        yield Desk(cluster, tmp_path, stack)
    print(cluster.last_words())  # shown where the test has failed
    cluster.command("scancel", "-u", "root", check=False)
