"""What retention removes of artifacts: those beyond their budget, strays of the store, and what other machines keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from anyio import to_thread

from mlpiped.backends.base import Keeps
from mlpiped.errors import BackendUnavailable
from mlpiped.ledger import moves
from mlpiped.retention.plan import PAGE, TICK, Part, Removal, gc_plan, pages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from anyio import CapacityLimiter

    from mlpiped.artifacts import Store
    from mlpiped.backends.base import Backend
    from mlpiped.clock import Clock
    from mlpiped.ledger import ArtifactRow, Ledger
    from mlpiped.ledger.survey import Survey

log = structlog.get_logger("keeper")

STRAY_AGE = 7 * 86_400.0  # seconds: a younger store entry may belong to a commit on its way, or to a ledger put aside


class Artifacts:
    def __init__(
        self, ledger: Ledger, store: Store, backends: Mapping[str, Backend], clock: Clock, limiter: CapacityLimiter
    ) -> None:
        self.ledger = ledger
        self.store = store
        self.backends = backends
        self.clock = clock
        self._limiter = limiter

    async def to_go(self, budget: int | None) -> tuple[list[ArtifactRow], list[Removal]]:
        if budget is None:
            return [], []
        async with self.ledger.survey() as survey:
            if await survey.artifact_bytes() <= budget:
                return [], []
            rows, needed = await survey.artifacts(), await survey.needed()
        now = self.clock.now()
        plan = await to_thread.run_sync(
            lambda: gc_plan(rows, now=now, budget=budget, keep=needed), limiter=self._limiter
        )
        return rows, plan

    async def clean(self, budget: int | None) -> Part:
        """The ledger first: from then on nobody builds on them, and a crash leaves strays, which go in their time."""
        planned = self.clock.now()
        _, plan = await self.to_go(budget)
        seconds = {removal.digest: removal.seconds for removal in plan}
        gone: list[str] = []
        size = 0
        for page in pages(list(seconds), PAGE // 5):
            (lost,) = await self.ledger.write(moves.lose_artifacts(page, self.clock.now(), planned=planned))
            size += await self.store.remove(lost, min_age=(self.clock.now() - planned) / 1e6 + TICK)
            gone += lost
        return Part("artifacts", len(gone), size, sum(seconds[digest] for digest in gone))

    async def strays(self, survey: Survey) -> AsyncIterator[list[str]]:
        """Pages of store entries that no output has. What an attempt that lives has collected is too young for it."""
        for page in pages(await self.store.listed(min_age=await self._stray_age(survey))):
            if strays := await survey.unknown(page):
                yield sorted(strays)

    async def _stray_age(self, survey: Survey) -> float:
        oldest = await survey.oldest_intent()
        return STRAY_AGE if oldest is None else max(STRAY_AGE, (self.clock.now() - oldest) / 1e6 + 60.0)

    async def clean_kept(self) -> Part:
        """On machines that can be asked now; how much of it was too young to go, nobody tells."""
        async with self.ledger.survey() as survey:
            age = await self._stray_age(survey)
            for backend in self.backends.values():
                if not isinstance(backend, Keeps):
                    continue
                try:
                    for page in pages(await backend.listed()):
                        unknown = await survey.unknown([digest.rpartition(":")[2] for digest in page])
                        if strays := [digest for digest in page if digest.rpartition(":")[2] in unknown]:
                            await backend.drop(strays, age)
                except BackendUnavailable as fault:
                    log.info("left for later", compute=backend.name, why=fault.message)
        return Part("kept", 0)

    async def clean_strays(self) -> Part:
        count = size = 0
        async with self.ledger.survey() as survey:
            async for page in self.strays(survey):
                freed = await self.store.remove(page, min_age=STRAY_AGE)
                count, size = count + len(page), size + freed
        return Part("strays", count, size)
