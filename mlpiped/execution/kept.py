"""Outputs that stay on the machine that made them (`keep="remote"`) until somebody needs them elsewhere.

The ledger says which compute has them, and that is believed: a plan asks no machine. What is kept is looked at, by
stamps, when it is used where it lies, and all of it every `PATROL` seconds; it is hashed when it comes home. What turns
out to be gone or changed has no bytes any more, says the ledger then, so the step that made it runs again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.artifacts.admitting import came_home
from mlpiped.backends.base import JobOutput, Keeps
from mlpiped.errors import BackendUnavailable, Conflict, InvalidJob
from mlpiped.files.portable import is_portable
from mlpiped.ledger.records import lose_kept
from mlpiped.model import OutputFact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mlpiped.artifacts import Store
    from mlpiped.backends.base import Backend, Handle
    from mlpiped.clock import Clock
    from mlpiped.ledger import Ledger
    from mlpiped.spec import StepSpec

log = structlog.get_logger("kept")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries to reach a machine
PATROL = 600.0  # seconds between two looks at all that a machine keeps


def is_home(fact: OutputFact) -> bool:
    """Whether its bytes are, or were, in the store."""
    return fact.compute is None or came_home(fact.path) is not None


def digest_for(fact: OutputFact, compute: str) -> str:
    """By which digest `compute` knows the content: the one that keeps it by its own, others by the store's."""
    if not is_portable(fact.digest) or fact.compute == compute:
        return fact.digest
    return came_home(fact.path) or fact.digest


class Kept:
    def __init__(self, ledger: Ledger, store: Store, backends: Mapping[str, Backend], clock: Clock) -> None:
        self.ledger, self.store, self.backends, self.clock = ledger, store, backends, clock
        self._locks: dict[str, anyio.Lock] = {}

    def within_reach(self, fact: OutputFact) -> bool:
        """Whether what keeps it is in the config; nobody is asked."""
        return fact.compute is None or self._keeper(fact.compute) is not None or is_home(fact)

    def _keeper(self, compute: str | None) -> Keeps | None:
        backend = None if compute is None else self.backends.get(compute)
        return backend if isinstance(backend, Keeps) else None

    async def take(self, backend: Backend, handle: Handle, step: StepSpec) -> dict[str, OutputFact]:
        """What of the step's outputs stays where it was made, by name. Raises InvalidJob, BackendUnavailable."""
        staying = {o.name: o for o in step.outputs if o.stays}
        if not staying or not isinstance(backend, Keeps):
            return {}
        wanted = [JobOutput(o.name, o.file_name, o.output_kind) for o in staying.values()]
        found = {}
        for kept in await backend.keep(handle, wanted):
            output = staying[kept.name]
            path = self.store.path_of(kept.digest, output.file_name)
            found[kept.name] = OutputFact(
                kept.name, kept.digest, output.output_kind, kept.size, path, compute=backend.name
            )
        return found

    async def at_hand(self, facts: Iterable[OutputFact], compute: str) -> None:
        """Make them readable for a step on `compute`. Raises Conflict (gone), BackendUnavailable (nobody can tell)."""
        for fact in facts:
            if not fact.path:  # told after a restart, of what was lost meanwhile
                raise Conflict(f"output `{fact.name}` is gone: {fact.digest}", hint="the next run makes it again")
            if fact.compute is None:
                continue
            if fact.compute != compute:
                await self.bring_home(fact)
                continue
            keeper = self._keeper(compute)
            if keeper is None or not await keeper.changed([fact.digest]):
                continue
            if not is_home(fact):
                raise await self._gone(fact)
            await keeper.drop([fact.digest], 0)  # so that nobody reads it there: what came home is sent

    async def wait_for(
        self, facts: Sequence[OutputFact], compute: str, stop: asyncio.Event, held: Callable[[str | None], None]
    ) -> None:
        """Until they are `at_hand`, or `stop`: a machine that is away is asked again, and `held` is told why."""
        pause = FIRST_PAUSE
        while not stop.is_set():
            try:
                await self.at_hand(facts, compute)
                break
            except BackendUnavailable as fault:
                held(f"an input is on `{_where(facts, compute)}`: {fault.message}")
            with anyio.move_on_after(pause):
                await stop.wait()
            pause = min(pause * 2, LONGEST_PAUSE)
        held(None)

    async def bring_home(self, fact: OutputFact) -> None:
        """Into the store, if it is not there. Raises Conflict (gone), BackendUnavailable."""
        if is_home(fact):
            return
        keeper = self._keeper(fact.compute)
        if keeper is None:
            raise Conflict(
                f"output `{fact.name}` is kept on `{fact.compute}`, which the config no longer has",
                hint="attach that machine again, or run the step that makes it again with --force",
            )
        async with self._locks.setdefault(fact.digest, anyio.Lock()):
            if is_home(fact):
                return
            came = await keeper.bring(fact.digest, self.store.incoming)
            if came is None or not await self.store.admit(came, fact):
                raise await self._gone(fact)
            log.info("came home", output=fact.name, digest=fact.digest, compute=fact.compute, bytes=fact.size)

    async def _gone(self, fact: OutputFact) -> Conflict:
        await self._lose(fact.digest, fact.compute or "")
        return Conflict(
            f"output `{fact.name}` is gone from `{fact.compute}`, or was changed there: {fact.digest}",
            hint="the next run makes it again",
        )

    async def _lose(self, digest: str, compute: str) -> None:
        log.warning("what a compute kept is gone or was changed", digest=digest, compute=compute)
        await self.ledger.write(lose_kept(digest, compute, self.clock.now()))

    # --- looking ----------------------------------------------------------------------------------------------
    async def check(self, compute: str) -> int:
        """Look at all that it keeps; how much of it is not what it was. Raises BackendUnavailable."""
        keeper = self._keeper(compute)
        bad = sorted(await keeper.changed()) if keeper is not None else []
        for digest in bad:
            await self._lose(digest, compute)
        return len(bad)

    async def run(self) -> None:
        while True:
            pause = PATROL
            for compute, backend in self.backends.items():
                if isinstance(backend, Keeps):
                    try:
                        await self.check(compute)
                    except (BackendUnavailable, InvalidJob) as fault:
                        log.info("not looked at what is kept", compute=compute, why=fault.message)
                        pause = LONGEST_PAUSE
            await anyio.sleep(pause)


def _where(facts: Sequence[OutputFact], compute: str) -> str:
    """The machine that is waited for, most likely."""
    names = [fact.compute for fact in facts if fact.compute == compute or not is_home(fact)]
    return next(filter(None, names), compute)
