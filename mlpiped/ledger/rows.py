"""What the ledger gives back: one frozen row type a table. Times are microseconds since the epoch, UTC."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mlpiped.model import (
    AttemptEnd,
    AttemptState,
    Cause,
    CauseKind,
    OutputFact,
    RunOutcome,
    RunState,
    StepOutcome,
    StepState,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class RunRow:
    id: int
    pipeline: str
    version: str
    experiment: str
    owner: str
    cause: Cause
    parameters: dict[str, Any]
    tags: dict[str, str]
    options: dict[str, Any]
    state: RunState
    outcome: RunOutcome | None
    created_at: int
    started_at: int | None
    finished_at: int | None


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of a run. `reused_from` is (run id, step name) of the result it took; `attempts` counts those that
    may have run. `run_id` is filled when it is read; writing takes the run's id beside the rows."""

    idx: int
    name: str
    state: StepState = StepState.WAITING
    outcome: StepOutcome | None = None
    why: str = ""
    compute: str | None = None
    attempts: int = 0
    exit_code: int | None = None
    key: str | None = None
    reused_from: tuple[int, str] | None = None
    started_at: int | None = None
    finished_at: int | None = None
    run_id: int = 0


@dataclass(frozen=True, slots=True)
class AttemptRow:
    token: str
    run_id: int
    idx: int
    n: int
    compute: str
    key: str
    state: AttemptState
    end: AttemptEnd | None
    handle: dict[str, Any] | None
    exit_code: int | None
    reason: str | None
    usage: dict[str, Any] | None
    cost_us: int | None
    intent_at: int
    submitted_at: int | None
    ended_at: int | None
    slots: int = 1
    cards: tuple[str, ...] = ()  # UUIDs of the GPUs that are leased to it


@dataclass(frozen=True, slots=True)
class ComputeRow:
    """What is known of a compute over restarts: who has drained it, and the incident that goes on."""

    name: str
    drained_by: str | None
    drained_at: int | None
    unwell: str | None
    unwell_at: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """What a key made, by a committed attempt. An output whose bytes were collected as garbage has an empty path."""

    run_id: int
    step_name: str
    outputs: tuple[OutputFact, ...]
    cost_us: int


@dataclass(frozen=True, slots=True)
class Head:
    """A step's last good state. `parts` is the JSON text of the key's named parts."""

    key: str
    run_id: int
    parts: str | None


@dataclass(frozen=True, slots=True)
class EventRow:
    id: int
    run_id: int | None
    idx: int | None
    kind: str
    at: int
    data: str | None  # a JSON object, as text

    @property
    def facts(self) -> dict[str, Any]:
        """`data`, parsed."""
        return json.loads(self.data) if self.data else {}


@dataclass(frozen=True, slots=True)
class FireRow:
    dedupe: str
    pipeline: str
    verdict: str
    run_id: int | None
    detail: str
    at: int


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """A trigger's cursor, and its last fire with what came of it (`run_id` or only a `verdict`)."""

    id: str
    pipeline: str
    cursor: dict[str, Any]
    moved_at: int
    fired_at: int | None
    verdict: str | None
    run_id: int | None


class Seen(NamedTuple):
    """What lay at a path when it was last taken into a batch."""

    digest: str
    size: int
    mtime_ns: int
    ino: int


@dataclass(frozen=True, slots=True)
class AuditRow:
    id: int
    at: int
    who: str
    uid: int | None
    pid: int | None
    verb: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ArtifactRow:
    """For garbage collection: an artifact that has its bytes, when it was last made or reused, what it cost to make."""

    digest: str
    kind: str
    path: str
    size: int
    used_at: int
    cost_us: int


@dataclass(frozen=True, slots=True)
class Maker:
    """A step that made an output, for lineage."""

    run_id: int
    idx: int
    step_name: str
    output: str
    token: str


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is going on: runs and steps that are not finished, by state (waiting steps are not counted)."""

    runs: dict[RunState, int]
    steps: dict[StepState, int]


RUN_STATES = {state.value: state for state in RunState}
RUN_OUTCOMES: dict[str | None, RunOutcome | None] = {None: None} | {o.value: o for o in RunOutcome}
STEP_STATES = {state.value: state for state in StepState}
STEP_OUTCOMES: dict[str | None, StepOutcome | None] = {None: None} | {o.value: o for o in StepOutcome}
ATTEMPT_STATES = {state.value: state for state in AttemptState}
ATTEMPT_ENDS: dict[str | None, AttemptEnd | None] = {None: None} | {e.value: e for e in AttemptEnd}


def run_row(r: Sequence[Any]) -> RunRow:
    return RunRow(
        id=r[0],
        pipeline=r[1],
        version=r[2],
        experiment=r[3],
        owner=r[4],
        cause=Cause(CauseKind(r[5]), r[6]),
        parameters=json.loads(r[7]),
        tags=json.loads(r[8]),
        options=json.loads(r[9]),
        state=RUN_STATES[r[10]],
        outcome=RUN_OUTCOMES[r[11]],
        created_at=r[12],
        started_at=r[13],
        finished_at=r[14],
    )


def step_row(r: Sequence[Any]) -> StepRow:
    state, outcome = STEP_STATES[r[3]], STEP_OUTCOMES[r[4]]
    reused = None if r[10] is None else (r[10], r[11])
    return StepRow(r[1], r[2], state, outcome, r[5], r[6], r[7], r[8], r[9], reused, r[12], r[13], r[0])


def attempt_row(r: Sequence[Any]) -> AttemptRow:
    return AttemptRow(
        token=r[0],
        run_id=r[1],
        idx=r[2],
        n=r[3],
        compute=r[4],
        key=r[5],
        state=ATTEMPT_STATES[r[6]],
        end=ATTEMPT_ENDS[r[7]],
        handle=None if r[8] is None else json.loads(r[8]),
        exit_code=r[9],
        reason=r[10],
        usage=None if r[11] is None else json.loads(r[11]),
        cost_us=r[12],
        intent_at=r[13],
        submitted_at=r[14],
        ended_at=r[15],
        slots=r[16],
        cards=() if r[17] is None else tuple(json.loads(r[17])),
    )


def schedule_row(r: Sequence[Any]) -> ScheduleRow:
    return ScheduleRow(r[0], r[1], json.loads(r[2]), *r[3:])


_FULL = 2**64


def signed(value: int) -> int:
    """A 64-bit number as SQLite can hold it: device and inode numbers may have the highest bit set."""
    return value - _FULL if value >= _FULL // 2 else value


def unsigned(value: int) -> int:
    return value + _FULL if value < 0 else value
