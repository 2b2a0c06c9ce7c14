"""What the tests of fingerprint, code and artifacts share: a stat cache in memory, and files as they are in the lab."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpiped.files.fingerprint import Fingerprinter, StatRow
from mlpiped.files.hashing import granule, stamp_of


class Table:
    """The ledger's stat cache without a ledger; counts what is asked of it."""

    def __init__(self) -> None:
        self.rows: dict[bytes, StatRow] = {}
        self.queries = 0

    async def stat_cache(self, paths: Sequence[bytes]) -> Mapping[bytes, StatRow]:
        self.queries += 1
        return {path: self.rows[path] for path in paths if path in self.rows}

    def post(self, *ops: Any) -> None:
        for rows in ops:
            self.rows.update({row.path: row for row in rows})


def fingerprinter(table: Table | None = None, **options: Any) -> Fingerprinter:
    return Fingerprinter(table or Table(), lambda rows: rows, **options)


def write(path: Path, content: bytes | str = b"x", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def settle(*paths: Path) -> None:
    """Wait until the clock of the files has ticked since each of them was last changed."""
    for path in paths:
        stamp = stamp_of(path.lstat())
        until(lambda stamp=stamp: time.time_ns() > stamp[4] + granule(stamp))  # type: ignore[misc]


def settle_all(folder: Path) -> None:
    settle(*(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.001)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def byte_path(folder: Path, name: bytes) -> bytes:
    return os.fsencode(folder) + b"/" + name
