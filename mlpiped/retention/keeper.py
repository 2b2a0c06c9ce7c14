"""Retention: what is old enough goes, every hour and when somebody asks, and nothing that an unfinished run needs.

    runs          rows older than `retention.runs`, a bite at a time: results, outputs and keys outlive them
    logs          job folders of runs that ended longer ago than `retention.logs`; metrics stay as long as their run
    artifacts     by `gc_plan`, when they take more room than `retention.artifacts`; their digests stay
    strays        store entries that no output has: what a crash or a failed commit left
    kept          what other machines keep (`keep="remote"`) and no output has
    sent          to other machines for steps, and built there: beyond the age and the size that these have for it
    code          snapshots that nothing was run from, or is explained against, for `retention.runs`
    environments  virtual environments that no step has started in for `retention.runs`
    images        that engines made of Dockerfiles and no run has asked for in that time
    stat cache    rows of files that are no more

Every part stands alone: what goes wrong with one is told, and the others go on. A pass that is cut off, by a crash too,
leaves nothing half done that the next one does not finish.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import structlog
from anyio import to_thread

from mlpiped.backends.base import BuildsImages, Prunes
from mlpiped.errors import BackendUnavailable, MlpipedError
from mlpiped.ledger import moves
from mlpiped.retention import keeping
from mlpiped.retention.artifacts import Artifacts
from mlpiped.retention.left_there import LeftThere
from mlpiped.retention.plan import PAGE, TICK, JobFolder, Part, Removal, Span, leapt, pages, spent_jobs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from mlpiped.artifacts import Store
    from mlpiped.backends.base import Backend
    from mlpiped.clock import Clock
    from mlpiped.config.settings import Retention
    from mlpiped.ledger import ArtifactRow, Ledger
    from mlpiped.ledger.survey import Survey

T = TypeVar("T")
log = structlog.get_logger("keeper")

FIRST = 120.0  # seconds after the start: a daemon that starts has other things to do
HOUR = 3600.0
DISTRUST = 86_400.0  # seconds that nothing is removed by itself after the clock leapt forward
SLICE = 0.2  # seconds of removing files in one go: what is cancelled waits no longer
STAT_ROWS = 50_000  # of the stat cache, looked at in one pass
STAT_TIME = 60.0  # seconds for all of that
STAT_AGE = 30 * 86_400.0  # seconds since it was hashed
JUST_NOW = 60.0  # seconds after its end in which a job's last processes may still go
SHOWN = 1000  # artifacts that are listed one by one


class Keeper:
    """`longest` is how long a single bite has held the ledger's writer, in seconds."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        backends: Mapping[str, Backend],
        retention: Retention,
        datastores: Mapping[str, Path],
        clock: Clock,
    ) -> None:
        self.ledger = ledger
        self.store = store
        self.backends = backends
        self.retention = retention
        self.datastores = datastores
        self.clock = clock
        self.longest = 0.0
        state = store.state_dir
        self.jobs, self.envs, self.code = state / "jobs", state / "envs", state / "code"
        self.left_there = LeftThere(state / "left-there")
        self._one = anyio.Lock()
        self._limiter = anyio.CapacityLimiter(1)
        self.artifacts = Artifacts(ledger, store, backends, clock, self._limiter)
        self._stat_after = b""

    # --- by itself --------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """A pass an hour. After a leap of the clock nothing is removed for a day: it may have been a mistake."""
        await anyio.sleep(FIRST)
        before, distrusted = self._span(), 0.0
        while True:
            now = self._span()
            if ahead := leapt(before, now):
                log.warning("the clock was set forward: nothing is removed for a day", days=round(ahead / 86_400, 1))
                distrusted = now.monotonic + DISTRUST
            before = now
            if now.monotonic >= distrusted:
                await self.clean()
            await anyio.sleep(HOUR)

    def _span(self) -> Span:
        return Span(self.clock.now(), self.clock.monotonic())

    # --- what people ask --------------------------------------------------------------------------------------
    async def clean(self) -> dict[str, Any]:
        """One pass: {"parts": [{"what", "count", "bytes", "seconds"}], "bytes", "seconds", "faults": [sentence]}."""
        async with self._one:
            began = time.monotonic()
            parts, faults = await self._all(
                ("logs", self._clean_logs),
                ("artifacts", lambda: self.artifacts.clean(self.retention.artifacts)),
                ("strays", self.artifacts.clean_strays),
                ("kept", self.artifacts.clean_kept),
                ("sent", self._clean_sent),
                ("code", self._clean_code),
                ("environments", self._clean_environments),
                ("images", self._clean_images),
                ("runs", self._clean_runs),
                ("stat cache", self._clean_stats),
            )
            answer = _answer(parts, faults)
            if answer["bytes"] or any(part.count for part in parts):
                counts = {part.what.replace(" ", "_"): part.count for part in parts if part.count}
                log.info("removed", **counts, bytes=answer["bytes"], took=round(time.monotonic() - began, 3))
            return answer

    async def plan(self) -> dict[str, Any]:
        """What `clean` would do now, and the artifacts of it one by one ("artifacts": dearest to make again first)."""
        listed: list[dict[str, Any]] = []

        async def artifacts() -> Part:
            rows, plan = await self.artifacts.to_go(self.retention.artifacts)
            by_digest = {row.digest: row for row in rows}
            dearest = sorted(plan, key=lambda removal: -removal.seconds)[:SHOWN]
            listed.extend(_removal_json(by_digest[removal.digest], removal) for removal in dearest)
            return Part("artifacts", len(plan), sum(r.bytes for r in plan), sum(r.seconds for r in plan))

        async def strays() -> Part:
            async with self.ledger.survey() as survey:
                digests = [digest async for page in self.artifacts.strays(survey) for digest in page]
            return Part("strays", len(digests), await self.store.bytes_of(digests))

        async def runs() -> Part:
            async with self.ledger.survey() as survey:
                return Part("runs", sum([len(page) async for page in self._runs_to_go(survey)]))

        parts, faults = await self._all(
            ("logs", lambda: self._clean_logs(only_look=True)),
            ("artifacts", artifacts),
            ("strays", strays),
            ("code", lambda: self._clean_code(only_look=True)),
            ("environments", lambda: self._clean_environments(only_look=True)),
            ("sent", lambda: self._clean_sent(only_look=True)),
            ("images", lambda: self._clean_images(only_look=True)),
            ("runs", runs),
        )
        return {**_answer(parts, faults), "artifacts": listed}

    async def orphans(self) -> dict[str, list[int]]:
        """Token -> pids of jobs on this host that run though the ledger does not know them, or says that they ended."""
        running: dict[str, list[int]] = await self._hop(lambda: keeping.processes(self.jobs))
        async with self.ledger.survey() as survey:
            alive = await survey.live_tokens(list(running), self._before(JUST_NOW))
        return {token: pids for token, pids in running.items() if token not in alive}

    async def _all(self, *steps: tuple[str, Callable[[], Awaitable[Part]]]) -> tuple[list[Part], list[str]]:
        parts, faults = [], []
        for what, step in steps:
            try:
                parts.append(await step())
            except Exception as fault:  # a fault of ours must not end the daemon either
                expected = isinstance(fault, MlpipedError | OSError)
                log.warning("not all could be removed", part=what, why=str(fault), exc_info=not expected)
                faults.append(f"{what}: {fault}")
        return parts, faults

    async def _hop(self, work: Callable[[], Any]) -> Any:
        return await to_thread.run_sync(work, limiter=self._limiter)

    def _before(self, seconds: float) -> int:
        return self.clock.now() - int(seconds * 1e6)

    # --- job folders ------------------------------------------------------------------------------------------
    async def _clean_logs(self, *, only_look: bool = False) -> Part:
        count = size = 0
        async with self.ledger.survey() as survey:
            async for spent, computes in self._spent(survey):

                def clear(token: str, computes: Mapping[str, str] = computes) -> int | None:
                    return keeping.clear_job(
                        self.jobs / token,
                        keep_metrics=token in computes,
                        only_look=only_look,
                        first=lambda: self._goes(token, computes.get(token)),
                    )

                freed = await self._slices(spent, clear)
                count, size = count + len(freed), size + sum(freed.values())
        if not only_look:
            await self.left_there.discard(self.backends)
        return Part("logs", count, size)

    def _goes(self, token: str, compute: str | None) -> None:
        """Its folder is removed now. Blocks."""
        backend = self.backends.get(compute or "")
        if compute is not None and (backend is None or backend.kind != "local"):
            self.left_there.note(token, compute)

    async def _spent(self, survey: Survey) -> AsyncIterator[tuple[list[str], dict[str, str]]]:
        """Pages of (tokens whose folders go, token -> compute of those that are known)."""
        folders: list[tuple[str, int]] = await self._hop(lambda: keeping.listed(self.jobs))
        for page in pages(folders):
            rows = await survey.jobs([token for token, _ in page])
            found = []
            for token, changed_at in page:
                row = rows.get(token)
                found.append(JobFolder(token, row is not None, row and row.finished_at, changed_at))
            if spent := spent_jobs(found, now=self.clock.now(), logs=self.retention.logs):
                yield spent, {token: row.compute for token, row in rows.items()}

    async def _slices(self, names: Sequence[str], work: Callable[[str], int | None]) -> dict[str, int]:
        """`work` on each name, in a thread, `SLICE` at a time; what it gave, less the None."""
        found: dict[str, int] = {}
        left = iter(names)
        more = bool(names)

        def go() -> bool:
            until = time.monotonic() + SLICE
            for name in left:
                done = work(name)
                if done is not None:
                    found[name] = done
                if time.monotonic() > until:
                    return True
            return False

        while more:
            more = await self._hop(go)
        return found

    # --- code and environments ----------------------------------------------------------------------------------
    async def _horizon(self, survey: Survey) -> float | None:
        """Seconds since the epoch before which something must have been used last to go; None: nothing goes."""
        if self.retention.runs is None:
            return None
        oldest = await survey.oldest_intent()
        before = self._before(self.retention.runs)
        # file systems note when something was read to the day
        return (before if oldest is None else min(before, oldest - 2 * 86_400_000_000)) / 1e6

    async def _clean_code(self, *, only_look: bool = False) -> Part:
        async with self.ledger.survey() as survey:
            horizon = await self._horizon(survey)
            if horizon is None:
                return Part("code", 0)
            used = {raw.rpartition(":")[2] for raw in await survey.code_in_use()}
        folders: list[str] = await self._hop(lambda: keeping.old_code(self.code, used, horizon))
        freed = await self._slices(folders, lambda name: keeping.drop_code(self.code, name, horizon, only_look))
        return Part("code", len(freed), sum(freed.values()))

    async def _clean_environments(self, *, only_look: bool = False) -> Part:
        async with self.ledger.survey() as survey:
            horizon = await self._horizon(survey)
        if horizon is None:
            return Part("environments", 0)
        names: list[str] = await self._hop(lambda: keeping.old_environments(self.envs, horizon))
        if not only_look:
            await self._hop(lambda: keeping.sweep_gone(self.envs))
        freed = await self._slices(names, lambda name: keeping.drop_environment(self.envs, name, horizon, only_look))
        return Part("environments", len(freed), sum(freed.values()))

    async def _clean_images(self, *, only_look: bool = False) -> Part:
        """Each run asks for its images once. What that frees nobody tells: images share their layers."""
        async with self.ledger.survey() as survey:
            horizon, oldest = await self._horizon(survey), await survey.oldest_run()
        if horizon is None:
            return Part("images", 0)
        before, count = min(horizon, horizon if oldest is None else oldest / 1e6 - TICK), 0
        for backend in self.backends.values():
            if isinstance(backend, BuildsImages):
                try:
                    count += await backend.drop_images(before, only_look=only_look)
                except BackendUnavailable as fault:
                    log.info("left for later", compute=backend.name, why=fault.message)
        return Part("images", count)

    async def _clean_sent(self, *, only_look: bool = False) -> Part:
        count = size = 0
        for backend in self.backends.values():
            if isinstance(backend, Prunes):
                try:
                    more, freed = await backend.prune(only_look=only_look)
                    count, size = count + more, size + freed
                except BackendUnavailable as fault:
                    log.info("left for later", compute=backend.name, why=fault.message)
        return Part("sent", count, size)

    # --- rows -------------------------------------------------------------------------------------------------
    async def _runs_to_go(self, survey: Survey) -> AsyncIterator[list[int]]:
        if self.retention.runs is None:
            return
        before, last = self._before(self.retention.runs), (-1, 0)
        while page := await survey.old_runs(before, PAGE, after=last):
            last = page[-1]
            yield [run_id for _, run_id in page]

    async def _clean_runs(self) -> Part:
        if self.retention.runs is None:
            return Part("runs", 0)
        count = 0
        async with self.ledger.survey() as survey:
            async for page in self._runs_to_go(survey):
                for run_id in page:
                    await self._forget(survey, run_id)
                    count += 1
        await self.left_there.discard(self.backends)
        before = self._before(self.retention.runs)
        while not await self._bite(moves.forget_loose_events(before)):
            pass
        return Part("runs", count)

    async def _forget(self, survey: Survey, run_id: int) -> None:
        """Its job folders go first: without its rows nobody would know whose they are."""
        computes = dict(await survey.tokens_of(run_id))

        def clear(token: str) -> int | None:
            self._goes(token, computes[token])
            return keeping.clear_job(self.jobs / token, keep_metrics=False)

        await self._slices(list(computes), clear)
        while not await self._bite(moves.forget_run(run_id)):
            pass

    async def _bite(self, op: Any) -> bool:
        """Whether it was the last one. Pauses as long as it took: others write too."""
        began = time.monotonic()
        (bite,) = await self.ledger.write(op)
        self.longest = max(self.longest, bite.seconds)
        await anyio.sleep(min(time.monotonic() - began, 0.5))
        return bool(bite.done)

    async def _clean_stats(self) -> Part:
        """Some of the stat cache, on from where the last pass ended. What lies on a datastore that is away stays."""
        count = looked = 0
        before = int((self.clock.now() / 1e6 - STAT_AGE) * 1e9)
        roots = [str(root) for root in self.datastores.values()]
        with anyio.fail_after(STAT_TIME):
            away = await self._ask_files(lambda: keeping.empty_roots(roots))
            async with self.ledger.survey() as survey:
                while looked < STAT_ROWS:
                    page = await survey.stat_page(self._stat_after, PAGE)
                    looked += PAGE
                    old = [(path, hashed) for path, hashed in page if hashed < before]
                    gone = await self._ask_files(lambda old=old: keeping.missing(old, away))  # type: ignore[misc]
                    if gone:
                        count += (await self.ledger.write(moves.drop_stats(gone)))[0]
                    self._stat_after = page[-1][0] if len(page) == PAGE else b""
                    if not self._stat_after:
                        break
        return Part("stat cache", count)

    async def _ask_files(self, work: Callable[[], T]) -> T:
        """Of datastores: one whose server is dead may not answer for ever."""
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)


def _answer(parts: Sequence[Part], faults: Sequence[str]) -> dict[str, Any]:
    return {
        "parts": [asdict(part) for part in parts],
        "bytes": sum(part.bytes for part in parts),
        "seconds": round(sum(part.seconds for part in parts), 3),
        "faults": list(faults),
    }


def _removal_json(row: ArtifactRow, removal: Removal) -> dict[str, Any]:
    return {
        "digest": row.digest,
        "kind": row.kind,
        "size": row.size,
        "path": row.path,
        "used_at": row.used_at,
        "seconds": removal.seconds,
        "why": removal.reason,
    }
