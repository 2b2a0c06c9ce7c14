"""Verbs that only look: they change nothing and cost no more than what they show."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlpiped import protocol
from mlpiped.control import metrics, overview
from mlpiped.control.times import moment
from mlpiped.control.views import definition_of, run_json
from mlpiped.errors import UnknownName, UsageError
from mlpiped.model import AttemptEnd, StepState, json_time

if TYPE_CHECKING:
    from mlpiped.control.requests import AskPlan, RunsQuery
    from mlpiped.control.route import Ask
    from mlpiped.control.service import LoadedPipeline
    from mlpiped.ledger.rows import AttemptRow


def loaded(ask: Ask, name: str) -> LoadedPipeline:
    """Raises UnknownName with the near ones."""
    found = ask.service.registry.get(name)
    if found is None:
        raise UnknownName.among("pipeline", name, ask.service.lookup.pipelines())
    return found


async def status(ask: Ask) -> Any:
    return await overview.status(ask.service)


async def pipelines(ask: Ask) -> Any:
    return await overview.pipelines(ask.service)


async def schedules(ask: Ask) -> Any:
    return await overview.schedules(ask.service)


async def compute(ask: Ask) -> Any:
    return {"compute": overview.computes(ask.service)}


async def gc_plan(ask: Ask) -> Any:
    plan = await ask.service.gc_plan()
    return {**plan, "artifacts": [{**a, "used_at": json_time(a["used_at"])} for a in plan["artifacts"]]}


async def pipeline(ask: Ask) -> Any:
    """What it is made of. What is stale is a question for `plan`, which reads files: the client asks it beside."""
    found = loaded(ask, ask.names["pipeline"])
    spec = found.spec
    ledger = ask.service.ledger
    paused = spec.name in await ledger.paused()
    last = (await ledger.last_finished([spec.name])).get(spec.name)
    coming = min((v.next_us for v in ask.service.schedules() if v.pipeline == spec.name and v.next_us), default=None)
    about = overview.pipeline_json(found, paused, last, coming, overview.faults_of(ask.service))
    return {
        "pipeline": about,
        "parameters": [p.model_dump() for p in spec.parameters],
        **graph(spec.model_dump()),
    }


def graph(spec: dict[str, Any]) -> dict[str, Any]:
    """The steps of a spec and what each comes after, for whoever draws it."""
    definition = definition_of(spec)
    return {
        "graph": [
            {
                "name": step["name"],
                "kind": step["kind"],
                "after": definition.before(step),
                "inputs": [_port(port) for port in step["inputs"]],
                "outputs": [{"name": o["name"], "kind": o["output_kind"]} for o in step["outputs"]],
                "compute": step["compute"],
                "description": step["description"],
            }
            for step in spec["steps"]
        ]
    }


def _port(port: dict[str, Any]) -> dict[str, Any]:
    source = port["source"]
    upstream = source["kind"] == "upstream"
    text = f"{source['step']}/{source['output']}" if upstream else f"{source['datastore']}:{source['path']}"
    return {"name": port["name"], "source": text}


async def runs(ask: Ask) -> Any:
    query: RunsQuery = ask.query
    if query.pipeline is not None and await ask.service.ledger.latest(query.pipeline) is None:
        loaded(ask, query.pipeline)
    rows = await ask.service.ledger.runs(
        pipeline=query.pipeline,
        state=query.state,
        outcome=query.outcome,
        tags=_tags(query.tag),
        since=None if query.since is None else moment(query.since, ask.service.clock.now()),
        limit=query.limit,
    )
    if query.steps:
        return {"runs": [run_json(run, await ask.service.lookup.steps(run)) for run in rows]}
    return {"runs": [{k: v for k, v in run_json(run, ()).items() if k != "steps"} for run in rows]}


def _tags(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UsageError(f"not a tag: `{word}`", hint="a tag is `name=value`")
        found[name] = value
    return found


async def run(ask: Ask) -> Any:
    row = await ask.service.lookup.run(ask.names["run"])
    return run_json(row, await ask.service.lookup.steps(row))


async def run_graph(ask: Ask) -> Any:
    row = await ask.service.lookup.run(ask.names["run"])
    definition = await ask.service.lookup.definition(row.version)
    return {"run": run_json(row, await ask.service.lookup.steps(row)), **graph(dict(definition.spec))}


async def why(ask: Ask) -> Any:
    """The sentence: of what has ended, from its row; of what has not, in the present tense, from the scheduler."""
    service = ask.service
    row = await service.lookup.run(ask.names["run"])
    step = await service.lookup.step(row, ask.names["step"])
    attempts = await service.ledger.attempts(row.id, step.idx)
    sentence = step.why or None
    waiting = None
    if step.state is not StepState.FINISHED:
        waiting = await service.actions.why_waiting(row.id, step.name)
    return {
        "run": row.id,
        "pipeline": row.pipeline,
        "step": step.name,
        "state": step.state.value,
        "outcome": None if step.outcome is None else step.outcome.value,
        "why": sentence,
        "waiting": waiting,
        "compute": step.compute,
        "key": step.key,
        "reused_from": None if step.reused_from is None else f"{step.reused_from[0]}/{step.reused_from[1]}",
        "parts": await _parts(ask, step.key),
        "attempts": [_attempt_json(attempt) for attempt in attempts],
    }


async def _parts(ask: Ask, key: str | None) -> Any:
    text = None if key is None else await ask.service.ledger.parts(key)
    return None if text is None else json.loads(text)


def _attempt_json(attempt: AttemptRow) -> dict[str, Any]:
    return {
        "n": attempt.n,
        "state": attempt.state.value,
        "end": None if attempt.end is None else attempt.end.value,
        "compute": attempt.compute,
        "exit_code": attempt.exit_code,
        "reason": attempt.reason,
        "committed": attempt.end is AttemptEnd.COMMITTED,
        "usage": attempt.usage,
        "submitted_at": json_time(attempt.submitted_at),
        "ended_at": json_time(attempt.ended_at),
    }


async def run_metrics(ask: Ask) -> Any:
    return await metrics.of_run(ask.service, await ask.service.lookup.run(ask.names["run"]))


async def plan(ask: Ask) -> Any:
    body: AskPlan = ask.body
    subject = body.subject()
    parameters = body.plain_parameters()
    if body.file is not None:  # loading it runs it
        ask.service.access.act(ask.peer, "plan a file: it is loaded as the daemon's user")
    if body.pipeline is not None:
        spec = loaded(ask, body.pipeline).spec
        parameters = dict(protocol.typed_parameters(parameters, spec.parameters))
    return await ask.service.actions.plan(subject, parameters=parameters, force=body.forced(), target=body.target)
