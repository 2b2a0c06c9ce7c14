"""What a job has made and printed, from its folder on the box into one here: whole, or not at all."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio.to_thread

from mlpiped.backends.ssh.returning import Returning
from mlpiped.backends.supervisor import sync_tree
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mlpiped.backends.ssh.keeper import Keeper
    from mlpiped.backends.ssh.progress import Moving, Progress


class Homecoming:
    def __init__(self, keeper: Keeper, returning: Returning, progress: Progress) -> None:
        self._keeper, self._returning, self._progress = keeper, returning, progress

    async def bring(self, token: str, what: str, folder: Path, names: Sequence[str], below: str = "") -> None:
        """Each of `names` that is there appears in `folder` by a rename, once all have come whole.

        `below`: where the folders of jobs lie in the work folder. Raises BackendUnavailable.
        """
        agent = await self._keeper.agent()
        place, words = f"{token}/home", f"brings {what} home from {self._keeper.link.name}"
        command = agent.box.script("tree.sh", "get", agent.box.root, below + token)
        part = folder / f".{names[0]}.part"

        @contextmanager
        def moves() -> Iterator[Moving]:
            with self._progress.wait(token, place), self._progress.move(place, words) as moving:
                yield moving

        try:
            async with self._returning.brought(command, names, part, moves):
                await anyio.to_thread.run_sync(_settle, part, folder)
        except OSError as fault:
            raise BackendUnavailable(f"cannot keep what the step made: {fault.strerror}: {fault.filename}") from fault


def _settle(draft: Path, folder: Path) -> None:
    for entry in draft.iterdir():
        target = folder / entry.name
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(str(entry))  # whoever finds it, after a power cut too, does not ask what it was on the box
            if target.exists():
                shutil.rmtree(target)
        entry.rename(target)
