"""What steps elsewhere print and measure while they run: brought to their job folders here as far as somebody reads it.

At a step's end its compute brings the whole of it and puts it in place by a rename: whoever writes here meanwhile
writes to what is no longer there.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import IO, TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from mlpiped.backends.base import Measures
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from mlpiped.backends.base import Backend, Handle
    from mlpiped.execution.attempt import Attempt
    from mlpiped.execution.run import Execution

    From = Callable[[int], AsyncIterator[bytes]]
    """What there is from an offset on."""

STREAMS: tuple[Literal["stdout", "stderr"], ...] = ("stdout", "stderr")
PATIENCE = 5.0  # seconds for a piece to come


class LiveLogs:
    def __init__(self, executions: Mapping[int, Execution], backends: Mapping[str, Backend], jobs: Path) -> None:
        self._executions, self._backends, self._jobs = executions, backends, jobs
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    def far(self, compute: str) -> bool:
        """Whether what a step prints there is not here while it runs."""
        return compute in self._backends and not self._backends[compute].logs_here

    async def bring(self, token: str) -> str | None:
        """All that it printed and that is not here yet, of an attempt that runs; why not all of it could be had, as a
        sentence."""
        attempt = self._attempt(token)
        if attempt is None or attempt.handle is None or not self.far(attempt.backend.name):
            return None
        backend, handle = attempt.backend, attempt.handle
        return await self._brought(attempt, {s: partial(_printed, backend, handle, s) for s in STREAMS})

    async def measured(self, token: str) -> str | None:
        """The same of its metrics."""
        attempt = self._attempt(token)
        if attempt is None or attempt.handle is None or not isinstance(attempt.backend, Measures):
            return None
        return await self._brought(attempt, {"metrics.jsonl": partial(attempt.backend.measured, attempt.handle)})

    async def _brought(self, attempt: Attempt, files: Mapping[str, From]) -> str | None:
        lock = self._locks.setdefault(attempt.token, anyio.Lock())
        why = None
        try:
            async with lock:
                for name, source in files.items():
                    await self._add(self._jobs / attempt.token / name, source)
        except TimeoutError:
            why = f"`{attempt.backend.name}` does not answer"
        except BackendUnavailable as fault:
            why = fault.message
        except OSError as fault:
            why = f"it cannot be kept: {fault.strerror}: {fault.filename}"
        return why and f"{why}; this is what came so far"

    def _attempt(self, token: str) -> Attempt | None:
        attempts = (t.attempt for execution in self._executions.values() for t in execution.tries.values())
        return next((one for one in attempts if one is not None and one.token == token), None)

    async def _add(self, path: Path, source: From) -> None:
        with ExitStack() as stack:
            # Opened before the question: what comes home meanwhile, whole, is another file.
            file = await anyio.to_thread.run_sync(_opened, path, "r+b")
            size = 0 if file is None else stack.enter_context(file).seek(0, os.SEEK_END)
            chunks = aiter(source(size))
            while True:
                with anyio.fail_after(PATIENCE):
                    chunk = await anext(chunks, b"")
                if not chunk:
                    return
                if file is None:
                    file = await anyio.to_thread.run_sync(_opened, path, "xb")
                    if file is None:
                        return
                    stack.enter_context(file)
                await anyio.to_thread.run_sync(_write, file, chunk)


def _printed(
    backend: Backend, handle: Handle, stream: Literal["stdout", "stderr"], offset: int
) -> AsyncIterator[bytes]:
    return backend.logs(handle, stream, offset, False)


def _opened(path: Path, mode: Literal["r+b", "xb"]) -> IO[bytes] | None:
    try:
        if mode == "xb":
            path.parent.mkdir(exist_ok=True)
        return path.open(mode)
    except (FileNotFoundError, FileExistsError):
        return None


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
