"""What all triggers on files share: datastores, hashing, the ledger, the clock."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import anyio

from mlpiped.clock import Clock
from mlpiped.triggers.memory import Emit, Memory


class Root(Protocol):
    """A datastore's settings."""

    @property
    def path(self) -> os.PathLike[str]: ...
    @property
    def watch(self) -> str: ...
    @property
    def poll_interval(self) -> float: ...


class FileFact(Protocol):
    @property
    def digest(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


class Hasher(Protocol):
    """What of the Fingerprinter is used here."""

    async def files(self, paths: Sequence[bytes], /) -> Mapping[bytes, FileFact]: ...


@dataclass(frozen=True, slots=True)
class World:
    """What all followers share. `rearm` is called when a follower's watch point changes."""

    memory: Memory
    hasher: Hasher
    clock: Clock
    emit: Emit
    limiter: anyio.CapacityLimiter
    reconcile: float
    rearm: Callable[[], None]
    refused: Callable[[bytes], str]  # why the kernel does not watch this folder, or nothing
