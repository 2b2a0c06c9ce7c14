"""The sentence for a move that no row could make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpiped.errors import IllegalMove
from mlpiped.ledger.db import one

if TYPE_CHECKING:
    from mlpiped.ledger.db import Connection


def illegal_run(c: Connection, run_id: int, to: str) -> IllegalMove:
    row = one(c, "run_state", {"run_id": run_id})
    if row is None:
        return IllegalMove(f"no run has the number {run_id}")
    if to == "finished" and row[0] != "finished":
        return IllegalMove(f"run {run_id} cannot finish: it has steps that are not finished")
    return IllegalMove(f"run {run_id} cannot go from {row[0]} to {to}")


def illegal_step(c: Connection, run_id: int, idx: int, to: str) -> IllegalMove:
    row = one(c, "step_state", {"run_id": run_id, "idx": idx})
    if row is None:
        return IllegalMove(f"run {run_id} has no step {idx}")
    return IllegalMove(f"step `{run_id}/{row[0]}` cannot go from {row[1]} to {to} now")
