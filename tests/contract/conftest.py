"""The benches of the contract suite: one class per backend. A new backend is a `Bench` here, and passes the same tests.

`bench.executes` is False for the scripted fake, which runs nothing: `test_seam.py` is for all, `test_execution.py` for
those that start real processes.
"""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from lab import ssh_rig
from lab.docker_rig import PYTHON, Engine

from mlpiped.backends.base import Backend, Exited, Job, Part
from mlpiped.backends.docker import DockerBackend
from mlpiped.backends.fake import FakeBackend
from mlpiped.backends.local import LocalBackend
from mlpiped.backends.slurm import LoginRunner, SlurmBackend
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.backends.ssh import LoginShell, SshBackend
from mlpiped.backends.ssh.link import Link
from mlpiped.config.computes import DockerCompute, SlurmCompute, SshCompute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lab.slurm_rig import Cluster


def command(*arguments: str | Part) -> tuple[tuple[Part, ...], ...]:
    return tuple((argument if isinstance(argument, Part) else Part("text", argument),) for argument in arguments)


class Bench:
    """One backend on one state of machines; `another()` is the backend of the daemon's next life there."""

    executes = True
    needs: str | None = None  # the fixture with the machine that it runs on
    marks: tuple[pytest.MarkDecorator, ...] = ()
    crowd = 50  # jobs that it is given at once
    measures_memory = True  # whether the most memory that a step held is told

    def __init__(self, place: Path, stack: AsyncExitStack, machine: Any = None) -> None:
        self.place, self.stack, self.machine = place, stack, machine

    async def another(self) -> Backend:
        backend = self.make()
        await backend.start(self.stack)
        return backend

    def make(self) -> Backend:
        raise NotImplementedError

    async def removed(self, backend: Backend) -> None:
        """Until what was discarded is gone."""

    async def beside(self, backend: Backend, *command: str) -> int:
        """Run it on the machine that executes, outside of every job that is there; its exit code."""
        outcome = await backend.wait(await backend.submit(self.job(*command)))
        assert isinstance(outcome, Exited) and outcome.code is not None, outcome
        return outcome.code

    def script(self, backend: Backend, *, run_for: float = 0.0, exit_code: int = 0, **job: Any) -> Job:
        """A job that takes so long and ends so."""
        return self.job("sh", "-c", f"sleep {run_for}; exit {exit_code}", **job)

    def job(self, *arguments: str | Part, **fields: Any) -> Job:
        fields.setdefault("token", f"t-{secrets.token_hex(6)}")
        fields.setdefault("grace", 5.0)
        return Job(arguments=command(*arguments), **fields)


class LocalBench(Bench):
    def make(self) -> LocalBackend:
        return LocalBackend(
            "local", self.place / "jobs", self.place / "envs", slots=2, memory=None, cpus=None
        )  # fmt: skip

    async def removed(self, backend: Backend) -> None:
        assert isinstance(backend, LocalBackend)
        await backend.removed()


class SshBench(Bench):
    """A real sshd. Its scripts cannot learn of a process's memory once that has ended."""

    needs = "ssh_box"
    marks = (pytest.mark.lab,)
    measures_memory = False

    def __init__(self, place: Path, stack: AsyncExitStack, machine: ssh_rig.Box) -> None:
        super().__init__(place, stack, machine)
        self.box = machine
        self.instance = secrets.token_hex(6)

    def make(self) -> SshBackend:
        (self.place / "known_hosts").write_text(self.box.known())
        settings = SshCompute(**self.box.settings(mounts={"data": "/data"}))
        return SshBackend("box", self.place, settings, instance=self.instance, datastores={"data": Path("/data")})

    async def removed(self, backend: Backend) -> None:
        assert isinstance(backend, SshBackend)
        await backend.removed()


class FakeBench(Bench):
    executes = False

    def __init__(self, place: Path, stack: AsyncExitStack, machine: Any = None) -> None:
        super().__init__(place, stack, machine)
        self.world: dict[str, list[Any] | None] = {}

    def make(self) -> FakeBackend:
        return FakeBackend(world=self.world)

    def script(self, backend: Backend, *, run_for: float = 0.0, exit_code: int = 0, **job: Any) -> Job:
        assert isinstance(backend, FakeBackend)
        backend.run_for, backend.exit_code = run_for, exit_code
        return self.job("true", **job)


class DockerBench(Bench):
    """Containers of a real dockerd."""

    needs = "docker_engine"
    marks = (pytest.mark.lab,)
    crowd = 20

    def __init__(
        self, place: Path, stack: AsyncExitStack, machine: Engine, instance: str | None = None, **settings: Any
    ) -> None:
        super().__init__(place, stack, machine)
        self.engine = machine
        self.settings = DockerCompute(kind="docker", url=machine.url, **{"slots": 2, **settings})
        self.instance = instance or secrets.token_hex(16)

    def make(self) -> DockerBackend:
        return DockerBackend("box", self.place / "state", self.settings, instance=self.instance)

    async def removed(self, backend: Backend) -> None:
        assert isinstance(backend, DockerBackend)
        await backend.removed()

    async def beside(self, backend: Backend, *command: str) -> int:
        """On the host: a container sees no other's folder."""
        return (await anyio.run_process(command, check=False)).returncode

    def job(self, *arguments: str | Part, **fields: Any) -> Job:
        if "image" not in fields:
            fields["image"] = self.engine.image(PYTHON)
        return super().job(*arguments, **fields)


class SlurmBench(Bench):
    """A real slurmctld with two slurmd."""

    needs = "slurm_cluster"
    marks = (pytest.mark.lab,)

    def make(self) -> SlurmBackend:
        settings = SlurmCompute(kind="slurm", slots=2, poll_interval="200ms")
        runner = HostRunner(self.machine.env)
        return SlurmBackend("cluster", self.place, settings, instance="0" * 32, runner=runner, patience=5.0)


class SlurmViaBench(Bench):
    """The same cluster, its commands run on a login node: a real sshd, over one connection."""

    needs = "slurm_login"
    marks = (pytest.mark.lab,)

    def make(self) -> SlurmBackend:
        _, box = self.machine
        (self.place / "known_hosts").write_text(box.known())
        link = Link("login", SshCompute(**box.settings()), self.place / "known_hosts")
        self.stack.push_async_callback(link.close)
        settings = SlurmCompute(kind="slurm", via="login", slots=2, poll_interval="200ms")
        runner = LoginRunner(LoginShell(link))
        return SlurmBackend("cluster", self.place, settings, instance="0" * 32, runner=runner, patience=5.0)


BENCHES = {
    "local": LocalBench,
    "fake": FakeBench,
    "docker": DockerBench,
    "ssh": SshBench,
    "slurm": SlurmBench,
    "slurm-via": SlurmViaBench,
}
EVERY = [pytest.param(name, marks=bench.marks) for name, bench in BENCHES.items()]
EXECUTING = [pytest.param(name, marks=bench.marks) for name, bench in BENCHES.items() if bench.executes]


@pytest.fixture(scope="session")
def slurm_login(slurm_cluster: Cluster, ssh_lab: ssh_rig.Lab) -> tuple[Cluster, ssh_rig.Box]:
    paths = slurm_cluster.env["PATH"].split(":")
    return slurm_cluster, ssh_lab.box(path=paths, SLURM_CONF=str(slurm_cluster.conf))


@pytest.fixture
async def bench(request: pytest.FixtureRequest, tmp_path: Path, anyio_backend: str) -> AsyncIterator[Bench]:
    kind = BENCHES[request.param]
    machine = None if kind.needs is None else request.getfixturevalue(kind.needs)
    async with AsyncExitStack() as stack:
        yield kind(tmp_path, stack, machine)


@pytest.fixture
async def backend(bench: Bench) -> Backend:
    return await bench.another()
