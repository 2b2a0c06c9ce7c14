"""What is written about attempts, and through them about their steps: the part of `moves` for what runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from mlpiped import crash
from mlpiped.errors import IllegalMove
from mlpiped.ledger.db import SQL, Connection, IntegrityError, Op, one
from mlpiped.ledger.refusals import illegal_step
from mlpiped.ledger.text import clean, compact, fs_bytes
from mlpiped.model import AttemptEnd, AttemptState, StepOutcome, StepState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.model import OutputFact

_SUCCEEDED, _CANCELLED = (compact({"outcome": o.value}) for o in (StepOutcome.SUCCEEDED, StepOutcome.CANCELLED))


def intent(
    run_id: int,
    idx: int,
    token: str,
    n: int,
    compute: str,
    key: str,
    parts_json: str,
    now: int,
    *,
    slots: int = 1,
    cards: Sequence[str] = (),
) -> Op[None]:
    """Step queued -> submitting, and its attempt `n` begins to live. The run must be running."""

    def op(c: Connection) -> None:
        values = {
            "run_id": run_id, "idx": idx, "token": token, "n": n, "compute": compute, "key": key,
            "parts": clean(parts_json), "now": now, "slots": slots, "cards": json.dumps(cards) if cards else None,
        }  # fmt: skip
        if one(c, "submitting_step", values) is None:
            raise illegal_step(c, run_id, idx, "submitting")
        try:
            c.execute(SQL["insert_attempt"], values)
        except IntegrityError as error:
            raise IllegalMove(f"step {run_id}/{idx} has a live attempt, or attempt {n} or its token already") from error
        c.execute(SQL["insert_key"], values)
        c.emit(run_id, idx, "attempt.intent", now, compact({"token": token}))
        c.emit(run_id, idx, "step.submitting", now, compact({"token": token, "n": n, "compute": compute}))

    return op


def handle(token: str, handle_json: str, now: int) -> Op[bool]:
    """The backend's handle. Attempt intent -> submitted, step submitting -> running; a later one replaces it.

    False, and nothing is written, when the attempt has ended already.
    """

    def op(c: Connection) -> bool:
        a = _Place.of(c, token)
        values = {"id": a.id, "run_id": a.run_id, "idx": a.idx, "handle": clean(handle_json), "now": now}
        if a.state == AttemptState.ENDED:
            return False
        if one(c, "submitted_attempt", values) is None:
            c.execute(SQL["renew_handle"], values)
            return True
        c.emit(a.run_id, a.idx, "attempt.submitted", now, compact({"token": token}))
        if one(c, "running_step", values) is not None:
            c.emit(a.run_id, a.idx, "step.running", now)
        return True

    return op


def collecting(token: str, exit_code: int, usage_json: str | None, now: int) -> Op[None]:
    """The process ended well: step -> collecting. The attempt lives until `commit_result` or `attempt_ended`."""

    def op(c: Connection) -> None:
        a = _Place.of(c, token)
        values = {
            "id": a.id, "run_id": a.run_id, "idx": a.idx, "exit_code": exit_code, "usage": usage_json, "now": now,
        }  # fmt: skip
        if a.state == AttemptState.ENDED or one(c, "collecting_step", values) is None:
            raise illegal_step(c, a.run_id, a.idx, "collecting")
        c.execute(SQL["exited_attempt"], values)
        c.emit(a.run_id, a.idx, "step.collecting", now)

    return op


def attempt_ended(
    token: str,
    end: AttemptEnd,
    step_to: StepState | None,
    why: str | None,
    exit_code: int | None,
    reason: str | None,
    usage_json: str | None,
    now: int,
) -> Op[StepState]:
    """The attempt ended without a commit. With `step_to` QUEUED its step waits for another try, with `why`.

    Gives the step's state after it. A step that is finished stays so. An attempt that has ended in the same way
    before is left as it is; in another way: IllegalMove.
    """
    if end is AttemptEnd.COMMITTED:
        raise ValueError("an attempt is committed by `commit_result`")
    if step_to not in (None, StepState.QUEUED):
        raise ValueError(f"an attempt's end takes no step to {step_to}")

    def op(c: Connection) -> StepState:
        a = _Place.of(c, token)
        if a.state == AttemptState.ENDED and a.end == end:
            return StepState(a.step_state)
        values = {
            "id": a.id, "run_id": a.run_id, "idx": a.idx, "exit_code": exit_code, "why": clean(why),
            "uncounted": int(end is AttemptEnd.NEVER_RAN), "now": now,
        }  # fmt: skip
        _end(c, a, end, now, exit_code=exit_code, reason=clean(reason), usage=usage_json)
        c.execute(SQL["attempt_told"], values)
        if step_to is None or a.step_state == StepState.FINISHED:
            return StepState(a.step_state)
        if one(c, "requeue_step", values) is None:
            raise illegal_step(c, a.run_id, a.idx, "queued")
        c.emit(a.run_id, a.idx, "step.queued", now)
        return StepState.QUEUED

    return op


def commit_result(
    token: str,
    key: str,
    outputs: Sequence[OutputFact],
    cost_us: int,
    now: int,
    reusable: bool,
    *,
    usage_json: str | None = None,
    started_at: int | None = None,
) -> Op[bool]:
    """The one way in which a step succeeds: attempt -> ended (committed), its outputs, step -> finished, its head and,
    if `reusable`, what its key stands for from now on. `started_at` counts if no `handle` was told before.

    True also when this very attempt was committed before. False when the step has been finished without it (the attempt
    ends as superseded) or the attempt was given up earlier: then nothing of it is ever used.
    """

    def op(c: Connection) -> bool:
        a = _Place.of(c, token)
        if a.state == AttemptState.ENDED:
            if a.end != AttemptEnd.COMMITTED:
                c.emit(a.run_id, a.idx, "attempt.late", now, compact({"token": token}))
            return a.end == AttemptEnd.COMMITTED
        if a.key != key:
            raise IllegalMove(f"attempt `{token}` was begun for another key than it is committed for")
        values = {
            "attempt": a.id, "run_id": a.run_id, "idx": a.idx, "key": key, "cost_us": cost_us, "now": now,
            "step": a.step_name, "pipeline": a.pipeline, "started_at": started_at or now,
        }  # fmt: skip
        if one(c, "commit_step", values) is None:
            _end(c, a, AttemptEnd.SUPERSEDED, now, cost_us=cost_us)
            return False
        _end(c, a, AttemptEnd.COMMITTED, now, cost_us=cost_us, exit_code=0, usage=usage_json)
        c.emit(a.run_id, a.idx, "step.finished", now, _SUCCEEDED)
        for position, o in enumerate(outputs):
            path = fs_bytes(o.path)
            c.execute(SQL["revive_outputs"], (path, o.compute, o.digest))
            row = (a.id, position, o.name, o.digest, o.kind, o.size, path, cost_us, now, o.compute)
            c.execute(SQL["insert_output"], row)
        if reusable:
            c.execute(SQL["put_result"], values)
        c.execute(SQL["put_head"], values)
        return True

    return op


def hand_over(
    token: str, handle_json: str, run_id: int, idx: int, n: int, now: int, *, why: str, left: str
) -> Op[None]:
    """A live attempt goes on as attempt `n` of another step of the same key, which is queued and becomes running, with
    `why`. The step that it leaves is finished as cancelled, with `left` as its reason.
    """

    def op(c: Connection) -> None:
        handle(token, handle_json, now)(c)
        a = _Place.of(c, token)
        values = {"id": a.id, "run_id": run_id, "idx": idx, "n": n, "key": a.key, "why": clean(why), "now": now}
        if a.state == AttemptState.ENDED:
            raise IllegalMove(f"attempt `{token}` has ended: it cannot go on for another step")
        if one(c, "inherit_step", values) is None:
            raise illegal_step(c, run_id, idx, "running")
        gone = (a.run_id, a.idx, StepOutcome.CANCELLED.value, clean(left), now, None, None, None, None, None)
        if c.execute(SQL["finish_step"], gone).rowcount != 1:
            raise illegal_step(c, a.run_id, a.idx, "finished")
        c.execute(SQL["uncount_attempt"], {"run_id": a.run_id, "idx": a.idx})
        try:
            c.execute(SQL["hand_over"], values)
        except IntegrityError as error:
            raise IllegalMove(f"step {run_id}/{idx} has a live attempt, or attempt {n} already") from error
        c.emit(a.run_id, a.idx, "attempt.handed_over", now, compact({"token": token, "run": run_id, "step": idx}))
        c.emit(a.run_id, a.idx, "step.finished", now, _CANCELLED)
        c.emit(run_id, idx, "step.running", now)
        crash.point("in_hand_over")

    return op


class _Place(NamedTuple):
    """An attempt and the step it is of, as a move finds them."""

    token: str
    id: int
    run_id: int
    idx: int
    key: str
    state: str
    end: str | None
    step_state: str
    step_name: str
    pipeline: str

    @classmethod
    def of(cls, c: Connection, token: str) -> _Place:
        row = one(c, "attempt_place", {"token": token})
        if row is None:
            raise IllegalMove(f"no attempt has the token `{token}`")
        return cls(*row)


def _end(c: Connection, a: _Place, end: AttemptEnd, now: int, **told: Any) -> None:
    values = {
        "id": a.id,
        "end": end.value,
        "now": now,
        "exit_code": None,
        "reason": None,
        "usage": None,
        "cost_us": None,
    }
    if one(c, "end_attempt", values | told) is None:
        raise IllegalMove(f"attempt `{a.token}` cannot end as {end}: it has ended as {a.end}")
    c.emit(a.run_id, a.idx, "attempt.ended", now, compact({"token": a.token, "end": end.value}))
