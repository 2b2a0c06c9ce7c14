"""Reading what steps print while they print it: files that only grow, found by the ledger, never by a peer's path."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from mlpiped import log_cap
from mlpiped.control import metrics
from mlpiped.errors import UnknownName
from mlpiped.model import RunState, StepState

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectReceiveStream

    from mlpiped.control.answers import Stream
    from mlpiped.control.service import Service
    from mlpiped.ledger.rows import AttemptRow, EventRow, RunRow, StepRow

CHUNK = 64 << 10
LOOK = 0.1  # seconds between two looks at files that may have grown
FAR = 0.5  # seconds between two looks at those on another machine


@dataclass(slots=True)
class _File:
    """One stream of one attempt, and how far it was read."""

    step: str
    attempt: int
    stream: str
    path: Path
    note: str | None  # whose log it really is
    offset: int = 0
    said: bool = False


class LogReader:
    """The logs of a run or of one step: the newest attempt's, or those of `attempt`.

    A reused step has the log of the attempt that it was reused from, and each first piece says so in `note`.
    """

    def __init__(
        self, service: Service, run: RunRow, step: StepRow | None, attempt: int | None, streams: Sequence[str]
    ) -> None:
        self._service = service
        self._run = run
        self._only = step
        self._attempt = attempt
        self._streams = streams
        self._files: dict[str, list[_File]] = {}  # by token: those that may have more to say
        self._known: set[str] = set()  # every token noted
        self._ended: set[str] = set()  # tokens of steps that have finished
        self._marks: dict[str, tuple[StepState, int]] = {}
        self._wanted: set[str] = set()  # tokens on other machines, noted just now
        self._far: dict[str, str | None] = {}  # tokens on other machines: why not all of it is here
        self._told: dict[str, str | None] = {}  # the same, as it was sent

    async def check(self) -> None:
        """Raises UnknownName for an attempt that there is not."""
        if self._only is None or self._attempt is None:
            return
        attempts = await self._service.ledger.attempts(self._run.id, self._only.idx)
        numbers = [attempt.n for attempt in attempts]
        if self._attempt not in numbers:
            hint = f"there are: {', '.join(map(str, numbers))}" if numbers else "it was not tried yet"
            raise UnknownName(f"no attempt {self._attempt} of `{self._only.name}` in run {self._run.id}", hint=hint)

    async def send_all(self, stream: Stream, news: MemoryObjectReceiveStream[list[EventRow]] | None) -> None:
        """All that there is; with `news` until the run or step has ended. Files are read after the look at the ledger:
        the other order would miss what is printed in between."""
        async with anyio.create_task_group() as tasks:
            ended = await self._look()
            while True:
                await self._bring(tasks, once=news is None)
                sent = False
                for token, files in list(self._files.items()):
                    for file in files:
                        sent = await self._send(stream, file) or sent
                    await self._tell(stream, token, files[0])
                    if token in self._ended:  # it was when we looked, so this was its last word
                        del self._files[token]
                if ended or news is None:
                    break
                if await _wait(news, LOOK):
                    ended = await self._look()
            tasks.cancel_scope.cancel()

    async def _bring(self, tasks: TaskGroup, *, once: bool) -> None:
        """Have what is printed on other machines brought here: now, or from now on, each by itself."""
        new = [token for token in self._files if token in self._wanted]
        self._wanted.clear()
        async with anyio.create_task_group() as now:
            for token in new:
                (now if once else tasks).start_soon(self._keep_bringing, token, once, name=f"log of {token}")

    async def _keep_bringing(self, token: str, once: bool) -> None:
        live = self._service.live
        assert live is not None
        while token in self._files:
            self._far[token] = await live.bring(token)
            if once:
                return
            await anyio.sleep(FAR)

    async def _tell(self, stream: Stream, token: str, file: _File) -> None:
        """Once, that there is more than can be had."""
        why = self._far.get(token)
        if why is not None and why != self._told.get(token):
            facts = {"step": file.step, "attempt": file.attempt, "stream": file.stream, "offset": file.offset}
            await stream.send({**facts, "note": why, "text": ""})
        self._told[token] = why

    async def _look(self) -> bool:
        """Note new attempts. Gives whether everything has ended. Costs a query only for steps that have moved."""
        run = await self._service.ledger.run(self._run.id) or self._run
        steps = await self._service.lookup.steps(run)
        if self._only is not None:
            steps = [each for each in steps if each.name == self._only.name]
        for step in steps:
            mark = (step.state, step.attempts)
            if step.state is StepState.WAITING or self._marks.get(step.name) == mark:
                continue
            self._marks[step.name] = mark
            for attempt, note in await self._attempts(run, step):
                self._note(step.name, attempt, note)
                if step.state is StepState.FINISHED:
                    self._ended.add(attempt.token)
        return run.state is RunState.FINISHED or all(each.state is StepState.FINISHED for each in steps)

    async def _attempts(self, run: RunRow, step: StepRow) -> list[tuple[AttemptRow, str | None]]:
        made_by, source = await self._service.lookup.origin(run, step)
        attempts = await self._service.ledger.attempts(made_by.id, source.idx)
        note = None
        if step.reused_from is not None:
            note = f"reused: this is the log of run {made_by.id}, step {source.name}"
            token = await metrics.token_of(self._service, run, step)
            attempts = [attempt for attempt in attempts if attempt.token == token]
        if self._attempt is not None:
            attempts = [attempt for attempt in attempts if attempt.n == self._attempt]
        return [(attempt, note) for attempt in attempts[-1:]]

    def _note(self, step: str, attempt: AttemptRow, note: str | None) -> None:
        if attempt.token not in self._known:
            self._known.add(attempt.token)
            if attempt.end is None and self._service.live is not None and self._service.live.far(attempt.compute):
                self._wanted.add(attempt.token)
            folder = self._service.job_folder(attempt.token)
            self._files[attempt.token] = [
                _File(step, attempt.n, stream, folder / stream, note) for stream in self._streams
            ]

    async def _send(self, stream: Stream, file: _File) -> bool:
        """What was added since; whether there was anything."""
        any_sent = False
        while found := await anyio.to_thread.run_sync(_read, file.path, file.offset):
            skipped, data = found
            file.offset += skipped
            piece: dict[str, Any] = {
                "step": file.step,
                "attempt": file.attempt,
                "stream": file.stream,
                "offset": file.offset,
            }
            if file.note and not file.said:
                piece["note"] = file.note
            if skipped:
                piece["skipped"] = skipped
            file.said = True
            file.offset += len(data)
            try:
                piece["text"] = data.decode("utf-8")
            except UnicodeDecodeError:
                piece["data"] = base64.b64encode(data).decode()
            await stream.send(piece)
            any_sent = True
        return any_sent


async def _wait(news: MemoryObjectReceiveStream[list[EventRow]], seconds: float) -> bool:
    """Give the files time to grow. Whether the run has moved meanwhile; a lost subscription counts as such."""
    await anyio.sleep(seconds)
    happened = False
    try:
        while True:
            news.receive_nowait()
            happened = True
    except anyio.WouldBlock:
        return happened
    except anyio.EndOfStream:
        return True


def _read(path: Path, offset: int) -> tuple[int, bytes] | None:
    """(bytes that are no longer kept there, up to CHUNK bytes after them, cut at a character's end where there is one);
    None at the end of the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        begin, hole = log_cap.bounds(fd, offset)
        data = os.pread(fd, CHUNK if hole is None else min(CHUNK, hole - begin), begin)
    except OSError:
        return None
    finally:
        os.close(fd)
    if not data:
        return None
    return begin - offset, _cut_at_a_character(data)


def _cut_at_a_character(data: bytes) -> bytes:
    if len(data) == CHUNK:  # do not cut a character in two
        for back in range(1, 4):
            byte = data[-back]
            if byte >= 0xC0:
                return data[:-back] if back < _width(byte) else data
            if byte < 0x80:
                break
    return data


def _width(first: int) -> int:
    return 2 if first < 0xE0 else 3 if first < 0xF0 else 4
