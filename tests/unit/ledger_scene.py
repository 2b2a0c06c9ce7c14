"""A ledger in a temporary folder, and the shortest way to a run with steps in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mlpiped.clock import SystemClock
from mlpiped.ledger import moves
from mlpiped.ledger.rows import StepRow
from mlpiped.ledger.store import Ledger
from mlpiped.model import Cause, CauseKind, Event, OutputFact

NOW = 1_800_000_000_000_000


@asynccontextmanager
async def opened(state_dir: Path) -> AsyncIterator[Ledger]:
    ledger = await Ledger.open(state_dir, SystemClock())
    try:
        yield ledger
    finally:
        await ledger.close()


def event(pipeline: str = "digits", **fields: Any) -> Event:
    return Event(pipeline, fields.pop("cause", Cause(CauseKind.MANUAL, "alice")), **fields)


def opening(fire: Event, **fields: Any) -> Any:
    known: dict[str, Any] = {
        "version": "v1", "experiment": "e", "owner": "alice", "tags": {}, "options": {}, "now": NOW,
    }  # fmt: skip
    return moves.open_run(fire, **(known | fields))


async def running(ledger: Ledger, steps: Sequence[str] = ("prepare", "train"), pipeline: str = "digits") -> int:
    """A running run whose steps wait."""
    [run_id] = await ledger.write(opening(event(pipeline)))
    rows = [StepRow(idx, name) for idx, name in enumerate(steps)]
    await ledger.write(moves.start_run(run_id, NOW), moves.add_steps(run_id, rows, NOW))
    return int(run_id)


async def begun(ledger: Ledger, run_id: int, idx: int = 0, *, key: str = "b3:k", token: str = "t1", n: int = 1) -> None:
    """An attempt of a waiting step has a handle."""
    await ledger.write(
        moves.queue_step(run_id, idx, key, "never ran", NOW),
        moves.intent(run_id, idx, token, n, "local", key, '{"command":"x"}', NOW),
        moves.handle(token, '{"v":1}', NOW),
    )


def made(name: str = "model", digest: str = "b3:made") -> OutputFact:
    return OutputFact(name, digest, "file", 3, f"/state/artifacts/{digest[3:5]}/{name}")


async def committed(ledger: Ledger, run_id: int, idx: int = 0, *, key: str = "b3:k", token: str = "t1") -> None:
    await begun(ledger, run_id, idx, key=key, token=token)
    [done] = await ledger.write(moves.commit_result(token, key, [made()], 7, NOW, True))
    assert done
