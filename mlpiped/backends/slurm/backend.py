"""Jobs of a Slurm cluster that sees the same files: submitted held, made durable, released, watched by one squeue.

On the node the supervisor of `base.py` executes them, so that a folder says the same here as on any other machine: who
claimed the token, how it ended. Slurm is asked for what the folder cannot know: whether it still waits and for what,
and who ended it.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Literal

import anyio
import structlog

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Capacity, Card, Cluster
from mlpiped.backends.slurm import commands, submission, verdict
from mlpiped.backends.slurm.apptainer import Sifs
from mlpiped.backends.slurm.arrays import Lists
from mlpiped.backends.slurm.commands import Ref
from mlpiped.backends.slurm.controller import Controller
from mlpiped.backends.slurm.counter import Counter
from mlpiped.backends.slurm.files import SharedFiles
from mlpiped.backends.slurm.queue import Queue
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AsyncExitStack
    from pathlib import Path

    from mlpiped.backends.base import Handle, Image, Job, NeverRan, Outcome
    from mlpiped.backends.slurm.commands import Listed, Nodes
    from mlpiped.backends.slurm.files import Files
    from mlpiped.backends.slurm.queue import Watch
    from mlpiped.backends.slurm.runner import Runner
    from mlpiped.config.computes import SlurmCompute

log = structlog.get_logger("slurm")
PATIENCE = 120.0  # seconds until what is not to be seen over a network's file system is not there
NOT_SEEN = "its nodes have not been asked yet"
NODES_NAMED = 3  # groups of nodes that are away for one reason


class SlurmBackend:
    kind = "slurm"

    def __init__(
        self,
        name: str,
        state_dir: Path,
        settings: SlurmCompute,
        *,
        instance: str,
        runner: Runner | None = None,
        files: Files | None = None,
        python: str = sys.executable,
        patience: float = PATIENCE,
    ) -> None:
        self.name = name
        self.settings = settings
        self._files = files or SharedFiles(name, state_dir, settings, python)
        self.logs_here = self._files.logs_here
        self._patience = patience
        runner = runner or HostRunner(os.environ)
        self._controller = Controller(name, runner, settings)
        self._queue = Queue(name, runner, settings.poll_interval, self._on_strangers)
        self._lists = Lists(self._files)
        self._counter = Counter(self._controller, self._queue, self._files, f"mlpiped:{instance}")
        self._sifs = Sifs()
        self._nodes: Nodes | None = None
        self._held: set[str] = set()  # tokens of jobs that a person holds
        self._signalled: set[str] = set()  # tokens of cancelled jobs whose supervisor has been told

    async def start(self, stack: AsyncExitStack) -> None:
        await self._files.start()
        self._queue.start()
        stack.push_async_callback(self._queue.close)
        stack.push_async_callback(self._counter.close)

    def capacity(self) -> Capacity:
        """Cards are places in Slurm's own queue: which of them a job gets, Slurm says."""
        count = self._nodes.gpus if self._nodes is not None else 0
        cards = tuple(Card(f"{self.name}:{index}", index, "gpu", 0) for index in range(count))
        slots = min(self.settings.slots, self.settings.max_jobs or self.settings.slots)
        nodes = None if self._nodes is None else self._nodes.up + self._nodes.down
        trouble = None if self._nodes is not None else NOT_SEEN
        sifs = bool(self.settings.apptainer)
        return Capacity(slots, cards=cards, no_cards=trouble, cluster=True, nodes=nodes, modules=True, sifs=sifs)

    async def image(self, reference: str | None, dockerfile: str | None) -> Image:
        return await self._sifs.image(reference)

    def bringing(self, reference: str | None, dockerfile: str | None) -> str | None:
        return None

    def missing(self, contents: Mapping[str, int]) -> int:
        return self._files.missing(contents)

    # --- submitted --------------------------------------------------------------------------------------------
    async def submit(self, job: Job) -> Handle:
        self._files.folder(job.token)
        try:
            return await self._counter.submit(job)
        except InvalidJob:
            await self._files.fence(job.token)
            raise

    # --- found and fenced -------------------------------------------------------------------------------------
    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        standing = {token: one for token, one in (await self._files.standing(tokens)).items() if not one.fenced}
        found = {token: submission.handle_of(token, one.record) for token, one in standing.items() if one.record}
        open_ends = [token for token, one in standing.items() if one.record is None and one.built]
        if open_ends:
            listing = await self._queue.fresh()
            for token in open_ends:
                adopted = await self._adopted(token, listing)
                if adopted is not None:
                    found[token] = adopted
        return found

    async def fence(self, token: str) -> NeverRan | Handle:
        found = (await self._files.standing([token]))[token]
        if found.record is None and found.built:  # only an answer says that it was not submitted
            adopted = await self._adopted(token, await self._queue.fresh())
            if adopted is not None:
                return adopted
        return await self._files.fence(token)

    async def _adopted(self, token: str, listing: Mapping[Ref, Listed]) -> Handle | None:
        """The job that an sbatch left behind of which nobody heard more, released; None: there is none."""
        alive = (await self._lists.by_token(listing)).get(token)
        if not alive:
            return None
        first = min(alive, key=lambda one: (commands.array_of(one.job), str(one.job)))
        array = first.name.partition("/")[0] if isinstance(first.job, str) else None
        return await self._counter.adopt(token, first.job, array)

    async def _on_strangers(self, held: list[Listed]) -> None:
        """Take out of the queue what nobody will release: its token was fenced or has ended, or another job has it."""

        async def look() -> list[tuple[Listed, str | None]]:
            """Those, and of each the token whose submission it is."""
            tokens = await self._lists.tokens(held)
            standing = await self._files.standing(sorted(set(tokens.values())))
            found: list[tuple[Listed, str | None]] = []
            for one in (one for one in held if one.job in tokens):
                at = standing[tokens[one.job]]
                if at.record is not None and at.record.get("job") != one.job:
                    found.append((one, None))
                elif at.record is not None and at.over:  # a killed controller may hold again what has ended
                    found.append((one, tokens[one.job]))
            return found

        async def take_out(one: Listed, token: str | None) -> None:
            log.info("a job that will never run is taken out of the queue", compute=self.name, job=one.job)
            try:
                if token is not None:
                    await self._files.drop(token)
                await self._controller.cancel(one.job, one.name)
            except BackendUnavailable as fault:
                log.warning(fault.message, compute=self.name)

        try:
            found = await look()
        except (BackendUnavailable, InvalidJob) as fault:
            log.warning(fault.message, compute=self.name)
            return
        async with anyio.create_task_group() as group:
            for one, token in found:
                group.start_soon(take_out, one, token)

    # --- waited for -------------------------------------------------------------------------------------------
    async def wait(self, handle: Handle) -> Outcome:
        outcome = await self._wait(handle)
        await self._files.ended(handle["token"], outcome)
        self._signalled.discard(handle["token"])
        self._held.discard(handle["token"])
        return outcome

    async def _wait(self, handle: Handle) -> Outcome:
        token, job = self._of(handle)
        early = verdict.judge(await self._files.look(token), job, "", "", 0.0, self._patience)
        if early not in ("wait", "fence"):
            return early  # type: ignore[return-value]
        ending = verdict.Ending(handle.get("grace", 10.0))
        name, since = submission.name_of(handle), handle.get("submitted", time.time())
        with self._queue.watch(token, job, name, since) as watch:
            while True:
                await watch.changed(ending.pause(self._queue.interval))
                state, reason = watch.state, watch.reason  # before the folder: what has ended meanwhile is told by it
                look = await self._files.look(token)
                waited = ending.waited(verdict.is_over(look, state))
                told = verdict.judge(look, job, state, reason, waited, self._patience)
                if told == "fence":
                    await self._files.bar(token)
                    look = await self._files.look(token)
                    told = verdict.judge(look, job, state, reason, waited, self._patience)
                if told not in ("wait", "fence"):
                    if state in commands.WAITING:
                        await self._files.drop(token)
                        await self._controller.cancel(job, name)  # requeued, or fenced: it has no business there
                    return told  # type: ignore[return-value]
                await self._care(handle, watch, look, ending)

    async def _care(self, handle: Handle, watch: Watch, look: submission.Look, ending: verdict.Ending) -> None:
        """Do what an earlier daemon, or a command that failed, has left undone."""
        if watch.reason != commands.HELD or watch.state not in commands.WAITING:
            self._held.discard(handle["token"])
        elif handle["token"] not in self._held:
            if look.released and not await self._controller.forgot(handle["job"]):
                self._held.add(handle["token"])
            else:
                await self._controller.release([handle["job"]])
                await self._files.released([handle["token"]])
                self._queue.expect()
        if look.cancelled and watch.state not in ("", None) and watch.state not in commands.ENDED:
            if handle["token"] not in self._signalled:  # the controller did not answer then, or we are another daemon
                await self.cancel(handle)
            elif ending.cancel_is_due():
                await self._controller.cancel(handle["job"], submission.name_of(handle))

    def doing(self, token: str) -> str | None:
        reason = self.waiting(token)
        if (moves := self._files.doing(token)) is not None:
            return moves
        return None if reason is None else f"waits in the queue of {self.name}: {reason}"

    def waiting(self, token: str) -> str | None:
        """In Slurm's own words: `Priority`, `Resources`; while the queue takes no more, those with which it refuses."""
        return self._controller.full if token in self._counter else self._queue.waiting(token)

    def cluster(self) -> Cluster:
        nodes, full = self._nodes, self._controller.full if self._counter else None
        return Cluster(
            partition=self.settings.partition,
            up=None if nodes is None else nodes.up,
            down=None if nodes is None else nodes.down,
            away=() if nodes is None else nodes.away,
            jobs=self._queue.states(),
            full=full,
        )

    # --- cancelled --------------------------------------------------------------------------------------------
    async def cancel(self, handle: Handle) -> None:
        token, job = self._of(handle)
        phase = await self._files.cancelling(token)
        if phase == "started":
            await self._controller.terminate(job, submission.name_of(handle))
            self._signalled.add(token)
        elif phase == "waits":
            self._signalled.add(token)
            await self._controller.cancel(job, submission.name_of(handle))
        self._queue.expect()

    # --- read and removed -------------------------------------------------------------------------------------
    async def logs(
        self, handle: Handle, stream: Literal["stdout", "stderr"], offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        token, job = self._of(handle)
        offset = await self._files.from_start(token, stream, offset)
        while True:
            seen = self._queue.seen(job, submission.name_of(handle))  # before reading: nothing comes after it then
            over, chunk = await self._files.read(token, stream, offset)
            if chunk:
                offset += len(chunk)
                yield chunk
            elif over or not follow or (seen is not None and seen.state in commands.ENDED):
                return
            else:
                await anyio.sleep(self._files.follow)

    async def fetch(self, handle: Handle, into: Path) -> Path:
        return await self._files.fetch(self._of(handle)[0])

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        await self._files.discard(token, keep_logs=keep_logs)

    async def health(self) -> str | None:
        try:
            self._nodes = nodes = await self._controller.nodes()
        except BackendUnavailable as fault:
            return f"Slurm does not answer: {fault.message}"
        where = "" if self.settings.partition is None else f" of partition `{self.settings.partition}`"
        if nodes.up == 0:
            why = "".join(f"; {some.nodes} {some.state}: {some.reason}" for some in nodes.away[:NODES_NAMED])
            return f"no node{where} is up: {nodes.down} down or drained{why}"

        return await self._files.health()

    # --- pieces -----------------------------------------------------------------------------------------------
    def _of(self, handle: Handle) -> tuple[str, Ref]:
        """(token, job id)"""
        token, job = handle.get("token"), handle.get("job")
        if handle.get("v") != 1 or not isinstance(token, str) or not isinstance(job, Ref):
            raise InvalidJob(f"no handle of a Slurm job: {handle!r:.200}")
        folders.at("", token)
        return token, job
