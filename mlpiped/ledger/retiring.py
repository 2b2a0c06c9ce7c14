"""What retention takes out of the ledger, bite by bite: a bite holds the writer for `BITE` and little more.

Each may be cut off after any bite, by a crash too, and goes on where it was: a run goes after all that is its own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from mlpiped.errors import IllegalMove
from mlpiped.ledger.db import SQL, Connection, Op, one

if TYPE_CHECKING:
    from collections.abc import Sequence

BITE = 0.015  # seconds of the writer's time
ROWS = 100  # deleted by one statement, between two looks at the clock


class Bite(NamedTuple):
    rows: int
    done: bool  # nothing is left of it
    seconds: float  # that the writer was held


def forget_run(run_id: int) -> Op[Bite]:
    """Events, attempts and steps of a finished run, and then the run; to be repeated until `done`.

    Results, outputs, heads and keys outlive it. Raises IllegalMove for a run that has not finished.
    """

    def op(c: Connection) -> Bite:
        began = time.perf_counter()
        found = one(c, "run_state", {"run_id": run_id})
        if found is None:
            return Bite(0, True, time.perf_counter() - began)
        if found[0] != "finished":
            raise IllegalMove(f"run {run_id} has not finished, and is kept")
        rows = 0
        for statement in ("forget_events", "forget_attempts", "forget_steps"):
            count = ROWS
            while count == ROWS:
                count = c.execute(SQL[statement], {"run_id": run_id, "limit": ROWS}).rowcount
                rows += count
                if time.perf_counter() - began > BITE:
                    return Bite(rows, False, time.perf_counter() - began)
        rows += c.execute(SQL["forget_run"], {"run_id": run_id}).rowcount
        return Bite(rows, True, time.perf_counter() - began)

    return op


def forget_loose_events(before: int) -> Op[Bite]:
    """Events from before a time that belong to no run; to be repeated until `done`."""

    def op(c: Connection) -> Bite:
        began = time.perf_counter()
        rows, count = 0, ROWS
        while count == ROWS and time.perf_counter() - began < BITE:
            count = c.execute(SQL["forget_loose_events"], {"before": before, "limit": ROWS}).rowcount
            rows += count
        return Bite(rows, count < ROWS, time.perf_counter() - began)

    return op


def drop_stats(rows: Sequence[tuple[bytes, int]]) -> Op[int]:
    """Files that are no more, as (path, hashed_ns). Gives how many rows went."""

    def op(c: Connection) -> int:
        return int(c.executemany(SQL["forget_stat"], rows).rowcount) if rows else 0

    return op
