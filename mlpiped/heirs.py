"""An attempt whose step is cancelled goes on for an equal step, of whatever run, that waits for what it makes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlpiped.ledger import AttemptRow, moves
from mlpiped.model import AttemptState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlpiped.attempt import Attempt
    from mlpiped.backends.base import Handle
    from mlpiped.run import Execution
    from mlpiped.tries import Try


@dataclass(frozen=True, slots=True)
class Heirs:
    """Those who wait for what step `index` of `run` makes."""

    run: Execution
    index: int

    def any(self) -> bool:
        return next(self._found(), None) is not None

    def _found(self) -> Iterator[tuple[Execution, int, Try]]:
        for heir, step in self.run.dispatcher.followers(self.run.id, self.index):
            t = heir.tries.get(step)
            if t is not None and t.attempt is None and not heir.cancelled:
                yield heir, step, t

    async def take_over(self, attempt: Attempt, handle: Handle) -> str | None:
        """The first of them goes on with the attempt, whose end nobody waits for now; the cancelled step's `why`.

        None: nobody needs it. It is one move of the ledger: an attempt of the cancelled step before, of the heir
        after. Who cancels the heir meanwhile reaches its new attempt.
        """
        found = next(self._found(), None)
        if found is None:
            return None
        (heir, step, t), run = found, self.run
        of, to = (f"run {r.id}/{r.graph.steps[i].name}" for r, i in ((run, self.index), (heir, step)))
        why = f"{t.why}; goes on with the attempt of {of}, which was cancelled"
        left = f"cancelled; its attempt goes on for {to}"
        n, now, compute, key = t.tokens + 1, run.clock.now(), attempt.backend.name, heir.facts.steps[step].key
        move = moves.hand_over(attempt.token, json.dumps(handle), heir.id, step, n, now, why=why, left=left)
        heir.prepare(step, compute, attempt.token, n, attempt.cards)
        try:
            await run.world.ledger.write(move)
        except BaseException:
            t.attempt = None
            raise
        t.why, t.tokens = why, n
        run.dispatcher.hand_over(run.id, self.index, heir, step, attempt.cards)
        nothing = None, None, None, None
        heir.begin(
            step,
            AttemptRow(
                attempt.token,
                heir.id,
                step,
                n,
                compute,
                key,
                AttemptState.SUBMITTED,
                None,
                handle,
                *nothing,
                now,
                now,
                None,
            ),
        )
        return left
