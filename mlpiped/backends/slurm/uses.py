"""What jobs of a cluster use of the contents that were brought there: it stays until they have ended (prune.sh).

slurm/uses/TOKEN    the names of those contents, one a line; there before the job looks whether they are

Standard library only: it runs on login nodes. All of it blocks.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

PRUNED = 20.0  # seconds for which somebody who prunes is waited for
UNSEEN = 5.0  # seconds after which one on another login node is done
YOUNG = 3600.0  # seconds for which a list is kept that no job's folder belongs to yet


class Uses:
    def __init__(self, root: str) -> None:
        self.root = root
        self.lists = f"{root}/slurm/uses"

    def add(self, token: str, names: Sequence[str]) -> None:
        """What of these is there after this, stays. Raises BackendUnavailable."""
        os.makedirs(self.lists, exist_ok=True)
        draft = f"{self.lists}/.{token}.{secrets.token_hex(6)}"
        with open(draft, "w", encoding="ascii") as file:
            file.writelines(f"{name}\n" for name in names)
        os.rename(draft, f"{self.lists}/{token}")
        for name in names:
            os.close(os.open(f"{self.root}/.used/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        until = time.monotonic() + PRUNED
        while any(map(self._prunes, os.listdir(f"{self.root}/.pruning"))):
            if time.monotonic() > until:
                raise BackendUnavailable("contents that nobody uses are being removed there: its own may be among them")
            time.sleep(0.02)

    def _prunes(self, mark: str) -> bool:
        """Whether the process of this mark is at it. One of another login node is not seen, and is soon done."""
        pid, _, start = mark.partition(".")
        try:
            if _began(pid) == start:
                return True
            return time.time() - os.stat(f"{self.root}/.pruning/{mark}").st_mtime < UNSEEN
        except FileNotFoundError:
            return False

    def drop(self, token: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(f"{self.lists}/{token}")

    def sweep(self, *places: str) -> None:
        """Remove what belongs to no job, of which there is something in one of these folders."""
        for name in os.listdir(self.lists) if os.path.isdir(self.lists) else ():
            with suppress(FileNotFoundError):
                old = time.time() - os.stat(f"{self.lists}/{name}").st_mtime > YOUNG
                if old and not any(os.path.exists(f"{place}/{name}") for place in places):
                    os.unlink(f"{self.lists}/{name}")


def _began(pid: str) -> str | None:
    """As /proc says of a process that lives."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in "ZX" else words[19]
