"""The numbers that steps wrote: one JSON line each in the attempt's metrics.jsonl. And those of the daemon itself."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from mlpiped.model import AttemptEnd, RunState, StepState

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.control.service import Service
    from mlpiped.ledger.rows import RunRow, StepRow

FILE_LIMIT = 8 << 20  # bytes of one step's metrics that are read


async def of_run(service: Service, run: RunRow) -> dict[str, Any]:
    """For each step that wrote any; a reused step shows those of the attempt that made its result."""
    found = []
    for step in await service.lookup.steps(run):
        token = await token_of(service, run, step)
        if token is None:
            continue
        why = None if service.live is None else await service.live.measured(token)
        lines, cut = await anyio.to_thread.run_sync(read, service.job_folder(token) / "metrics.jsonl")
        if lines or why is not None:
            reused = step.reused_from
            found.append(
                {
                    "step": step.name,
                    "reused_from": None if reused is None else f"{reused[0]}/{reused[1]}",
                    "last": {line["name"]: line["value"] for line in lines if is_metric(line)},
                    "metrics": lines,
                    "truncated": cut,
                    "note": why,
                }
            )
    return {"run": run.id, "pipeline": run.pipeline, "steps": found}


def is_metric(line: dict[str, Any]) -> bool:
    """`kind` may be missing: other languages write `{"name": …, "value": …}`."""
    return line.get("kind", "metric") == "metric" and isinstance(line.get("name"), str) and "value" in line


async def token_of(service: Service, run: RunRow, step: StepRow) -> str | None:
    """The attempt that made the step's result; before there is one, the newest."""
    made_by, source = await service.lookup.origin(run, step)
    if source.attempts == 0 and source.state is StepState.FINISHED:
        return None
    attempts = await service.ledger.attempts(made_by.id, source.idx)
    committed = [attempt for attempt in attempts if attempt.end is AttemptEnd.COMMITTED]
    chosen = committed or attempts
    return chosen[-1].token if chosen else None


def read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """(the lines that are JSON objects, whether the file was cut). A script may write what it likes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return [], False
    with os.fdopen(fd, "rb") as file:
        data = file.read(FILE_LIMIT + 1)
    found = []
    for line in data[:FILE_LIMIT].splitlines():
        try:
            value = json.loads(line, parse_constant=str)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found, len(data) > FILE_LIMIT


async def prometheus(service: Service) -> str:
    """The text format. Only what is known without a look at history."""
    counts = await service.ledger.counts()
    lines: list[str] = []

    def metric(name: str, kind: str, text: str, values: Sequence[tuple[str, float]]) -> None:
        lines.append(f"# HELP mlpiped_{name} {text}")
        lines.append(f"# TYPE mlpiped_{name} {kind}")
        lines.extend(f"mlpiped_{name}{labels} {value:g}" for labels, value in values)

    runs = [(f'{{state="{s.value}"}}', counts.runs.get(s, 0)) for s in (RunState.QUEUED, RunState.RUNNING)]
    metric("runs", "gauge", "Runs that have not finished, by state.", runs)
    busy = (StepState.QUEUED, StepState.SUBMITTING, StepState.RUNNING, StepState.COLLECTING)
    metric("steps", "gauge", "Steps that want or have a machine, by state.",
           [(f'{{state="{s.value}"}}', counts.steps.get(s, 0)) for s in busy])  # fmt: skip
    computes = list(service.actions.compute())
    label = [f'{{compute="{_label(c["name"])}"}}' for c in computes]
    metric("slots", "gauge", "Slots of each compute.", [(n, c["slots"]) for n, c in zip(label, computes, strict=True)])
    metric("slots_used", "gauge", "Slots in use.", [(n, c["used"]) for n, c in zip(label, computes, strict=True)])
    metric("compute_healthy", "gauge", "1 when the compute is well.",
           [(n, c["health"] is None) for n, c in zip(label, computes, strict=True)])  # fmt: skip
    metric("pipelines", "gauge", "Pipelines loaded.", [("", len(list(service.registry.all())))])
    metric(
        "plugins_broken",
        "gauge",
        "Faults in plugin files.",
        [("", sum(len(each.faults) for each in service.registry.broken()))],
    )
    metric("ledger_commits_total", "counter", "Group commits since the start.", [("", service.ledger.commits)])
    metric("loop_lag_seconds", "gauge", "How late the event loop was when last looked.", [("", service.loop_lag())])
    metric("start_time_seconds", "gauge", "When the daemon started.", [("", service.about.started_at / 1e6)])
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
