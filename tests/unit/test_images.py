"""Steps in containers: when their image is asked for, what is kept of the answer, and what waits when there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from test_run import Lab, lab, reading

from mlpiped import inquiry
from mlpiped.backends.base import Capacity, Image
from mlpiped.backends.fake import FakeBackend
from mlpiped.errors import BackendUnavailable, InvalidJob
from mlpiped.execution.facts import World
from mlpiped.execution.images import Finder, Wanted
from mlpiped.model import AttemptEnd, RunOutcome, StepOutcome

if TYPE_CHECKING:
    from mlpiped.backends.base import Handle, Job
    from mlpiped.execution.run import Execution

__all__ = ["lab"]
pytestmark = pytest.mark.anyio
ONE, TWO = (Image(f"sha256:{digit * 64}", f"sha256:{digit * 64}") for digit in "12")


class Recorder(FakeBackend):
    def __init__(self, name: str = "fake") -> None:
        super().__init__(name)
        self.jobs: list[Job] = []

    async def submit(self, job: Job) -> Handle:
        self.jobs.append(job)
        return await super().submit(job)


class Engine(Recorder):
    """Knows the images of `shelf`, by tag or by the text of a Dockerfile."""

    def __init__(self, name: str = "box", shelf: dict[str, Image] | None = None) -> None:
        super().__init__(name)
        self.shelf = {"app:latest": ONE} if shelf is None else shelf
        self.asked: list[str] = []
        self.pulled: anyio.Event | None = None  # a look-up lasts until then

    def capacity(self) -> Capacity:
        return Capacity(self.slots, images=True)

    async def image(self, reference: str | None, dockerfile: str | None) -> Image:
        name = reference or dockerfile or ""
        self.asked.append(name)
        await self._call()
        if self.pulled is not None:
            await self.pulled.wait()
        if name not in self.shelf:
            raise InvalidJob(f"no such image: {name}")
        return self.shelf[name]


@pytest.fixture
def engine(lab: Lab) -> Engine:
    """A box for containers, beside a compute that runs none."""
    box = Engine()
    lab.others = [box]
    w, finder = lab.world, Finder({"box": box}, {})
    lab.world = World(w.ledger, w.fingerprinter, w.code, w.store, w.datastores, finder)
    return box


def contained(name: str = "a", image: str = "app:latest", **more: Any) -> dict[str, Any]:
    return {"name": name, "environment": {"image": image}, **more}


async def why(lab: Lab, execution: Execution) -> str:
    return (await lab.step(execution)).why


# --- what is asked, and what it is good for ---------------------------------------------------------------------
async def test_the_attempt_runs_the_digest_that_is_in_the_key(lab: Lab, engine: Engine) -> None:
    engine.shelf["app:latest"] = Image("sha256:identity", "sha256:run")
    resources = {"network": True, "shm_size": 1 << 30, "gpu_memory": None}
    execution = await lab.open(contained(resources=resources))
    assert await execution.run() is RunOutcome.SUCCEEDED
    (job,) = engine.jobs
    assert (job.image, job.network, job.shm_size) == ("sha256:run", True, 1 << 30)
    (attempt,) = await lab.ledger.attempts(execution.id, 0)
    parts = await lab.ledger.parts(attempt.key)
    assert parts is not None
    assert '"environment": {"image": "sha256:identity"}' in parts and '"run": "sha256:run"' in parts


async def test_a_step_without_an_image_asks_no_engine(lab: Lab, engine: Engine) -> None:
    plain = lab.backend = Recorder()
    assert await (await lab.open({"name": "a"})).run() is RunOutcome.SUCCEEDED
    assert (engine.asked, plain.jobs[0].image) == ([], None)


async def test_a_tag_that_means_the_same_is_reused_and_one_that_moved_runs_and_says_so(
    lab: Lab, engine: Engine
) -> None:
    await (await lab.open(contained())).run()
    again = await lab.open(contained())
    await again.run()
    assert (await lab.step(again)).outcome is StepOutcome.REUSED
    engine.shelf["app:latest"] = TWO
    moved = await lab.open(contained())
    await moved.run()
    assert await why(lab, moved) == "environment: image app:latest is now sha256:222222222222"
    renamed = await lab.open(contained(image="app:2"))
    engine.shelf["app:2"] = TWO
    await renamed.run()
    assert (await lab.step(renamed)).outcome is StepOutcome.REUSED


async def test_a_run_asks_once_for_all_its_steps_with_the_same_image(lab: Lab, engine: Engine) -> None:
    steps = [contained(f"s{n}", salt=str(n)) for n in range(20)] + [contained("late", after=["s0"], salt="late")]
    assert await (await lab.open(*steps)).run() is RunOutcome.SUCCEEDED
    assert engine.asked == ["app:latest"]
    assert len(engine.jobs) == 21


async def test_I7_image_tag_moved_between_retries_runs_the_recorded_digest(lab: Lab, engine: Engine) -> None:
    class Retagged(Engine):
        async def submit(self, job: Job) -> Handle:
            self.exit_code = 1 if job.env["MLPIPED_ATTEMPT"] == "1" else 0
            self.shelf["app:latest"] = TWO
            return await super().submit(job)

    engine.__class__ = Retagged
    execution = await lab.open(contained(retry={"attempts": 2, "delay": 0}))
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert [job.image for job in engine.jobs] == [ONE.run, ONE.run]
    first, second = await lab.ledger.attempts(execution.id, 0)
    assert first.key == second.key


async def test_I7_image_tag_moved_while_the_daemon_was_down_changes_no_retry(lab: Lab, engine: Engine) -> None:
    engine.exit_code = 1
    execution = await lab.open(contained(retry={"attempts": 2, "delay": 1}))
    async with anyio.create_task_group() as tasks:
        with lab.ledger.subscribe() as events:
            tasks.start_soon(execution.run)
            async for rows in events:
                if any(row.kind == "attempt.ended" for row in rows):
                    break
        tasks.cancel_scope.cancel()
    engine.exit_code, engine.shelf["app:latest"] = 0, TWO
    assert await (await lab.execution(execution.id)).run() is RunOutcome.SUCCEEDED
    assert [job.image for job in engine.jobs] == [ONE.run, ONE.run]


# --- when it cannot be told -------------------------------------------------------------------------------------
async def test_an_image_that_does_not_exist_fails_the_step_with_the_engines_words(lab: Lab, engine: Engine) -> None:
    execution = await lab.open(contained(image="app:none", retry={"attempts": 3}), {"name": "b", "salt": "b"})
    assert await execution.run() is RunOutcome.FAILED
    a, b = await lab.ledger.steps(execution.id)
    assert (a.outcome, a.attempts, b.outcome) == (StepOutcome.FAILED, 0, StepOutcome.SUCCEEDED)
    assert a.why == "image `app:none`: no such image: app:none"


async def test_a_step_whose_engine_is_away_is_held_with_its_reason_and_goes_on_by_itself(
    lab: Lab, engine: Engine
) -> None:
    held: list[str | None] = []
    sleep = lab.clock.sleep

    async def look(seconds: float) -> None:
        held.append(execution.tries[0].held)
        await sleep(seconds)

    lab.clock.sleep = look  # type: ignore[method-assign]
    engine.unavailable_for = 3
    execution = await lab.open(contained())
    assert await execution.run() is RunOutcome.SUCCEEDED
    assert held == ["image `app:latest`: box: `box` does not answer"] * 3
    assert await lab.ends(execution) == [AttemptEnd.COMMITTED]


async def test_other_steps_go_on_while_an_image_is_pulled(lab: Lab, engine: Engine) -> None:
    engine.pulled = anyio.Event()
    steps = [contained(), {"name": "b", "salt": "b"}, {"name": "c", "salt": "c", "after": ["b"]}]
    execution = await lab.open(*steps)
    async with anyio.create_task_group() as tasks:
        with lab.ledger.subscribe() as events:
            tasks.start_soon(execution.run)
            async for _ in events:
                if execution.plan.outcome[2] is not None:
                    break
        assert execution.plan.outcome[0] is None
        assert execution.tries[0].held == "image `app:latest` is looked up"
        engine.pulled.set()
    assert execution.outcome() is RunOutcome.SUCCEEDED


@pytest.mark.parametrize("whole", [True, False])
async def test_cancel_does_not_wait_for_an_image_that_is_being_pulled(lab: Lab, engine: Engine, whole: bool) -> None:
    engine.pulled = anyio.Event()
    execution = await lab.open(contained())
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(execution.run)
            while not engine.asked:
                await anyio.lowlevel.checkpoint()
            await execution.cancel(None if whole else 0)
    assert (await lab.step(execution)).outcome is StepOutcome.CANCELLED
    assert engine.jobs == []


async def test_without_a_compute_for_containers_the_step_fails_with_a_sentence(lab: Lab) -> None:
    execution = await lab.open(contained())
    assert await execution.run() is RunOutcome.FAILED
    assert await why(lab, execution) == "image `app:latest`: no compute of the config runs containers"


# --- plan -------------------------------------------------------------------------------------------------------
async def planned(lab: Lab, execution: Execution) -> list[tuple[str, str]]:
    answer = await inquiry.plan(lab.world, execution.graph.spec, {}, False, None)
    return [(step["action"], step["why"]) for step in answer["steps"]]


async def test_a_plan_knows_images_too(lab: Lab, engine: Engine) -> None:
    execution = await lab.open(contained(), contained("b", after=["a"], salt="b"))
    assert (await planned(lab, execution))[0] == ("run", "has not succeeded before")
    await execution.run()
    engine.asked.clear()
    assert await planned(lab, execution) == [("reuse", f"reused from run {execution.id}")] * 2
    assert engine.asked == ["app:latest"]


async def test_a_plan_says_what_it_cannot_know(lab: Lab, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    execution = await lab.open(contained(), contained("b", after=["a"]))
    engine.unavailable_for = 1
    later = ("unknown", "depends on what `a` will make")
    assert await planned(lab, execution) == [("unknown", "image `app:latest`: box: `box` does not answer"), later]
    engine.pulled = anyio.Event()
    monkeypatch.setattr(inquiry, "LOOK_UP_LIMIT", 0.01)
    assert await planned(lab, execution) == [("unknown", "image `app:latest` is looked up"), later]


# --- which engine is asked --------------------------------------------------------------------------------------
async def found(engines: list[FakeBackend], *computes: str, pools: dict[str, list[str]] | None = None) -> str:
    finder = Finder({engine.name: engine for engine in engines}, pools or {})
    try:
        return (await finder(Wanted("app:latest", None, computes))).run
    except (InvalidJob, BackendUnavailable) as fault:
        return f"{type(fault).__name__}: {fault.message}"


async def test_engines_are_asked_in_the_steps_order_of_preference() -> None:
    def engines() -> list[FakeBackend]:
        return [FakeBackend("local"), Engine("one", {"app:latest": ONE}), Engine("two", {"app:latest": TWO})]

    assert await found(engines()) == ONE.run
    assert await found(engines(), "two", "one") == TWO.run
    assert await found(engines(), "any", pools={"any": ["local", "two"]}) == TWO.run
    assert await found(engines(), "local") == "InvalidJob: no compute of `local` runs containers"
    assert await found([FakeBackend("local")]) == "InvalidJob: no compute of the config runs containers"


async def test_an_image_is_absent_only_when_every_engine_has_said_so() -> None:
    bare, full, away = Engine("bare", {}), Engine("full"), Engine("away")
    away.unavailable_for = 9
    assert await found([bare, full]) == ONE.run
    assert await found([away, full]) == ONE.run
    assert await found([bare, away]) == "BackendUnavailable: away: `away` does not answer"
    assert await found([bare]) == "InvalidJob: no such image: app:latest"


# --- what is there already --------------------------------------------------------------------------------------
async def test_a_job_names_the_content_of_each_of_its_inputs(lab: Lab) -> None:
    backend = lab.backend = Recorder()
    folder = lab.folder / "lab"
    (folder / "tree").mkdir()
    for name in ("1.csv", "2.csv", "tree/x"):
        (folder / name).write_text(name)
    for path in ("1.csv", "*.csv", "tree", "tr*"):
        await (await lab.open(reading(path, salt=path))).run()
    one, glob, tree, trees = (job.contents for job in backend.jobs)
    assert list(one) == [str(folder / "1.csv")] and list(glob) == [str(folder / "1.csv"), str(folder / "2.csv")]
    assert one[str(folder / "1.csv")] == glob[str(folder / "1.csv")] != glob[str(folder / "2.csv")]
    assert list(tree) == [str(folder / "tree")] and tree == trees
    assert all(digest.startswith("b3:") for digest in glob.values())
    assert tree[str(folder / "tree")].startswith("b3t:")
