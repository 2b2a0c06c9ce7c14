"""How a job ended, from its folder and from what Slurm says of it.

The witness comes first. It cannot tell who sent the signal that ended it, though: preemption, a failing node, the time
limit and an administrator's scancel all reach the supervisor as SIGTERM. Then Slurm's word decides what it meant.
"""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mlpiped.backends.base import Exited, Lost, NeverRan, Outcome
from mlpiped.backends.slurm.commands import ENDED, IMPOSSIBLE, ON_NODE, WAITING

if TYPE_CHECKING:
    from mlpiped.backends.slurm.commands import Ref
    from mlpiped.backends.slurm.submission import Look

MACHINES = {
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "PREEMPTED": "Slurm preempted it for a job of higher priority",
    "REVOKED": "a sibling cluster took it",
    "LAUNCH_FAILED": "Slurm could not launch it",
    "REQUEUED": "somebody requeued it in Slurm",
}
BY_OTHERS = "cancelled in Slurm, not by mlpiped"
NO_MEMORY = "out of memory: Slurm ended it for needing more than its limit"
CANCEL_MARGIN = 30.0  # seconds after its grace until a cancelled job is ended by Slurm itself
STUCK = 10  # so many times the patience for a supervisor that holds its lock after Slurm has given up its job

Verdict = Outcome | Literal["wait", "fence"]


def judge(look: Look, job: Ref, state: str | None, reason: str, waited: float, patience: float) -> Verdict:
    """`state`: Slurm's word, "" before it was asked, None when it knows no such job. `waited`: seconds since its end.

    "fence": as far as anybody knows it has not started, and it must not any more.
    """
    if look.dropped and state == "CANCELLED":
        state = "PENDING"  # so it was when it was over for us
    word = "REQUEUED" if look.claimed and state in WAITING else state
    over = is_over(look, state)
    late = over and waited >= patience
    if look.witness is not None:
        return _told(look.witness, look.cancelled, job, word, late if word is None else over)
    if look.fenced:
        return _never_started(look, job, word, reason)
    if not look.claimed:
        return "fence" if late or word in ENDED or reason == IMPOSSIBLE else "wait"
    if not late or (look.held and waited < patience * STUCK):
        return "wait"
    return _silent(look.cancelled, job, word)


def is_over(look: Look, state: str | None) -> bool:
    """Whether Slurm is done with it. One that waits again after it has started was requeued."""
    return state is None or state in ENDED or (look.claimed and state in WAITING)


def _told(said: Exited, ours: bool, job: Ref, word: str | None, settled: bool) -> Verdict:
    killed = said.signal in (signal.SIGKILL, signal.SIGTERM) and not said.timed_out and said.error is None
    if (said.cancelled and ours) or not (said.cancelled or killed):
        return said
    if not settled:
        return "wait"
    if word in MACHINES:
        return Lost(f"Slurm job {job} was ended: {MACHINES[word]}")
    if word in ("TIMEOUT", "DEADLINE"):
        return replace(said, cancelled=False, timed_out=True)
    if word == "OUT_OF_MEMORY":
        return replace(said, cancelled=False, out_of_memory=True, error=NO_MEMORY)
    if word == "CANCELLED" and not ours:
        return replace(said, cancelled=False, error=BY_OTHERS)
    if said.cancelled:
        return Lost(
            f"its supervisor was told to stop, and not by mlpiped; Slurm says of job {job}: {word or 'nothing'}"
        )
    return said


def _never_started(look: Look, job: Ref, word: str | None, reason: str) -> Outcome:
    if look.cancelled:
        return Exited(code=None, cancelled=True)
    if reason == IMPOSSIBLE:
        return Exited(code=None, error=f"Slurm says that no node can ever hold it: {reason}")
    if word == "CANCELLED" and reason == ON_NODE:  # by Slurm, or in the very moment of its start
        return NeverRan(f"Slurm cancelled job {job}, which its node did not start")
    if word == "CANCELLED":
        return Exited(code=None, error=f"{BY_OTHERS}, before it started")
    if word == "COMPLETED":  # a controller that was killed gives ids out again: that was the end of another
        return NeverRan(f"Slurm calls job {job} completed, and it had not started")
    if word is None:
        return NeverRan(f"Slurm does not know job {job} any more, and it had not started")
    if word in MACHINES:
        return NeverRan(f"Slurm job {job} was ended before it started: {MACHINES[word]}")
    if word == "FAILED" and not look.complaint:  # its script did not come to a word: a prolog, a credential, a SIGKILL
        return NeverRan(f"Slurm could not start it: job {job} ended as {word}")
    if word in ENDED:
        why = f": {look.complaint}" if look.complaint else ""
        return Exited(code=None, error=f"Slurm could not start it: job {job} ended as {word}{why}")
    return NeverRan("its token was fenced before it started")


def _silent(ours: bool, job: Ref, word: str | None) -> Outcome:
    """It has started, is over, and has left no witness."""
    killed = Exited(code=None, signal=int(signal.SIGKILL))
    if word in ("TIMEOUT", "DEADLINE"):
        return replace(killed, timed_out=True)
    if word == "OUT_OF_MEMORY":
        return replace(killed, out_of_memory=True, error=NO_MEMORY)
    if word == "CANCELLED":
        return replace(killed, cancelled=True) if ours else replace(killed, error=BY_OTHERS)
    if word in MACHINES:
        return Lost(f"Slurm job {job} was ended: {MACHINES[word]}")
    said = "Slurm does not know it any more" if word is None else f"Slurm calls it {word}"
    return Lost(f"job {job} left no witness, and {said}")


class Ending:
    """The clocks of one wait."""

    def __init__(self, grace: float) -> None:
        self._over: float | None = None
        self._due: float | None = None
        self._grace = grace

    def waited(self, over: bool) -> float:
        """Seconds since it is over; begins anew when it was not."""
        now = time.monotonic()
        self._over = (self._over or now) if over else None
        return 0.0 if self._over is None else now - self._over

    def pause(self, interval: float) -> float | None:
        """How long to wait for news: for ever, unless something is awaited in the folder."""
        return None if self._over is None and self._due is None else interval

    def cancel_is_due(self) -> bool:
        """Whether a cancelled job should have ended by now, or nobody has heard that it was: asked again and again."""
        now = time.monotonic()
        if self._due is None:
            self._due = now + self._grace + CANCEL_MARGIN
            return False
        if now < self._due:
            return False
        self._due = now + CANCEL_MARGIN
        return True
