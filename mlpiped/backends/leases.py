"""The cards of this host as a backend's jobs have them: leased before one is started, given back when it has ended."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mlpiped.errors import InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mlpiped.backends.base import Job
    from mlpiped.backends.host_cards import HostCards
    from mlpiped.backends.threads import Threads


class Leases:
    def __init__(self, cards: HostCards, do: Threads) -> None:
        self._cards = cards
        self._do = do

    @asynccontextmanager
    async def of(self, job: Job) -> AsyncIterator[None]:
        """While the job is submitted. Given back at once when it can be started nowhere (`InvalidJob`); else it is not
        known whether it runs. Raises BackendUnavailable with who has one of its cards."""
        if not job.gpus:
            yield
            return
        await self._do("lease the cards", lambda: self._cards.take(job))
        try:
            yield
        except InvalidJob:
            await self.give_back(job.token)
            raise

    async def give_back(self, token: str) -> None:
        """The job has ended, or never can start."""
        if self._cards.leased(token):
            await self._do("give back the cards", lambda: self._cards.give(token))
