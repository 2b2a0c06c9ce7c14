"""What can happen: the states of runs, steps and attempts, and every legal move between them.

Rule 1: a state says where a thing is; an outcome says how it ended, and exists only in state `finished`.
Rule 2: a move that is not in MOVES is illegal wherever it is tried; the ledger refuses it too, by a guarded
        UPDATE, and leaves an event row in the same transaction for each one that it allows.
Rule 3: nothing here does anything. No clock, no file, no network.

The diagram in docs/ is generated from MOVES.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class RunState(StrEnum):
    QUEUED = "queued"  # recorded; waits for its turn (overlap, limits)
    RUNNING = "running"  # its steps are being resolved or run
    FINISHED = "finished"


class RunOutcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StepState(StrEnum):
    WAITING = "waiting"  # something before it has not finished
    QUEUED = "queued"  # must run; waits for a place (or for an equal step that runs already)
    SUBMITTING = "submitting"  # an attempt's intent is durable; its backend may or may not know it
    RUNNING = "running"  # a backend has given a handle for it
    COLLECTING = "collecting"  # its process ended well; outputs are checked and hashed
    FINISHED = "finished"


class StepOutcome(StrEnum):
    SUCCEEDED = "succeeded"
    REUSED = "reused"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"  # something before it did not succeed, or `when=` said no
    LOST = "lost"  # its machine or supervisor died, and its retries are used up

    @property
    def good(self) -> bool:
        """Whether what comes after may build on it."""
        return self in (StepOutcome.SUCCEEDED, StepOutcome.REUSED)


class AttemptState(StrEnum):
    INTENT = "intent"  # the token is durable; nothing else is known
    SUBMITTED = "submitted"  # a handle is durable
    ENDED = "ended"  # how it ended is durable (`AttemptEnd`)


class AttemptEnd(StrEnum):
    COMMITTED = "committed"  # exit 0, outputs committed: the one attempt that made the step's result
    FAILED = "failed"  # the code's fault: exit status, missing output
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    LOST = "lost"  # the machine's fault: it may have run, no witness is left
    NEVER_RAN = "never_ran"  # the fence won: it has not started and cannot
    TAINTED = "tainted"  # an input changed while it ran: what it made is of no use
    SUPERSEDED = "superseded"  # another attempt of the step was committed first


S = StepState
STEP_MOVES: dict[StepState, frozenset[StepState]] = {
    S.WAITING: frozenset({S.QUEUED, S.FINISHED}),
    S.QUEUED: frozenset({S.SUBMITTING, S.RUNNING, S.WAITING, S.FINISHED}),
    S.SUBMITTING: frozenset({S.RUNNING, S.QUEUED, S.COLLECTING, S.FINISHED}),
    S.RUNNING: frozenset({S.COLLECTING, S.QUEUED, S.FINISHED}),
    S.COLLECTING: frozenset({S.QUEUED, S.FINISHED}),
    S.FINISHED: frozenset(),
}
RUN_MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.FINISHED}),
    RunState.RUNNING: frozenset({RunState.FINISHED}),
    RunState.FINISHED: frozenset(),
}
ATTEMPT_MOVES: dict[AttemptState, frozenset[AttemptState]] = {
    AttemptState.INTENT: frozenset({AttemptState.SUBMITTED, AttemptState.ENDED}),
    AttemptState.SUBMITTED: frozenset({AttemptState.ENDED}),
    AttemptState.ENDED: frozenset(),
}
del S


class CauseKind(StrEnum):
    MANUAL = "manual"
    CRON = "cron"  # Cron and Every
    ARRIVAL = "arrival"
    PIPELINE = "pipeline"  # OnSuccess, OnChange
    API = "api"
    RETRY = "retry"
    BACKFILL = "backfill"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a run exists. `detail` is a sentence's worth for people."""

    kind: CauseKind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """A trigger's finding: `pipeline` should be looked at, because of `cause`.

    `dedupe` names the fire for ever (trigger, nominal time or batch content): the ledger opens at most one run
    for it. `cursor`, where set, is (schedule id, JSON) and is stored in the transaction that opens the run,
    so a fire and its cursor are never apart.
    """

    pipeline: str
    cause: Cause
    dedupe: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    cursor: tuple[str, dict[str, Any]] | None = None
    arrivals: Sequence[Arrival] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """One file that an OnArrival trigger has taken into a batch. `path` is absolute, as the file system's bytes."""

    schedule: str
    path: bytes
    digest: str
    size: int
    mtime_ns: int
    ino: int


@dataclass(frozen=True, slots=True)
class OutputFact:
    """What a step made for one of its outputs. `digest` is `b3:<hex>` of a file, `b3t:<hex>` of a tree; `s2:`
    and `s2t:` if a box has kept it.

    `path` is where it lies, as an absolute path in the artifact store; or will lie once it is needed here, when
    `compute`, the one that keeps it, is not None.
    """

    name: str
    digest: str
    kind: str  # "file" | "folder"
    size: int  # bytes, all files of a folder together
    path: str
    compute: str | None = None


def json_time(us: int | None) -> str | None:
    """Microseconds since the epoch, UTC -> RFC 3339 with milliseconds and `Z`; None stays None."""
    if us is None:
        return None
    from datetime import UTC, datetime

    moment = datetime.fromtimestamp(us // 1_000_000, tz=UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{us // 1000 % 1000:03d}Z"
