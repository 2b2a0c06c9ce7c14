"""The benches of the contract suite: one class per backend. A new backend is a `Bench` here, and passes the same tests.

`bench.executes` is False for the scripted fake, which runs nothing: `test_seam.py` is for all, `test_execution.py` for
those that start real processes.
"""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import ssh_rig

from mlpiped.backends.base import Backend, Job, Part
from mlpiped.backends.fake import FakeBackend
from mlpiped.backends.local import LocalBackend
from mlpiped.backends.ssh import SshBackend
from mlpiped.config.computes import SshCompute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def command(*arguments: str | Part) -> tuple[tuple[Part, ...], ...]:
    return tuple((argument if isinstance(argument, Part) else Part("text", argument),) for argument in arguments)


class Bench:
    """One backend on one state of machines; `another()` is the backend of the daemon's next life there."""

    executes = True
    measures_memory = True
    """Whether the most memory that a step held is told."""

    def __init__(self, place: Path, stack: AsyncExitStack) -> None:
        self.place, self.stack = place, stack

    async def another(self) -> Backend:
        backend = self.make()
        await backend.start(self.stack)
        return backend

    def make(self) -> Backend:
        raise NotImplementedError

    async def removed(self, backend: Backend) -> None:
        """Until what was discarded is gone."""

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

    measures_memory = False
    box: ssh_rig.Box

    def __init__(self, place: Path, stack: AsyncExitStack) -> None:
        super().__init__(place, stack)
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

    def __init__(self, place: Path, stack: AsyncExitStack) -> None:
        super().__init__(place, stack)
        self.world: dict[str, list[Any] | None] = {}

    def make(self) -> FakeBackend:
        return FakeBackend(world=self.world)

    def script(self, backend: Backend, *, run_for: float = 0.0, exit_code: int = 0, **job: Any) -> Job:
        assert isinstance(backend, FakeBackend)
        backend.run_for, backend.exit_code = run_for, exit_code
        return self.job("true", **job)


BENCHES = {"local": LocalBench, "fake": FakeBench, "ssh": SshBench}
MARKS = {"ssh": pytest.mark.lab}
EVERY = [pytest.param(name, marks=MARKS.get(name, ())) for name in BENCHES]
EXECUTING = [pytest.param(name, marks=MARKS.get(name, ())) for name, bench in BENCHES.items() if bench.executes]


@pytest.fixture(scope="session")
def ssh_box() -> Iterator[ssh_rig.Box]:
    with ssh_rig.lab() as lab:
        yield lab.box()


@pytest.fixture
async def bench(request: pytest.FixtureRequest, tmp_path: Path, anyio_backend: str) -> AsyncIterator[Bench]:
    kind = BENCHES[request.param]
    if kind is SshBench:
        SshBench.box = request.getfixturevalue("ssh_box")
    async with AsyncExitStack() as stack:
        yield kind(tmp_path, stack)


@pytest.fixture
async def backend(bench: Bench) -> Backend:
    return await bench.another()
