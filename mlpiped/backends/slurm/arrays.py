"""Arrays: which job is which element, durable before Slurm hears of it; and the script that finds its own job.

slurm/arrays/ID     the tokens of an array's elements, one a line, element 0 first. All elements have the array's name,
                    which holds the ID: made for this one submission, it is nobody else's, whatever ids are given out
"""

from __future__ import annotations

import os
import secrets
import shlex
import time
from typing import TYPE_CHECKING

from mlpiped.backends.slurm import commands
from mlpiped.backends.supervisor import sync_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mlpiped.backends.slurm.commands import Listed, Ref

YOUNG = 3600.0  # seconds for which a list is kept, whatever has become of its jobs
REMEMBERED = 64  # lists


def script(single: bytes, folder: str, tokens: Sequence[str]) -> bytes:
    """The script of one element -> that of all. What it has to say is said in the folder that it finds."""
    line = os.fsencode(f"folder={shlex.quote(folder)}\n")
    assert single.count(line) == 1
    jobs_dir = shlex.quote(os.path.dirname(folder))
    pick = (
        f"set -- {' '.join(tokens)}\n"
        'shift "$SLURM_ARRAY_TASK_ID" && test -n "$1" || exit 69\n'
        f'folder={jobs_dir}/"$1"\n'
        'exec >>"$folder/slurm.out" 2>&1 || exit 69\n'
    )
    return single.replace(line, os.fsencode(pick))


class Lists:
    """All of it blocks."""

    def __init__(self, root: Path) -> None:
        self.home = os.fspath(root / "slurm" / "arrays")
        self._read: dict[str, tuple[str, ...]] = {}
        self._sorted: tuple[Mapping[Ref, Listed], dict[str, list[Listed]]] = ({}, {})

    def write(self, tokens: Sequence[str]) -> str:
        """The new array's ID. Durable at the return."""
        array = secrets.token_hex(8)
        os.makedirs(self.home, exist_ok=True)
        fd = os.open(f"{self.home}/{array}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(fd, "w", encoding="ascii") as file:
            file.writelines(f"{token}\n" for token in tokens)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.home)
        return array

    def token(self, name: str) -> str | None:
        """Whose job it is that Slurm's answers know by this name."""
        array, found, index = name.partition("/")
        if not found:
            return name
        tokens = self._tokens(array)
        return tokens[int(index)] if int(index) < len(tokens) else None

    def by_token(self, listing: Mapping[Ref, Listed]) -> dict[str, list[Listed]]:
        """The jobs of that listing that have not ended."""
        if self._sorted[0] is not listing:
            found: dict[str, list[Listed]] = {}
            for one in listing.values():
                whole = isinstance(one.job, str) and "/" not in one.name
                if one.state not in commands.ENDED and not whole and (token := self.token(one.name)) is not None:
                    found.setdefault(token, []).append(one)
            self._sorted = listing, found
        return self._sorted[1]

    def _tokens(self, array: str) -> tuple[str, ...]:
        """None of an array that was submitted from another folder."""
        if array not in self._read:
            try:
                with open(f"{self.home}/{array}", encoding="ascii") as file:
                    tokens = tuple(file.read().split())
            except FileNotFoundError:
                return ()
            while len(self._read) >= REMEMBERED:
                self._read.pop(next(iter(self._read)), None)
            self._read[array] = tokens
        return self._read[array]

    def sweep(self, jobs_dir: str) -> None:
        """Remove those of which no job's folder is left."""
        for array in os.listdir(self.home) if os.path.isdir(self.home) else ():
            path = f"{self.home}/{array}"
            if time.time() - os.stat(path).st_mtime > YOUNG:
                if not any(os.path.exists(f"{jobs_dir}/{token}") for token in self._tokens(array)):
                    os.unlink(path)
