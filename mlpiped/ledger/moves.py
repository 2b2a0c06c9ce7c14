"""Everything that is written about runs, steps and attempts. Each function makes an operation for `Ledger.write`.

An operation runs inside a transaction. It moves a row by a guarded UPDATE whose guard comes from the tables in `model`;
no row moved is an IllegalMove and nothing is written. Each move leaves one event row of the kind `<thing>.<state>`:

    run.queued {pipeline}   run.merged   run.running   run.cancelling   run.finished {outcome}
    step.waiting|queued|submitting {token, n, compute}|running|collecting   step.finished {outcome}
    attempt.intent {token}   attempt.submitted {token}   attempt.ended {token, end}   attempt.late {token}
    attempt.handed_over {token, run, step}: by the step that it was of, to that one
    fire.<verdict> {pipeline, detail}   pipeline.paused|resumed {pipeline, who}
    compute.drained|undrained {compute, who}   compute.unwell|well {compute, why}

A state that lasts for a moment only may never be written: a short step goes from `submitting` to `finished`.

Four things are refused whatever the caller believes: two live attempts of one step, two commits of one step, success
without a commit, and reuse of what is not the committed result of that key at this moment (StaleReuse).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlpiped.errors import IllegalMove, StaleReuse
from mlpiped.ledger.attempts import attempt_ended, collecting, commit_result, hand_over, handle, intent
from mlpiped.ledger.db import SQL, Connection, IntegrityError, Op, every, one
from mlpiped.ledger.fires import merge_fire, open_run, put_arrivals, put_cursor, record_fire
from mlpiped.ledger.records import (
    audit,
    drop_results,
    lose_artifacts,
    pin_code,
    put_stat_cache,
    save_definition,
    set_drained,
    set_paused,
    set_unwell,
)
from mlpiped.ledger.refusals import illegal_run, illegal_step
from mlpiped.ledger.retiring import drop_stats, forget_loose_events, forget_run
from mlpiped.ledger.rows import StepRow
from mlpiped.ledger.text import clean, compact
from mlpiped.model import StepOutcome, StepState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.model import RunOutcome

__all__ = [
    "Op",
    "add_steps",
    "attempt_ended",
    "audit",
    "cancel_run",
    "collecting",
    "commit_result",
    "drop_results",
    "drop_stats",
    "finish_run",
    "finish_step",
    "finish_steps",
    "forget_loose_events",
    "forget_run",
    "hand_over",
    "handle",
    "intent",
    "lose_artifacts",
    "merge_fire",
    "open_run",
    "pin_code",
    "put_arrivals",
    "put_cursor",
    "put_stat_cache",
    "queue_step",
    "record_fire",
    "save_definition",
    "set_drained",
    "set_paused",
    "set_unwell",
    "start_run",
]

_FINISHED = {outcome: compact({"outcome": outcome.value}) for outcome in StepOutcome}


# --- runs -----------------------------------------------------------------------------------------------------
def start_run(run_id: int, now: int) -> Op[None]:
    """queued -> running."""

    def op(c: Connection) -> None:
        if one(c, "start_run", {"run_id": run_id, "now": now}) is None:
            raise illegal_run(c, run_id, "running")
        c.emit(run_id, None, "run.running", now)

    return op


def cancel_run(run_id: int, now: int) -> Op[bool]:
    """Note that the run is to end; its options say `cancelled` from now on. False when it has ended already."""

    def op(c: Connection) -> bool:
        if one(c, "cancel_run", {"run_id": run_id}) is None:
            return False
        c.emit(run_id, None, "run.cancelling", now)
        return True

    return op


def finish_run(run_id: int, outcome: RunOutcome, now: int) -> Op[None]:
    """-> finished. All its steps must be finished."""

    def op(c: Connection) -> None:
        if one(c, "finish_run", {"run_id": run_id, "outcome": outcome.value, "now": now}) is None:
            raise illegal_run(c, run_id, "finished")
        c.emit(run_id, None, "run.finished", now, compact({"outcome": outcome.value}))

    return op


# --- steps ----------------------------------------------------------------------------------------------------
def add_steps(run_id: int, rows: Sequence[StepRow], now: int) -> Op[None]:
    """The steps of a run, waiting, queued or finished already (not `succeeded`: that takes a commit)."""

    def op(c: Connection) -> None:
        made_by = _made_by(c, run_id, rows)
        values, finished = [], {o: ("step.finished", now, data) for o, data in _FINISHED.items()}
        for row in rows:
            if row.state not in (StepState.WAITING, StepState.QUEUED, StepState.FINISHED):
                raise IllegalMove(f"step `{run_id}/{row.name}` cannot begin as {row.state}")
            source = made_by.get(row.idx, _NOTHING)
            ended = row.finished_at or now if row.outcome else None
            values.append(
                (run_id, row.idx, row.name, row.state.value, row.outcome and row.outcome.value, clean(row.why),
                 row.compute, row.attempts, row.exit_code, row.key, *source[:2], row.started_at, ended, source[2])
            )  # fmt: skip
            c.events.append(
                (run_id, row.idx, *finished[row.outcome])
                if row.outcome
                else (run_id, row.idx, f"step.{row.state.value}", now, None)
            )
        try:
            c.executemany(SQL["insert_step"], values)
        except IntegrityError as error:
            raise IllegalMove(f"the steps of run {run_id} cannot be added: {error}") from error
        _after_reuse(c, run_id, made_by, now)

    return op


def queue_step(run_id: int, idx: int, key: str | None, why: str | None, now: int) -> Op[None]:
    """-> queued: it must run. None leaves `key` and `why` as they are."""

    def op(c: Connection) -> None:
        values = {"run_id": run_id, "idx": idx, "key": key, "why": clean(why)}
        if one(c, "queue_step", values) is None:
            raise illegal_step(c, run_id, idx, "queued")
        c.emit(run_id, idx, "step.queued", now)

    return op


def finish_step(
    run_id: int,
    idx: int,
    outcome: StepOutcome,
    why: str | None,
    now: int,
    *,
    key: str | None = None,
    exit_code: int | None = None,
    reused_from: tuple[int, str] | None = None,
) -> Op[None]:
    """-> finished by anything but a commit. None leaves `why`, `key` and `exit_code` as they are.

    Reuse needs the `key`; with `reused_from`, the result must still be that one, else StaleReuse: plan again.
    """
    row = StepRow(idx, str(idx), StepState.FINISHED, outcome, why or "", None, 0, exit_code, key, reused_from)
    return _finish(run_id, [row], now, keep_why=why is None)


def finish_steps(run_id: int, rows: Sequence[StepRow], now: int) -> Op[None]:
    """`finish_step` for many; read from a row: idx, outcome, why, key, exit_code, reused_from. All or none."""
    return _finish(run_id, rows, now, keep_why=False)


def _finish(run_id: int, rows: Sequence[StepRow], now: int, *, keep_why: bool) -> Op[None]:
    def op(c: Connection) -> None:
        made_by = _made_by(c, run_id, rows)
        cursor = c.cursor()
        for row in rows:
            if row.outcome is None:
                raise IllegalMove(f"step {run_id}/{row.idx} cannot finish without an outcome")
            why = None if keep_why else clean(row.why)
            source = made_by.get(row.idx, _NOTHING)
            values = (run_id, row.idx, row.outcome.value, why, now, row.key, row.exit_code, *source)
            if cursor.execute(SQL["finish_step"], values).rowcount != 1:
                raise illegal_step(c, run_id, row.idx, "finished")
            c.events.append((run_id, row.idx, "step.finished", now, _FINISHED[row.outcome]))
        _after_reuse(c, run_id, made_by, now)

    return op


# --- reuse ----------------------------------------------------------------------------------------------------
_NOTHING: tuple[int | None, str | None, int | None] = (None, None, None)


def _made_by(c: Connection, run_id: int, rows: Sequence[StepRow]) -> dict[int, tuple[int, str, int]]:
    """For each reused row the (run id, step name, attempt) of the committed result that it takes, as of now."""
    for row in rows:
        if row.outcome is StepOutcome.SUCCEEDED:
            raise IllegalMove(f"step {run_id}/{row.idx} succeeds by the commit of an attempt, and by nothing else")
    reused = [row for row in rows if row.outcome is StepOutcome.REUSED]
    if not reused:
        return {}
    found = every(c, "reuse_sources", {"keys": json.dumps([row.key for row in reused])})
    sources = {r[0]: (r[1], r[2], r[3]) for r in found}
    made_by = {}
    for row in reused:
        source = sources.get(row.key)
        if source is None:
            raise StaleReuse(f"step {run_id}/{row.idx} cannot reuse: no result is kept for its key")
        if row.reused_from is not None and tuple(row.reused_from) != source[:2]:
            raise StaleReuse(
                f"step {run_id}/{row.idx} cannot reuse run {row.reused_from[0]}: run {source[0]} made it anew"
            )
        made_by[row.idx] = source
    return made_by


def _after_reuse(c: Connection, run_id: int, made_by: dict[int, Any], now: int) -> None:
    if made_by:
        values = {"run_id": run_id, "idxs": json.dumps(list(made_by)), "now": now}
        c.execute(SQL["reuse_heads"], values)
        c.execute(SQL["reuse_touch"], values)
