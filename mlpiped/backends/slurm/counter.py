"""Where jobs are handed in: like ones that come together go as one array, with one sbatch for all; and what was taken
at about the same time, like or not, is recorded and released together.

Nobody waits for company: only for those who are on their way already, and while another sbatch for such jobs is under
way. What takes time goes on side by side: sbatch starts while the array's list is made durable, and hears its script
after that; the orders are written while it asks; the release starts while the records are made durable, and hears whom
it is for after that. A submission that is under way goes on when nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import structlog

from mlpiped.backends.slurm import arrays, commands, submission
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from mlpiped.backends.base import Handle, Job
    from mlpiped.backends.slurm.commands import Ref
    from mlpiped.backends.slurm.controller import Controller
    from mlpiped.backends.slurm.files import Files
    from mlpiped.backends.slurm.queue import Queue

log = structlog.get_logger("slurm")
NEXT = 0.05  # seconds that those who are ready wait for the next one who is on the way
PATIENT = 1.0  # seconds that they wait in all
LEAST_PAUSE = 1.0  # seconds between two tries to submit to a full queue

Fault = BackendUnavailable | InvalidJob


@dataclass(eq=False, slots=True)
class Entry:
    """A job on its way. `sent`: it is part of what sbatch is told. `over`: it has its handle or its fault."""

    job: Job
    ready: Any = None
    sent: bool = False
    ref: Ref = 0
    array: str | None = None
    handle: Handle | None = None
    fault: Fault | None = None
    wanted: bool = True
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, fault: Fault) -> None:
        self.fault, self.handle = type(fault)(fault.message), None


@dataclass(eq=False, slots=True)
class _Line:
    """Jobs that sbatch is told the same of."""

    coming: int = 0
    waiting: list[Entry] = field(default_factory=list)
    came: anyio.Event = field(default_factory=anyio.Event)
    served: bool = False
    most: int = 1 << 30  # in one array: fewer while the queue is nearly full


class Counter:
    def __init__(self, controller: Controller, queue: Queue, files: Files, comment: str) -> None:
        self._controller = controller
        self._queue = queue
        self._files = files
        self._comment = comment
        self._entries: dict[str, Entry] = {}
        self._lines: dict[tuple[Any, ...], _Line] = {}
        self._taken: list[Entry] = []  # by Slurm, and not recorded
        self._recording = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail(list(self._entries.values()), BackendUnavailable(f"`{self._controller.name}` is being left"))

    def __contains__(self, token: str) -> bool:
        return token in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    # --- who comes ----------------------------------------------------------------------------------------------
    async def submit(self, job: Job) -> Handle:
        """Submitted, recorded and released; at another time, or by another, maybe. Raises InvalidJob for what never
        can run there, and BackendUnavailable."""
        while (other := self._entries.get(job.token)) is not None:
            await other.over.wait()
        entry = self._entries[job.token] = Entry(job)
        like = commands.likeness(job)
        line = self._lines.setdefault(like, _Line())
        line.coming += 1
        try:
            try:
                if await self._ready(entry):
                    line.waiting.append(entry)
            finally:
                line.coming -= 1
                line.came.set()
            if not line.served:
                line.served = True
                self._spawn(self._serve(like, line))
            await entry.over.wait()
        finally:
            entry.wanted = False
            if not entry.sent:
                self._end(entry)
                if entry in line.waiting:
                    line.waiting.remove(entry)
                self._tidy(like, line)
        if entry.fault is not None:
            raise entry.fault
        assert entry.handle is not None
        return entry.handle

    async def _ready(self, entry: Entry) -> bool:
        """False: it has been submitted before."""
        if not self._files.at_once(entry.job):
            known = await self._files.enlist(None, [entry.job.token])
            if self._known(entry, known):
                return False
        entry.ready = await self._files.ready(entry.job)
        return True

    def _known(self, entry: Entry, known: dict[str, dict[str, Any]]) -> bool:
        record = known.get(entry.job.token)
        if record is not None:
            self._stands(entry, record)
            self._end(entry)
        return record is not None

    def _stands(self, entry: Entry, record: dict[str, Any]) -> None:
        """A submitter that finds its token fenced is late, and will find that out by `fence`."""
        if record.get("fenced"):
            entry.fail(BackendUnavailable(f"token `{entry.job.token}` was fenced and cannot start"))
        else:
            entry.handle = submission.handle_of(entry.job.token, record)

    def _end(self, entry: Entry) -> None:
        if self._entries.get(entry.job.token) is entry:
            del self._entries[entry.job.token]
            self._files.left(entry.job.token)
        entry.over.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- one batch of a line after the other --------------------------------------------------------------------
    async def _serve(self, like: tuple[Any, ...], line: _Line) -> None:
        try:
            while line.waiting:
                await self._gather(line)
                if line.waiting:
                    await self._send(line)
        finally:
            line.served = False
            self._tidy(like, line)

    def _tidy(self, like: tuple[Any, ...], line: _Line) -> None:
        if not (line.coming or line.waiting or line.served) and self._lines.get(like) is line:
            del self._lines[like]

    async def _gather(self, line: _Line) -> None:
        with anyio.move_on_after(PATIENT):
            while line.coming:
                line.came = anyio.Event()
                with anyio.move_on_after(NEXT) as pause:
                    await line.came.wait()
                if pause.cancelled_caught:
                    return

    async def _send(self, line: _Line) -> None:
        """Those that go together now. While the queue is full it waits; an array for which there is no room becomes a
        smaller one first."""
        batch = line.waiting
        try:
            if len(line.waiting) > 1:
                batch = line.waiting[: max(1, min(line.most, commands.longest_array(await self._config())))]
            for entry in batch:
                entry.sent = True
            line.waiting = line.waiting[len(batch) :]
            number = await self._offer(batch)
        except Exception as fault:
            line.waiting = [entry for entry in line.waiting if entry not in batch]
            self._fail(batch, fault)
            return
        left = [entry for entry in batch if not entry.over.is_set()]
        if number is not None:
            line.most *= 2
            await self._settled(left)
            return
        for entry in left:
            entry.sent = False
            if not entry.wanted:
                self._end(entry)
        line.waiting[:0] = [entry for entry in left if entry.wanted]
        if len(left) == len(batch):
            line.most = max(1, len(batch) // 2)
            if len(batch) == 1:
                await anyio.sleep(max(LEAST_PAUSE, self._controller.compute.poll_interval))

    async def _config(self) -> Mapping[str, str]:
        if self._queue.config is None:
            await self._queue.configure()
        return self._queue.config or {}

    async def _offer(self, batch: Sequence[Entry]) -> int | None:
        """The number of the held job, the orders being complete. None: the queue is full; or some have been submitted
        before, are over, and the others are to be offered without them. Raises BackendUnavailable, InvalidJob."""
        first = batch[0].job
        jobs_dir, array = f"{self._files.place}/jobs", secrets.token_hex(8) if len(batch) > 1 else None
        argv = commands.sbatch(first, jobs_dir, self._controller.compute, self._comment)
        if array is not None:
            argv = commands.as_array(argv, array, len(batch))
        script: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        within = commands.patience(self._queue.config)
        number, built = await asyncio.gather(
            self._controller.offer(argv, script, within), self._build(batch, array, script), return_exceptions=True
        )
        if isinstance(built, BaseException):
            raise built
        if not built:
            return None
        if isinstance(number, BaseException):
            raise number
        for index, entry in enumerate(batch):
            entry.ref, entry.array = number or 0 if array is None else f"{number}_{index}", array
        return number

    async def _build(self, batch: Sequence[Entry], array: str | None, script: asyncio.Future[bytes | None]) -> bool:
        """What there has to be before sbatch hears its script, and then the orders. False: it shall not hear it."""
        tokens = [entry.job.token for entry in batch]
        try:
            known = await self._files.enlist(array, tokens)
            for entry in batch:
                self._known(entry, known)
            if not known and not script.done():
                text = self._files.script(tokens[0])
                script.set_result(text if array is None else arrays.script(text, tokens))
        finally:
            if not script.done():
                script.set_result(None)
        if known:
            return False
        wrong = await self._files.build([entry.job for entry in batch], [entry.ready for entry in batch])
        for entry in batch:
            entry.fault = wrong.get(entry.job.token)
        return True

    # --- what counts --------------------------------------------------------------------------------------------
    async def _settled(self, entries: list[Entry]) -> None:
        """With all that are taken while others are recorded. Returns when these are over: it waits for no others."""
        self._taken += entries
        if not self._recording:
            self._recording = True
            self._spawn(self._record())
        for entry in entries:
            await entry.over.wait()

    async def _record(self) -> None:
        try:
            while self._taken:
                batch, self._taken = self._taken, []
                try:
                    await self._settle(batch)
                except Exception as fault:
                    self._fail(batch, fault)
        finally:
            self._recording = False

    async def _settle(self, batch: Sequence[Entry]) -> None:
        """Make these submissions the ones that count, and release them; or take them back, where another or the fence
        does."""
        naming: asyncio.Future[Sequence[Ref]] = asyncio.get_running_loop().create_future()
        submitted = {e.job.token: submission.submitted(e.ref, e.job.grace, e.array) for e in batch if e.fault is None}

        async def record() -> list[Entry]:
            try:
                standing = await self._files.settle(submitted)
                ours = [e for e in batch if standing.get(e.job.token, {}).get("job") == e.ref]
                naming.set_result(_named(batch, ours))
            finally:
                if not naming.done():
                    naming.set_result([])
            for entry in batch:
                if entry.fault is None:
                    self._stands(entry, standing[entry.job.token])
            return ours

        ours, released = await asyncio.gather(record(), self._controller.release_named(naming), return_exceptions=True)
        if isinstance(ours, BaseException):
            raise ours
        if isinstance(released, BaseException):
            self._fail(ours, released)
        lost = [entry for entry in batch if entry not in set(ours)]
        for entry in batch:
            self._end(entry)
        self._queue.expect()
        for entry in lost:
            await self._take_back(entry.job.token, entry.ref, entry.array)
        if not isinstance(released, BaseException):
            await self._files.released([entry.job.token for entry in ours])

    async def adopt(self, token: str, ref: Ref, array: str | None) -> Handle | None:
        """Make that job of the queue the one that counts, and release it. None: it does not count."""
        record = await self._files.adopt(token, ref, array)
        if record is None:
            return None
        if record.get("job") != ref:
            await self._take_back(token, ref, array)
        else:
            try:
                await self._controller.release([ref])
                await self._files.released([token])
                self._queue.expect()
            except BackendUnavailable as fault:  # who waits for it will see that
                log.warning(fault.message, compute=self._controller.name)
        return None if record.get("fenced") else submission.handle_of(token, record)

    async def _take_back(self, token: str, ref: Ref, array: str | None) -> None:
        try:
            await self._controller.cancel(ref, submission.name_of({"job": ref, "token": token, "array": array}))
        except BackendUnavailable as fault:  # it is held, and taken out as soon as somebody looks at the queue
            log.warning(fault.message, compute=self._controller.name)

    def _fail(self, batch: Sequence[Entry], fault: BaseException) -> None:
        if not isinstance(fault, Fault):
            log.error("a submission has failed", compute=self._controller.name, exc_info=fault)
            fault = BackendUnavailable(f"cannot submit to `{self._controller.name}`: {fault}")
        for entry in batch:
            if not entry.over.is_set():
                entry.fail(fault)
                self._end(entry)


def _named(batch: Sequence[Entry], ours: Sequence[Entry]) -> list[Ref]:
    """How Slurm is told of them: an array of which all are meant, by its number."""
    parts = {entry.array for entry in set(batch) - set(ours)}
    return list(dict.fromkeys(e.ref if e.array in parts or not e.array else commands.array_of(e.ref) for e in ours))
