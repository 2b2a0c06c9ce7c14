"""Jobs of a Slurm cluster that sees the same files: submitted held, made durable, released, watched by one squeue.

On the node the supervisor of `base.py` executes them, so that a folder says the same here as on any other machine: who
claimed the token, how it ended. Slurm is asked for what the folder cannot know: whether it still waits and for what,
and who ended it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
import anyio.to_thread
import structlog

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Capacity, Card, Cluster, Handle, Image, Job, NeverRan, Outcome
from mlpiped.backends.environments import Environments
from mlpiped.backends.slurm import commands, submission, surroundings, verdict
from mlpiped.backends.slurm.apptainer import Sifs
from mlpiped.backends.slurm.arrays import Lists
from mlpiped.backends.slurm.commands import Ref
from mlpiped.backends.slurm.controller import Controller
from mlpiped.backends.slurm.counter import Counter, Entry
from mlpiped.backends.slurm.queue import Queue
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AsyncExitStack

    from mlpiped.backends.slurm.commands import Listed, Nodes
    from mlpiped.backends.slurm.queue import Watch
    from mlpiped.backends.slurm.runner import Runner
    from mlpiped.config.computes import SlurmCompute

T = TypeVar("T")
log = structlog.get_logger("slurm")
PATIENCE = 120.0  # seconds until what is not to be seen over a network's file system is not there
NOT_SEEN = "its nodes have not been asked yet"
NODES_NAMED = 3  # groups of nodes that are away for one reason
FOLLOW = 0.2  # seconds between two looks at a log that is followed


class SlurmBackend:
    kind = "slurm"
    logs_here = True  # its folder is seen from here, by a link where `work_dir` is set

    def __init__(
        self,
        name: str,
        state_dir: Path,
        settings: SlurmCompute,
        *,
        instance: str,
        runner: Runner | None = None,
        python: str = sys.executable,
        patience: float = PATIENCE,
    ) -> None:
        self.name = name
        self.settings = settings
        self.root = (settings.work_dir or state_dir).absolute()
        self.jobs_dir = self.root / "jobs"
        self._jobs = os.fspath(self.jobs_dir)
        self._home = state_dir.absolute() / "jobs"  # where the daemon looks for logs
        self._python = python
        self._patience = patience
        runner = runner or HostRunner(os.environ)
        self._controller = Controller(name, runner, settings)
        self._environments = Environments(self.root / "envs", python)
        self._queue = Queue(name, runner, settings.poll_interval, self._on_strangers)
        self._lists = Lists(self.root)
        self._counter = Counter(self._controller, self._queue, self._lists, f"mlpiped:{instance}", self._do)
        self._tools: str | None = None
        self._sifs = Sifs()
        self._nodes: Nodes | None = None
        self._turns: dict[str, anyio.Lock] = {}
        self._sentenced: set[Ref] = set()  # held jobs that were taken out of the queue
        self._signalled: set[str] = set()  # tokens of cancelled jobs whose supervisor has been told
        self._trouble: str | None = None
        self._threads = anyio.CapacityLimiter(4)

    async def start(self, stack: AsyncExitStack) -> None:
        def make() -> None:
            folders.prepare(self.jobs_dir)
            self._environments.prepare()
            self._tools = submission.install(self.root)
            self._home.mkdir(parents=True, exist_ok=True)
            self._lists.sweep(self._jobs)

        await self._do("make its folders", make)
        self._queue.start()
        stack.push_async_callback(self._queue.close)

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
        return 0

    # --- submitted --------------------------------------------------------------------------------------------
    async def submit(self, job: Job) -> Handle:
        folder = folders.at(self._jobs, job.token)
        turn = self._turns.setdefault(job.token, anyio.Lock())
        try:
            with self._counter.coming(job) as place:
                async with turn:
                    known = await self._do("look for the job", lambda: self._standing(folder))
                    if known is not None:
                        return known
                    base = await self._environments.of(job)
                    script = await self._do("make the job's folder", lambda: self._build(folder, job, base))
                    try:
                        return await place.submit(folder, script)
                    except InvalidJob:
                        await self._do("fence the job", lambda: self._fence(folder))
                        raise
        finally:
            if not turn.statistics().tasks_waiting:
                self._turns.pop(job.token, None)

    def _standing(self, folder: str) -> Handle | None:
        """Raises BackendUnavailable when it is fenced: its submitter is late, and will find that out by `fence`."""
        record = submission.record_of(folder)
        if (record is None and folders.fenced(folder)) or (record is not None and record.get("fenced")):
            raise BackendUnavailable(f"token `{os.path.basename(folder)}` was fenced and cannot start")
        return None if record is None else submission.handle_of(folder, record)

    def _build(self, folder: str, job: Job, base: dict[str, str]) -> bytes:
        """The folder, complete; the script that is to be submitted."""
        if job.code is not None and not os.path.isdir(job.code):
            raise BackendUnavailable(f"the code snapshot is missing: {job.code}")
        env = {**base, "SRUN_CPUS_PER_TASK": str(commands.cpus_of(job)), **folders.variables(folder, job)}
        for name in ("PATH", "PYTHONPATH"):  # the step's own come first; the environment's stay reachable
            if name in job.env:
                env[name] = f"{job.env[name]}:{base[name]}"
        order = folders.order(job.argv(folders.output_paths(folder, job)), env, job)
        assert self._tools is not None
        order = surroundings.around(order, job, folder, self._tools, self.settings)
        order["inherit"] = list(submission.INHERITED)
        folders.build(folder, job, json.dumps(order))
        link = self._home / job.token
        if self._home != self.jobs_dir and not link.is_symlink():
            link.symlink_to(folder)
        return submission.script(folder, self._tools, self._python)

    # --- found and fenced -------------------------------------------------------------------------------------
    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        def look() -> tuple[dict[str, Handle], list[str]]:
            found, open_ends = {}, []
            for token in tokens:
                folder = folders.at(self._jobs, token)
                record = submission.record_of(folder)
                if record is None and os.path.exists(folder) and not folders.fenced(folder):
                    open_ends.append(token)
                elif record is not None and not record.get("fenced"):
                    found[token] = submission.handle_of(folder, record)
            return found, open_ends

        found, open_ends = await self._do("look for jobs", look)
        if open_ends:
            listing = await self._queue.fresh()
            for token in open_ends:
                adopted = await self._adopted(token, listing)
                if adopted is not None:
                    found[token] = adopted
        return found

    async def fence(self, token: str) -> NeverRan | Handle:
        folder = folders.at(self._jobs, token)

        def look() -> tuple[dict[str, Any] | None, bool]:
            return submission.record_of(folder), os.path.exists(folder)

        record, built = await self._do("look for the job", look)
        if record is None and built:  # it may have been submitted: only an answer says that it is not in the queue
            adopted = await self._adopted(token, await self._queue.fresh())
            if adopted is not None:
                return adopted
        return await self._do("fence the job", lambda: self._fence(folder))

    def _fence(self, folder: str) -> NeverRan | Handle:
        os.makedirs(folder, exist_ok=True)
        record = submission.settle(folder, submission.FENCED)
        if not record.get("fenced"):
            return submission.handle_of(folder, record)
        found = folders.fence(folder)  # on the node too: somebody may release by hand what we never will
        if isinstance(found, NeverRan):
            return found
        return submission.handle_of(folder, submission.submitted(0, submission.grace_of(folder)))

    async def _adopted(self, token: str, listing: Mapping[Ref, Listed]) -> Handle | None:
        """The job that an sbatch left behind of which nobody heard more, released; None: there is none."""
        folder = folders.at(self._jobs, token)

        def look() -> tuple[list[Listed], float]:
            return self._lists.by_token(listing).get(token, []), submission.grace_of(folder)

        alive, grace = await self._do("look at the job", look)
        if not alive:
            return None
        first = min(alive, key=lambda one: (commands.array_of(one.job), str(one.job)))
        array = first.name.partition("/")[0] if isinstance(first.job, str) else None
        entry = Entry(Job(token, (), grace=grace), folder, b"")
        try:
            await self._counter.settle([entry], [first.job], array)
        except BackendUnavailable:
            pass  # not released: who waits for it will see that
        record = await self._do("look at the job", lambda: submission.record_of(folder))
        return None if record is None or record.get("fenced") else submission.handle_of(folder, record)

    async def _on_strangers(self, held: list[Listed]) -> None:
        """Take out of the queue what nobody will release: its token was fenced or has ended, or another job has it."""

        def look() -> list[Listed]:
            found = []
            for one in held:
                token = self._lists.token(one.name)
                folder = None if token is None else folders.at(self._jobs, token)
                record = None if folder is None else submission.record_of(folder)
                if folder is None or record is None:
                    continue
                over = folders.fenced(folder) or folders.witness(folder) is not None
                if over or record.get("job") != one.job:  # a controller that was killed may hold again what has ended
                    found.append(one)
            return found

        async def take_out(one: Listed) -> None:
            log.info("a job that will never run is taken out of the queue", compute=self.name, job=one.job)
            try:
                await self._controller.cancel(one.job, one.name)
                self._sentenced.add(one.job)
            except BackendUnavailable as fault:
                log.warning(fault.message, compute=self.name)

        held = [one for one in held if one.job not in self._sentenced]
        try:
            found = await self._do("look for jobs", look) if held else []
        except (BackendUnavailable, InvalidJob) as fault:
            log.warning(fault.message, compute=self.name)
            return
        async with anyio.create_task_group() as group:
            for one in found:
                group.start_soon(take_out, one)

    # --- waited for -------------------------------------------------------------------------------------------
    async def wait(self, handle: Handle) -> Outcome:
        outcome = await self._wait(handle)
        self._signalled.discard(handle["token"])
        return outcome

    async def _wait(self, handle: Handle) -> Outcome:
        folder, job = self._of(handle)
        if (early := verdict.judge(await self._look(folder), job, "", "", 0.0, self._patience)) not in (
            "wait",
            "fence",
        ):
            return early  # type: ignore[return-value]
        ending = verdict.Ending(handle.get("grace", 10.0))
        name, since = submission.name_of(handle), handle.get("submitted", time.time())
        with self._queue.watch(handle["token"], job, name, since) as watch:
            while True:
                await watch.changed(ending.pause(self._queue.interval))
                state, reason = watch.state, watch.reason  # before the folder: what has ended meanwhile is told by it
                look = await self._look(folder)
                waited = ending.waited(verdict.is_over(look, state))
                told = verdict.judge(look, job, state, reason, waited, self._patience)
                if told == "fence":
                    await self._do("fence the job", lambda: folders.fence(folder))
                    look = await self._look(folder)
                    told = verdict.judge(look, job, state, reason, waited, self._patience)
                if told not in ("wait", "fence"):
                    if state in commands.WAITING:
                        await self._controller.cancel(job, name)  # requeued, or fenced: it has no business there
                    return told  # type: ignore[return-value]
                await self._care(folder, handle, watch, look, ending)

    async def _care(
        self, folder: str, handle: Handle, watch: Watch, look: submission.Look, ending: verdict.Ending
    ) -> None:
        """Do what an earlier daemon, or a command that failed, has left undone."""
        if watch.reason == commands.HELD and watch.state in commands.WAITING:
            if not await self._do("look at the job", lambda: submission.marked(folder, "released")):
                await self._controller.release([handle["job"]])
                await self._do("record the job", lambda: submission.mark(folder, "released", durable=False))
                self._queue.expect()
        if look.cancelled and watch.state not in ("", None) and watch.state not in commands.ENDED:
            if handle["token"] not in self._signalled:  # the controller did not answer then, or we are another daemon
                await self.cancel(handle)
            elif ending.cancel_is_due():
                await self._controller.cancel(handle["job"], submission.name_of(handle))

    async def _look(self, folder: str) -> submission.Look:
        def look() -> submission.Look:
            try:
                return submission.look(folder)
            except FileNotFoundError:
                return submission.Look(None, False, False, False, False, "its folder is gone")

        return await self._do("look at the job", look)

    def doing(self, token: str) -> str | None:
        reason = self.waiting(token)
        return None if reason is None else f"waits in the queue of {self.name}: {reason}"

    def waiting(self, token: str) -> str | None:
        """In Slurm's own words: `Priority`, `Resources`; while the queue takes no more, those with which it refuses."""
        return self._controller.full if token in self._turns else self._queue.waiting(token)

    def cluster(self) -> Cluster:
        nodes, full = self._nodes, self._controller.full if self._turns else None
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
        folder, job = self._of(handle)

        def prepare() -> bool:
            """Whether it has started. Where it has not, it never will."""
            if os.path.exists(folder + "/exit.json") or not os.path.exists(folder):
                return False
            submission.mark(folder, "cancel")
            return not isinstance(folders.fence(folder), NeverRan)

        started = await self._do("cancel the job", prepare)
        if started:
            await self._controller.terminate(job, submission.name_of(handle))
            self._signalled.add(handle["token"])
        elif not await self._do("look at the job", lambda: os.path.exists(folder + "/exit.json")):
            self._signalled.add(handle["token"])
            await self._controller.cancel(job, submission.name_of(handle))
        self._queue.expect()

    # --- read and removed -------------------------------------------------------------------------------------
    async def logs(
        self, handle: Handle, stream: Literal["stdout", "stderr"], offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        folder, job = self._of(handle)
        offset = await self._do("read the log", lambda: folders.from_start(folder, stream, offset))

        def look(offset: int) -> tuple[bool, bytes]:
            """Whether nothing comes after this: so it is asked before reading."""
            gone = not os.path.exists(folder) or folders.fenced(folder) or folders.witness(folder) is not None
            seen = self._queue.seen(job, submission.name_of(handle))
            over = not follow or gone or (seen is not None and seen.state in commands.ENDED)
            return over, folders.read_stream(folder, stream, offset)

        while True:
            over, chunk = await self._do("read the log", lambda offset=offset: look(offset))  # type: ignore[misc]
            if chunk:
                offset += len(chunk)
                yield chunk
            elif over:
                return
            else:
                await anyio.sleep(FOLLOW)

    async def fetch(self, handle: Handle, into: Path) -> Path:
        return Path(self._of(handle)[0])

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        folder = folders.at(self._jobs, token)

        def remove() -> None:
            errors = folders.discard_all([(folder, keep_logs)])
            link = self._home / token
            if not keep_logs and link.is_symlink():
                link.unlink()
            self._trouble = None
            for error in errors:
                self._trouble = f"files of ended jobs cannot be removed: {error.strerror}: {error.filename}"

        await self._do("remove the job's files", remove)

    async def health(self) -> str | None:
        try:
            self._nodes = nodes = await self._controller.nodes()
        except BackendUnavailable as fault:
            return f"Slurm does not answer: {fault.message}"
        where = "" if self.settings.partition is None else f" of partition `{self.settings.partition}`"
        if nodes.up == 0:
            why = "".join(f"; {some.nodes} {some.state}: {some.reason}" for some in nodes.away[:NODES_NAMED])
            return f"no node{where} is up: {nodes.down} down or drained{why}"

        def look() -> str | None:
            if not os.access(self.jobs_dir, os.W_OK | os.X_OK):
                return f"the folder of its jobs cannot be written: {self.jobs_dir}"
            return self._trouble

        return await self._do("look at its folders", look)

    # --- pieces -----------------------------------------------------------------------------------------------
    def _of(self, handle: Handle) -> tuple[str, Ref]:
        """(folder, job id)"""
        if handle.get("v") != 1 or not isinstance(handle.get("token"), str) or not isinstance(handle.get("job"), Ref):
            raise InvalidJob(f"no handle of a Slurm job: {handle!r:.200}")
        return folders.at(self._jobs, handle["token"]), handle["job"]

    async def _do(self, what: str, function: Callable[[], T]) -> T:
        """In a thread; no foreign exception gets out."""
        try:
            return await anyio.to_thread.run_sync(function, limiter=self._threads)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise BackendUnavailable(f"cannot {what} on `{self.name}`: {error.strerror}{place}") from error
