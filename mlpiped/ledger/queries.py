"""What can be asked of the ledger. Every statement goes by an index."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlpiped.files.hashing import StatRow
from mlpiped.ledger.db import SQL, Reads, every
from mlpiped.ledger.rows import (
    RUN_STATES,
    STEP_STATES,
    AttemptRow,
    AuditRow,
    ComputeRow,
    Counts,
    EventRow,
    FireRow,
    Head,
    Maker,
    Result,
    RunRow,
    ScheduleRow,
    Seen,
    StepRow,
    attempt_row,
    run_row,
    schedule_row,
    step_row,
    unsigned,
)
from mlpiped.ledger.text import clean, fs_text
from mlpiped.model import OutputFact, RunOutcome, RunState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.ledger.db import Connection

CHUNK = 1000  # keys, names or paths in one statement


class Queries(Reads):
    """Reads, on a connection that cannot write. Each shows one moment, with every write that had returned before."""

    # --- runs -------------------------------------------------------------------------------------------------
    async def run(self, run_id: int) -> RunRow | None:
        row = await self._one("run", id=run_id)
        return None if row is None else run_row(row)

    async def runs(
        self,
        *,
        pipeline: str | None = None,
        state: RunState | None = None,
        outcome: RunOutcome | None = None,
        tags: Mapping[str, str] | None = None,
        since: int | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[RunRow]:
        """Runs that meet all conditions, the newest first. `since` is a time; `before` is a run id, to page on."""
        values: dict[str, Any] = {"limit": limit}
        terms: list[str] = []
        if pipeline is not None:
            terms.append("pipeline")
            values["pipeline"] = pipeline
        if outcome is not None:
            terms.append("outcome")
            values["outcome"] = outcome.value
        if state is not None:
            terms.append("finished" if state is RunState.FINISHED else "unfinished")
            values["state"] = state.value
        if since is not None:
            terms.append("since")
            values["since"] = since
        if before is not None:
            terms.append("before")
            values["before"] = before
        conditions = [SQL[f"runs_where_{term}"] for term in terms]
        for n, (name, value) in enumerate((tags or {}).items()):
            conditions.append(SQL["runs_where_tag"].replace("{n}", str(n)))
            values |= {f"tag_name_{n}": clean(name), f"tag_value_{n}": clean(value)}
        sql = SQL["runs"].replace("{conditions}", " AND ".join(conditions) or "true")
        rows = await self._reader.call(lambda c: c.execute(sql, values).fetchall())
        return [run_row(row) for row in rows]

    async def unfinished_runs(self) -> list[RunRow]:
        """Queued and running, the oldest first."""
        return [run_row(row) for row in await self._every("unfinished_runs")]

    async def latest(self, pipeline: str | None = None) -> RunRow | None:
        """The newest run, in whatever state."""
        row = await (self._one("latest_of_all") if pipeline is None else self._one("latest", pipeline=pipeline))
        return None if row is None else run_row(row)

    async def latest_success(self, pipeline: str) -> RunRow | None:
        """The newest run of the pipeline that succeeded."""
        row = await self._one("latest_success", pipeline=pipeline)
        return None if row is None else run_row(row)

    async def last_finished(self, pipelines: Sequence[str]) -> dict[str, RunRow]:
        """The newest finished run of each of `pipelines` that has one."""
        found = [run_row(row) for row in await self._every("last_finished", pipelines=json.dumps(list(pipelines)))]
        return {run.pipeline: run for run in found}

    async def last_failures(self, limit: int = 5) -> list[RunRow]:
        return await self.runs(outcome=RunOutcome.FAILED, limit=limit)

    async def counts(self) -> Counts:
        def work(c: Connection) -> Counts:
            runs = {RUN_STATES[state]: n for state, n in every(c, "count_runs")}
            return Counts(runs, {STEP_STATES[state]: n for state, n in every(c, "count_steps")})

        return await self._reader.call(work)

    async def progress(self, runs: Sequence[int]) -> dict[int, dict[str, int]]:
        """For each run, how many steps have each outcome or, unfinished, are in each state."""
        found: dict[int, dict[str, int]] = {run_id: {} for run_id in runs}
        for run_id, word, n in await self._every("progress", runs=json.dumps(list(runs))):
            found[run_id][word] = n
        return found

    # --- steps and attempts -----------------------------------------------------------------------------------
    async def steps(self, run_id: int) -> list[StepRow]:
        return [step_row(row) for row in await self._every("steps", run_id=run_id)]

    async def step(self, run_id: int, name: str) -> StepRow | None:
        row = await self._one("step", run_id=run_id, name=name)
        return None if row is None else step_row(row)

    async def attempts_of_run(self, run_id: int) -> dict[int, list[AttemptRow]]:
        """By step, in their order: what a walk is taken up again from."""
        found: dict[int, list[AttemptRow]] = {}
        for row in map(attempt_row, await self._every("attempts_of_run", run_id=run_id)):
            found.setdefault(row.idx, []).append(row)
        return found

    async def attempts(self, run_id: int, idx: int) -> list[AttemptRow]:
        return [attempt_row(row) for row in await self._every("attempts", run_id=run_id, idx=idx)]

    async def left_behind(self) -> list[AttemptRow]:
        """Those that have not ended though their steps have."""
        return [attempt_row(row) for row in await self._every("left_behind")]

    async def attempt(self, token: str) -> AttemptRow | None:
        row = await self._one("attempt", token=token)
        return None if row is None else attempt_row(row)

    async def recent_use(self, since: int, limit: int = 50_000) -> list[tuple[str, int, float, float]]:
        """What owners have had, by the hour, by the last `limit` attempts: (owner, µs, slot-seconds, card-seconds)."""
        rows = await self._every("recent_use", since=since, limit=limit)
        return [(owner, hour * 3_600_000_000, slots, cards) for owner, hour, slots, cards in rows]

    async def computes(self) -> dict[str, ComputeRow]:
        """What is known of computes, by name; nothing of one that was never drained nor unwell."""
        return {row[0]: ComputeRow(*row) for row in await self._every("computes")}

    async def outputs(self, run_id: int, idx: int) -> tuple[OutputFact, ...]:
        """What a finished step made, or took from the result that it reused."""
        return tuple(_fact(row) for row in await self._every("outputs", run_id=run_id, idx=idx))

    async def outputs_of_run(self, run_id: int) -> dict[int, tuple[OutputFact, ...]]:
        """`outputs` of every finished step of the run that has any, by index."""
        found: dict[int, tuple[OutputFact, ...]] = {}
        for idx, *fact in await self._every("outputs_of_run", run_id=run_id):
            found[idx] = (*found.get(idx, ()), _fact(fact))
        return found

    # --- keys and results -------------------------------------------------------------------------------------
    async def results(self, keys: Sequence[str]) -> dict[str, Result]:
        """What may be reused for each of `keys`; a key without a result is absent."""

        def work(c: Connection) -> list[Any]:
            return [
                row
                for chunk in _chunks(sorted(set(keys)))  # in the order of the index
                for row in every(c, "results", {"keys": json.dumps(chunk)})
            ]

        found: dict[str, Result] = {}
        for key, run_id, step, cost_us, name, *fact in await self._reader.call(work):
            before = found.get(key)
            made = () if name is None else (_fact((name, *fact)),)
            found[key] = Result(run_id, step, made if before is None else (*before.outputs, *made), cost_us)
        return found

    async def heads(self, pipeline: str, names: Sequence[str]) -> dict[str, Head]:
        """The last good state of each of the steps `names` that has one."""

        def work(c: Connection) -> dict[str, Head]:
            return {
                step: Head(*head)
                for chunk in _chunks(names)
                for step, *head in every(c, "heads", {"pipeline": pipeline, "names": json.dumps(chunk)})
            }

        return await self._reader.call(work)

    async def durations(self, pipeline: str) -> dict[str, int]:
        """What each step of the pipeline cost when it last ran, in microseconds."""
        return dict(await self._every("durations", pipeline=pipeline))

    async def parts(self, key: str) -> str | None:
        """The JSON text of the named parts that `key` was made of."""
        row = await self._one("parts", key=key)
        return None if row is None else row[0]

    async def makers(self, digest: str, limit: int = 100) -> list[Maker]:
        """The steps that made these bytes, the newest first."""
        return [Maker(*row) for row in await self._every("makers", digest=digest, limit=limit)]

    # --- triggers ---------------------------------------------------------------------------------------------
    async def schedules(self) -> list[ScheduleRow]:
        return [schedule_row(row) for row in await self._every("schedules")]

    async def schedule(self, schedule: str) -> ScheduleRow | None:
        row = await self._one("schedule", schedule=schedule)
        return None if row is None else schedule_row(row)

    async def fire(self, dedupe: str) -> FireRow | None:
        """What came of a fire; for an Idempotency-Key, the run that it opened."""
        row = await self._one("fire", dedupe=clean(dedupe))
        return None if row is None else FireRow(*row)

    async def arrivals(self, schedule: str, after: bytes = b"", limit: int = 1000) -> dict[bytes, Seen]:
        """What lay at each path when the trigger last took it into a batch, in the order of paths, beyond `after`."""
        rows = await self._every("arrivals", schedule=schedule, after=after, limit=limit)
        return {path: Seen(digest, size, mtime_ns, unsigned(ino)) for path, digest, size, mtime_ns, ino in rows}

    async def arrival_digests(self, schedule: str, digests: Sequence[str]) -> set[str]:
        """What of this content the trigger ever took."""
        text = json.dumps(list(digests))
        return {row[0] for row in await self._every("arrival_digests", schedule=schedule, digests=text)}

    # --- the rest ---------------------------------------------------------------------------------------------
    async def events(self, after: int = 0, limit: int = 1000, *, run: int | None = None) -> list[EventRow]:
        """What happened after the event `after`, in order."""
        if run is None:
            rows = await self._every("events", after=after, limit=limit)
        else:
            rows = await self._every("events_of_run", after=after, limit=limit, run_id=run)
        return [EventRow(*row) for row in rows]

    async def last_event(self) -> int:
        """The number of the newest event; 0 when there is none."""
        return int((await self._one("last_event"))[0])

    async def definition(self, version: str) -> str | None:
        """The JSON text of the spec of a version."""
        row = await self._one("definition", version=version)
        return None if row is None else row[0]

    async def paused(self) -> set[str]:
        return {row[0] for row in await self._every("paused")}

    async def audit(self, limit: int = 100, *, before: int = 2**62) -> list[AuditRow]:
        """Who did what, the newest first; `before` is an id, to page on."""
        rows = await self._every("audit", limit=limit, before=before)
        return [AuditRow(r[0], r[1], r[2], r[3], r[4], r[5], json.loads(r[6])) for r in rows]

    async def stat_cache(self, paths: Sequence[bytes]) -> dict[bytes, StatRow]:
        """What is known of each of `paths`; an unknown one is absent."""

        def work(c: Connection) -> list[Any]:
            found: list[Any] = []
            for chunk in _chunks(paths):
                size = 1 << (len(chunk) - 1).bit_length()  # few different statements, so that they stay prepared
                sql = SQL["stats"].replace("{slots}", ", ".join("?" * size))
                found += c.execute(sql, [*chunk, *[None] * (size - len(chunk))]).fetchall()
            return found

        rows = await self._reader.call(work)
        return {row[0]: StatRow(row[0], unsigned(row[1]), unsigned(row[2]), *row[3:]) for row in rows}


def _chunks(values: Sequence[Any]) -> list[list[Any]]:
    return [list(values[i : i + CHUNK]) for i in range(0, len(values), CHUNK)]


def _fact(row: Sequence[Any]) -> OutputFact:
    """(name, digest, kind, size, path, gone_at, compute) -> fact; without bytes, without a path."""
    gone = row[5] is not None
    return OutputFact(row[0], row[1], row[2], row[3], "" if gone else fs_text(row[4]), None if gone else row[6])
