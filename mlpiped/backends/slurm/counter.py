"""Where jobs are handed in: like ones that come together go as one array, with one sbatch and one release for all.

Nobody waits for company: only for those who are on their way already, and while another sbatch for such jobs is under
way. Each job then has a record of its own, and goes its own way.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.backends.slurm import arrays, commands, submission
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlpiped.backends.base import Handle, Job
    from mlpiped.backends.slurm.commands import Ref
    from mlpiped.backends.slurm.controller import Controller
    from mlpiped.backends.slurm.files import Files
    from mlpiped.backends.slurm.queue import Queue

log = structlog.get_logger("slurm")
NEXT = 0.05  # seconds that those who are ready wait for the next one who is on the way
PATIENT = 1.0  # seconds that they wait in all
LEAST_PAUSE = 1.0  # seconds between two tries to submit to a full queue


@dataclass(eq=False, slots=True)
class Entry:
    """A job whose folder is built."""

    job: Job
    folder: str
    script: bytes
    handle: Handle | None = None
    fault: BackendUnavailable | InvalidJob | None = None

    @property
    def form(self) -> bytes:
        """Equal for those whose scripts differ by their tokens alone."""
        return self.script.replace(self.job.token.encode(), b"@")


@dataclass(eq=False, slots=True)
class _Line:
    """Jobs that sbatch is told the same of."""

    coming: int = 0
    waiting: list[Entry] = field(default_factory=list)
    came: anyio.Event = field(default_factory=anyio.Event)
    turn: anyio.Lock = field(default_factory=anyio.Lock)
    most: int = 1 << 30  # in one array: fewer while the queue is nearly full


class Counter:
    def __init__(self, controller: Controller, queue: Queue, files: Files, comment: str) -> None:
        self._controller = controller
        self._queue = queue
        self._files = files
        self._comment = comment
        self._lines: dict[tuple[str, ...], _Line] = {}

    @contextmanager
    def coming(self, job: Job) -> Iterator[Place]:
        """A place in the line, from before the job's folder is built."""
        like = tuple(commands.sbatch(job, "", self._controller.compute, "", token=""))
        line = self._lines.setdefault(like, _Line())
        line.coming += 1
        place = Place(self, line, job)
        try:
            yield place
        finally:
            place.leave()
            if not line.coming and not line.waiting and not line.turn.statistics().tasks_waiting:
                if self._lines.get(like) is line and not line.turn.locked():
                    del self._lines[like]

    # --- one batch after the other ------------------------------------------------------------------------------
    async def send(self, line: _Line) -> None:
        """Those of the line that go together now. It is whoever has the line's turn that calls this."""
        await self._gather(line)
        number, array, batch = await self._submit(line)
        for entry in batch:
            line.waiting.remove(entry)
        if number is None:
            return
        refs: list[Ref] = [number] if array is None else [f"{number}_{index}" for index in range(len(batch))]
        try:
            await self.settle(batch, refs, array)
        except BackendUnavailable as fault:
            _fail(batch, fault)

    async def _gather(self, line: _Line) -> None:
        with anyio.move_on_after(PATIENT):
            while line.coming:
                line.came = anyio.Event()
                with anyio.move_on_after(NEXT) as pause:
                    await line.came.wait()
                if pause.cancelled_caught:
                    return

    async def _submit(self, line: _Line) -> tuple[int | None, str | None, list[Entry]]:
        """(the job's id or, for a batch that has failed, None; the array's; who is meant). While the queue is full, it
        waits: an array for which there is no room becomes a smaller one first."""
        while True:
            batch: list[Entry] = []
            try:
                batch = await self._batch(line)
                number, array = await self._offer(batch)
            except (BackendUnavailable, InvalidJob) as fault:
                batch = batch or list(line.waiting)
                _fail(batch, fault)
                return None, None, batch
            if number is not None:
                line.most *= 2
                return number, array, batch
            line.most = max(1, len(batch) // 2)
            if len(batch) == 1:
                await anyio.sleep(max(LEAST_PAUSE, self._controller.compute.poll_interval))

    async def _batch(self, line: _Line) -> list[Entry]:
        form = line.waiting[0].form
        like = [entry for entry in line.waiting if entry.form == form]
        if len(like) == 1:
            return like
        if self._queue.config is None:
            await self._queue.configure()
        assert self._queue.config is not None
        return like[: max(1, min(line.most, commands.longest_array(self._queue.config)))]

    async def _offer(self, batch: Sequence[Entry]) -> tuple[int | None, str | None]:
        first = batch[0]
        argv = commands.sbatch(first.job, first.folder, self._controller.compute, self._comment)
        argv = commands.limited(argv, self._queue.config)
        if len(batch) == 1:
            return await self._controller.offer(argv, first.script), None
        tokens = [entry.job.token for entry in batch]
        array = await self._files.write_array(tokens)
        argv = commands.as_array(argv, array, first.folder.rpartition("/")[0], len(batch))
        return await self._controller.offer(argv, arrays.script(first.script, first.folder, tokens)), array

    # --- what counts --------------------------------------------------------------------------------------------
    async def settle(self, batch: Sequence[Entry], refs: Sequence[Ref], array: str | None) -> None:
        """Make these submissions the ones that count, and release them; or take them back, where another or the fence
        does. Each entry has its handle or its fault then. Raises BackendUnavailable."""
        records = [submission.submitted(ref, e.job.grace, array) for e, ref in zip(batch, refs, strict=True)]
        standing = await self._files.settle([entry.job.token for entry in batch], records)
        ours: list[tuple[Entry, Ref]] = []
        lost: list[tuple[Entry, Ref]] = []
        for entry, ref, record in zip(batch, refs, standing, strict=True):
            if record.get("fenced"):
                entry.fault = BackendUnavailable(f"token `{entry.job.token}` was fenced and cannot start")
            else:
                entry.handle = submission.handle_of(entry.job.token, record)
            (ours if record.get("job") == ref else lost).append((entry, ref))
        for entry, ref in lost:
            name = submission.name_of({"job": ref, "token": entry.job.token, "array": array})
            try:
                await self._controller.cancel(ref, name)
            except BackendUnavailable as fault:  # it is held, and taken out as soon as somebody looks at the queue
                log.warning(fault.message, compute=self._controller.name)
        if ours:
            whole = array is not None and not lost
            await self._controller.release([commands.array_of(refs[0])] if whole else [ref for _, ref in ours])
            await self._files.released([entry.job.token for entry, _ in ours])
            self._queue.expect()


class Place:
    def __init__(self, counter: Counter, line: _Line, job: Job) -> None:
        self._counter, self._line, self._job = counter, line, job
        self._left = False

    def leave(self) -> None:
        """It is not on its way any more."""
        if not self._left:
            self._left = True
            self._line.coming -= 1
            self._line.came.set()

    async def submit(self, folder: str, script: bytes) -> Handle:
        """Submitted, recorded and released. Raises InvalidJob for what never can run there, and BackendUnavailable."""
        entry, line = Entry(self._job, folder, script), self._line
        line.waiting.append(entry)
        self.leave()
        try:
            async with line.turn:
                while entry in line.waiting:
                    await self._counter.send(line)
        finally:
            if entry in line.waiting:
                line.waiting.remove(entry)
        if entry.fault is not None:
            raise entry.fault
        assert entry.handle is not None
        return entry.handle


def _fail(batch: Sequence[Entry], fault: BackendUnavailable | InvalidJob) -> None:
    for entry in batch:
        entry.fault, entry.handle = type(fault)(fault.message), None
