"""What we ask the controller to do: take a job, release it, end it, tell of its nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.backends.slurm import commands
from mlpiped.backends.slurm.runner import ask, attempt
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.base import Job
    from mlpiped.backends.slurm.commands import Nodes
    from mlpiped.backends.slurm.runner import Runner
    from mlpiped.config.computes import SlurmCompute

log = structlog.get_logger("slurm")
AT_ONCE = 4  # commands: each is a question to a controller that other people ask too
MOST = 200  # jobs that one command names
SHORTEST_PAUSE = 1.0  # seconds between two tries to submit to a full queue


class Controller:
    """All methods raise BackendUnavailable when it is not known that what they ask for was done."""

    def __init__(self, name: str, runner: Runner, compute: SlurmCompute, comment: str) -> None:
        self.name = name
        self.compute = compute
        self.full: str | None = None  # Slurm's words while it takes no more jobs of ours
        self._comment = comment
        self._runner = runner
        self._unreleased: set[int] = set()
        self._releasing = anyio.Lock()
        self._limiter = anyio.CapacityLimiter(AT_ONCE)

    async def submit(self, job: Job, folder: str, script: bytes) -> int:
        """The id of the held job. While the queue is full, it waits. Raises InvalidJob for what never can run there."""
        argv = commands.sbatch(job, folder, self.compute, self._comment)
        while True:
            code, stdout, stderr = await self._say(argv, script)
            number = commands.submitted(stdout) if code == 0 else None
            if number is not None:
                self.full = None
                return number
            words = commands.complaint(stderr)
            if commands.is_never(stderr):
                raise InvalidJob(f"Slurm refuses the job: {words}")
            if not commands.is_full(stderr):
                raise BackendUnavailable(f"sbatch on `{self.name}` does not say that it took the job: {words}")
            if self.full is None:
                log.info("the queue takes no more jobs: they wait", compute=self.name, why=words)
            self.full = words
            await anyio.sleep(max(SHORTEST_PAUSE, self.compute.poll_interval))

    async def release(self, job: int) -> None:
        """With those that come while another release is on its way: one command for all of them."""
        self._unreleased.add(job)
        try:
            async with self._releasing:
                if job not in self._unreleased:
                    return
                batch = {job, *list(self._unreleased)[:MOST]}
                code, _, _ = await self._say(commands.release(sorted(batch)))
                if code == 0:
                    self._unreleased -= batch
                else:  # which of them it was, it says in words alone
                    await self._done(commands.release([job]), f"job {job} of `{self.name}` is not released")
        finally:
            self._unreleased.discard(job)

    async def cancel(self, job: int, token: str) -> None:
        """Out of the queue, or ended by Slurm."""
        await self._done(commands.scancel(job, token), f"job {job} of `{self.name}` is not cancelled")

    async def terminate(self, job: int, token: str) -> None:
        """SIGTERM to its supervisor."""
        await self._done(commands.terminate(job, token), f"job {job} of `{self.name}` is not cancelled")

    async def nodes(self) -> Nodes:
        partition = self.compute.partition
        return commands.nodes(await ask(self._runner, commands.sinfo(partition)))

    async def _done(self, argv: Sequence[str], fault: str) -> None:
        """It was done, or the job has ended."""
        code, _, stderr = await self._say(argv)
        if code != 0 and not commands.is_gone(stderr):
            raise BackendUnavailable(f"{fault}: {commands.complaint(stderr)}")

    async def _say(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, str, str]:
        async with self._limiter:
            return await attempt(self._runner, argv, stdin)
