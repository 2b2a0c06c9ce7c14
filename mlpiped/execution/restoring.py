"""A run that an earlier daemon began: its plan is told what the ledger knows, and what was begun goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from mlpiped.execution.tries import Try
from mlpiped.model import AttemptEnd, StepState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.execution.run import Execution
    from mlpiped.ledger import AttemptRow, StepRow

log = structlog.get_logger("run")


async def restore(run: Execution) -> None:
    """Go on with every attempt, and say what it holds; what is open besides is decided again in its time."""
    ledger, plan = run.world.ledger, run.plan
    rows = await ledger.steps(run.id)
    made = await ledger.outputs_of_run(run.id)
    for row in rows:
        run.recorded.add(row.idx)
        if row.outcome is not None:
            plan.finished(row.idx, row.outcome, made.get(row.idx, ()))
    attempts = await ledger.attempts_of_run(run.id)
    await run.facts.recall_images({idx: found[-1].key for idx, found in attempts.items() if found})
    live: list[AttemptRow] = []
    for row in rows:
        if row.outcome is None:
            live += _recall(run, row, attempts.get(row.idx, ()))
    plan.ready()  # handed out below, less those that run already
    running = {attempt.idx for attempt in live}
    for i in [i for i, end in enumerate(plan.outcome) if end is None and not plan.waits_for(i) and i not in running]:
        if i in run.tries and run.tries[i].not_before is not None:
            run.retry_later(i)
        else:
            run.decide_again(i)
    if live:
        await _adopt(run, live)
    run.dispatcher.restored(run.id)


def _recall(run: Execution, row: StepRow, attempts: Sequence[AttemptRow]) -> list[AttemptRow]:
    """What was tried of a step that has not finished; those attempts that have not ended."""
    t = run.tries[row.idx] = Try(row.state, run.clock.now(), row.why)
    for attempt in attempts:
        t.tokens = max(t.tokens, attempt.n)
        t.count(attempt.end)
        if attempt.end in (AttemptEnd.FAILED, AttemptEnd.TIMED_OUT) and attempt.ended_at is not None:
            t.again = attempt.reason or ""
            t.not_before = attempt.ended_at + int(t.pause(run.graph.steps[row.idx].retry) * 1e6)
    return [attempt for attempt in attempts if attempt.end is None]


async def _adopt(run: Execution, live: Sequence[AttemptRow]) -> None:
    await run.facts.adopt(run.plan, {row.idx: row.key for row in live})
    for row in live:
        t = run.tries[row.idx]
        if row.compute not in run.backends:
            log.error("an attempt runs on a compute that the config no longer has", compute=row.compute, run=run.id)
            t.compute, t.stray = row.compute, row.token
            continue
        share = row.key if run.shareable(row.idx) else None
        run.dispatcher.occupy(run.need(row.idx), row, share)
        t.state = StepState.SUBMITTING
        run.prepare(row.idx, row.compute, row.token, row.n, row.cards)
        run.begin(row.idx, row)
