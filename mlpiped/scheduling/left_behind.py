"""Attempts of steps that were cancelled while the config did not have their compute: nobody could be told to end them.

They stay open in the ledger. When a daemon starts whose config has that compute again, they are ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from mlpiped.backends.base import Exited, Lost, NeverRan
from mlpiped.errors import BackendUnavailable, MlpipedError
from mlpiped.execution.asking import Asking
from mlpiped.ledger import moves
from mlpiped.model import AttemptEnd

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anyio.abc import TaskGroup

    from mlpiped.backends.base import Backend, Outcome
    from mlpiped.clock import Clock
    from mlpiped.ledger import AttemptRow, Ledger
    from mlpiped.scheduling.dispatch import Dispatch

log = structlog.get_logger("scheduler")
WHY = "its step was cancelled while the config did not have its compute"


class LeftBehind:
    def __init__(self, ledger: Ledger, backends: Mapping[str, Backend], dispatch: Dispatch, clock: Clock) -> None:
        self._ledger, self._backends, self._dispatch, self._clock = ledger, backends, dispatch, clock

    async def end(self, tasks: TaskGroup) -> None:
        """Begin to end them all; call once, after the start."""
        for row in await self._ledger.left_behind():
            backend = self._backends.get(row.compute)
            if backend is None:
                log.warning("an attempt may run on a compute that the config does not have", compute=row.compute,
                            token=row.token)  # fmt: skip
            else:
                tasks.start_soon(self._end, row, backend, name=f"end of {row.token}")

    async def _end(self, row: AttemptRow, backend: Backend) -> None:
        name, places = backend.name, self._dispatch
        asking = Asking(self._clock, lambda: places.unavailable(name, None), lambda: places.answered(name))
        try:
            outcome = await asking.until_answered(lambda: _ended(row, backend))
        except MlpipedError as fault:  # the compute of that name is another one now
            log.warning("an attempt cannot be ended", compute=name, token=row.token, why=fault.message)
            return
        match outcome:
            case Exited():
                end, code = AttemptEnd.CANCELLED, outcome.code
            case Lost():
                end, code = AttemptEnd.LOST, None
            case NeverRan():
                end, code = AttemptEnd.NEVER_RAN, None
        ended = moves.attempt_ended(row.token, end, None, None, code, WHY, None, self._clock.now())
        await self._ledger.write(ended)
        log.info("an attempt that was left behind is over", compute=name, token=row.token)
        try:
            await backend.discard(row.token, keep_logs=True)
        except BackendUnavailable:
            log.info("left for gc", token=row.token)


async def _ended(row: AttemptRow, backend: Backend) -> Outcome:
    """Raises BackendUnavailable, InvalidJob."""
    handle = await backend.fence(row.token) if row.handle is None else row.handle
    if isinstance(handle, NeverRan):
        return handle
    await backend.cancel(handle)
    return await backend.wait(handle)
