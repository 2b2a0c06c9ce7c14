"""ONE run: decide -> dispatch -> await the outcome -> ledger. No decision is made here, no SQL, no network.

A restart walks the same path as a start: what the ledger says is finished is told to the plan; an attempt with a handle
is waited for; an intent without one is fenced, and then it either never ran or is adopted.

One driver task owns the plan. A step that runs has a task of its own, which ends by telling the driver.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.errors import BackendUnavailable, MlpipedError, StaleReuse, StorageAway
from mlpiped.execution.attempt import Attempt
from mlpiped.execution.facts import Facts
from mlpiped.execution.images import Lookups
from mlpiped.execution.needs import bytes_to_travel, need_of
from mlpiped.execution.restoring import restore
from mlpiped.execution.results import publish
from mlpiped.execution.tries import Try
from mlpiped.ledger import StepRow, moves
from mlpiped.model import RunOutcome, RunState, StepOutcome, StepState
from mlpiped.resolve import Decision, Graph, Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anyio.abc import TaskGroup

    from mlpiped.backends.base import Backend
    from mlpiped.clock import Clock
    from mlpiped.execution.dispatcher import Dispatcher
    from mlpiped.execution.facts import World
    from mlpiped.ledger import AttemptRow, RunRow
    from mlpiped.placement.decide import Need

log = structlog.get_logger("run")

AWAY_PAUSE = 10.0  # seconds until a machine, or a datastore, that is away is looked for again

_OUTCOMES = {
    "reuse": StepOutcome.REUSED,
    "skip": StepOutcome.SKIPPED,
    "fail": StepOutcome.FAILED,
    "cancel": StepOutcome.CANCELLED,
}


class Execution:
    """One run while it is alive."""

    def __init__(
        self,
        row: RunRow,
        graph: Graph,
        world: World,
        backends: Mapping[str, Backend],
        clock: Clock,
        dispatcher: Dispatcher,
    ) -> None:
        self.row = row
        self.id = row.id
        self.graph = graph
        self.world = world
        self.backends = backends
        self.clock = clock
        self.dispatcher = dispatcher
        force, target = row.options.get("force"), row.options.get("target")
        forced = range(len(graph.steps)) if force is True else [graph.step(name) for name in force or ()]
        self.plan = Plan(graph, target=graph.step(target) if target else None, force=forced)
        self.facts = Facts(world, graph, row.parameters)
        self.facts.unpin(row.options.get("code", ()))
        self._pinned = "code" in row.options
        self.tries: dict[int, Try] = {}
        self.started_at = row.started_at
        self.cancelled = bool(row.options.get("cancelled"))
        self.restored = anyio.Event()  # what an earlier daemon knew of it is known
        self.walking = anyio.Event()  # it has asked for all that it needs at first
        self.over = anyio.Event()
        self.recorded: set[int] = set()  # steps that have a row in the ledger
        self._settling: set[int] = set()  # steps whose end is on its way to the ledger
        self._again: list[int] = []
        self._resting: set[int] = set()  # steps that are decided again after a pause
        self._wake = asyncio.Event()
        self._tasks: TaskGroup | None = None
        self._lookups = Lookups(self.facts.images, clock, self._hold)

    # --- the driver -------------------------------------------------------------------------------------------
    async def run(self) -> RunOutcome:
        """Until the run has ended and that is durable."""
        restored = self.row.state is RunState.RUNNING
        if not restored:
            self.started_at = self.clock.now()
            self.world.ledger.post(moves.start_run(self.id, self.started_at))
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                if restored:
                    await restore(self)
            finally:
                self.restored.set()
            while True:
                await self._advance()
                self.walking.set()
                if not self.plan.more_to_do():
                    break
                await self._wake.wait()
                self._wake.clear()
            self._lookups.stop()
        outcome = self.outcome()
        await self.world.ledger.write(moves.finish_run(self.id, outcome, self.clock.now()))
        self.over.set()
        return outcome

    def outcome(self) -> RunOutcome:
        ends = set(self.plan.outcome)
        if ends & {StepOutcome.FAILED, StepOutcome.TIMED_OUT, StepOutcome.LOST}:
            return RunOutcome.FAILED
        if self.cancelled or StepOutcome.CANCELLED in ends:
            return RunOutcome.CANCELLED
        return RunOutcome.SUCCEEDED

    def decide_again(self, index: int) -> None:
        """Its facts may have changed, or the equal step that it waited for has ended."""
        self._again.append(index)
        self._wake.set()

    async def _advance(self) -> None:
        """Decide all that can be decided now, write it down, ask for places."""
        while indexes := self._undecided():
            decisions = [] if self.cancelled else await self.facts.decide(self.plan, indexes)
            indexes = [i for i in indexes if self._open(i)]  # less what was cancelled meanwhile
            if self.cancelled:
                await self._settle([Decision(i, "cancel", "the run was cancelled") for i in indexes])
                continue
            stopped = [i for i in indexes if i in self.tries and self.tries[i].stop.is_set()]
            await self._settle([Decision(i, "cancel", "cancelled") for i in stopped])
            decisions = [d for d in decisions if self._open(d.index)]
            for d in [d for d in decisions if d.action == "hold"]:
                self._lookups.begin(self._tasks, d.index, self.graph.steps[d.index], d.why)
            for d in [d for d in decisions if d.action == "away"]:
                self._hold_awhile(d.index, d.why)
            self._queue([d for d in decisions if d.action == "run"])
            await self._settle([d for d in decisions if d.action not in ("run", "hold", "away")])

    def _hold(self, indexes: Iterable[int], why: str | None) -> None:
        """Why these cannot be decided just now; None: they can again."""
        for i in [i for i in indexes if self.plan.outcome[i] is None]:
            self.tries.setdefault(i, Try(since=self.clock.now())).held = why
            if why is None:
                self.decide_again(i)

    def _hold_awhile(self, index: int, why: str) -> None:
        """It needs what is away now, and is decided again after a pause."""
        self._hold([index], why)
        if index not in self._resting:
            self._resting.add(index)
            asyncio.get_running_loop().call_later(AWAY_PAUSE, self._rested, index)

    def _rested(self, index: int) -> None:
        self._resting.discard(index)
        self._hold([index], None)

    def _undecided(self) -> list[int]:
        again, self._again = self._again, []
        return [i for i in dict.fromkeys(self.plan.ready() + again) if self._open(i)]

    def _open(self, index: int) -> bool:
        return self.plan.outcome[index] is None and index not in self._settling

    async def _settle(self, decisions: Sequence[Decision]) -> None:
        """Steps that end without running: one write for all of them, and then the plan goes on.

        If a result was made anew between the decision and the write, all of them are decided again. A step that another
        call is at is left to it.
        """
        decisions = [d for d in decisions if self._open(d.index)]
        self._settling.update(indexes := [d.index for d in decisions])
        try:
            await self._settled(decisions)
        finally:
            self._settling.difference_update(indexes)

    async def _settled(self, decisions: Sequence[Decision]) -> None:
        found = [await self._published(d) if d.index in self.graph.publishing else d for d in decisions]
        if not (decisions := [d for d in found if d is not None]):
            return
        now = self.clock.now()
        rows = [
            StepRow(
                d.index,
                self.graph.steps[d.index].name,
                StepState.FINISHED,
                _OUTCOMES[d.action],
                d.why,
                key=d.key,
                reused_from=d.reused_from,
                finished_at=now,
            )
            for d in decisions
        ]
        new = [row for row in rows if row.idx not in self.recorded]
        old = [row for row in rows if row.idx in self.recorded]
        ops = [moves.add_steps(self.id, new, now)] if new else []
        ops += [moves.finish_steps(self.id, old, now)] if old else []
        try:
            await self.world.ledger.write(*ops)
        except StaleReuse:
            self._again += [d.index for d in decisions]
            return
        self.recorded.update(row.idx for row in new)
        for d in decisions:
            self.tries.pop(d.index, None)
            self.plan.finished(d.index, _OUTCOMES[d.action], d.outputs)
            self.dispatcher.settled(self.id, d.index)

    async def _published(self, decision: Decision) -> Decision | None:
        """A reused step publishes too: its path may name the run, or somebody may have removed what was there. None: a
        machine that keeps what it made, or the datastore, is away, and it is decided again later."""
        if decision.action != "reuse":
            return decision
        step = self.graph.steps[decision.index]
        try:
            await publish(self.world, self.graph.spec, step, self.id, decision.outputs)
        except (BackendUnavailable, StorageAway) as fault:
            self._hold_awhile(decision.index, f"cannot publish: {fault.message}")
            return None
        except (MlpipedError, OSError) as fault:
            return Decision(decision.index, "fail", f"cannot publish: {fault}", decision.key)
        return decision

    def _queue(self, decisions: Sequence[Decision]) -> None:
        now = self.clock.now()
        new = []
        for d in decisions:
            t = self.tries.setdefault(d.index, Try(since=now))
            t.why = t.why or d.why
            if d.index not in self.recorded:
                new.append(StepRow(d.index, self.graph.steps[d.index].name, StepState.QUEUED, None, d.why, key=d.key))
                self.recorded.add(d.index)
        if new:
            self.world.ledger.post(moves.add_steps(self.id, new, now))
        if decisions and not self._pinned and self._tasks is not None:
            self._pinned = True
            self._tasks.start_soon(self._pin, name=f"run {self.id} pin")
        for d in decisions:
            self.dispatcher.request(self, d.index, self.need(d.index), d.key if self.shareable(d.index) else None)

    async def _pin(self) -> None:
        begun = {i for i, t in self.tries.items() if t.attempt is not None}
        if kept := await self.facts.pin(self.plan, begun):
            self.world.ledger.post(moves.pin_code(self.id, kept))

    def shareable(self, index: int) -> bool:
        step = self.graph.steps[index]
        return step.allow_reuse and not step.effect and index not in self.plan.force

    def need(self, index: int) -> Need:
        need = need_of(self.graph, index, self.id, self.row.owner)
        facts = self.facts.steps.get(index)
        if facts is None or len(self.backends) < 2:
            return need
        return replace(need, data=bytes_to_travel(self.plan, index, facts, self.backends))

    def since(self, index: int) -> int | None:
        """When the step got into the state that it is in, in microseconds."""
        t = self.tries.get(index)
        return t.since if t is not None else None

    # --- attempts ---------------------------------------------------------------------------------------------
    def granted(self, index: int, compute: str, cards: Sequence[str] = ()) -> None:
        """A place on `compute`, with these of its cards, is leased for step `index`: its attempt begins, or goes on."""
        t = self.tries[index]
        if t.attempt is None:
            self.get_ready(index, compute, cards)
        assert t.attempt is not None
        t.state, t.since = StepState.SUBMITTING, self.clock.now()
        t.attempt.go()

    def get_ready(self, index: int, compute: str, cards: Sequence[str] = ()) -> None:
        """The attempt of step `index` on `compute` begins, and waits for its turn when its intent is durable."""
        t = self.tries[index]
        t.tokens += 1
        token = f"mlp-{self.id}-{index}-{t.tokens}-{secrets.token_hex(8)}"
        self.prepare(index, compute, token, t.tokens, cards)
        self.begin(index)

    def prepare(self, index: int, compute: str, token: str, n: int, cards: Sequence[str]) -> None:
        t = self.tries[index]
        t.compute = compute
        t.attempt = Attempt(self, index, self.backends[compute], token, n, tuple(cards))

    def begin(self, index: int, adopted: AttemptRow | None = None) -> None:
        """The attempt that was prepared begins, or goes on from what the ledger knows of it."""
        attempt = self.tries[index].attempt
        assert self._tasks is not None and attempt is not None
        name = f"run {self.id} step {self.graph.steps[index].name}"
        self._tasks.start_soon(self._try, index, attempt, adopted, name=name)

    def running(self, index: int) -> None:
        """Its attempt has been started."""
        t = self.tries[index]
        if t.compute is not None:
            self.dispatcher.taken(t.compute)
        t.state, t.since = StepState.RUNNING, self.clock.now()

    async def _try(self, index: int, attempt: Attempt, adopted: AttemptRow | None) -> None:
        try:
            if adopted is None:
                ended = await attempt.run(self.facts.steps[index])
            else:
                ended = await attempt.adopt(adopted)
        finally:
            self.dispatcher.withdraw(self, index)  # it may have ended before its turn
            self.dispatcher.release(self.id, index)
        if ended.end is not None:  # else it goes on, as another step's
            self.world.begun.pop(attempt.token, None)
        t = self.tries[index]
        t.attempt = None
        cancelled = "the run was cancelled" if self.cancelled else "cancelled" if attempt.cancelled else None
        ended, again, pause = t.verdict(self.graph.steps[index], ended, cancelled)
        self._settling.add(index)
        try:
            await attempt.record(ended, t.why, again=again is not None)
        finally:
            self._settling.discard(index)
        if again is None:
            assert ended.outcome is not None
            del self.tries[index]
            self.facts.steps.pop(index, None)
            self.plan.finished(index, ended.outcome, ended.outputs)
            self.dispatcher.settled(self.id, index)
            self._wake.set()
            await attempt.tidy(ended)
            return
        t.state, t.again, t.since = StepState.QUEUED, again, self.clock.now()
        t.not_before = t.since + int(pause * 1e6) if pause else None
        self.dispatcher.settled(self.id, index)
        await self._pause(index)

    def retry_later(self, index: int) -> None:
        """A restart: the step's next attempt has its time already."""
        assert self._tasks is not None
        self._tasks.start_soon(self._pause, index, name=f"run {self.id} pause")

    async def _pause(self, index: int) -> None:
        """Wait for the time of the step's next attempt, then decide it again: its inputs may be others by then."""
        t = self.tries.get(index)
        while t is not None and t.not_before is not None and not self.cancelled:
            left = t.not_before - self.clock.now()
            if left <= 0:
                break
            with anyio.move_on_after(left / 1e6):
                await t.stop.wait()
                break
        if t is not None:
            t.not_before = None
        self.decide_again(index)

    # --- cancel -----------------------------------------------------------------------------------------------
    async def cancel(self, index: int | None = None) -> None:
        """One step, or all of them: what has not started ends at once, what runs gets SIGTERM."""
        await self.restored.wait()
        if index is None:
            self.cancelled = True
            await self.world.ledger.write(moves.cancel_run(self.id, self.clock.now()))
        for i in [index] if index is not None else list(self.tries):
            t = self.tries.get(i)
            if t is not None and t.attempt is not None:
                self.dispatcher.withdraw(self, i)
                t.attempt.cancel()
            elif self.plan.outcome[i] is None:
                self.tries.setdefault(i, Try(since=self.clock.now())).stop.set()
                self.dispatcher.withdraw(self, i)
                await self._settle([Decision(i, "cancel", self._cancelled_words(t))])
        self._wake.set()

    def _cancelled_words(self, t: Try | None) -> str:
        if t is None or t.compute is None or t.compute in self.backends:
            return "cancelled"
        return f"cancelled; what it began on `{t.compute}` is ended when the config has that again"

    def cancel_attempts(self) -> None:
        """What an earlier walk had no time for, of a run that is cancelled: its steps end in `_advance`."""
        for t in self.tries.values():
            if t.attempt is not None:
                t.attempt.cancel()
