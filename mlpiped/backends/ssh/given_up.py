"""Jobs that were called lost because their box stayed away. When it is back, what still runs of them is ended and
their cards are given back: each has been run again elsewhere, or nobody wants it.

They are kept as empty files, named by their tokens, so the next daemon ends them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from pathlib import Path

    from mlpiped.backends.ssh.gpus import BoxCards
    from mlpiped.backends.ssh.keeper import Keeper

log = structlog.get_logger("ssh")


class GivenUp:
    def __init__(self, keeper: Keeper, cards: BoxCards, folder: Path) -> None:
        self._keeper, self._cards, self._folder = keeper, cards, folder
        self._tokens = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
        self._asked: set[str] = set()

    def __contains__(self, token: str) -> bool:
        return token in self._tokens

    def note(self, token: str) -> None:
        """Durable; blocks. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._folder / token).touch()
        self._tokens.add(token)

    async def end(self) -> None:
        """As far as that goes now: who takes his grace is looked at the next time. Raises BackendUnavailable."""
        for token in sorted(self._tokens):
            agent = await self._keeper.agent()
            if token not in self._asked:
                await agent.ask("cancel", token)
                self._asked.add(token)
            await agent.ask("look", token)
            if not self._keeper.has_ended(token):
                continue
            if self._cards.leased(token):
                await self._cards.give(token)
            (self._folder / token).unlink(missing_ok=True)
            self._tokens.discard(token)
            self._asked.discard(token)
            log.info("a step that was called lost is over", compute=self._keeper.link.name, token=token)
