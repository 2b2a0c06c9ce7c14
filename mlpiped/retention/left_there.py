"""Jobs whose folders, gone here, have to go on other machines too. One that is away is asked again by the next pass.

Each is an empty file, `COMPUTE/TOKEN`: from before anything of the job is removed here, so that no crash makes it
forgotten, until its compute says that nothing of it is left there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import structlog
from anyio import to_thread

from mlpiped.errors import BackendUnavailable
from mlpiped.retention.plan import pages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.backends.base import Backend

log = structlog.get_logger("keeper")
PATIENCE = 120.0  # seconds for a page of them: a file system that hangs there must not keep `gc` for ever


class LeftThere:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unwritten: list[tuple[str, str]] = []

    def note(self, token: str, compute: str) -> None:
        """Blocks. On a full disk it is written as soon as what is removed has made room."""
        try:
            self._write(token, compute)
        except OSError:
            self._unwritten.append((token, compute))

    def _write(self, token: str, compute: str) -> None:
        try:
            (self._folder / compute / token).touch(mode=0o600)
        except FileNotFoundError:
            (self._folder / compute).mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._folder / compute / token).touch(mode=0o600)

    async def discard(self, backends: Mapping[str, Backend]) -> None:
        """As far as that goes now. What a compute has that the config does not name stays until it does again.

        Raises OSError.
        """
        for compute, tokens in (await to_thread.run_sync(self._noted)).items():
            if compute in backends:
                await self._discard(backends[compute], tokens)

    def _noted(self) -> dict[str, list[str]]:
        while self._unwritten:
            self._write(*self._unwritten[-1])
            self._unwritten.pop()
        places = [path for path in self._folder.iterdir() if path.is_dir()] if self._folder.is_dir() else []
        return {path.name: sorted(os.listdir(path)) for path in places}

    async def _discard(self, backend: Backend, tokens: Sequence[str]) -> None:
        """Many at once: a cluster is asked about them in one go. One that is away is not asked about them all."""
        count, why = 0, ""
        gone: list[str] = []

        async def ask(token: str) -> None:
            nonlocal why
            try:
                await backend.discard(token, keep_logs=False)
                gone.append(token)
            except BackendUnavailable as fault:
                why = fault.message

        def forget() -> None:
            for token in gone:
                (self._folder / backend.name / token).unlink(missing_ok=True)

        for page in pages(tokens):
            gone.clear()
            with anyio.move_on_after(PATIENCE) as limit:
                async with anyio.create_task_group() as group:
                    for token in page:
                        group.start_soon(ask, token)
            if limit.cancelled_caught:
                why = "it takes too long"
            await to_thread.run_sync(forget)
            count += len(gone)
            if not gone:
                break
        if count < len(tokens):
            log.info("left for later", compute=backend.name, jobs=len(tokens) - count, why=why)
