"""An attempt whose step is cancelled goes on for an equal step, of whatever run, that waits for what it makes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mlpiped import crash
from mlpiped.ledger import AttemptRow, moves
from mlpiped.model import AttemptState

if TYPE_CHECKING:
    from mlpiped.backends.base import Handle
    from mlpiped.execution.attempt import Attempt
    from mlpiped.execution.run import Execution


async def take_over(attempt: Attempt, handle: Handle) -> str | None:
    """The first that can goes on with the attempt, whose end nobody waits for now; the cancelled step's `why`.

    None: nobody needs it. It is one move of the ledger: an attempt of the cancelled step before, of the heir after. Who
    cancels the heir meanwhile reaches its new attempt.
    """
    run, index = attempt.execution, attempt.index
    if (found := _heir(attempt)) is None:
        return None
    heir, step = found
    t = heir.tries[step]
    of, to = (f"run {r.id}/{r.graph.steps[i].name}" for r, i in ((run, index), (heir, step)))
    why = f"{t.why}; goes on with the attempt of {of}, which was cancelled"
    left = f"cancelled; its attempt goes on for {to}"
    n, now, key = t.tokens + 1, run.clock.now(), heir.facts.steps[step].key
    move = moves.hand_over(attempt.token, json.dumps(handle), heir.id, step, n, now, why=why, left=left)
    heir.prepare(step, attempt.backend.name, attempt.token, n, attempt.cards)
    crash.point("before_hand_over")
    try:
        await run.world.ledger.write(move)
    except BaseException:
        t.attempt = None
        raise
    crash.point("after_hand_over")
    t.why, t.tokens = why, n
    run.dispatcher.hand_over(run.id, index, heir, step, attempt.cards)
    state, nothing = AttemptState.SUBMITTED, (None, None, None, None)
    compute, cards = attempt.backend.name, attempt.cards
    row = AttemptRow(
        attempt.token, heir.id, step, n, compute, key, state, None, handle, *nothing, now, now, None, cards=cards
    )
    heir.begin(step, row)
    return left


def _heir(attempt: Attempt) -> tuple[Execution, int] | None:
    """The first follower that would have begun just such a job: under other limits it might have ended otherwise."""
    run, mine = attempt.execution, attempt.step
    for heir, index in run.dispatcher.followers(run.id, attempt.index):
        t, its = heir.tries.get(index), heir.graph.steps[index]
        if t is None or t.attempt is not None or heir.cancelled:
            continue
        if (its.resources, its.timeout, its.grace) == (mine.resources, mine.timeout, mine.grace):
            return heir, index
    return None
