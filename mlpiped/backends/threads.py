"""What blocks, done in a few threads of a backend's own, and told in its words when it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
AT_ONCE = 4


class Threads:
    """Of the compute `name`. Call it: `what` completes the sentence of a failure; no OSError gets out."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._limiter = anyio.CapacityLimiter(AT_ONCE)

    async def __call__(self, what: str, function: Callable[[], T]) -> T:
        try:
            return await anyio.to_thread.run_sync(function, limiter=self._limiter)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise BackendUnavailable(f"cannot {what} on `{self._name}`: {error.strerror}{place}") from error
