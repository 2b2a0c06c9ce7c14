"""A cluster against Slurm's own commands: many steps submitted, like ones as an array and unlike ones as jobs."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlpiped.backends.base import Job, Part
from mlpiped.backends.slurm import SlurmBackend
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.config.computes import SlurmCompute
from tests.bench.figures import Figure
from tests.bench.gauges import wall
from tests.lab import slurm_rig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlpiped.backends.slurm.runner import Answer, Stdin

MANY = 200
ARRAYS, LOOPS = 9, 3  # pairs
TIMES_ARRAY = 2.0
TIMES_LOOP = 1.3


class Timed(HostRunner):
    """Seconds in which one of Slurm's commands was under way, however many at once."""

    def __init__(self, cluster: slurm_rig.Cluster) -> None:
        super().__init__(cluster.env)
        self.seconds = 0.0
        self._running, self._since = 0, 0.0

    async def run(self, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
        now = time.perf_counter()
        self._running, self._since = self._running + 1, now if self._running == 0 else self._since
        try:
            return await super().run(argv, stdin, within)
        finally:
            self._running -= 1
            if self._running == 0:
                self.seconds += time.perf_counter() - self._since


def array() -> Iterator[Figure]:
    """Two commands are what a job costs that nobody can lose: held, its id made durable, released."""

    def jobs(number: int) -> list[Job]:
        return [_true(f"a{number}-{index}") for index in range(MANY)]

    def bare(cluster: slurm_rig.Cluster) -> None:
        _sbatch(cluster, f"--array=0-{MANY - 1}")

    def two(cluster: slurm_rig.Cluster) -> None:
        number = _sbatch(cluster, f"--array=0-{MANY - 1}", "--hold")
        cluster.command("scontrol", "release", number)

    raw, both, ours, inside = _medians((bare, two), jobs, ARRAYS)
    note = f"median of {ARRAYS} rounds: {ours * 1e3:.0f} ms, sbatch {raw * 1e3:.1f} ms"
    yield Figure(f"{MANY} like steps submitted / `sbatch --array`", ours / raw, "×", TIMES_ARRAY, note=note)
    yield Figure("of it, two commands alone", both / raw, "×", note="`sbatch --hold`, then `scontrol release`")
    yield Figure(
        "of it, without any command", (ours - inside) * 1e3, "ms", note="before sbatch, between, after release"
    )


def many() -> Iterator[Figure]:
    def jobs(number: int) -> list[Job]:
        return [_true(f"m{number}-{index}", memory=(index + 1) << 20) for index in range(MANY)]

    def bare(cluster: slurm_rig.Cluster) -> None:
        for index in range(MANY):
            _sbatch(cluster, f"--mem={index + 1}M")

    raw, ours, _ = _medians((bare,), jobs, LOOPS)
    note = f"median of {LOOPS} rounds: {ours * 1e3:.0f} ms, sbatch {raw * 1e3:.0f} ms"
    yield Figure(f"{MANY} unlike steps submitted / `sbatch` in a loop", ours / raw, "×", TIMES_LOOP, note=note)


def _medians(
    bare: Sequence[Callable[[slurm_rig.Cluster], None]], jobs: Callable[[int], list[Job]], rounds: int
) -> list[float]:
    """Seconds of each of Slurm's ways; of ours; and of ours those in which a command of Slurm was under way. In turn,
    on nodes that start nothing meanwhile."""

    async def main(cluster: slurm_rig.Cluster, place: Path) -> list[float]:
        found = []
        async with AsyncExitStack() as stack:
            runner, settings = Timed(cluster), SlurmCompute(kind="slurm")
            backend = SlurmBackend("cluster", place, settings, instance="0" * 32, runner=runner)
            await backend.start(stack)
            for number in range(rounds + 1):  # the first of each is not counted
                raw = [wall(lambda way=way: way(cluster)) for way in bare]  # type: ignore[misc]
                runner.seconds = 0.0
                ours = await _submitted(backend, jobs(number))
                found.append([*raw, ours, runner.seconds])
                cluster.command("scancel", "-u", "root")
        return [statistics.median(some) for some in zip(*found[1:], strict=True)]

    with slurm_rig.running() as cluster, tempfile.TemporaryDirectory(prefix="mlpd-slurm-bench-") as place:
        cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=bench")
        return anyio.run(main, cluster, Path(place))


async def _submitted(backend: SlurmBackend, jobs: Sequence[Job]) -> float:
    """Seconds until all of them are in the queue, with their handles durable, and released."""
    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(backend.submit, job)
    return time.perf_counter() - began


def _sbatch(cluster: slurm_rig.Cluster, *more: str) -> str:
    return subprocess.run(
        ["sbatch", "--parsable", "--output=/dev/null", *more], input="#!/bin/sh\ntrue\n", env=cluster.env, cwd="/",
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.strip()  # fmt: skip


def _true(token: str, memory: int | None = None) -> Job:
    return Job(token=token, arguments=((Part("text", "true"),),), memory=memory)
