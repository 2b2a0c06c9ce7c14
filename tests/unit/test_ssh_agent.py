"""The channel to a box, where no server shows a fault on demand."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import asyncssh
import pytest

from mlpiped.backends.ssh.agent import Agent

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio


class Cut:
    """A connection that is lost while a session is opened: the session hears of it before whoever opens it does."""

    async def create_session(self, session: Callable[[], Agent], command: str, encoding: None) -> None:
        session().connection_lost(None)
        raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the connection was lost")


async def test_a_session_that_ends_before_anybody_waits_for_it_leaves_no_error_behind() -> None:
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    with pytest.raises(asyncssh.ChannelOpenError):
        connection: Any = Cut()
        await Agent.open(connection, "box", "work", "instance", "", lambda kind, rest: None, lambda agent: None)
    gc.collect()
    assert unheard == []
