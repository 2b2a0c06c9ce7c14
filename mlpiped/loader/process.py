"""One child process on a leash: a deadline, bounded output, frames on a pipe of its own, nobody left behind.

Success is a result frame and nothing else: an exit status says nothing about a process that runs foreign code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_READ = 1 << 16
_MARK = "MLPIPED_LOADING"
_REAP = 5.0  # seconds that the kernel gets to finish a killed process


@dataclass(frozen=True, slots=True)
class Limits:
    """What one load may use. Seconds and bytes."""

    deadline: float = 10.0
    memory: int = 4 << 30
    file_size: int = 64 << 20
    processes: int | None = None
    output: int = 64 << 10  # kept of stdout and of stderr; the rest is read and dropped
    result: int = 64 << 20
    source: int = 4 << 20

    @property
    def cpu(self) -> int:
        return int(self.deadline * 2) + 1


@dataclass(slots=True)
class Ended:
    """How a child ended and what it said."""

    frames: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    trace: str = ""  # by faulthandler: where it hung or crashed
    timed_out: bool = False
    too_large: bool = False
    returncode: int | None = None


async def run_child(command: Callable[[int, int], Sequence[str]], source: bytes, folder: str, limits: Limits) -> Ended:
    """Run `command(result fd, trace fd)` with `source` as its stdin until it has answered, ended or run out of time.

    Whatever happens, and when cancelled too, its whole process group is killed before this returns.
    """
    ended = Ended()
    with ExitStack() as stack:
        trace = stack.enter_context(tempfile.TemporaryFile())
        child = await anyio.to_thread.run_sync(_start, command, source, folder, trace, stack)
        try:
            with anyio.move_on_after(limits.deadline) as patience:
                await _talk(child, ended, limits)
            ended.timed_out = patience.cancelled_caught
        finally:
            with anyio.CancelScope(shield=True):
                ended.returncode = await anyio.to_thread.run_sync(child.end)
        trace.seek(0)
        ended.trace = trace.read(_READ).decode(errors="replace")
    return ended


class _Child:
    """A started child and the reading ends of its pipes, all non-blocking."""

    def __init__(
        self, process: subprocess.Popen[bytes], mark: str, pidfd: int, result: int, out: int, err: int
    ) -> None:
        self.process = process
        self.mark = mark
        self.pidfd = pidfd
        self.result = result
        self.stdout = out
        self.stderr = err

    def end(self) -> int | None:
        """Kill the group, reap the child, and hunt for those that left the group (in a thread)."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # not reaped yet: the number is still its own
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP)
        kill_marked(self.mark)
        return self.process.returncode


def _start(
    command: Callable[[int, int], Sequence[str]], source: bytes, folder: str, trace: IO[bytes], stack: ExitStack
) -> _Child:
    """Start the child (in a thread: fork and exec take a while). Every descriptor is closed by `stack`."""

    def pipe() -> tuple[int, int]:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        stack.callback(os.close, reading)
        return reading, writing

    stdin = stack.enter_context(tempfile.TemporaryFile())
    stdin.write(source)
    stdin.seek(0)
    mark = uuid.uuid4().hex
    (result, result_w), (out, out_w), (err, err_w) = pipe(), pipe(), pipe()
    try:
        process = subprocess.Popen(
            list(command(result_w, trace.fileno())),
            stdin=stdin,
            stdout=out_w,
            stderr=err_w,
            pass_fds=(result_w, trace.fileno()),
            start_new_session=True,
            cwd=folder,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": os.environ.get("HOME", "/"),
                "LANG": "C.UTF-8",
                _MARK: mark,
            },
        )
    finally:
        for writing in (result_w, out_w, err_w):
            os.close(writing)
    pidfd = os.pidfd_open(process.pid)
    stack.callback(os.close, pidfd)
    return _Child(process, mark, pidfd, result, out, err)


async def _talk(child: _Child, ended: Ended, limits: Limits) -> None:
    """Until the result has come, the pipe is closed, or the process is gone (a fork of it may keep the pipe open)."""
    async with anyio.create_task_group() as tasks:
        frames = _Frames(ended, limits.result)

        async def answer() -> None:
            await _read_frames(child.result, frames)
            if frames.finished:  # a pipe that was merely closed: how the process ends will tell
                tasks.cancel_scope.cancel()

        async def gone() -> None:
            await anyio.wait_readable(child.pidfd)
            _rest(child.result, frames)
            tasks.cancel_scope.cancel()

        tasks.start_soon(answer, name="answer")
        tasks.start_soon(gone, name="gone")
        tasks.start_soon(_drain, child.stdout, ended, "stdout", limits.output, name="stdout")
        tasks.start_soon(_drain, child.stderr, ended, "stderr", limits.output, name="stderr")


async def _drain(pipe: int, ended: Ended, name: str, most: int) -> None:
    """Read on for ever, so that the child never blocks; keep the beginning."""
    while True:
        await anyio.wait_readable(pipe)
        with suppress(BlockingIOError):
            data = os.read(pipe, _READ)
            if not data:
                return
            kept: bytes = getattr(ended, name)
            if len(kept) < most:
                setattr(ended, name, (kept + data)[:most])


class _Frames:
    """The frames in a stream of bytes, as they become whole. `finished`: nothing more of use can come."""

    def __init__(self, ended: Ended, most: int) -> None:
        self.ended = ended
        self.buffer = bytearray()
        self.left = most
        self.finished = False

    def feed(self, data: bytes) -> None:
        self.buffer += data
        self.left -= len(data)
        if self.left < 0:
            self.ended.too_large = self.finished = True
        while not self.finished and len(self.buffer) >= 4:
            length = int.from_bytes(self.buffer[:4], "big")
            if len(self.buffer) < 4 + length:
                return
            frame = _frame(bytes(self.buffer[4 : 4 + length]))
            del self.buffer[: 4 + length]
            if frame is None:
                self.finished = True
            elif frame.get("kind") == "result":
                self.ended.result = frame
                self.finished = True
            else:
                self.ended.frames.append(frame)


def _frame(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


async def _read_frames(pipe: int, frames: _Frames) -> None:
    while not frames.finished:
        await anyio.wait_readable(pipe)
        with suppress(BlockingIOError):
            data = os.read(pipe, _READ)
            if not data:
                return
            frames.feed(data)


def _rest(pipe: int, frames: _Frames) -> None:
    """What a process that is gone had still said."""
    with suppress(BlockingIOError):
        while not frames.finished and (data := os.read(pipe, _READ)):
            frames.feed(data)


def kill_marked(mark: str) -> None:
    """SIGKILL every process of ours whose environment holds `mark`: it made a session of its own to get away."""
    wanted = f"{_MARK}={mark}".encode()
    until = time.monotonic() + 1.0
    found = True
    while found and time.monotonic() < until:  # again, for what they forked meanwhile
        found = False
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with suppress(OSError):
                with open(f"/proc/{name}/environ", "rb") as file:
                    if wanted not in file.read().split(b"\0"):
                        continue
                os.kill(int(name), signal.SIGKILL)
                found = True
