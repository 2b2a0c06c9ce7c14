"""What people ask about work: what would run, what a step waits for, who holds what. Nothing here changes anything."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import anyio

from mlpiped.backends.base import Queues
from mlpiped.errors import BackendUnavailable
from mlpiped.execution.facts import Facts
from mlpiped.execution.images import wanted_by
from mlpiped.execution.needs import need_of
from mlpiped.model import OutputFact, StepOutcome, StepState
from mlpiped.resolve import Graph, Plan
from mlpiped.spec import version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mlpiped.backends.base import Backend, Images
    from mlpiped.execution.facts import World
    from mlpiped.execution.run import Execution
    from mlpiped.execution.tries import Try
    from mlpiped.placement.decide import Need, Spot
    from mlpiped.protocol import ActiveJson, ClusterJson, ComputeJson, DoingJson, HolderJson
    from mlpiped.resolve import Decision
    from mlpiped.scheduling.dispatch import Dispatch
    from mlpiped.scheduling.scheduler import Scheduler
    from mlpiped.spec import PipelineSpec, Scalar


SHOWN = 3  # steps of a run of which it is told how far their transfers are
LOOK_UP_LIMIT = 5.0  # seconds for the images of a plan


async def plan(
    world: World,
    spec: PipelineSpec,
    parameters: Mapping[str, Scalar],
    force: bool | Sequence[str],
    target: str | None,
    never: Callable[[Need], str | None] = lambda need: None,
) -> dict[str, Any]:
    """The walk of a run without its acts. What comes after a step that would run is `unknown`: it depends on what
    that step makes. `seconds` is what the step took when it last ran, or None. `never` says why a step that must run
    cannot have a place."""
    graph = Graph(spec)
    forced = range(len(graph.steps)) if force is True else [graph.step(name) for name in force or ()]
    walk = Plan(graph, target=graph.step(target) if target else None, force=forced)
    facts = Facts(world, graph, parameters)
    costs = await world.ledger.durations(spec.name)
    found: dict[int, dict[str, Any]] = {}
    uncertain: set[int] = set()
    while ready := walk.ready():
        known = [i for i in ready if not uncertain.intersection(graph.before[i])]
        for i in set(ready).difference(known):
            names = [graph.steps[need].name for need in graph.before[i] if need in uncertain]
            why = f"depends on what {' and '.join(f'`{n}`' for n in names[:3])} will make"
            _note(found, uncertain, walk, i, "unknown", why)
        await _look_up_images(facts, known)
        for decision in await facts.decide(walk, known):
            _tell(found, uncertain, walk, decision)
    steps = []
    for i in sorted(found):
        cost = costs.get(graph.steps[i].name)
        seconds = None if cost is None or found[i]["action"] in ("reuse", "skip") else cost / 1e6
        if found[i]["action"] == "run" and (reason := never(need_of(graph, i, 0, ""))) is not None:
            found[i]["why"] += f"; {reason}"
        steps.append({"name": graph.steps[i].name, **found[i], "seconds": seconds})
    total = sum(step["seconds"] or 0.0 for step in steps)
    return {"pipeline": spec.name, "version": version_of(spec), "steps": steps, "seconds": round(total, 3)}


async def _look_up_images(facts: Facts, indexes: Sequence[int]) -> None:
    """As far as that goes in a short time: a plan does not wait until an image has been pulled or built."""
    wanted = {one for i in indexes if (one := wanted_by(facts.graph.steps[i])) is not None}
    with anyio.move_on_after(LOOK_UP_LIMIT):
        for one in sorted(wanted, key=str):
            with suppress(BackendUnavailable):
                await facts.images.look_up(one)


def _tell(found: dict[int, dict[str, Any]], uncertain: set[int], walk: Plan, decision: Decision) -> None:
    i = decision.index
    if decision.action in ("run", "hold", "away"):
        action = "run" if decision.action == "run" else "unknown"
        _note(found, uncertain, walk, i, action, decision.why)
        return
    found[i] = {"action": "skip" if decision.action == "fail" else decision.action, "why": decision.why}
    outcome = StepOutcome.REUSED if decision.action == "reuse" else StepOutcome.SKIPPED
    walk.finished(i, outcome, decision.outputs)


def _note(found: dict[int, dict[str, Any]], uncertain: set[int], walk: Plan, index: int, action: str, why: str) -> None:
    found[index] = {"action": action, "why": why}
    uncertain.add(index)
    nothing: tuple[OutputFact, ...] = ()
    walk.finished(index, StepOutcome.SUCCEEDED, nothing)


def why_waiting(scheduler: Scheduler, run_id: int, step: str) -> str | None:
    """Present tense, for a step that has not finished; None when there is nothing to say."""
    execution = scheduler.executions.get(run_id)
    if execution is None:
        if (fault := scheduler.unreadable.get(run_id)) is not None:
            return f"held: {fault.message}"
        ahead = scheduler.ahead_of(run_id)
        return None if ahead is None else f"waits: {ahead}"
    index = execution.graph.step(step)
    if execution.plan.outcome[index] is not None:
        return None
    t = execution.tries.get(index)
    if t is None:
        return _waits_for(execution, index)
    now = scheduler.clock.now()
    if t.state is StepState.QUEUED:
        if t.not_before is not None:
            held = "held, " if t.refused else ""
            return f"{held}tried again in {max(0, t.not_before - now) / 1e6:.0f} s: {t.again}"
        if t.held is not None:
            return _bringing(execution, index) or f"held: {t.held}"
        waits = scheduler.dispatch.why_waiting(run_id, index) or "about to start"
        return f"{waits}; run again: {t.again}" if t.again else waits
    if t.attempt is None:
        return f"held: its attempt is on compute `{t.compute}`, which the config no longer has"
    if t.attempt.held is not None:
        return f"held: {t.attempt.held}"
    doing = t.attempt.backend.doing(t.attempt.token)
    if doing is not None:
        return doing
    word = "runs" if t.state is StepState.RUNNING else "starts"
    return f"{word} on {t.compute} for {(now - t.since) / 1e6:.0f} s: {t.why}"


def stuck(scheduler: Scheduler) -> list[tuple[str, str]]:
    """What does not go on by itself, each with what to do."""
    found = [(f"run {run} is held: {fault.message}", fault.hint or "") for run, fault in scheduler.unreadable.items()]
    for execution in scheduler.executions.values():
        for index, t in execution.tries.items():
            if t.stray is not None and execution.plan.outcome[index] is None:
                name = f"{execution.id}/{execution.graph.steps[index].name}"
                what = f"`{name}` is held: its attempt is on compute `{t.compute}`, which the config no longer has"
                found.append((what, f"put that compute back, or give it up: `mlpipectl cancel {execution.id}`"))
    return found


def _bringing(execution: Execution, index: int) -> str | None:
    """What is done for the step's image just now."""
    wanted = wanted_by(execution.graph.steps[index])
    engines = [backend for backend in execution.backends.values() if backend.capacity().images]
    said = [cast("Images", one).bringing(wanted.reference, wanted.dockerfile) for one in engines if wanted is not None]
    return next((one for one in said if one is not None), None)


def _on_the_way(execution: Execution) -> list[DoingJson]:
    """What travels for its steps, of a few of them."""
    found: list[DoingJson] = []
    for index, t in execution.tries.items():
        what = None
        if t.attempt is not None:
            held = t.attempt.held
            what = t.attempt.backend.doing(t.attempt.token) if held is None else f"held: {held}"
        elif t.held is not None:
            what = _bringing(execution, index) or f"held: {t.held}"
        if what is not None:
            found.append({"step": execution.graph.steps[index].name, "what": what})
            if len(found) >= SHOWN:
                break
    return found


def _waits_for(execution: Execution, index: int) -> str:
    words = []
    for need in execution.plan.waits_for(index)[:3]:
        t: Try | None = execution.tries.get(need)
        words.append(f"`{execution.graph.steps[need].name}` ({t.state.value if t else 'waiting'})")
    return f"waits for {', '.join(words)}" if words else "is being decided"


def active(dispatch: Dispatch) -> list[ActiveJson]:
    """The runs that are alive."""
    found: list[ActiveJson] = []
    for execution in dispatch.executions.values():
        ends = [o for o in execution.plan.outcome if o is not None]
        states = [t.state for t in execution.tries.values()]
        queued = states.count(StepState.QUEUED)
        found.append(
            {
                "id": execution.id,
                "pipeline": execution.row.pipeline,
                "owner": execution.row.owner,
                "started_at": execution.started_at,
                "total": len(execution.plan.outcome),
                "done": len(ends),
                "running": len(states) - queued,
                "failed": sum(o in (StepOutcome.FAILED, StepOutcome.TIMED_OUT, StepOutcome.LOST) for o in ends),
                "queued": queued,
                "doing": _on_the_way(execution),
            }
        )
    return found


def compute(dispatch: Dispatch, backends: Mapping[str, Backend]) -> list[ComputeJson]:
    """Each compute with what is taken and by whom."""
    return [
        {
            "name": place.name,
            "kind": backends[place.name].kind,
            "slots": place.slots,
            "used": place.used_slots,
            "memory": place.memory,
            "memory_used": place.used_memory,
            "holders": _holders(dispatch, place.holders),
            "health": place.unwell,
            "unwell_since": place.unwell_since if place.unwell is not None else None,
            "drained": place.drained,
            "drained_by": place.drained_by or None,
            "drained_since": place.drained_since,
            "cards": [
                {
                    "uuid": card.uuid,
                    "index": card.index,
                    "name": card.name,
                    "memory": card.memory,
                    "foreign": card.foreign,
                    "holders": _holders(dispatch, place.leased.get(card.uuid, ())),
                }
                for card in place.cards
            ],
            "cards_trouble": place.no_cards,
            "cluster": _cluster(backends[place.name]),
        }
        for place in dispatch.places.values()
    ]


def _cluster(backend: Backend) -> ClusterJson | None:
    if not isinstance(backend, Queues):
        return None
    seen = backend.cluster()
    return {
        "partition": seen.partition,
        "nodes_up": seen.up,
        "nodes_down": seen.down,
        "away": [{"nodes": some.nodes, "state": some.state, "reason": some.reason} for some in seen.away],
        "jobs": dict(seen.jobs),
        "full": seen.full,
    }


def _holders(dispatch: Dispatch, spots: Iterable[Spot]) -> list[HolderJson]:
    found: list[HolderJson] = []
    for run, index in spots:
        execution = dispatch.executions.get(run)
        if execution is not None:
            step = execution.graph.steps[index]
            since, slots = execution.since(index), step.resources.slots
            found.append({"run": run, "step": step.name, "since": since, "slots": slots})
    return found
