"""What a job prints, read from its folder on this host, and followed until it has ended."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio

from mlpiped.backends import folder as folders

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from mlpiped.backends.threads import Threads

EVERY = 0.1  # seconds between two looks at a log that is followed


async def read(
    do: Threads,
    folder: str,
    stream: str,
    offset: int,
    over: Callable[[], Awaitable[bool]],
    news: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[bytes]:
    """From byte `offset`, a negative one from the end, until the end of the file is reached and `over` is true: it is
    asked before each look, so that nothing comes after it. `news` waits between two looks, if there may be any."""
    at = await do("read the log", lambda: folders.from_start(folder, stream, offset))
    while True:
        ended = await over()
        chunk = await do("read the log", partial(folders.read_stream, folder, stream, at))
        if chunk:
            at += len(chunk)
            yield chunk
        elif ended:
            return
        else:
            await (anyio.sleep(EVERY) if news is None else news())
