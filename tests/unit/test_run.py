"""ONE run, with real ledger, files and store, and a scripted backend for the faults that a real one cannot show."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import pytest

from mlpiped.artifacts import Store
from mlpiped.backends.base import Exited
from mlpiped.backends.fake import FakeBackend
from mlpiped.clock import SystemClock
from mlpiped.code import CodeReader
from mlpiped.errors import StorageAway
from mlpiped.execution import attempt
from mlpiped.execution.facts import World
from mlpiped.execution.run import Execution
from mlpiped.execution.tries import LOST_LIMIT, TAINTED_LIMIT
from mlpiped.files.fingerprint import Fingerprinter
from mlpiped.ledger import Ledger, StepRow, moves
from mlpiped.model import AttemptEnd, Cause, CauseKind, Event, RunOutcome, StepOutcome, StepState
from mlpiped.placement.decide import Place
from mlpiped.resolve import Graph
from mlpiped.scheduling.dispatch import Dispatch
from mlpiped.spec import PipelineSpec, canonical, version_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from mlpiped.backends.base import Handle, Job

pytestmark = pytest.mark.anyio
WHERE = {"file": "p.py", "line": 1}


class QuickClock(SystemClock):
    """Pauses take no time."""

    async def sleep(self, seconds: float) -> None:
        await anyio.lowlevel.checkpoint()


class Lab:
    def __init__(self, ledger: Ledger, folder: Path) -> None:
        prints = Fingerprinter(ledger, moves.put_stat_cache)
        self.ledger, self.folder = ledger, folder
        self.world = World(ledger, prints, CodeReader(prints, folder), Store(folder, prints), {"lab": folder / "lab"})
        self.backend = FakeBackend()
        self.others: list[FakeBackend] = []
        self.clock = QuickClock()

    async def open(self, *steps: dict[str, Any]) -> Execution:
        plain = [{"where": WHERE, "arguments": [{"kind": "text", "text": "true"}], **step} for step in steps]
        spec = PipelineSpec.model_validate({"name": "p", "where": WHERE, "experiment": "p", "steps": plain})
        version = version_of(spec)
        await self.ledger.write(moves.save_definition(version, "p", canonical(spec), 1))
        event = Event("p", Cause(CauseKind.MANUAL))
        opening = moves.open_run(event, version=version, experiment="p", owner="a", tags={}, options={}, now=1)
        (number,) = await self.ledger.write(opening)
        self.graph = Graph(spec)
        return await self.execution(number)

    async def execution(self, number: int) -> Execution:
        """The walk of run `number`, as a daemon begins it that has just started."""
        row = await self.ledger.run(number)
        assert row is not None
        backends = {backend.name: backend for backend in (self.backend, *self.others)}
        places = [Place(name, 2) for name in backends]
        for place in places:
            place.offers(backends[place.name].capacity())
        dispatch = Dispatch(places, {}, None)
        found = Execution(row, self.graph, self.world, backends, self.clock, dispatch)
        dispatch.executions[number] = found
        return found

    async def step(self, execution: Execution, index: int = 0) -> StepRow:
        return (await self.ledger.steps(execution.id))[index]

    async def ends(self, execution: Execution, index: int = 0) -> list[AttemptEnd | None]:
        return [attempt.end for attempt in await self.ledger.attempts(execution.id, index)]


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    (tmp_path / "lab").mkdir()
    ledger = await Ledger.open(tmp_path, SystemClock())
    try:
        yield Lab(ledger, tmp_path)
    finally:
        await ledger.close()


async def test_steps_run_in_their_order_and_are_reused_by_the_next_run(lab: Lab) -> None:
    steps: list[dict[str, Any]] = [{"name": "a"}, {"name": "b", "after": ["a"], "salt": "2"}]
    first = await lab.open(*steps)
    assert await first.run() is RunOutcome.SUCCEEDED
    rows = await lab.ledger.steps(first.id)
    assert [(r.name, r.outcome, r.attempts) for r in rows] == [
        ("a", StepOutcome.SUCCEEDED, 1),
        ("b", StepOutcome.SUCCEEDED, 1),
    ]
    second = await lab.open(*steps)
    assert await second.run() is RunOutcome.SUCCEEDED
    assert [(r.outcome, r.reused_from) for r in await lab.ledger.steps(second.id)] == [
        (StepOutcome.REUSED, (first.id, "a")),
        (StepOutcome.REUSED, (first.id, "b")),
    ]


async def test_what_comes_after_a_failure_is_skipped_and_the_rest_runs(lab: Lab) -> None:
    lab.backend.exit_code = 3
    execution = await lab.open({"name": "a"}, {"name": "b", "after": ["a"]}, {"name": "c", "salt": "c"})
    assert await execution.run() is RunOutcome.FAILED
    rows = {row.name: row for row in await lab.ledger.steps(execution.id)}
    assert (rows["a"].outcome, rows["a"].why, rows["a"].exit_code) == (
        StepOutcome.FAILED,
        "exited with status 3 (it ran: has not succeeded before)",
        3,
    )
    assert (rows["b"].outcome, rows["b"].why) == (StepOutcome.SKIPPED, "`a` failed")
    assert rows["c"].attempts == 1


async def test_a_failure_is_never_reused(lab: Lab) -> None:
    lab.backend.exit_code = 1
    await (await lab.open({"name": "a"})).run()
    lab.backend.exit_code = 0
    again = await lab.open({"name": "a"})
    await again.run()
    assert (await lab.step(again)).outcome is StepOutcome.SUCCEEDED


async def test_a_failing_step_has_as_many_attempts_as_its_retry_allows(lab: Lab) -> None:
    lab.backend.exit_code = 1
    execution = await lab.open({"name": "a", "retry": {"attempts": 3, "delay": 0}})
    await execution.run()
    assert await lab.ends(execution) == [AttemptEnd.FAILED] * 3
    assert (await lab.step(execution)).attempts == 3


async def test_a_lost_attempt_is_run_again_under_a_new_token_and_costs_no_retry(lab: Lab) -> None:
    class OnceLost(FakeBackend):
        async def submit(self, job: Job) -> Handle:
            self.lose_after = -1 if job.env["MLPIPED_ATTEMPT"] == "1" else None
            return await super().submit(job)

    lab.backend = OnceLost()
    execution = await lab.open({"name": "a"})
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.LOST, AttemptEnd.COMMITTED]
    tokens = {attempt.token for attempt in await lab.ledger.attempts(execution.id, 0)}
    assert len(tokens) == 2


@pytest.mark.parametrize(("fields", "times"), [({}, LOST_LIMIT + 1), ({"effect": True}, 1)])
async def test_a_step_that_is_lost_again_and_again_ends_as_lost(lab: Lab, fields: dict[str, Any], times: int) -> None:
    lab.backend.run_for, lab.backend.lose_after = 9.0, 0
    execution = await lab.open({"name": "a", **fields})
    assert await execution.run() is RunOutcome.FAILED
    assert (await lab.step(execution)).outcome is StepOutcome.LOST
    assert await lab.ends(execution) == [AttemptEnd.LOST] * times


async def test_a_submit_without_an_answer_is_fenced_before_it_is_made_again(lab: Lab) -> None:
    lab.backend.unavailable_for = 2  # the submit, and the first try to fence
    execution = await lab.open({"name": "a"})
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.NEVER_RAN, AttemptEnd.COMMITTED]
    assert (await lab.step(execution)).attempts == 1


async def test_a_submit_that_failed_aloud_but_started_is_adopted(lab: Lab) -> None:
    class Liar(FakeBackend):
        async def submit(self, job: Job) -> Handle:
            await super().submit(job)
            self.unavailable_for = 1
            await self._call()
            raise AssertionError

    lab.backend = Liar()
    execution = await lab.open({"name": "a"})
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]


async def test_a_query_that_failed_is_no_answer(lab: Lab) -> None:
    class Deaf(FakeBackend):
        async def wait(self, handle: Handle) -> Any:
            if not hasattr(self, "asked"):
                self.asked, self.unavailable_for = True, 3
            return await super().wait(handle)

    lab.backend = Deaf()
    execution = await lab.open({"name": "a"})
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]


MAKES = {"outputs": [{"name": "model", "output_kind": "file", "file_name": "model.bin"}]}


class Faraway(FakeBackend):
    """What its steps made has to come home, and the first `silent` times that goes wrong; None: always."""

    def __init__(self, folder: Path, silent: int | None) -> None:
        super().__init__()
        self.folder, self.silent, self.asked = folder, silent, 0

    async def fetch(self, handle: Handle, into: Path) -> Path:
        self.asked += 1
        self.unavailable_for = int(self.silent is None or self.asked <= self.silent)
        await self._call()
        made = self.folder / "job" / "out" / "model"
        made.mkdir(parents=True)
        (made / "model.bin").write_text("made")
        return self.folder / "job"


async def test_H2_outputs_that_cannot_be_brought_home_now_are_asked_for_again(lab: Lab) -> None:
    lab.backend = far = Faraway(lab.folder, silent=3)
    execution = await lab.open({"name": "a", **MAKES})
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]
    assert far.asked == 4
    (made,) = await lab.ledger.outputs(execution.id, 0)
    assert made.size == len("made")


async def test_who_waits_for_outputs_says_why_and_can_be_cancelled(lab: Lab) -> None:
    lab.backend = far = Faraway(lab.folder, silent=None)
    execution = await lab.open({"name": "a", **MAKES})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        with anyio.fail_after(20):
            while far.asked < 3:
                await anyio.sleep(0.001)
            attempt = execution.tries[0].attempt
            assert attempt is not None
            assert attempt.held == "`fake` does not answer"
            await execution.cancel()
            await execution.over.wait()
    assert execution.outcome() is RunOutcome.CANCELLED
    assert await lab.ends(execution) == [AttemptEnd.CANCELLED]


async def test_a_cancel_that_did_not_get_through_is_sent_when_the_backend_answers_again(lab: Lab) -> None:
    lab.backend.run_for = 3600
    execution = await lab.open({"name": "a"})
    async with running(lab, execution, "a") as told:
        lab.backend.unavailable_for = 3
        with anyio.fail_after(20):
            await execution.cancel()
            await execution.over.wait()
    assert told["outcome"] is RunOutcome.CANCELLED
    assert await lab.ends(execution) == [AttemptEnd.CANCELLED]


@asynccontextmanager
async def running(lab: Lab, execution: Execution, *names: str) -> AsyncIterator[dict[str, RunOutcome]]:
    """The run, from when its steps `names` run until it has ended."""
    told: dict[str, RunOutcome] = {}

    async def run() -> None:
        told["outcome"] = await execution.run()

    with lab.ledger.subscribe() as events:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            missing = len(names)
            async for rows in events:
                missing -= sum(row.kind == "step.running" for row in rows)
                if missing <= 0:
                    break
            yield told


async def test_cancel_ends_what_runs_and_what_waits(lab: Lab) -> None:
    lab.backend.run_for = 3600
    execution = await lab.open({"name": "a"}, {"name": "b", "after": ["a"]})
    async with running(lab, execution, "a") as told:
        await execution.cancel()
    assert told["outcome"] is RunOutcome.CANCELLED
    assert [row.outcome for row in await lab.ledger.steps(execution.id)] == [StepOutcome.CANCELLED] * 2
    row = await lab.ledger.run(execution.id)
    assert row is not None
    assert row.options["cancelled"] is True


async def begun(lab: Lab, *, submitted: bool) -> tuple[Execution, str]:
    """A run whose daemon died after the intent of its only step, or after the submit."""
    execution = await lab.open({"name": "a"})
    await lab.ledger.write(moves.start_run(execution.id, 2))
    decided = await execution.facts.decide(execution.plan, [0])
    facts, token = execution.facts.steps[0], f"mlp-{execution.id}-0-1-abc"
    rows = [StepRow(0, "a", StepState.QUEUED, None, decided[0].why, key=facts.key)]
    await lab.ledger.write(
        moves.add_steps(execution.id, rows, 2),
        moves.intent(execution.id, 0, token, 1, "fake", facts.key, json.dumps(facts.parts), 3),
    )
    if submitted:
        lab.backend.world[token] = [0.0, Exited(0), anyio.Event()]
    return await lab.execution(execution.id), token


async def test_a_restart_after_the_intent_alone_fences_it_and_runs_the_step_once(lab: Lab) -> None:
    execution, token = await begun(lab, submitted=False)
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.NEVER_RAN, AttemptEnd.COMMITTED]
    assert lab.backend.world[token] is None


async def test_a_restart_after_the_submit_adopts_it(lab: Lab) -> None:
    execution, token = await begun(lab, submitted=True)
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]
    assert list(lab.backend.world) == [token]


async def test_a_restart_goes_on_behind_what_is_finished(lab: Lab) -> None:
    execution = await lab.open({"name": "a"}, {"name": "b", "after": ["a"], "salt": "b"})
    lab.backend.run_for = 3600
    async with anyio.create_task_group() as tasks:
        with lab.ledger.subscribe() as events:
            tasks.start_soon(execution.run)
            async for rows in events:
                if any(row.kind == "step.running" for row in rows):
                    break
        tasks.cancel_scope.cancel()
    for entry in lab.backend.world.values():
        assert entry is not None
        entry[0] = 0.0
    lab.backend.run_for = 0
    assert await (await lab.execution(execution.id)).run() is RunOutcome.SUCCEEDED
    rows = await lab.ledger.steps(execution.id)
    assert [(row.name, row.outcome, row.attempts) for row in rows] == [
        ("a", StepOutcome.SUCCEEDED, 1),
        ("b", StepOutcome.SUCCEEDED, 1),
    ]


async def cut_short(lab: Lab, turns: int) -> bool:
    """A run that is cancelled after so many turns of the loop, and gone on with by the next daemon. False: it was over.

    Each step must have been started by one token, and be committed once.
    """
    execution = await lab.open({"name": "a", "salt": f"a{turns}"}, {"name": "b", "after": ["a"], "salt": f"b{turns}"})
    walk = asyncio.create_task(execution.run())
    for _ in range(turns):
        await asyncio.sleep(0)
        if walk.done():
            break
    walk.cancel()
    (ended,) = await asyncio.gather(walk, return_exceptions=True)
    assert not isinstance(ended, Exception), ended
    if isinstance(ended, asyncio.CancelledError):
        await lab.ledger.write(lambda c: None)  # a daemon that ends writes what was posted
        if execution.id in {row.id for row in await lab.ledger.unfinished_runs()}:
            with anyio.fail_after(20):
                assert await (await lab.execution(execution.id)).run() is RunOutcome.SUCCEEDED
    mine = [token for token, entry in lab.backend.world.items() if entry and token.startswith(f"mlp-{execution.id}-")]
    assert sorted(token.split("-")[2] for token in mine) == ["0", "1"], mine
    for index in (0, 1):
        assert (await lab.ends(execution, index)).count(AttemptEnd.COMMITTED) == 1
    return isinstance(ended, asyncio.CancelledError)


async def test_C8_a_run_that_is_cancelled_at_any_await_goes_on_from_the_ledger_and_starts_each_step_once(
    lab: Lab,
) -> None:
    chance, turns, over = random.Random(8), 0, 0
    while over < 3:
        over += not await cut_short(lab, turns)
        turns += 1 if turns < 60 else chance.randint(1, 12)
    assert turns > 60


def reading(path: str, **fields: Any) -> dict[str, Any]:
    source = {"kind": "reference", "datastore": "lab", "path": path, "glob": "*" in path}
    arguments: Sequence[Any] = [{"kind": "text", "text": "cat"}, {"kind": "input", "port": "data"}]
    return {"name": "a", "arguments": arguments, "inputs": [{"name": "data", "source": source}], **fields}


class Meddler(FakeBackend):
    """Changes a file while each of its first `times` jobs runs."""

    def __init__(self, path: Path, times: int) -> None:
        super().__init__()
        self.path, self.times = path, times

    async def submit(self, job: Job) -> Handle:
        handle = await super().submit(job)
        if self.times:
            self.times -= 1
            self.path.write_text(f"changed {self.times}")
        return handle


async def test_a_step_whose_input_changed_while_it_ran_is_run_again_on_what_is_there_now(lab: Lab) -> None:
    path = lab.folder / "lab" / "x.csv"
    path.write_text("1")
    lab.backend = Meddler(path, 1)
    execution = await lab.open(reading("x.csv"))
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.TAINTED, AttemptEnd.COMMITTED]
    first, second = await lab.ledger.attempts(execution.id, 0)
    assert first.key != second.key
    assert await lab.ledger.results([first.key]) == {}


async def test_a_step_whose_input_never_holds_still_fails_and_says_so(lab: Lab) -> None:
    path = lab.folder / "lab" / "x.csv"
    path.write_text("1")
    lab.backend = Meddler(path, 99)
    execution = await lab.open(reading("x.csv"))
    assert await execution.run() is RunOutcome.FAILED
    assert await lab.ends(execution) == [AttemptEnd.TAINTED] * (TAINTED_LIMIT + 1)
    assert (await lab.step(execution)).why.startswith("its inputs kept changing while it ran")


async def test_a_file_that_arrives_while_a_step_reads_the_others_does_not_taint_it(lab: Lab) -> None:
    (lab.folder / "lab" / "1.csv").write_text("1")
    lab.backend = Meddler(lab.folder / "lab" / "2.csv", 1)
    execution = await lab.open(reading("*.csv"))
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]


async def test_an_input_that_is_not_there_fails_the_step_with_a_sentence(lab: Lab) -> None:
    execution = await lab.open(reading("none/*.csv"))
    assert await execution.run() is RunOutcome.FAILED
    row = await lab.step(execution)
    assert (row.outcome, row.attempts) == (StepOutcome.FAILED, 0)
    assert "none/*.csv" in row.why


async def test_an_unknown_datastore_fails_the_step_with_a_sentence(lab: Lab) -> None:
    step = reading("x.csv")
    step["inputs"][0]["source"]["datastore"] = "gone"
    execution = await lab.open(step)
    assert await execution.run() is RunOutcome.FAILED
    assert "no datastore named `gone` in the config" in (await lab.step(execution)).why


async def test_F3_a_step_whose_datastore_is_away_is_held_and_runs_when_it_is_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpiped.execution.run.AWAY_PAUSE", 0.01)
    place = lab.folder / "lab"
    place.rmdir()
    execution = await lab.open(reading("x.csv"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        with anyio.fail_after(20):
            while not (execution.tries and execution.tries[0].held):
                await anyio.sleep(0.001)
            assert f"the datastore's folder `{place}` is not there" in (execution.tries[0].held or "")
            place.mkdir()
            (place / "x.csv").write_text("1")
            await execution.over.wait()
    assert execution.outcome() is RunOutcome.SUCCEEDED


async def test_F3_a_run_that_waits_for_a_datastore_can_be_cancelled(lab: Lab) -> None:
    (lab.folder / "lab").rmdir()
    execution = await lab.open(reading("x.csv"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        with anyio.fail_after(20):
            while not (execution.tries and execution.tries[0].held):
                await anyio.sleep(0.001)
            await execution.cancel()
            await execution.over.wait()
    assert execution.outcome() is RunOutcome.CANCELLED


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE])
async def test_C2_an_output_that_cannot_be_kept_just_now_is_kept_later_and_nothing_runs_twice(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    lab.backend = Faraway(lab.folder, silent=0)
    tried, collect = [], lab.world.store.collect

    async def full(*args: Any) -> Any:
        tried.append(args)
        if len(tried) <= 4:
            raise OSError(code, os.strerror(code))
        return await collect(*args)

    monkeypatch.setattr(lab.world.store, "collect", full)
    execution = await lab.open({"name": "a", **MAKES})
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]


async def scripted(lab: Lab) -> tuple[Execution, Path]:
    """A run of one script, and that script."""
    source = lab.folder / "src"
    source.mkdir()
    script = source / "say.py"
    script.write_text("print(0)\n")
    words = {"directory": str(source), "mode": "tree", "script": "say.py"}
    return await lab.open({"name": "a", "source": words}), script


@pytest.mark.parametrize(("times", "outcome"), [(2, RunOutcome.SUCCEEDED), (99, RunOutcome.FAILED)])
async def test_code_that_is_edited_just_before_its_step_begins_is_looked_at_again_but_not_for_ever(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, times: int, outcome: RunOutcome
) -> None:
    execution, script = await scripted(lab)
    snapshot, edits = lab.world.code.snapshot, itertools.count(1)

    async def edited(source: Any, fact: Any) -> Path:
        if (number := next(edits)) <= times:
            script.write_text(f"print({number})\n")
        return await snapshot(source, fact)

    monkeypatch.setattr(lab.world.code, "snapshot", edited)
    assert await execution.run() is outcome
    row = await lab.step(execution)
    if outcome is RunOutcome.FAILED:
        assert "changed while it was read" in row.why
    else:
        assert (row.attempts, await lab.ends(execution)) == (1, [AttemptEnd.COMMITTED])


async def test_C2_code_that_cannot_be_copied_just_now_is_copied_later(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution, _ = await scripted(lab)
    snapshot, tried = lab.world.code.snapshot, []

    async def full(source: Any, fact: Any) -> Path:
        tried.append(fact)
        if len(tried) < 5:
            raise StorageAway("its code cannot be copied: no space left on device")
        return await snapshot(source, fact)

    monkeypatch.setattr(lab.world.code, "snapshot", full)
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]


async def test_a_step_costs_two_group_commits_and_no_more(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "TELL", 3600.0)  # what a busy machine may tell besides holds nobody up
    costs = []
    for count in (5, 25):
        names = [f"{count}-{i}" for i in range(count)]
        before = {name: [above] for above, name in itertools.pairwise(names)}
        execution = await lab.open(*({"name": name, "salt": name, "after": before.get(name, [])} for name in names))
        commits = lab.ledger.commits
        assert await execution.run() is RunOutcome.SUCCEEDED
        costs.append(lab.ledger.commits - commits)
    assert costs[1] - costs[0] <= 2 * 20, costs


async def test_why_a_step_ran_is_still_known_after_it_was_tried_again(lab: Lab) -> None:
    class OnceFailing(FakeBackend):
        async def submit(self, job: Job) -> Handle:
            self.exit_code = 1 if job.env["MLPIPED_ATTEMPT"] == "1" else 0
            return await super().submit(job)

    lab.backend = OnceFailing()
    execution = await lab.open({"name": "a", "retry": {"attempts": 2, "delay": 0}})
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert (await lab.step(execution)).why == "has not succeeded before"
    assert [a.reason for a in await lab.ledger.attempts(execution.id, 0)] == ["exited with status 1", None]


async def test_cancel_while_a_step_is_being_decided_starts_nothing(lab: Lab) -> None:
    execution = await lab.open({"name": "a"}, {"name": "b", "after": ["a"]})
    decide = execution.facts.decide

    async def decide_and_meanwhile(*asked: Any) -> Any:
        decisions = await decide(*asked)
        await execution.cancel()
        return decisions

    execution.facts.decide = decide_and_meanwhile  # type: ignore[method-assign]
    assert await execution.run() is RunOutcome.CANCELLED
    assert lab.backend.world == {}
    assert [row.outcome for row in await lab.ledger.steps(execution.id)] == [StepOutcome.CANCELLED] * 2


async def test_cancel_of_a_step_while_it_is_being_decided_ends_that_step_alone(lab: Lab) -> None:
    execution = await lab.open({"name": "a"}, {"name": "b", "salt": "b"})
    decide = execution.facts.decide

    async def decide_and_meanwhile(*asked: Any) -> Any:
        decisions = await decide(*asked)
        await execution.cancel(0)
        return decisions

    execution.facts.decide = decide_and_meanwhile  # type: ignore[method-assign]
    assert await execution.run() is RunOutcome.CANCELLED
    assert [row.outcome for row in await lab.ledger.steps(execution.id)] == [
        StepOutcome.CANCELLED,
        StepOutcome.SUCCEEDED,
    ]


# --- who gets ready before its turn -----------------------------------------------------------------------------------
class Dwindling(FakeBackend):
    """Its first job is over at once, and all others last for an hour, or until `let_go`."""

    async def submit(self, job: Job) -> Handle:
        self.run_for = 0.0 if job.token.split("-")[2] == "0" else 3600.0
        return await super().submit(job)

    def let_go(self) -> None:
        for entry in self.world.values():
            if entry is not None:
                entry[0] = 0.0
                entry[2].set()


async def until_intents(lab: Lab, execution: Execution, count: int) -> None:
    with lab.ledger.subscribe(kinds=("attempt.intent",)) as events:
        async for rows in events:
            count -= len(rows)
            if count <= 0:
                return
    raise AssertionError


@pytest.fixture
def dwindling(lab: Lab) -> Dwindling:
    backend = lab.backend = Dwindling()
    return backend


STEPS = [{"name": f"s{n}", "salt": str(n)} for n in range(6)]


async def test_an_intent_whose_turn_does_not_come_is_taken_back_and_costs_no_attempt(
    lab: Lab, dwindling: Dwindling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "READY", 0.05)
    execution = await lab.open(*STEPS)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(until_intents, lab, execution, 6)
        tasks.start_soon(execution.run)
        with anyio.fail_after(20):
            while [await lab.ends(execution, index) for index in (3, 4, 5)] != [[AttemptEnd.NEVER_RAN]] * 3:
                await anyio.sleep(0.01)
        rows = await lab.ledger.steps(execution.id)
        assert [row.state for row in rows[3:]] == [StepState.QUEUED] * 3
        assert [row.attempts for row in rows[3:]] == [0] * 3
        dispatch = execution.dispatcher
        assert "2 slots, 2 in use" in (cast(Dispatch, dispatch).why_waiting(execution.id, 3) or "")
        assert len(dwindling.world) == 3, "nothing was submitted out of turn"
        while not execution.over.is_set():
            dwindling.let_go()
            await anyio.sleep(0.01)
    assert execution.outcome() is RunOutcome.SUCCEEDED
    assert (await lab.ends(execution, 5))[-1] is AttemptEnd.COMMITTED
    assert [row.attempts for row in await lab.ledger.steps(execution.id)] == [1] * 6


async def test_a_step_that_is_ready_and_cancelled_has_never_run_and_its_place_goes_to_the_next(
    lab: Lab, dwindling: Dwindling
) -> None:
    execution = await lab.open(*STEPS)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        await until_intents(lab, execution, 6)
        await execution.cancel(3)
        while not execution.over.is_set():
            dwindling.let_go()
            await anyio.sleep(0.01)
    assert await lab.ends(execution, 3) == [AttemptEnd.NEVER_RAN]
    outcomes = [row.outcome for row in await lab.ledger.steps(execution.id)]
    assert outcomes == [StepOutcome.CANCELLED if n == 3 else StepOutcome.SUCCEEDED for n in range(6)]


async def test_A2_intents_of_steps_whose_turn_had_not_come_are_fenced_after_a_restart_and_run_once(
    lab: Lab, dwindling: Dwindling
) -> None:
    execution = await lab.open(*STEPS)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        await until_intents(lab, execution, 6)
        tasks.cancel_scope.cancel()
    dwindling.let_go()
    again = await lab.execution(execution.id)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again.run)
        while not again.over.is_set():
            dwindling.let_go()
            await anyio.sleep(0.01)
    assert again.outcome() is RunOutcome.SUCCEEDED
    for index in (3, 4, 5):
        ends = await lab.ends(again, index)
        assert ends == [AttemptEnd.NEVER_RAN, AttemptEnd.COMMITTED]
    started = [token.split("-")[2] for token, entry in dwindling.world.items() if entry is not None]
    assert sorted(started) == sorted({*started})
