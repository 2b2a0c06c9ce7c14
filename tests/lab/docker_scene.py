"""A Docker backend on a real engine, and steps on it that wait for a word."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from contract.conftest import DockerBench

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from lab.docker_rig import Engine

    from mlpiped.backends.base import Handle, Job, Outcome, Part
    from mlpiped.backends.docker import DockerBackend

GATED = "echo ready; while ! test -e go; do sleep 0.02; done; echo went"


@asynccontextmanager
async def served(bench: DockerBench) -> AsyncIterator[DockerBackend]:
    """One life of a daemon's backend."""
    async with AsyncExitStack() as stack:
        backend = bench.make()
        await backend.start(stack)
        yield backend


@pytest.fixture
async def bench(docker_engine: Engine, tmp_path: Path, anyio_backend: str) -> AsyncIterator[DockerBench]:
    async with AsyncExitStack() as stack:
        yield DockerBench(tmp_path, stack, docker_engine)
    left = docker_engine.containers()
    if left:
        docker_engine.docker("rm", "--force", *left)


def folder(bench: DockerBench, job: Job | Handle) -> Path:
    token = job["token"] if isinstance(job, dict) else job.token
    return bench.place / "state/jobs" / token


async def shown(path: Path, text: bytes) -> None:
    with anyio.fail_after(20):
        while not path.exists() or text not in path.read_bytes():
            await anyio.sleep(0.01)


async def gated(bench: DockerBench, backend: DockerBackend, more: str = "", before: str = "", **fields: Any) -> Handle:
    """A step that runs until `open_gate`."""
    handle = await backend.submit(bench.job(f"{before}{GATED}{more}", shell=True, **fields))
    await shown(folder(bench, handle) / "stdout", b"ready")
    return handle


def open_gate(bench: DockerBench, handle: Handle) -> None:
    (folder(bench, handle) / "work/go").touch()


async def said(bench: DockerBench, *command: str | Part, **fields: Any) -> tuple[Outcome, str]:
    """How it ended, and what it printed."""
    async with served(bench) as backend:
        job = bench.job(*command, **fields)
        outcome = await backend.wait(await backend.submit(job))
        streams = (folder(bench, job) / name for name in ("stdout", "stderr"))
        return outcome, "".join(stream.read_text() if stream.exists() else "" for stream in streams)


async def finally_(backend: DockerBackend, handle: Handle) -> Outcome:
    """As the daemon does: an engine that is away is asked again."""
    with anyio.fail_after(60):
        while True:
            try:
                return await backend.wait(handle)
            except BackendUnavailable:
                await anyio.sleep(0.2)
