"""What triggers find: each fire once for ever, with its cursor and its arrivals in the transaction that uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpiped.errors import IllegalMove
from mlpiped.ledger.db import SQL, Connection, Op, one
from mlpiped.ledger.rows import signed
from mlpiped.ledger.text import clean, compact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.model import Arrival, Event


def open_run(
    event: Event,
    *,
    version: str,
    experiment: str,
    owner: str,
    tags: Mapping[str, str],
    options: Mapping[str, Any],
    now: int,
) -> Op[int | None]:
    """A new run, queued: its id. None, and nothing is written, when this fire has happened before."""

    def op(c: Connection) -> int | None:
        if not _first(c, event, "opened", None, now):
            return None
        row = one(
            c,
            "insert_run",
            {
                "pipeline": event.pipeline,
                "version": version,
                "experiment": experiment,
                "owner": clean(owner),
                "cause_kind": event.cause.kind.value,
                "cause_detail": clean(event.cause.detail),
                "parameters": compact(event.parameters),
                "tags": compact(dict(tags)),
                "options": compact(dict(options)),
                "now": now,
            },
        )
        run_id: int = row[0]
        c.executemany(SQL["insert_tag"], [(clean(name), clean(str(value)), run_id) for name, value in tags.items()])
        if event.dedupe is not None:
            c.execute(SQL["fire_opened"], {"run_id": run_id, "dedupe": clean(event.dedupe)})
        _advance(c, event, "opened", run_id, now)
        c.emit(run_id, None, "run.queued", now, compact({"pipeline": event.pipeline}))
        return run_id

    return op


def merge_fire(run_id: int, event: Event, now: int) -> Op[bool]:
    """The fire joins a run that is still queued (else IllegalMove). False: it has happened before."""

    def op(c: Connection) -> bool:
        if not _first(c, event, "merged", run_id, now):
            return False
        if one(c, "merge_cause", {"run_id": run_id, "detail": clean(event.cause.detail)}) is None:
            raise IllegalMove(f"run {run_id} is not queued any more: nothing can be merged into it")
        _advance(c, event, "merged", run_id, now)
        c.emit(run_id, None, "run.merged", now)
        return True

    return op


def record_fire(event: Event, now: int, verdict: str) -> Op[bool]:
    """A fire that opens nothing, and why: `skipped`, `missed`, … False: it has happened before."""

    def op(c: Connection) -> bool:
        if not _first(c, event, verdict, None, now):
            return False
        _advance(c, event, verdict, None, now)
        data = compact({"pipeline": event.pipeline, "detail": event.cause.detail})
        c.emit(None, None, f"fire.{verdict}", now, data)
        return True

    return op


def put_cursor(schedule: str, pipeline: str, cursor: Mapping[str, Any], now: int) -> Op[None]:
    """A trigger's cursor without a fire: its first one, or a step over a span in which nothing was due."""

    def op(c: Connection) -> None:
        values = {"schedule": schedule, "pipeline": pipeline, "cursor": compact(dict(cursor)), "now": now}
        c.execute(SQL["put_cursor"], values)

    return op


def put_arrivals(arrivals: Sequence[Arrival]) -> Op[None]:
    """Files that count as seen without a fire: what lies there when a trigger is new, or a touch of what is known."""

    def op(c: Connection) -> None:
        _store_arrivals(c, arrivals)

    return op


def _first(c: Connection, event: Event, verdict: str, run_id: int | None, now: int) -> bool:
    if event.dedupe is None:
        return True
    values = {
        "dedupe": clean(event.dedupe),
        "pipeline": event.pipeline,
        "verdict": verdict,
        "run_id": run_id,
        "detail": clean(event.cause.detail),
        "now": now,
    }
    return one(c, "insert_fire", values) is not None


def _advance(c: Connection, event: Event, verdict: str, run_id: int | None, now: int) -> None:
    if event.cursor is not None:
        schedule, cursor = event.cursor
        put_cursor(schedule, event.pipeline, cursor, now)(c)
        c.execute(SQL["schedule_fired"], {"schedule": schedule, "verdict": verdict, "run_id": run_id, "now": now})
    _store_arrivals(c, event.arrivals)


def _store_arrivals(c: Connection, arrivals: Sequence[Arrival]) -> None:
    """One at a time: a flood may bring a million."""
    rows = ((a.schedule, a.path, a.digest, a.size, a.mtime_ns, signed(a.ino)) for a in arrivals)
    c.executemany(SQL["put_arrival"], rows)
    c.executemany(SQL["put_arrival_digest"], ((a.schedule, a.digest) for a in arrivals))
