"""ONE attempt of one step: intent -> submit -> handle -> observe -> outcome -> collect -> commit.

`run` starts a new one, `adopt` goes on with one that an earlier daemon or an equal step began; both end in an `Ended`.
What a failure means for the step (retry or not) is the run's business, not the attempt's.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import structlog

from mlpiped import crash
from mlpiped.backends.base import Exited, Lost, NeverRan
from mlpiped.code import CodeChanged
from mlpiped.errors import BackendUnavailable, InvalidJob, MlpipedError
from mlpiped.execution.asking import Asking
from mlpiped.execution.heirs import take_over
from mlpiped.execution.job import exit_words, job_of, last_words, seconds
from mlpiped.execution.results import Changed, Made, fetch, take
from mlpiped.files.hashing import printable
from mlpiped.ledger import moves
from mlpiped.model import AttemptEnd, OutputFact, StepOutcome, StepState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mlpiped.backends.base import Backend, Handle, Job, Outcome
    from mlpiped.execution.facts import StepFacts
    from mlpiped.execution.run import Execution
    from mlpiped.ledger import AttemptRow

log = structlog.get_logger("attempt")
T = TypeVar("T")

TELL = 0.02  # seconds that a state on the way must last to be written down: the end tells all of it
READY = 5.0  # seconds for which an intent waits for its turn; then it is taken back
COMPANY = 0.025  # seconds that a result waits for others to share a commit with, while the machines have enough to do


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended. `outcome` None: nothing is wrong with the step, it must only be run again."""

    outcome: StepOutcome | None
    why: str
    end: AttemptEnd | None  # None: it goes on, as another step's
    exit_code: int | None = None
    outputs: tuple[OutputFact, ...] = ()
    final: bool = False  # trying again cannot help
    usage: dict[str, float | int | None] = field(default_factory=dict)
    refused: bool = False  # its machine had taken it, and did not start it
    moved: bool = False  # its code was another by then


class Attempt:
    """Of step `index` of `execution`. `n`: of the step's tokens; `cards`: UUIDs of the GPUs that are leased to it."""

    def __init__(
        self, execution: Execution, index: int, backend: Backend, token: str, n: int, cards: tuple[str, ...] = ()
    ) -> None:
        self.execution, self.index, self.backend = execution, index, backend
        self.token, self.n, self.cards = token, n, cards
        self.world, self.clock = execution.world, execution.clock
        self.step = execution.graph.steps[index]
        self.number = execution.tries[index].number  # counts from 1: `MLPIPED_ATTEMPT`
        self.inherited = not token.startswith(f"mlp-{execution.id}-{index}-")  # it was begun by another step
        self.handle: Handle | None = None
        places, compute = execution.dispatcher, backend.name
        self.asking = Asking(self.clock, lambda: places.unavailable(compute, None), lambda: places.answered(compute))
        self.keeping = Asking(self.clock, _nothing, _nothing)
        self._begun = False  # the intent is durable
        self._turn = asyncio.Event()
        self._granted = False
        self._telling: asyncio.TimerHandle | None = None
        self._started: int | None = None
        self._cancelled = asyncio.Event()
        self._unheeded = False  # a cancel that nothing was done about yet
        self._ending = False  # its backend has heard of a cancel
        self._question: anyio.CancelScope | None = None
        self._told_exit = False  # the step is in `collecting`, says the ledger

    # --- the two beginnings -----------------------------------------------------------------------------------
    async def run(self, step: StepFacts) -> Ended:
        crash.point("before_intent")
        try:
            if (kept := self.world.kept) is not None:
                made, stop = self.execution.facts.made(step, self.execution.plan), self._cancelled
                await kept.wait_for(made, self.backend.name, stop, lambda why: setattr(self.asking, "held", why))
            job = await self.keeping.until_answered(lambda: self._job(step))
        except _Cancelled:
            return Ended(StepOutcome.CANCELLED, "cancelled before it started", AttemptEnd.NEVER_RAN)
        except CodeChanged as fault:
            return Ended(None, fault.advice, AttemptEnd.NEVER_RAN, moved=True)
        except MlpipedError as fault:
            # No intent yet: an input is gone, or the code could not be snapshot. Nothing is in the ledger to end.
            return Ended(StepOutcome.FAILED, fault.advice, AttemptEnd.NEVER_RAN, final=True)
        intent = moves.intent(
            self.execution.id,
            self.index,
            self.token,
            self.n,
            self.backend.name,
            step.key,
            json.dumps(step.parts),
            self.clock.now(),
            slots=self.step.resources.slots,
            cards=self.cards,
        )
        await self.world.ledger.write(intent)
        self._begins()
        crash.point("after_intent")
        await self._its_turn()
        if self.cancelled:
            return Ended(StepOutcome.CANCELLED, "cancelled before it started", AttemptEnd.NEVER_RAN)
        if not self._granted:
            return Ended(None, "its turn did not come", AttemptEnd.NEVER_RAN)
        try:
            handle = await self.backend.submit(job)
        except InvalidJob as fault:
            return Ended(StepOutcome.FAILED, fault.advice, AttemptEnd.FAILED, final=True)
        except BackendUnavailable as fault:
            self.execution.dispatcher.unavailable(self.backend.name, fault.message)
            return await self._found_or_fenced(fault.message)
        crash.point("after_submit")
        return await self._observe(handle)

    async def _job(self, step: StepFacts) -> Job:
        """Raises _Cancelled, StorageAway, MlpipedError."""
        if self.cancelled:
            raise _Cancelled
        return await job_of(self, step)

    async def adopt(self, row: AttemptRow) -> Ended:
        """Go on with what is begun: with its handle, or by fencing its intent."""
        self._begins()
        self._told_exit = row.exit_code is not None
        if row.handle is None:
            return await self._found_or_fenced(None)
        return await self._observe(row.handle)

    def _begins(self) -> None:
        self._begun = True
        self.world.begun[self.token] = self.backend

    def go(self) -> None:
        """A place is leased for it."""
        self._granted = True
        self._turn.set()

    async def _its_turn(self) -> None:
        """Until `go` or `cancel`, or too long: who looks at the step would take it for one that is started."""
        if not self._turn.is_set():
            stale = asyncio.get_running_loop().call_later(READY, self._turn.set)
            try:
                await self._turn.wait()
            finally:
                stale.cancel()

    def cancel(self) -> None:
        """Its step is to end: it goes on for an equal one that waits for what it makes, or its backend ends it."""
        self._unheeded = True
        self._cancelled.set()
        self._turn.set()
        self.keeping.well_again()
        if self._question is not None:
            self._question.cancel()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def held(self) -> str | None:
        """Why the backend cannot be asked just now, or what it made cannot be kept."""
        if self.keeping.held is not None:
            return self.keeping.held
        held = self.asking.held
        return f"{held}; it is cancelled as soon as that is over" if held and self._unheeded else held

    # --- the way ----------------------------------------------------------------------------------------------
    def _tell(self, op: Callable[[], moves.Op[Any]] | None) -> None:
        """Write it down if nothing else is told meanwhile. None: what is told next says it all."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if op is not None:
            post = self.world.ledger.post
            self._telling = asyncio.get_running_loop().call_later(TELL, lambda: post(op()))

    async def _answer(self, handle: Handle, question: Callable[[], Awaitable[T]]) -> T:
        """Of its backend, as soon as there is one; after a cancel it is asked anew. Raises _Cut: another step's now."""
        while True:
            if self._unheeded and not self._ending and (left := await take_over(self, handle)):
                raise _Cut(Ended(StepOutcome.CANCELLED, left, None))
            with anyio.CancelScope() as self._question:
                return await self.asking.until_answered(question)

    async def _found_or_fenced(self, trouble: str | None) -> Ended:
        """It is not known whether the token started: the fence says so, for good."""
        found = await self.asking.until_answered(lambda: self.backend.fence(self.token), trouble)
        if isinstance(found, NeverRan):
            return self._judged_never_ran(found)
        return await self._observe(found)

    async def _observe(self, handle: Handle) -> Ended:
        self.handle, self._started = handle, (now := self.clock.now())
        self._tell(lambda: moves.handle(self.token, json.dumps(handle), now))
        crash.point("after_handle")
        self.execution.running(self.index)
        try:
            outcome = await self._answer(handle, lambda: self._end_of(handle))
            self._tell(None)
            self.execution.dispatcher.release(self.execution.id, self.index)
            crash.point("before_outcome")
            return await self._judge(handle, outcome)
        except _Cut as cut:
            return cut.ended
        finally:
            self._tell(None)

    async def _end_of(self, handle: Handle) -> Outcome:
        """How it ended; first of all its backend hears of a cancel. Raises BackendUnavailable."""
        if self._unheeded:
            await self.backend.cancel(handle)
            self._unheeded, self._ending = False, True
        return await self.backend.wait(handle)

    async def _judge(self, handle: Handle, outcome: Outcome) -> Ended:
        match outcome:
            case Lost(reason):
                return Ended(StepOutcome.LOST, reason, AttemptEnd.LOST)
            case NeverRan():
                return self._judged_never_ran(outcome)
            case Exited():
                pass
        usage = {"cpu": outcome.cpu, "max_rss": outcome.max_rss, "seconds": seconds(outcome)}
        if outcome.error is not None:
            return Ended(StepOutcome.FAILED, outcome.error, AttemptEnd.FAILED, outcome.code, (), outcome.final, usage)
        if outcome.timed_out:
            limit = self.step.timeout  # None: the queue's own time limit
            why = "reached the time limit of its compute" if limit is None else f"timed out after {limit:g} s"
            return Ended(StepOutcome.TIMED_OUT, why, AttemptEnd.TIMED_OUT, outcome.code, usage=usage)
        if outcome.cancelled and self.inherited and not self.cancelled:
            why = "the attempt that it had taken over was cancelled"
            return Ended(None, why, AttemptEnd.CANCELLED, outcome.code, usage=usage)
        if outcome.cancelled or (self.cancelled and outcome.code != 0):
            return Ended(StepOutcome.CANCELLED, "cancelled", AttemptEnd.CANCELLED, outcome.code, usage=usage)
        if outcome.code != 0:
            why = exit_words(outcome) + await last_words(self.backend, handle)
            return Ended(StepOutcome.FAILED, why, AttemptEnd.FAILED, outcome.code, usage=usage)
        return await self._collect(handle, outcome, usage)

    def _judged_never_ran(self, outcome: NeverRan) -> Ended:
        if self.cancelled:
            return Ended(StepOutcome.CANCELLED, "cancelled before it started", AttemptEnd.NEVER_RAN)
        return Ended(
            None, f"it had not started: {outcome.reason}", AttemptEnd.NEVER_RAN, refused=self.handle is not None
        )

    async def _collect(self, handle: Handle, outcome: Exited, usage: dict[str, float | int | None]) -> Ended:
        told = json.dumps(usage)
        try:
            outputs = await self._taken(handle, told)
        except _Cancelled:
            return Ended(StepOutcome.CANCELLED, "cancelled", AttemptEnd.CANCELLED, 0, usage=usage)
        except Changed as change:
            why = f"an input changed while it ran: {change}"
            return Ended(None, why, AttemptEnd.TAINTED, 0, usage=usage)
        except MlpipedError as fault:
            return Ended(StepOutcome.FAILED, fault.message, AttemptEnd.FAILED, 0, usage=usage)
        except OSError as fault:
            where = f": `{printable(os.fsdecode(fault.filename))}`" if fault.filename else ""
            why = f"its outputs cannot be kept: {(fault.strerror or str(fault)).lower()}{where}"
            return Ended(StepOutcome.FAILED, why, AttemptEnd.FAILED, 0, usage=usage)
        finally:
            self._tell(None)
        crash.point("before_commit")
        commit = moves.commit_result(
            self.token,
            self.execution.facts.steps[self.index].key,
            outputs,
            int((seconds(outcome) or 0) * 1e6),
            self.clock.now(),
            not self.step.effect,
            usage_json=told,
            started_at=self._started,
        )
        # A step with an effect that is lost in a power cut is not run again: its end does not wait.
        within = COMPANY if self.execution.dispatcher.pressed() and not self.step.effect else 0
        (first,) = await self.world.ledger.write(commit, within=within)
        if not first:
            return Ended(StepOutcome.LOST, "another attempt was committed first", AttemptEnd.SUPERSEDED, final=True)
        crash.point("after_commit")
        return Ended(StepOutcome.SUCCEEDED, "", AttemptEnd.COMMITTED, 0, outputs, usage=usage)

    async def _taken(self, handle: Handle, usage: str) -> tuple[OutputFact, ...]:
        """Its outputs, if its inputs are what they were; a disk or a machine that is away is waited for.

        Raises Changed, MlpipedError, OSError, _Cancelled, _Cut.
        """
        made = None
        if self.step.outputs:
            if not self._told_exit:
                now = self.clock.now()
                self._tell(lambda: moves.collecting(self.token, 0, usage, now))
            made = await self._answer(handle, lambda: self._fetched(handle))

        async def keep() -> tuple[OutputFact, ...]:
            if self.keeping.held is not None and self._unheeded:
                if (left := await take_over(self, handle)) is not None:
                    raise _Cut(Ended(StepOutcome.CANCELLED, left, None))
                raise _Cancelled
            return await take(self, made)

        return await self.keeping.until_answered(keep)

    async def _fetched(self, handle: Handle) -> Made:
        """Raises _Cancelled, MlpipedError."""
        if self._unheeded:
            raise _Cancelled
        return await fetch(self.world, self.backend, handle, self.step)

    # --- its end ----------------------------------------------------------------------------------------------
    async def record(self, ended: Ended, ran_because: str, *, again: bool) -> None:
        """Make the end durable: the attempt's, and the step's unless it is run `again`."""
        if ended.end in (None, AttemptEnd.COMMITTED, AttemptEnd.SUPERSEDED):
            return  # `hand_over`, or `commit_result`, was the one transaction
        crash.point("before_end")
        now = self.clock.now()
        ops: list[moves.Op[Any]] = []
        if self._begun:
            to = StepState.QUEUED if again else None
            usage = json.dumps(ended.usage)
            ops.append(moves.attempt_ended(self.token, ended.end, to, None, ended.exit_code, ended.why, usage, now))
        if not again and ended.outcome is not None:
            run_id, code = self.execution.id, ended.exit_code
            why = ended.why if ended.outcome is StepOutcome.CANCELLED else f"{ended.why} (it ran: {ran_because})"
            ops.append(moves.finish_step(run_id, self.index, ended.outcome, why, now, exit_code=code))
        if ops:
            await self.world.ledger.write(*ops)

    async def tidy(self, ended: Ended) -> None:
        """Free what the attempt no longer needs; after a failure its working folder stays for a look."""
        if ended.end is not None and ended.outcome in (StepOutcome.SUCCEEDED, StepOutcome.CANCELLED):
            try:
                await self.backend.discard(self.token, keep_logs=True)
            except BackendUnavailable:
                log.info("left for gc", token=self.token)


def _nothing() -> None:
    """Nobody else is told."""


class _Cancelled(Exception):
    """before it began, or while its outputs came home"""


class _Cut(Exception):
    """A cancel ends it here."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended
