"""What the end of an attempt means for its step, where its machine did not start it."""

from __future__ import annotations

from mlpiped.execution.attempt import Ended
from mlpiped.execution.tries import LONGEST_PAUSE, REFUSALS_HELD, Try
from mlpiped.model import AttemptEnd, StepOutcome
from mlpiped.spec import StepSpec

STEP = StepSpec.model_validate({"name": "a", "where": {"file": "p.py", "line": 1}, "arguments": []})
REFUSED = Ended(None, "it had not started: no space left", AttemptEnd.NEVER_RAN, refused=True)
NOT_ITS_TURN = Ended(None, "its turn did not come", AttemptEnd.NEVER_RAN)
LOST = Ended(StepOutcome.LOST, "its machine died", AttemptEnd.LOST)


def test_a_step_that_its_machine_does_not_start_is_tried_on_after_growing_pauses_and_called_held() -> None:
    t, pauses = Try(), []
    for n in range(1, 12):
        ended, again, pause = t.verdict(STEP, REFUSED, None)
        assert ended is REFUSED and again is not None and again.startswith(REFUSED.why)
        assert (f"{n} times in a row" in again) == (n > 1)
        assert t.refused == (n >= REFUSALS_HELD)
        pauses.append(pause)
    assert pauses[:5] == [0.0, 1.0, 2.0, 4.0, 8.0] and pauses[-1] == LONGEST_PAUSE
    assert t.number == 1, "no attempt was spent"


def test_what_has_started_meanwhile_or_had_only_to_wait_is_no_refusal() -> None:
    for between in (NOT_ITS_TURN, LOST):
        t = Try()
        for ended in (REFUSED, REFUSED, REFUSED, between):
            _, again, pause = t.verdict(STEP, ended, None)
        assert again is not None and pause == 0.0 and t.refusals == 0
        assert t.verdict(STEP, REFUSED, None)[2] == 0.0


def test_a_step_that_was_not_started_and_is_not_wanted_any_more_is_cancelled() -> None:
    ended, again, _ = Try(refusals=7).verdict(STEP, REFUSED, "the run was cancelled")
    assert (ended.outcome, ended.why, again) == (StepOutcome.CANCELLED, "the run was cancelled", None)
