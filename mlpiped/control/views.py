"""Ledger rows -> the JSON of the contract, for runs and what belongs to them. Pure, but for `Lookup`.

`Lookup` turns the names that people use into rows: run references, steps, definitions.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlpiped import protocol
from mlpiped.errors import UnknownName
from mlpiped.ledger.rows import StepRow
from mlpiped.model import RunOutcome, RunState, StepOutcome, StepState, json_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.control.service import Registry
    from mlpiped.ledger.rows import EventRow, RunRow
    from mlpiped.ledger.store import Ledger
    from mlpiped.protocol import RunJson, StepJson

_DEFINITIONS_KEPT = 16
_HOPS = 20  # from a reused step to the one that ran


def step_json(row: StepRow) -> StepJson:
    reused = row.reused_from
    return {
        "name": row.name,
        "state": row.state.value,
        "outcome": None if row.outcome is None else row.outcome.value,
        "why": row.why or None,
        "compute": row.compute,
        "attempts": row.attempts,
        "exit_code": row.exit_code,
        "key": row.key,
        "reused_from": None if reused is None else f"{reused[0]}/{reused[1]}",
        "started_at": json_time(row.started_at),
        "finished_at": json_time(row.finished_at),
    }


def run_json(run: RunRow, steps: Sequence[StepRow]) -> RunJson:
    return {
        "id": run.id,
        "pipeline": run.pipeline,
        "version": run.version,
        "experiment": run.experiment,
        "owner": run.owner or None,
        "cause": {"kind": run.cause.kind.value, "detail": run.cause.detail},
        "parameters": run.parameters,
        "tags": run.tags,
        "state": run.state.value,
        "outcome": None if run.outcome is None else run.outcome.value,
        "created_at": json_time(run.created_at),
        "started_at": json_time(run.started_at),
        "finished_at": json_time(run.finished_at),
        "steps": [step_json(row) for row in steps],
    }


def brief_json(run: RunRow, steps: Sequence[StepRow]) -> dict[str, Any]:
    """For a person who waits: how many steps ended how (or are in which state), and those that did not end well."""
    counts = Counter((row.outcome or row.state).value for row in steps)
    bad = [row for row in steps if row.outcome is not None and not row.outcome.good]
    return {**run_json(run, bad), "counts": dict(counts)}


def all_steps(run: RunRow, rows: Sequence[StepRow], names: Sequence[str]) -> list[StepRow]:
    """Every step of the definition, in its order: those without a row yet are waiting, or never had their turn."""
    if len(rows) >= len(names):
        return list(rows)
    by_name = {row.name: row for row in rows}
    found = []
    for idx, name in enumerate(names):
        row = by_name.pop(name, None)
        if row is None and run.state is RunState.FINISHED:
            cancelled = run.outcome is RunOutcome.CANCELLED
            outcome = StepOutcome.CANCELLED if cancelled else StepOutcome.SKIPPED
            row = StepRow(idx, name, StepState.FINISHED, outcome, "the run ended before it")
        found.append(row or StepRow(idx, name))
    return found + list(by_name.values())


def event_json(row: EventRow, step: str | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "at": json_time(row.at),
        "kind": row.kind,
        "run": row.run_id,
        "step": step,
        "data": json.loads(row.data) if row.data else {},
    }


@dataclass(frozen=True, slots=True)
class Definition:
    """What is shown of a version's spec, as plain data: a request must not pay for models of 10,000 steps."""

    spec: Mapping[str, Any]
    names: tuple[str, ...]

    def before(self, step: Mapping[str, Any]) -> list[str]:
        """The steps that must end before `step`, in the order of its ports."""
        sources = [p["source"]["step"] for p in step.get("inputs", ()) if p["source"]["kind"] == "upstream"]
        return list(dict.fromkeys([*sources, *step.get("after", ())]))


def definition_of(spec: Mapping[str, Any]) -> Definition:
    return Definition(spec, tuple(step["name"] for step in spec["steps"]))


class Lookup:
    """Names -> rows, with the near names when there is no such thing."""

    def __init__(self, ledger: Ledger, registry: Registry) -> None:
        self._ledger = ledger
        self._registry = registry
        self._definitions: OrderedDict[str, Definition] = OrderedDict()

    async def run(self, reference: str) -> RunRow:
        """Raises UnknownName and UsageError."""
        pipeline, number = protocol.reference(reference)
        if number is None:
            found = await self._ledger.latest(pipeline)
            if found is not None:
                return found
            if pipeline is not None and self._registry.get(pipeline) is None:
                raise UnknownName.among("pipeline", pipeline, self.pipelines())
            whose = f" of `{pipeline}`" if pipeline else ""
            raise UnknownName(f"no run{whose} yet", hint=f"`mlpipectl run {pipeline or 'PIPELINE'}` starts one")
        run = await self._ledger.run(number)
        if run is None:
            last = await self._ledger.latest()
            hint = f"the last one is {last.id}; `mlpipectl runs` lists them" if last else "there are no runs yet"
            raise UnknownName(f"no run {number}", hint=hint)
        return run

    def pipelines(self) -> list[str]:
        return [loaded.spec.name for loaded in self._registry.all()]

    async def steps(self, run: RunRow) -> list[StepRow]:
        rows = await self._ledger.steps(run.id)
        if rows and run.state is RunState.FINISHED and run.outcome is not RunOutcome.CANCELLED:
            return list(rows)
        return all_steps(run, rows, (await self.definition(run.version)).names)

    async def step(self, run: RunRow, name: str) -> StepRow:
        """Raises UnknownName."""
        row = await self._ledger.step(run.id, name)
        if row is not None:
            return row
        steps = await self.steps(run)
        for each in steps:
            if each.name == name:
                return each
        raise UnknownName.among(f"step of run {run.id}", name, [each.name for each in steps])

    async def origin(self, run: RunRow, step: StepRow) -> tuple[RunRow, StepRow]:
        """The run and step that made what `step` has: itself, or the one that it was reused from."""
        for _ in range(_HOPS):
            if step.reused_from is None:
                break
            earlier = await self._ledger.run(step.reused_from[0])
            row = None if earlier is None else await self._ledger.step(earlier.id, step.reused_from[1])
            if earlier is None or row is None:
                break
            run, step = earlier, row
        return run, step

    async def definition(self, version: str) -> Definition:
        """The spec of a version; one without steps when the ledger has none."""
        known = self._definitions.get(version)
        if known is None:
            text = await self._ledger.definition(version)
            known = definition_of(json.loads(text) if text else {"steps": []})
            self._definitions[version] = known
            while len(self._definitions) > _DEFINITIONS_KEPT:
                self._definitions.popitem(last=False)
        self._definitions.move_to_end(version)
        return known

    async def step_name(self, run_id: int, idx: int) -> str | None:
        run = await self._ledger.run(run_id)
        names = (await self.definition(run.version)).names if run is not None else ()
        return names[idx] if idx < len(names) else None
