"""ONE attempt of one step: intent -> submit -> handle -> observe -> outcome -> collect -> commit.

`run` starts a new one, `adopt` goes on with one that an earlier daemon began; both end in an `Ended`. What a failure
means for the step (retry or not) is the run's business, not the attempt's.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import structlog

from mlpiped import crash
from mlpiped.asking import Asking
from mlpiped.backends.base import Exited, Job, JobOutput, Lost, NeverRan
from mlpiped.errors import BackendUnavailable, InvalidJob, MlpipedError
from mlpiped.job_words import as_text, exit_words, parts_of, seconds, variable, with_hint
from mlpiped.kept import digest_for
from mlpiped.ledger import moves
from mlpiped.model import AttemptEnd, OutputFact, StepOutcome, StepState
from mlpiped.publish import destination
from mlpiped.spec import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mlpiped.backends.base import Backend, Handle, Outcome
    from mlpiped.clock import Clock
    from mlpiped.facts import Facts, StepFacts, World
    from mlpiped.ledger import AttemptRow, RunRow
    from mlpiped.resolve import Plan
    from mlpiped.spec import PipelineSpec, StepSpec

log = structlog.get_logger("attempt")

TELL = 0.02  # seconds that a state on the way must last to be written down: the end tells all of it
READY = 5.0  # seconds for which an intent waits for its turn; then it is taken back
COMPANY = 0.025  # seconds that a result waits for others to share a commit with, while the machines have enough to do


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended. `outcome` None: nothing is wrong with the step, it must only be run again."""

    outcome: StepOutcome | None
    why: str
    end: AttemptEnd
    exit_code: int | None = None
    outputs: tuple[OutputFact, ...] = ()
    final: bool = False  # trying again cannot help
    usage: dict[str, float | int | None] = field(default_factory=dict)


class Attempt:
    def __init__(
        self,
        facts: Facts,
        clock: Clock,
        backend: Backend,
        run: RunRow,
        plan: Plan,
        index: int,
        token: str,
        n: int,
        number: int,
        on_running: Callable[[], None],
        on_exit: Callable[[], None],
        on_unavailable: Callable[[str | None], None],
        on_answer: Callable[[], None],
        pressed: Callable[[], bool],
        cards: tuple[str, ...] = (),
    ) -> None:
        self.facts = facts
        self.world = facts.world
        self.clock = clock
        self.backend = backend
        self.run_row = run
        self.plan = plan
        self.index = index
        self.step = plan.graph.steps[index]
        self.token = token
        self.n = n  # of the step's tokens
        self.number = number  # counts from 1: `MLPIPED_ATTEMPT`
        self.begun = False  # the intent is durable
        self.handle: Handle | None = None
        self.asking = Asking(clock, lambda: on_unavailable(None), on_answer)
        self._on_running = on_running
        self._on_exit = on_exit
        self._on_unavailable = on_unavailable
        self.cards = cards  # UUIDs of the GPUs that are leased to it
        self._pressed = pressed  # steps wait for places: nothing is gained by a result that comes at once
        self._turn = asyncio.Event()
        self._granted = False
        self._telling: asyncio.TimerHandle | None = None
        self._started: int | None = None
        self._cancelled = False
        self._stop = asyncio.Event()  # set with `_cancelled`
        self._uncancelled: str | None = None  # why the backend has not heard of it
        self._waiting: anyio.CancelScope | None = None  # for its end, or for what it made
        self._collecting = False
        self._told_exit = False  # the step is in `collecting`, says the ledger

    # --- the two beginnings -----------------------------------------------------------------------------------
    async def run(self, step: StepFacts) -> Ended:
        crash.point("before_intent")
        try:
            if (kept := self.world.kept) is not None:
                made = self.facts.made(step, self.plan)
                await kept.wait_for(made, self.backend.name, self._stop, lambda why: setattr(self.asking, "held", why))
            job = await self._job(step)
        except MlpipedError as fault:
            # No intent yet: an input is gone, or the code could not be snapshot. Nothing is in the ledger to end.
            return Ended(StepOutcome.FAILED, with_hint(fault), AttemptEnd.NEVER_RAN, final=True)
        intent = moves.intent(
            self.run_row.id,
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
        self.begun = True
        crash.point("after_intent")
        await self._its_turn()
        if self._cancelled:
            return Ended(StepOutcome.CANCELLED, "cancelled before it started", AttemptEnd.NEVER_RAN)
        if not self._granted:
            return Ended(None, "its turn did not come", AttemptEnd.NEVER_RAN)
        try:
            handle = await self.backend.submit(job)
        except InvalidJob as fault:
            return Ended(StepOutcome.FAILED, with_hint(fault), AttemptEnd.FAILED, final=True)
        except BackendUnavailable as fault:
            self._on_unavailable(fault.message)
            return await self._found_or_fenced(fault.message)
        crash.point("after_submit")
        return await self._observe(handle)

    async def adopt(self, row: AttemptRow) -> Ended:
        """Go on with an attempt of an earlier daemon: with its handle, or by fencing its intent."""
        self.begun = True
        self._told_exit = row.exit_code is not None
        if row.handle is None:
            return await self._found_or_fenced(None)
        return await self._observe(row.handle)

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

    async def cancel(self) -> None:
        self._cancelled = True
        self._stop.set()
        self._turn.set()
        if self.handle is None:
            return
        if not self._collecting:
            try:
                await self.backend.cancel(self.handle)
                return
            except BackendUnavailable as fault:
                self._uncancelled = fault.message
        if self._waiting is not None:
            self._waiting.cancel()

    @property
    def held(self) -> str | None:
        """Why the backend cannot be asked just now."""
        held = self.asking.held
        return f"{held}; it is cancelled as soon as that is over" if held and self._uncancelled else held

    # --- the way ----------------------------------------------------------------------------------------------
    def _tell(self, op: Callable[[], moves.Op[Any]] | None) -> None:
        """Write it down if nothing else is told meanwhile. None: what is told next says it all."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if op is not None:
            post = self.world.ledger.post
            self._telling = asyncio.get_running_loop().call_later(TELL, lambda: post(op()))

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
        self._on_running()
        if self._cancelled:
            await self.cancel()
        try:
            outcome = await self.asking.until_answered(lambda: self._end_of(handle))
        finally:
            self._tell(None)
        self._on_exit()
        crash.point("before_outcome")
        return await self._judge(handle, outcome)

    async def _end_of(self, handle: Handle) -> Outcome:
        """How it ended; first of all it hears of a cancel that did not reach it. Raises BackendUnavailable."""
        if self._uncancelled is not None:
            await self.backend.cancel(handle)
            self._uncancelled = None
        with anyio.CancelScope() as self._waiting:
            return await self.backend.wait(handle)
        raise BackendUnavailable(self._uncancelled or "its cancel did not get through")

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
        if outcome.cancelled or (self._cancelled and outcome.code != 0):
            return Ended(StepOutcome.CANCELLED, "cancelled", AttemptEnd.CANCELLED, outcome.code, usage=usage)
        if outcome.code != 0:
            why = exit_words(outcome) + await self._last_words(handle)
            return Ended(StepOutcome.FAILED, why, AttemptEnd.FAILED, outcome.code, usage=usage)
        return await self._collect(handle, outcome, usage)

    def _judged_never_ran(self, outcome: NeverRan) -> Ended:
        if self._cancelled:
            return Ended(StepOutcome.CANCELLED, "cancelled before it started", AttemptEnd.NEVER_RAN)
        return Ended(None, f"it had not started: {outcome.reason}", AttemptEnd.NEVER_RAN)

    async def _collect(self, handle: Handle, outcome: Exited, usage: dict[str, float | int | None]) -> Ended:
        told = json.dumps(usage)
        if self.step.outputs and not self._told_exit:
            now = self.clock.now()
            self._tell(lambda: moves.collecting(self.token, 0, told, now))
        try:
            outputs = await self._take(handle)
        except _Cancelled:
            return Ended(StepOutcome.CANCELLED, "cancelled", AttemptEnd.CANCELLED, 0, usage=usage)
        except _Changed as change:
            why = f"an input changed while it ran: {change}"
            return Ended(None, why, AttemptEnd.TAINTED, 0, usage=usage)
        except MlpipedError as fault:
            return Ended(StepOutcome.FAILED, fault.message, AttemptEnd.FAILED, 0, usage=usage)
        except OSError as fault:
            why = f"its outputs could not be kept: {fault.strerror}: {fault.filename}"
            return Ended(StepOutcome.FAILED, why, AttemptEnd.FAILED, 0, usage=usage)
        finally:
            self._tell(None)
        crash.point("before_commit")
        commit = moves.commit_result(
            self.token,
            self.facts.steps[self.index].key,
            outputs,
            int((seconds(outcome) or 0) * 1e6),
            self.clock.now(),
            not self.step.effect,
            usage_json=told,
            started_at=self._started,
        )
        # A step with an effect that is lost in a power cut is not run again: its end does not wait.
        within = COMPANY if self._pressed() and not self.step.effect else 0
        (first,) = await self.world.ledger.write(commit, within=within)
        if not first:
            return Ended(StepOutcome.LOST, "another attempt was committed first", AttemptEnd.SUPERSEDED, final=True)
        crash.point("after_commit")
        return Ended(StepOutcome.SUCCEEDED, "", AttemptEnd.COMMITTED, 0, outputs, usage=usage)

    async def _take(self, handle: Handle) -> tuple[OutputFact, ...]:
        """Its outputs, in the store and published, if its inputs are what they were. Raises _Changed, _Cancelled."""
        facts, store = self.facts, self.world.store
        if not self.step.outputs:
            await self._same_inputs()
            return ()
        kept, folder = await self._fetched(handle)
        outputs = [output for output in self._outputs() if output.name not in kept]
        taken = None
        if outputs:
            taken = await store.collect(folder, outputs, lambda: facts.known_unchanged(self.index, self.plan))
        if taken is None:
            await self._same_inputs()
            taken = await store.collect(folder, outputs) or [] if outputs else []
        await publish(self.world, self.plan.graph.spec, self.step, self.run_row.id, taken)
        return tuple({**{fact.name: fact for fact in taken}, **kept}[output.name] for output in self.step.outputs)

    async def _fetched(self, handle: Handle) -> tuple[dict[str, OutputFact], Path]:
        """(the outputs that stay where they were made, where the others lie at home). Raises _Cancelled: nobody wants
        them any more."""

        async def fetch() -> tuple[dict[str, OutputFact], Path]:
            into, world = self.world.store.incoming, self.world
            kept = await world.kept.take(self.backend, handle, self.step) if world.kept is not None else {}
            stays = len(kept) == len(self.step.outputs)
            return kept, into if stays else await self.backend.fetch(handle, into)

        self._collecting = True
        with anyio.CancelScope() as self._waiting:
            return await self.asking.until_answered(fetch)
        self.asking.held = None
        raise _Cancelled

    async def _same_inputs(self) -> None:
        changed = await self.facts.changed_since(self.index, self.plan)
        if changed is not None:
            raise _Changed(changed)

    async def record(self, ended: Ended, ran_because: str, *, again: bool) -> None:
        """Make the end durable: the attempt's, and the step's unless it is run `again`."""
        if ended.end in (AttemptEnd.COMMITTED, AttemptEnd.SUPERSEDED):
            return  # `commit_result` was the one transaction
        crash.point("before_end")
        now = self.clock.now()
        ops: list[moves.Op[Any]] = []
        if self.begun:
            to = StepState.QUEUED if again else None
            usage = json.dumps(ended.usage)
            ops.append(moves.attempt_ended(self.token, ended.end, to, None, ended.exit_code, ended.why, usage, now))
        if not again and ended.outcome is not None:
            run_id, code = self.run_row.id, ended.exit_code
            why = ended.why if ended.outcome is StepOutcome.CANCELLED else f"{ended.why} (it ran: {ran_because})"
            ops.append(moves.finish_step(run_id, self.index, ended.outcome, why, now, exit_code=code))
        if ops:
            await self.world.ledger.write(*ops)

    async def tidy(self, ended: Ended) -> None:
        """Free what the attempt no longer needs; after a failure its working folder stays for a look."""
        if ended.outcome in (StepOutcome.SUCCEEDED, StepOutcome.CANCELLED):
            try:
                await self.backend.discard(self.token, keep_logs=True)
            except BackendUnavailable:
                log.info("left for gc", token=self.token)

    # --- pieces -----------------------------------------------------------------------------------------------
    async def _job(self, facts: StepFacts) -> Job:
        step, spec = self.step, self.plan.graph.spec
        code = None
        if facts.source is not None and facts.code is not None:
            code = str(await self.world.code.snapshot(facts.source, facts.code))
        env = dict(step.environment.env)
        env.update({f"MLPIPED_PARAM_{variable(n)}": as_text(v) for n, v in facts.parameters.items()})
        env.update(
            MLPIPED_PIPELINE=spec.name,
            MLPIPED_STEP=step.name,
            MLPIPED_RUN_ID=str(self.run_row.id),
            MLPIPED_TOKEN=self.token,
            MLPIPED_ATTEMPT=str(self.number),
            MLPIPED_STEP_KEY=facts.key,
        )
        return Job(
            token=self.token,
            arguments=tuple(parts_of(a, facts) for a in step.arguments),
            inputs=facts.paths,
            outputs=self._outputs(),
            env=env,
            input_env={f"MLPIPED_INPUT_{variable(p.name)}": p.name for p in step.inputs if not p.in_arguments},
            parameters=facts.parameters,
            shell=step.shell,
            code=code,
            requirements=step.environment.requirements,
            python=step.environment.python,
            modules=step.environment.modules,
            image=None if facts.image is None else facts.image.run,
            network=step.resources.network,
            shm_size=step.resources.shm_size,
            contents=self._contents(facts),
            cpus=step.resources.cpus,
            memory=step.resources.memory,
            gpus=self.cards,
            gpu_memory=step.resources.gpu_memory,
            timeout=step.timeout,
            grace=step.grace,
        )

    def _contents(self, facts: StepFacts) -> dict[str, str]:
        """Input path -> the digest that is in the key, of files and folders."""
        found: dict[str, str] = {}
        for port in self.step.inputs:
            if isinstance(port.source, Upstream):
                made = (self.plan.outputs[self.plan.graph.index[port.source.step]] or {})[port.source.output]
                found[made.path] = digest_for(made, self.backend.name)
                continue
            outside, paths = facts.outside[port.name], facts.paths[port.name]
            if not port.source.glob:
                found[paths[0]] = outside.digest
            elif outside.entries is not None and len(outside.entries) == len(paths):  # else two names print alike
                found.update(zip(paths, outside.entries.values(), strict=True))
        return found

    def _outputs(self) -> tuple[JobOutput, ...]:
        return tuple(JobOutput(o.name, o.file_name, o.output_kind) for o in self.step.outputs)

    async def _last_words(self, handle: Handle) -> str:
        """`: <the last line of stderr>`, or nothing."""
        tail = b""
        try:
            async for chunk in self.backend.logs(handle, "stderr", -4096, False):
                tail = (tail + chunk)[-4096:]
        except BackendUnavailable:
            return ""
        lines = tail.decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:200]}" if lines else ""


class _Cancelled(Exception):
    """while its outputs came home"""


class _Changed(Exception):
    """An input is not what it was: the end of a sentence."""


async def publish(world: World, spec: PipelineSpec, step: StepSpec, run_id: int, outputs: Sequence[OutputFact]) -> None:
    """Put what a step made where it is published. Raises MlpipedError (BackendUnavailable: a machine that keeps it is
    away), OSError."""
    made = {fact.name: fact for fact in outputs}
    for output in step.outputs:
        if output.publish is not None:
            root, path = destination(output, spec, step, run_id, world.datastores)
            if world.kept is not None:
                await world.kept.bring_home(made[output.name])
            await world.store.publish(made[output.name], path, root=root)
