"""ALL runs: what a trigger found becomes a run, in its turn; every unfinished run goes on after a restart.

Rule 1: an event only says "look". Whether a run opens is one transaction of the ledger (dedupe, cursor, run together).
Rule 2: whether a pipeline is busy follows from runs that are alive here, and all unfinished ones are, after `recover`.
Rule 3: a run keeps the version it started with, whatever happens to its plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import structlog

from mlpiped import crash
from mlpiped.errors import BadParameter, Conflict, IllegalMove, LedgerFull, MlpipedError, UnknownName
from mlpiped.execution.run import Execution
from mlpiped.ledger import moves
from mlpiped.model import Cause, CauseKind, Event, RunOutcome, RunState
from mlpiped.protocol import typed_parameters
from mlpiped.scheduling.graphs import Graphs
from mlpiped.spec import SuccessSpec, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anyio.abc import TaskGroup

    from mlpiped.backends.base import Backend
    from mlpiped.clock import Clock
    from mlpiped.execution.facts import World
    from mlpiped.ledger import RunRow
    from mlpiped.loader import Loaded, Registry
    from mlpiped.resolve import Graph
    from mlpiped.scheduling.dispatch import Dispatch
    from mlpiped.spec import PipelineSpec

log = structlog.get_logger("scheduler")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before an interrupted run is taken up again
ROLL_CALL = 5.0  # seconds in which the runs after a restart have said what they need

ASKED_FOR = (CauseKind.MANUAL, CauseKind.API, CauseKind.RETRY)  # by somebody who gets the number of a run for it


class Scheduler:
    def __init__(
        self,
        world: World,
        registry: Registry,
        backends: Mapping[str, Backend],
        clock: Clock,
        dispatch: Dispatch,
    ) -> None:
        self.world = world
        self.registry = registry
        self.backends = backends
        self.clock = clock
        self.dispatch = dispatch
        self.executions = dispatch.executions
        self.queued: dict[str, list[tuple[RunRow, Graph]]] = {}  # pipeline -> runs whose turn has not come
        self.paused: set[str] = set()
        self._retrying: set[int] = set()  # runs of which a retry is being opened
        self.on_resume: Callable[[], None] = lambda: None
        self.graphs = Graphs(world.ledger, clock)
        self.unreadable: dict[int, MlpipedError] = {}  # unfinished runs that cannot go on here, and why
        self._tasks: TaskGroup | None = None
        self._opening = anyio.Lock()  # one event at a time decides about overlap

    # --- life -------------------------------------------------------------------------------------------------
    async def recover(self, tasks: TaskGroup) -> int:
        """Go on with every unfinished run; returns how many. Call once, before anything can fire."""
        self._tasks = tasks
        self.paused = await self.world.ledger.paused()
        rows = await self.world.ledger.unfinished_runs()
        self.dispatch.expect(row.id for row in rows if row.state is RunState.RUNNING)
        for row in sorted(rows, key=lambda row: (row.state is RunState.QUEUED, row.id)):
            try:
                graph = await self.graphs.of(row)
            except MlpipedError as fault:
                log.error("a run cannot go on", run=row.id, why=fault.message, hint=fault.hint)
                self.unreadable[row.id] = fault
                self.dispatch.restored(row.id)
                continue
            if row.state is RunState.RUNNING:
                self._start(row, graph)
            else:
                self.queued.setdefault(row.pipeline, []).append((row, graph))
                self._next(row.pipeline)
        tasks.start_soon(self._cancel_again, list(self.executions.values()), name="cancels before the restart")
        return len(rows)

    async def _cancel_again(self, executions: Sequence[Execution]) -> None:
        """What was to be cancelled when the daemon ended; as soon as it is known who else needs it."""
        with anyio.move_on_after(ROLL_CALL):
            for execution in executions:
                await execution.walking.wait()
        for execution in executions:
            if execution.cancelled:
                execution.cancel_attempts()

    # --- events -> runs ---------------------------------------------------------------------------------------
    async def emit(self, event: Event) -> None:
        """A trigger's finding. Never raises for what is wrong with one pipeline."""
        crash.point("before_fire")
        loaded = self.registry.get(event.pipeline)
        if loaded is None:
            return
        if event.pipeline in self.paused:
            # Arrivals are found again at the next look; a cron time passes, and is accounted for.
            if event.cause.kind is CauseKind.CRON:
                await self.world.ledger.write(moves.record_fire(event, self.clock.now(), "paused"))
            return
        graph = await self.graphs.known(loaded.spec, loaded.version)
        try:
            values = parameters_for(graph.spec, event.parameters)
        except MlpipedError as fault:
            await self.world.ledger.write(moves.record_fire(event, self.clock.now(), f"refused: {fault.message}"))
            return
        event = Event(event.pipeline, event.cause, event.dedupe, values, event.cursor, event.arrivals)
        await self._open(event, graph, loaded.version, owner=loaded.owner, tags=graph.spec.tags, options={})
        crash.point("after_fire")

    async def _open(
        self, event: Event, graph: Graph, version: str, *, owner: str, tags: Mapping[str, str], options: dict[str, Any]
    ) -> int | None:
        """A new run, or the queued one that the event joined; None if it was there already or is skipped."""
        spec, ledger, now = graph.spec, self.world.ledger, self.clock.now()
        async with self._opening:
            busy = not self._free(spec)
            if busy and spec.overlap == "skip" and event.cause.kind not in ASKED_FOR:
                await ledger.write(moves.record_fire(event, now, "skipped: the last run has not finished"))
                return None
            if busy and spec.overlap == "queue":
                for row, waiting in self.queued.get(spec.name, ()):
                    if row.parameters == event.parameters and row.options == options and waiting is graph:
                        try:
                            (merged,) = await ledger.write(moves.merge_fire(row.id, event, now))
                        except IllegalMove:
                            break  # its turn came meanwhile: this is the next one
                        return row.id if merged else None
            (run_id,) = await ledger.write(
                moves.open_run(
                    event,
                    version=version,
                    experiment=spec.experiment,
                    owner=owner,
                    tags=dict(tags),
                    options=options,
                    now=now,
                )
            )
            if run_id is None:
                return None
            crash.point("before_start")
            opened = await ledger.run(run_id)
            assert opened is not None
            if busy and spec.overlap == "cancel_previous":
                await self._cancel_all(spec.name)
            # Whoever was busy may have ended since: the turn is asked for, not concluded from what was seen above.
            self.queued.setdefault(spec.name, []).append((opened, graph))
            self._next(spec.name)
            return opened.id

    def _alive(self, pipeline: str) -> list[Execution]:
        return [e for e in self.executions.values() if e.row.pipeline == pipeline]

    def _free(self, spec: PipelineSpec) -> bool:
        """Whether a new run of this pipeline may start at once."""
        return self._turn(spec) and not self.queued.get(spec.name)

    async def _cancel_all(self, pipeline: str) -> None:
        for row, _ in self.queued.pop(pipeline, []):
            await self.world.ledger.write(moves.finish_run(row.id, RunOutcome.CANCELLED, self.clock.now()))
        for execution in self._alive(pipeline):
            await execution.cancel()

    def _start(self, row: RunRow, graph: Graph) -> None:
        assert self._tasks is not None
        execution = Execution(row, graph, self.world, self.backends, self.clock, self.dispatch)
        self.executions[row.id] = execution
        self._tasks.start_soon(self._run, execution, name=f"run {row.id} of {row.pipeline}")

    async def _run(self, execution: Execution) -> None:
        """One run, fenced off: what goes wrong in it does not reach the others.

        A fault of ours, or of the ledger's disk, ends the walk but not the run: it is taken up again from the ledger,
        as after a restart, after growing pauses. Its steps run on meanwhile.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                outcome = await execution.run()
                break
            except Exception as fault:
                log.error("a run was interrupted; it is taken up again", run=execution.id, exc_info=fault)
            self.dispatch.forget(execution.id)
            await self.clock.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            execution = await self._anew(execution)
            if execution.cancelled and self._tasks is not None:
                self._tasks.start_soon(self._cancel_again, [execution], name=f"cancel of run {execution.id}")
        del self.executions[execution.id]
        self._next(execution.row.pipeline)
        if outcome is RunOutcome.SUCCEEDED:
            await self.tell_followers()

    async def _anew(self, old: Execution) -> Execution:
        row = await self.world.ledger.run(old.id)
        new = Execution(row or old.row, old.graph, self.world, self.backends, self.clock, self.dispatch)
        self.executions[old.id] = new
        return new

    def _next(self, pipeline: str) -> None:
        """The turn of the queued run, if it is."""
        waiting = self.queued.get(pipeline, [])
        while waiting and self._turn(waiting[0][1].spec):
            row, graph = waiting.pop(0)
            if not waiting:
                del self.queued[pipeline]
            self._start(row, graph)

    def _turn(self, spec: PipelineSpec) -> bool:
        alive = len(self._alive(spec.name))
        return alive < (spec.max_parallel or alive + 1) if spec.overlap == "parallel" else alive == 0

    async def tell_followers(self) -> None:
        """OnSuccess: each pipeline whose upstream has succeeded since its cursor fires, once per upstream run.

        Called when a run has succeeded, at start, at resume and when plugins change: none is lost, none is told twice.
        """
        for loaded in self.registry.all():
            for trigger in loaded.spec.triggers:
                if isinstance(trigger, SuccessSpec):
                    try:
                        await self._follow(loaded.spec.name, trigger.pipeline)
                    except MlpipedError as fault:  # the cursor has not moved: the next look finds it again
                        log.error("a success could not be told", pipeline=loaded.spec.name, why=fault.message)

    async def _follow(self, pipeline: str, upstream: str) -> None:
        ledger = self.world.ledger
        schedule = f"success:{pipeline}:{upstream}"
        last = await ledger.latest_success(upstream)
        before = await ledger.schedule(schedule)
        if before is None:  # never at load: what succeeded before the trigger was there does not count
            start = {"run": last.id if last else 0}
            await ledger.write(moves.put_cursor(schedule, pipeline, start, self.clock.now()))
        elif last is not None and last.id > before.cursor["run"]:
            cause = Cause(CauseKind.PIPELINE, f"{upstream} run {last.id} succeeded")
            await self.emit(Event(pipeline, cause, f"{schedule}:{last.id}", cursor=(schedule, {"run": last.id})))

    # --- what people ask --------------------------------------------------------------------------------------
    async def start(
        self,
        pipeline: str,
        *,
        parameters: Mapping[str, Any],
        force: bool | list[str] = False,
        target: str | None = None,
        tags: Mapping[str, str] | None = None,
        kind: str = "manual",
        who: str = "",
        idempotency_key: str | None = None,
    ) -> tuple[int, bool]:
        """A run by hand: (its id, whether it is new). Raises UnknownName, BadParameter."""
        loaded = self.loaded(pipeline)
        return await self._start_by_hand(
            loaded.spec, loaded.version, parameters, force, target, tags or {}, kind, who, idempotency_key
        )

    async def submit(
        self,
        spec: PipelineSpec,
        *,
        parameters: Mapping[str, Any],
        force: bool | list[str] = False,
        target: str | None = None,
        tags: Mapping[str, str] | None = None,
        who: str = "",
    ) -> int:
        """A run of a pipeline that is not installed."""
        run_id, _ = await self._start_by_hand(
            spec, version_of(spec), parameters, force, target, tags or {}, "manual", who, None
        )
        return run_id

    async def _start_by_hand(
        self,
        spec: PipelineSpec,
        version: str,
        parameters: Mapping[str, Any],
        force: bool | list[str],
        target: str | None,
        tags: Mapping[str, str],
        kind: str,
        who: str,
        idempotency_key: str | None,
    ) -> tuple[int, bool]:
        graph = await self.graphs.known(spec, version)
        values = parameters_for(spec, parameters)
        for name in [*(force if isinstance(force, list) else ()), *([target] if target else ())]:
            graph.step(name)
        if self.world.ledger.full:
            raise LedgerFull("the disk that holds the ledger is full", hint="free some space; see `mlpipectl doctor`")
        options: dict[str, Any] = {}
        if force:
            options["force"] = force
        if target:
            options["target"] = target
        dedupe = f"idem:{who}:{idempotency_key}" if idempotency_key else None
        event = Event(spec.name, Cause(CauseKind(kind), f"by {who}" if who else ""), dedupe, values)
        run_id = await self._open(event, graph, version, owner=who, tags={**spec.tags, **tags}, options=options)
        if run_id is not None:
            return run_id, True
        before = await self.world.ledger.fire(dedupe or "")
        if before is None or before.run_id is None:
            raise Conflict(f"`{spec.name}` was not started", hint="try again")
        return before.run_id, False

    async def retry(self, run_id: int, who: str) -> int:
        """A new run of the same version with the same parameters; what had succeeded is reused by its key."""
        row = await self.world.ledger.run(run_id)
        if row is None:
            raise UnknownName(f"no run {run_id}")
        if row.state is not RunState.FINISHED:
            raise Conflict(f"run {run_id} is {row.state}", hint="wait for it, or cancel it first")
        if row.outcome is RunOutcome.SUCCEEDED:
            raise Conflict(f"run {run_id} succeeded: nothing to retry", hint=f"`mlpipectl run {row.pipeline} --force`")
        alive = [e.row for e in self.executions.values()] + [r for rows in self.queued.values() for r, _ in rows]
        if run_id in self._retrying or any(each.options.get("retry_of") == run_id for each in alive):
            raise Conflict(f"run {run_id} is being retried already", hint="`mlpipectl runs` shows by which run")
        self._retrying.add(run_id)
        try:
            graph = await self.graphs.of(row)
            event = Event(row.pipeline, Cause(CauseKind.RETRY, f"of run {run_id} by {who}"), None, row.parameters)
            # What was said to the first run, to force it or to end it, was said to that one.
            options = {k: v for k, v in row.options.items() if k not in ("force", "cancelled")} | {"retry_of": run_id}
            new = await self._open(event, graph, row.version, owner=who or row.owner, tags=row.tags, options=options)
        finally:
            self._retrying.discard(run_id)
        assert new is not None
        return new

    async def cancel(self, run_id: int, step: str | None, who: str) -> None:
        execution = self.executions.get(run_id)
        if execution is not None:
            await execution.cancel(None if step is None else execution.graph.step(step))
            return
        for pipeline, waiting in self.queued.items():
            for entry in waiting:
                if entry[0].id == run_id:
                    if step is not None:
                        raise Conflict(f"run {run_id} has not started", hint=f"`mlpipectl cancel {run_id}`")
                    waiting.remove(entry)
                    await self.world.ledger.write(moves.finish_run(run_id, RunOutcome.CANCELLED, self.clock.now()))
                    self._next(pipeline)
                    return
        if (fault := self.unreadable.get(run_id)) is not None:
            raise fault
        row = await self.world.ledger.run(run_id)
        if row is None:
            raise UnknownName(f"no run {run_id}")
        raise Conflict(f"run {run_id} has finished: {row.outcome}")

    async def pause(self, pipeline: str, who: str) -> None:
        self.loaded(pipeline)
        await self.world.ledger.write(moves.set_paused(pipeline, True, who, self.clock.now()))
        self.paused.add(pipeline)

    async def resume(self, pipeline: str, who: str) -> None:
        self.loaded(pipeline)
        await self.world.ledger.write(moves.set_paused(pipeline, False, who, self.clock.now()))
        self.paused.discard(pipeline)
        self.on_resume()
        await self.tell_followers()

    def ahead_of(self, run_id: int) -> str | None:
        """What a queued run waits for; None if it is not queued."""
        for pipeline, waiting in self.queued.items():
            if any(row.id == run_id for row, _ in waiting):
                alive = self._alive(pipeline)
                return f"run {alive[0].id} of `{pipeline}` has not finished" if alive else "its turn comes next"
        return None

    def loaded(self, pipeline: str) -> Loaded:
        """Raises UnknownName with the nearest names."""
        loaded = self.registry.get(pipeline)
        if loaded is None:
            raise UnknownName.among("pipeline", pipeline, [each.spec.name for each in self.registry.all()])
        return loaded


def parameters_for(spec: PipelineSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every declared parameter with its value: the given one, of the declared type, or the default.

    Raises BadParameter that names every fault.
    """
    values = typed_parameters(given, spec.parameters)
    missing = [p.name for p in spec.parameters if p.required and p.name not in values]
    if missing:
        words = ", ".join(f"`{name}`" for name in missing)
        raise BadParameter(f"`{spec.name}` needs {words}", hint=f"give it with -p {missing[0]}=…")
    return {p.name: values.get(p.name, p.default) for p in spec.parameters}
