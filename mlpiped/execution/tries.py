"""What a run knows of each of its steps that has to run, and what the end of an attempt means for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mlpiped.model import AttemptEnd, StepOutcome, StepState

if TYPE_CHECKING:
    from mlpiped.execution.attempt import Attempt, Ended
    from mlpiped.spec import RetrySpec, StepSpec

LOST_LIMIT = 3
"""So many times a step is run again because its machine failed it; a step with an effect never is."""

TAINTED_LIMIT = 3
"""So many times a step is run again because an input changed under it."""

REFUSALS_HELD = 5
"""So many times in a row its machine has not started it: then `why` calls it held. It is tried on."""

LONGEST_PAUSE = 60.0  # seconds between two tries of a step that its machine does not start


@dataclass(slots=True)
class Try:
    """What is held in memory of a step that has to run."""

    state: StepState = StepState.QUEUED
    since: int = 0  # µs: in this state
    why: str = ""  # it has to run
    again: str = ""  # it has to run once more
    held: str | None = None  # why it cannot be decided just now
    compute: str | None = None
    tokens: int = 0
    failures: int = 0  # attempts that were the code's fault
    losses: int = 0
    taints: int = 0
    moves: int = 0  # in a row: its code was another by the time that it was to begin
    refusals: int = 0  # in a row: attempts that its machine did not start
    not_before: int | None = None  # µs: the pause of a retry ends
    attempt: Attempt | None = None
    stray: str | None = None  # the token of one that is on a compute which the config no longer has
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def refused(self) -> bool:
        return self.refusals >= REFUSALS_HELD

    @property
    def number(self) -> int:
        """Of the next attempt, from 1."""
        return 1 + self.failures + self.losses + self.taints

    def verdict(self, step: StepSpec, ended: Ended, cancelled: str | None) -> tuple[Ended, str | None, float]:
        """What an attempt's end means for its step: (how it ended, why it is tried again or None, pause in seconds).

        `cancelled`: why nobody wants it any more, if so. Failures of the code cost a retry; failures of the machine,
        and inputs that changed meanwhile, do not.
        """
        self.refusals = self.refusals + 1 if ended.refused else 0
        if ended.outcome in (StepOutcome.SUCCEEDED, StepOutcome.CANCELLED):
            return ended, None, 0.0
        if cancelled is not None:
            stopped = replace(ended, outcome=StepOutcome.CANCELLED, why=cancelled)
            return (ended if ended.outcome is StepOutcome.FAILED else stopped), None, 0.0
        number = self.number
        if ended.outcome in (StepOutcome.FAILED, StepOutcome.TIMED_OUT):
            self.failures += 1
            if ended.final or self.failures >= step.retry.attempts:
                return ended, None, 0.0
            return ended, f"attempt {number} of {step.retry.attempts} {ended.why}", self.pause(step.retry)
        if ended.outcome is StepOutcome.LOST:
            self.losses += 1
            if self.losses > LOST_LIMIT or step.effect:
                return ended, None, 0.0
            return ended, f"attempt {number} was lost: {ended.why}", 0.0
        if ended.end is AttemptEnd.TAINTED:
            self.taints += 1
            if self.taints > TAINTED_LIMIT:
                why = f"its inputs kept changing while it ran: {ended.why}"
                return replace(ended, outcome=StepOutcome.FAILED, why=why), None, 0.0
        self.moves = self.moves + 1 if ended.moved else 0
        if self.moves > TAINTED_LIMIT:
            return replace(ended, outcome=StepOutcome.FAILED), None, 0.0
        if self.refusals > 1:
            pause = min(2.0 ** (self.refusals - 2), LONGEST_PAUSE)
            return ended, f"{ended.why} ({self.refusals} times in a row)", pause
        return ended, ended.why, 0.0

    def count(self, end: AttemptEnd | None) -> None:
        """An attempt that ended before a restart, as `verdict` has counted it then."""
        match end:
            case AttemptEnd.FAILED | AttemptEnd.TIMED_OUT:
                self.failures += 1
            case AttemptEnd.LOST:
                self.losses += 1
            case AttemptEnd.TAINTED:
                self.taints += 1

    def pause(self, retry: RetrySpec) -> float:
        """Seconds between the last failure and the next attempt: exponential backoff."""
        return min(retry.delay * retry.backoff ** (self.failures - 1), retry.max_delay)
