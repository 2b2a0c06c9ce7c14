"""What a step in a container costs beyond the engine itself."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlpiped.backends.base import Exited, Job, Part
from mlpiped.backends.docker import DockerBackend
from mlpiped.config.computes import DockerCompute
from tests.bench.figures import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.docker_rig import Engine

TURNS, STEPS = 6, 5


def containers() -> Iterator[Figure]:
    """`true` in a container, one after another, their removal included; against `docker run --rm`, in turns."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the lab's rigs are found from there
    from lab import docker_rig, packages

    if (reason := docker_rig.why_not()) is not None:
        raise AssertionError(reason)
    packages.install(docker_rig.PACKAGES)
    engine = docker_rig.Engine()
    try:
        engine.start().make_images()
        raw, ours = anyio.run(_measure, engine, engine.image(docker_rig.PYTHON))
    finally:
        engine.close()
    note = (
        f"{statistics.median(ours) * 1000:.0f} ms against {statistics.median(raw) * 1000:.0f} ms, {TURNS * STEPS} each"
    )
    ratio = statistics.median(own / bare for own, bare in zip(ours, raw, strict=True))
    yield Figure("container of `true`, over `docker run --rm`", ratio, "×", 1.3, note=note)


async def _measure(engine: Engine, image: str) -> tuple[list[float], list[float]]:
    """Seconds a step, by turn: (the engine's client, ours)."""
    raw, ours = [], []
    with tempfile.TemporaryDirectory() as place:
        async with AsyncExitStack() as stack:
            backend = DockerBackend(
                "box", Path(place), DockerCompute(kind="docker", url=engine.url, slots=1), instance="bench"
            )
            await backend.start(stack)

            async def batch(name: str) -> float:
                began = time.perf_counter()
                for number in range(STEPS):
                    job = Job(f"{name}-{number}", ((Part("text", "true"),),), image=image)
                    outcome = await backend.wait(await backend.submit(job))
                    assert isinstance(outcome, Exited) and outcome.code == 0, outcome
                    await backend.discard(job.token, keep_logs=True)
                await backend.removed()
                return (time.perf_counter() - began) / STEPS

            def bare() -> float:
                began = time.perf_counter()
                for _ in range(STEPS):
                    engine.docker("run", "--rm", "--init", "--network=none", image, "true")
                return (time.perf_counter() - began) / STEPS

            await batch("warm")
            bare()
            for turn in range(TURNS):
                raw.append(await anyio.to_thread.run_sync(bare))
                ours.append(await batch(f"turn{turn}"))
    return raw, ours
