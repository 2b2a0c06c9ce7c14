"""Runs that share their steps, cancelled, restarted and answered late in random order: nobody loses, nothing twice."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from test_run import MAKES, WHERE, Lab

from mlpiped.backends.base import Capacity, Exited
from mlpiped.backends.fake import FakeBackend
from mlpiped.clock import SystemClock
from mlpiped.errors import Conflict
from mlpiped.ledger import Ledger
from mlpiped.model import AttemptEnd, RunOutcome, RunState, StepOutcome
from mlpiped.placement.decide import Place
from mlpiped.scheduling.dispatch import Dispatch
from mlpiped.scheduling.scheduler import Scheduler
from mlpiped.spec import PipelineSpec, version_of

if TYPE_CHECKING:
    from pathlib import Path

    from mlpiped.backends.base import Handle, Job

pytestmark = pytest.mark.anyio

TRIALS = int(os.environ.get("MLPIPED_SHARING_TRIALS", "24"))
PEOPLE = {"p": ("alice", 0), "q": ("bob", 5), "r": ("carol", -5)}
"""Pipeline -> who runs it, and its priority. All have one step of the same key."""


def pipelines() -> Any:
    loaded = {}
    for name, (owner, priority) in PEOPLE.items():
        arguments = [{"kind": "text", "text": "train"}]
        step = {"name": f"of-{name}", "where": WHERE, "arguments": arguments, "retry": {"attempts": 2, "delay": 0}}
        plain = {"name": name, "where": WHERE, "experiment": name, "overlap": "parallel", "priority": priority}
        spec = PipelineSpec.model_validate({**plain, "steps": [{**step, **MAKES}]})
        loaded[name] = SimpleNamespace(spec=spec, version=version_of(spec), owner=owner)
    return SimpleNamespace(get=loaded.get, all=lambda: list(loaded.values()))


class Watched(FakeBackend):
    """Jobs run until the test ends them, outputs come home when it says so. It notes what must not be asked of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.run_for, self.folder = 3600.0, folder
        self.home = anyio.Event()
        self.faults: list[str] = []
        self.told: set[str] = set()  # tokens
        self.was_silent = False
        self.dispatch: Dispatch
        self.unwanted: set[int] = set()  # runs

    def alive(self) -> list[str]:
        return [token for token, entry in self.world.items() if entry is not None and entry[0] > anyio.current_time()]

    async def submit(self, job: Job) -> Handle:
        handle = await super().submit(job)
        if len(self.alive()) > 1:
            self.faults.append(f"equal jobs at the same time: {self.alive()}")
        return handle

    async def cancel(self, handle: Handle) -> None:
        token = handle["token"]
        needy = [
            run
            for run in self.dispatch.executions
            if run not in self.unwanted and (self.dispatch.why_waiting(run, 0) or "").startswith("shares")
        ]
        if needy and token not in self.told and not self.was_silent:
            self.faults.append(f"`{token}` was ended, and runs {needy} waited for it")
        await super().cancel(handle)
        self.told.add(token)

    async def fetch(self, handle: Handle, into: Path) -> Path:
        await self._call()
        await self.home.wait()
        made = self.folder / handle["token"] / "out" / "model"
        made.mkdir(parents=True, exist_ok=True)
        (made / "model.bin").write_text(handle["token"])
        return made.parent.parent

    def end(self, code: int) -> int:
        """Those that live end so; how many did."""
        ended = self.alive()
        for token in ended:
            entry = self.world[token]
            assert entry is not None
            entry[:2] = 0.0, Exited(code)
            entry[2].set()
        return len(ended)


class Trial:
    def __init__(self, ledger: Ledger, folder: Path, chance: random.Random) -> None:
        self.lab, self.chance = Lab(ledger, folder), chance
        self.backend = Watched(folder)
        self.runs: list[int] = []
        self.failed = 0
        self.story: list[str] = []
        self.scheduler: Scheduler

    def dispatch(self) -> Dispatch:
        place = Place("fake", 2)
        place.offers(Capacity(2))
        return Dispatch([place], {}, None)

    async def live(self, *, last: bool) -> None:
        """One daemon, from its start to its end: without a word, unless it is the last."""
        self.backend.dispatch = dispatch = self.dispatch()
        lab = self.lab
        self.scheduler = Scheduler(lab.world, pipelines(), {"fake": self.backend}, lab.clock, dispatch)
        dispatch.executions = self.scheduler.executions
        async with anyio.create_task_group() as tasks:
            await self.scheduler.recover(tasks)
            for _ in range(self.chance.randint(3, 9)):
                await self.act()
                for _ in range(self.chance.choice((0, 1, 3, 10, 40, 200))):
                    await anyio.lowlevel.checkpoint()
            if last:
                await self.finish()
            tasks.cancel_scope.cancel()

    async def act(self) -> None:
        backend, what = (
            self.backend,
            self.chance.choice("start start start cancel cancel step end fail home silent".split()),
        )
        self.story.append(what)
        match what:
            case "start" if len(self.runs) < 6:
                name = self.chance.choice(list(PEOPLE))
                number, _ = await self.scheduler.start(name, parameters={}, who=PEOPLE[name][0])
                self.runs.append(number)
                self.story[-1] += f" {name} as {number}"
            case "cancel" | "step" if self.runs:
                number = self.chance.choice(self.runs)
                self.story[-1] += f" {number}"
                backend.unwanted.add(number)
                with suppress(Conflict):
                    row = await self.lab.ledger.run(number)
                    assert row is not None
                    await self.scheduler.cancel(number, f"of-{row.pipeline}" if what == "step" else None, "root")
            case "end":
                backend.end(0)
            case "fail" if not self.failed:
                self.failed = backend.end(3)
            case "home":
                backend.home.set()
            case "silent":
                backend.unavailable_for = self.chance.randint(1, 4)
                backend.was_silent = True

    async def finish(self) -> None:
        self.backend.home.set()
        with anyio.fail_after(20):
            while self.scheduler.executions:
                self.backend.end(0)
                await anyio.sleep(0.001)

    async def judge(self) -> list[str]:
        ledger, found = self.lab.ledger, list(self.backend.faults)
        tokens: list[str] = []
        for number in self.runs:
            run = await ledger.run(number)
            [step] = await ledger.steps(number)
            attempts = await ledger.attempts(number, 0)
            tokens += [attempt.token for attempt in attempts]
            assert run is not None
            if run.state is not RunState.FINISHED:
                found.append(f"run {number} has not finished")
            elif number not in self.backend.unwanted and run.outcome is not RunOutcome.SUCCEEDED:
                found.append(f"run {number} was {run.outcome}: {step.why}")
            elif run.outcome not in (RunOutcome.SUCCEEDED, RunOutcome.CANCELLED):
                found.append(f"run {number}, which was cancelled, was {run.outcome}: {step.why}")
            if step.attempts != sum(attempt.end is not AttemptEnd.NEVER_RAN for attempt in attempts):
                found.append(f"run {number} counts {step.attempts} attempts of {[a.end for a in attempts]}")
            committed = [attempt.end for attempt in attempts].count(AttemptEnd.COMMITTED)
            if committed != (step.outcome is StepOutcome.SUCCEEDED):
                found.append(f"run {number} was {step.outcome} with {[a.end for a in attempts]}")
            if any(attempt.end is None for attempt in attempts):
                found.append(f"an attempt of run {number} has no end")
        started = sorted(token for token, entry in self.backend.world.items() if entry is not None)
        if sorted(set(tokens)) != sorted(tokens) or not set(started) <= set(tokens):
            found.append(f"started {started}, in the ledger {tokens}")
        dispatch = self.backend.dispatch
        place = dispatch.places["fake"]
        if place.holders or place.used_slots or len(dispatch.waiting):
            found.append(f"places are held: {place.holders}")
        return found


@pytest.mark.parametrize("seed", range(TRIALS))
async def test_runs_that_share_a_step_each_get_it_or_are_cancelled_whatever_comes_in_between(
    tmp_path: Path, seed: int
) -> None:
    (tmp_path / "lab").mkdir()
    ledger = await Ledger.open(tmp_path, SystemClock())
    trial = Trial(ledger, tmp_path, chance := random.Random(seed))
    try:
        lives = chance.choice((1, 1, 2, 3))
        for life in range(1, lives + 1):
            await trial.live(last=life == lives)
            await ledger.write(lambda c: None)  # a daemon that ends writes what was posted
            trial.story.append("restart")
        found = await trial.judge()
        assert not found, [*found, trial.story]
    finally:
        await ledger.close()
