"""Pipelines, triggers and the daemon itself, as people and programs see them. Never a look at the runs of the past."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpiped.model import RunOutcome, RunState, StepState, json_time
from mlpiped.triggers.schedule import schedule_id, span_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlpiped.control.service import LoadedPipeline, Service
    from mlpiped.errors import Fault
    from mlpiped.ledger.rows import RunRow
    from mlpiped.protocol import HolderJson
    from mlpiped.spec import PipelineSpec, Trigger
    from mlpiped.triggers.schedule import ScheduleView

NEXT_SHOWN = 5
FAILURES_SHOWN = 5


def trigger_text(trigger: Trigger) -> str:
    """One line, as a person would say it."""
    if trigger.kind == "cron":
        return trigger.expression if trigger.timezone == "UTC" else f"{trigger.expression} ({trigger.timezone})"
    if trigger.kind == "every":
        return f"every {span_text(trigger.seconds)}"
    if trigger.kind == "success":
        return f"after `{trigger.pipeline}` succeeded"
    what = f"arrival at {trigger.source.datastore}:{trigger.source.path}"
    return f"{what}, marker {trigger.marker}" if trigger.marker else f"{what}, settle {span_text(trigger.settle)}"


def fault_json(fault: Fault) -> dict[str, Any]:
    return {"file": fault.file, "line": fault.line, "message": fault.message, "hint": fault.hint}


def faults_of(service: Service) -> list[Fault]:
    return [fault for each in service.registry.broken() for fault in each.faults]


def _next_by_pipeline(views: Iterable[ScheduleView]) -> dict[str, int]:
    found: dict[str, int] = {}
    for view in views:
        if view.next_us is not None:
            found[view.pipeline] = min(view.next_us, found.get(view.pipeline, view.next_us))
    return found


async def status(service: Service) -> dict[str, Any]:
    """All that a person wants to see at a glance. O(what is unfinished) whatever the ledger's size."""
    ledger, about = service.ledger, service.about
    loaded = len(list(service.registry.all()))
    broken = [fault_json(fault) for fault in faults_of(service)]
    paused = await ledger.paused()
    coming = sorted((v for v in service.schedules() if v.next_us is not None), key=lambda v: v.next_us or 0)
    counts = await ledger.counts()
    failures = await ledger.last_failures(FAILURES_SHOWN)
    return {
        "daemon": {
            "version": about.version,
            "pid": about.pid,
            "started_at": json_time(about.started_at),
            "now": json_time(service.clock.now()),
            "state_dir": str(about.state_dir),
            "disk_full": ledger.full,
            "ledger_broken": ledger.broken and ledger.broken.message,
        },
        "pipelines": {"loaded": loaded, "broken": len(broken), "paused": len(paused)},
        "broken": broken,
        "next": [
            {"pipeline": v.pipeline, "trigger": v.describe, "at": json_time(v.next_us), "paused": v.pipeline in paused}
            for v in coming[:NEXT_SHOWN]
        ],
        "runs": {state.value: counts.runs.get(state, 0) for state in (RunState.QUEUED, RunState.RUNNING)},
        "steps": {state.value: counts.steps.get(state, 0) for state in StepState if state in _BUSY},
        "active": [{**run, "started_at": json_time(run["started_at"])} for run in service.actions.active()],
        "compute": computes(service),
        "failures": [await _failure(service, run) for run in failures],
    }


_BUSY = (StepState.QUEUED, StepState.SUBMITTING, StepState.RUNNING, StepState.COLLECTING)


async def _failure(service: Service, run: RunRow) -> dict[str, Any]:
    """A run that failed, and the first step of it that did. Remembered: runs can have 10,000 steps."""
    known = service.failures.get(run.id)
    if known is None:
        if len(service.failures) > 100:
            service.failures.clear()
        known = service.failures[run.id] = await _failure_of(service, run)
    return known


async def _failure_of(service: Service, run: RunRow) -> dict[str, Any]:
    rows = await service.ledger.steps(run.id)
    bad = next((r for r in rows if r.outcome in ("failed", "timed_out", "lost")), None)
    return {
        "id": run.id,
        "pipeline": run.pipeline,
        "outcome": None if run.outcome is None else run.outcome.value,
        "finished_at": json_time(run.finished_at),
        "step": None if bad is None else bad.name,
        "step_outcome": None if bad is None or bad.outcome is None else bad.outcome.value,
        "exit_code": None if bad is None else bad.exit_code,
        "why": None if bad is None else bad.why or None,
    }


def computes(service: Service) -> list[dict[str, Any]]:
    return [
        {
            **c,
            "holders": _held(c["holders"]),
            "unwell_since": json_time(c["unwell_since"]),
            "drained_since": json_time(c["drained_since"]),
            "cards": [{**card, "holders": _held(card["holders"])} for card in c["cards"]],
        }
        for c in service.actions.compute()
    ]


def _held(holders: Sequence[HolderJson]) -> list[dict[str, Any]]:
    return [{**holder, "since": json_time(holder["since"])} for holder in holders]


async def pipelines(service: Service) -> dict[str, Any]:
    all_loaded = sorted(service.registry.all(), key=lambda each: each.spec.name)
    paused = await service.ledger.paused()
    last = await service.ledger.last_finished([each.spec.name for each in all_loaded])
    coming = _next_by_pipeline(service.schedules())
    faults = faults_of(service)
    return {
        "pipelines": [
            pipeline_json(each, name in paused, last.get(name), coming.get(name), faults)
            for name, each in ((each.spec.name, each) for each in all_loaded)
        ],
        "broken": [fault_json(fault) for fault in faults],
    }


def pipeline_json(
    loaded: LoadedPipeline,
    paused: bool,
    last: RunRow | None,
    coming: int | None,
    faults: Sequence[Fault],
) -> dict[str, Any]:
    """`broken` is the fault of the file that it was loaded from: the last good version is in use meanwhile."""
    spec = loaded.spec
    mine = [fault for fault in faults if fault.file == spec.where.file]
    return {
        "name": spec.name,
        "version": loaded.version,
        "experiment": spec.experiment,
        "description": spec.description,
        "file": spec.where.file,
        "line": spec.where.line,
        "steps": len(spec.steps),
        "overlap": spec.overlap,
        "triggers": [trigger_text(trigger) for trigger in spec.triggers],
        "next_fire": json_time(coming),
        "paused": paused,
        "last": None if last is None else last_json(last),
        "broken": str(mine[0]) if mine else None,
    }


def last_json(run: RunRow) -> dict[str, Any]:
    outcome = run.outcome.value if isinstance(run.outcome, RunOutcome) else None
    return {"id": run.id, "state": run.state.value, "outcome": outcome, "finished_at": json_time(run.finished_at)}


async def schedules(service: Service) -> dict[str, Any]:
    """Every trigger: what the clock and the watchers say of it, and its last fire by the ledger."""
    paused = await service.ledger.paused()
    rows = {row.id: row for row in await service.ledger.schedules()}
    found: list[dict[str, Any]] = []
    for view in service.schedules():
        row = rows.get(view.id)
        found.append(
            {
                "id": view.id,
                "pipeline": view.pipeline,
                "kind": view.kind,
                "trigger": view.describe,
                "next_fire": json_time(view.next_us),
                "last_fire": json_time(view.last_us if row is None else row.fired_at),
                "last_run": None if row is None else row.run_id,
                "verdict": None if row is None else row.verdict,
                "waits_for": view.waits_for or None,
                "mode": view.mode or None,
                "cursor": view.cursor if view.cursor is not None else (None if row is None else row.cursor),
                "paused": view.pipeline in paused,
            }
        )
    found.extend(_by_success([each.spec for each in service.registry.all()], rows, paused))
    return {"schedules": sorted(found, key=lambda s: (s["next_fire"] is None, s["next_fire"] or "", s["pipeline"]))}


def _by_success(
    specs: Iterable[PipelineSpec], rows: Mapping[str, Any], paused: Iterable[str]
) -> Iterable[dict[str, Any]]:
    """Triggers that no clock and no watcher knows: they wait for a run of another pipeline."""
    for spec in specs:
        for trigger in spec.triggers:
            if trigger.kind != "success":
                continue
            row = rows.get(schedule_id(spec.name, trigger))
            yield {
                "id": schedule_id(spec.name, trigger),
                "pipeline": spec.name,
                "kind": trigger.kind,
                "trigger": trigger_text(trigger),
                "next_fire": None,
                "last_fire": None if row is None else json_time(row.fired_at),
                "last_run": None if row is None else row.run_id,
                "verdict": None if row is None else row.verdict,
                "waits_for": f"`{trigger.pipeline}` to succeed",
                "mode": "run",
                "cursor": None,
                "paused": spec.name in paused,
            }
