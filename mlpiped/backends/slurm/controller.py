"""What we ask the controller to do: take a job, release it, end it, tell of its nodes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.backends.slurm import commands
from mlpiped.backends.slurm.commands import MOST
from mlpiped.backends.slurm.runner import ask, attempt
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from mlpiped.backends.slurm.commands import Nodes, Ref
    from mlpiped.backends.slurm.runner import Answer, Runner, Stdin
    from mlpiped.config.computes import SlurmCompute

log = structlog.get_logger("slurm")
AT_ONCE = 4  # commands: each is a question to a controller that other people ask too


class Controller:
    """All methods raise BackendUnavailable when it is not known that what they ask for was done."""

    def __init__(self, name: str, runner: Runner, compute: SlurmCompute) -> None:
        self.name = name
        self.compute = compute
        self.full: str | None = None  # Slurm's words while it takes no more jobs of ours
        self._runner = runner
        self._ending = _Together(self._end)
        self._unreleased: set[Ref] = set()
        self._releasing = anyio.Lock()
        self._limiter = anyio.CapacityLimiter(AT_ONCE)
        self._never_freed: tuple[float, set[Ref]] = float("-inf"), set()  # when it was asked, and its answer
        self._remembering = anyio.Lock()

    async def offer(self, argv: Sequence[str], script: Stdin, within: float) -> int | None:
        """The id of the held job; None while the queue is full. Raises InvalidJob for what never can run there.
        `script`, `within`: as `Runner` has it.

        An sbatch that was ended while the queue was full may have left a job all the same. It is held, and no record
        names it: so it is taken out, and it is safe to ask again.
        """
        code, stdout, stderr = await self._say(argv, script, within)
        number = commands.submitted(stdout) if code == 0 else None
        if number is not None:
            self.full = None
            return number
        words = commands.complaint(stderr)
        if commands.is_never(stderr):
            raise InvalidJob(f"Slurm refuses the job: {words}")
        if not commands.is_full(stderr):
            raise BackendUnavailable(f"sbatch on `{self.name}` does not say that it took the job: {words}")
        words = commands.full_words(stderr)
        if self.full is None:
            log.info("the queue takes no more jobs: they wait", compute=self.name, why=words)
        self.full = words
        return None

    async def release_named(self, naming: asyncio.Future[Sequence[Ref]]) -> None:
        """As `release`, by a command that starts while it is found out which: none, perhaps."""
        words: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def tell(_: object) -> None:
            if not words.done():
                words.set_result(None if naming.cancelled() else commands.releases(naming.result()) or None)

        naming.add_done_callback(tell)
        code, _, _ = await self._say(["scontrol"], words)
        if code != 0 and (jobs := naming.result()):
            await self.release(jobs)

    async def release(self, jobs: Sequence[Ref]) -> None:
        """With those that come while another release is on its way: one command for all of them."""
        wanted = set(jobs)
        self._unreleased |= wanted
        try:
            async with self._releasing:
                while wanted & self._unreleased:
                    await self._release(wanted)
        finally:
            self._unreleased -= wanted

    async def _release(self, wanted: set[Ref]) -> None:
        """Some of those, and others as far as there is room."""
        first = sorted(wanted & self._unreleased, key=str)[:MOST]
        batch = [*first, *[job for job in self._unreleased if job not in wanted][: MOST - len(first)]]
        code, _, _ = await self._say(commands.release(batch))
        if code == 0:
            self._unreleased.difference_update(batch)
            return
        for job in first:  # which of them it was, it says in words alone
            await self._done(commands.release([job]), f"job {job} of `{self.name}` is not released")
            self._unreleased.discard(job)

    async def forgot(self, job: Ref) -> bool:
        """Whether it knows nothing of the release of this job: one that is killed forgets what it was told last. Of a
        Slurm that cannot say so, it is not believed."""
        now = time.monotonic()
        async with self._remembering:
            if self._never_freed[0] < now:
                now = time.monotonic()
                code, stdout, stderr = await self._say(commands.squeue_freed())
                if code != 0 and commands.is_unreachable(stderr):
                    raise BackendUnavailable(f"job {job} of `{self.name}` is held: {commands.complaint(stderr)}")
                self._never_freed = now, commands.never_freed(stdout) if code == 0 else set()
        return job in self._never_freed[1]

    async def cancel(self, job: Ref, name: str) -> None:
        """Out of the queue, or ended by Slurm."""
        if isinstance(job, int):
            await self._done(commands.scancel(job, name), f"job {job} of `{self.name}` is not cancelled")
        else:
            await self._ending.ask(job, name)

    async def _end(self, elements: Mapping[str, str]) -> None:
        """Those that are in the queue under these names."""
        arrays = sorted({commands.array_of(job) for job in elements})
        code, stdout, stderr = await self._say(commands.squeue(arrays))
        if code != 0 and not commands.is_gone(stderr):
            raise BackendUnavailable(
                f"elements of arrays of `{self.name}` are not cancelled: {commands.complaint(stderr)}"
            )
        listing = commands.listed(stdout)
        there = [
            job
            for job, name in elements.items()
            if (one := listing.get(job)) is not None and one.name == name and one.state not in commands.ENDED
        ]
        if there:
            await self._done(commands.scancel_elements(there), f"jobs {there[0]} … of `{self.name}` are not cancelled")

    async def terminate(self, job: Ref, name: str) -> None:
        """SIGTERM to its supervisor."""
        await self._done(commands.terminate(job, name), f"job {job} of `{self.name}` is not cancelled")

    async def nodes(self) -> Nodes:
        partition = self.compute.partition
        found = commands.nodes(await ask(self._runner, commands.sinfo(partition)))
        if not found.down:
            return found
        return replace(found, away=commands.away(await ask(self._runner, commands.sinfo_away(partition))))

    async def _done(self, argv: Sequence[str], fault: str) -> None:
        """It was done, or the job has ended."""
        code, _, stderr = await self._say(argv)
        if code != 0 and not commands.is_gone(stderr):
            raise BackendUnavailable(f"{fault}: {commands.complaint(stderr)}")

    async def _say(self, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
        async with self._limiter:
            return await attempt(self._runner, argv, stdin, within)


class _Together:
    """What is asked for while a command is under way goes with the next: one for all of them, and its end is theirs."""

    def __init__(self, act: Callable[[Mapping[str, str]], Awaitable[None]]) -> None:
        self._act = act
        self._next: _Round | None = None
        self._turn = anyio.Lock()

    async def ask(self, job: str, name: str) -> None:
        """Raises BackendUnavailable."""
        if self._next is None or len(self._next.jobs) >= MOST:
            self._next = _Round()
        mine = self._next
        mine.jobs[job] = name
        async with self._turn:
            if not mine.over:
                if self._next is mine:
                    self._next = None
                try:
                    await self._act(mine.jobs)
                except BackendUnavailable as fault:
                    mine.fault = fault.message
                mine.over = True
        if mine.fault is not None:
            raise BackendUnavailable(mine.fault)


@dataclass(eq=False, slots=True)
class _Round:
    jobs: dict[str, str] = field(default_factory=dict)
    over: bool = False
    fault: str | None = None
