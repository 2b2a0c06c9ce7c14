"""Computes that fall ill: one event an incident, growing pauses, steps that go elsewhere, and back again by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from test_run import Lab, QuickClock

from mlpiped.backends.base import Capacity, Card, Handle, Job
from mlpiped.backends.fake import FakeBackend
from mlpiped.clock import SystemClock
from mlpiped.errors import BackendUnavailable, UnknownName
from mlpiped.execution.run import Execution
from mlpiped.ledger import Ledger
from mlpiped.model import RunOutcome
from mlpiped.placement.breaker import FIRST_PAUSE, LONGEST_PAUSE, LOOK, SPREAD, SUBMITS, Breaker
from mlpiped.placement.decide import Place
from mlpiped.scheduling.dispatch import Dispatch
from mlpiped.scheduling.hosts import Hosts

pytestmark = pytest.mark.anyio


# --- the circuit ------------------------------------------------------------------------------------------------
def breaker(random: float = 0.5) -> Breaker:
    return Breaker(lambda: random)


async def test_an_incident_begins_once_and_ends_once_however_often_it_is_looked_at() -> None:
    it = breaker()
    assert it.looked(None) is False
    assert [it.looked("no route") for _ in range(5)] == [True, False, False, False, False]
    assert it.looked("another sentence") is False and it.why == "another sentence"
    assert [it.looked(None) for _ in range(3)] == [True, False, False]


async def test_H5_pauses_grow_to_a_limit_are_spread_and_are_short_again_after_it() -> None:
    it = breaker()
    assert it.pause() == LOOK
    pauses = []
    for _ in range(12):
        it.looked("no route")
        pauses.append(it.pause())
    assert pauses[:4] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE
    for random, factor in ((0.0, 1 - SPREAD), (1.0, 1 + SPREAD)):
        it.random = lambda random=random: random  # type: ignore[misc]
        assert it.pause() == pytest.approx(LONGEST_PAUSE * factor)
    it.looked(None)
    it.looked("again")
    it.random = lambda: 0.5
    assert it.pause() == FIRST_PAUSE


async def test_a_compute_that_is_well_and_takes_no_submit_is_rested_and_tried_with_one() -> None:
    it = breaker()
    assert [it.refused("no space for a container") for _ in range(SUBMITS)] == [False] * (SUBMITS - 1) + [True]
    assert it.why == "no space for a container"
    assert it.looked(None) is False and it.why is None and it.incident  # once more, in the same incident
    assert it.refused("no space for a container") is False and it.why is not None
    assert it.pause() == 2 * FIRST_PAUSE
    it.looked(None)
    assert it.took() is True and not it.incident
    assert it.refused("a hiccup") is False and it.why is None


# --- computes ---------------------------------------------------------------------------------------------------
class Ill(FakeBackend):
    """`sentence`: what it says of itself while it is set; `refuses`: so many submits are not taken."""

    sentence: str | None = None
    refuses = 0
    cards: tuple[Card, ...] = ()
    submitted = 0

    async def health(self) -> str | None:
        await anyio.lowlevel.checkpoint()
        return self.sentence

    async def submit(self, job: Job) -> Handle:
        self.submitted += 1
        if self.sentence is not None or self.refuses:
            self.refuses = max(0, self.refuses - 1)
            raise BackendUnavailable(self.sentence or "it takes nothing")
        self.gpus = job.gpus
        return await super().submit(job)

    def capacity(self) -> Capacity:
        return Capacity(self.slots, cards=self.cards)


class Computes(Lab):
    """Two of them, gpu1 preferred."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        super().__init__(ledger, folder)
        self.begin()

    def begin(self) -> None:
        """As a daemon begins."""
        self.one, self.two = Ill("gpu1"), Ill("gpu2")
        backends = {"gpu1": self.one, "gpu2": self.two}
        self.dispatch = Dispatch([Place("gpu1", 2), Place("gpu2", 2)], {}, None, self.clock.now)
        self.hosts = Hosts(backends, self.dispatch, self.ledger, self.clock, self._started)
        self.dispatch.on_unavailable, self.dispatch.on_taken = self.hosts.unavailable, self.hosts.took
        self.dispatch.on_answered = self.hosts.answered

    async def _started(self, backend: Any) -> None:
        await anyio.lowlevel.checkpoint()

    async def execution(self, number: int) -> Execution:
        row = await self.ledger.run(number)
        assert row is not None
        found = Execution(row, self.graph, self.world, self.hosts.backends, self.clock, self.dispatch)
        self.dispatch.executions[number] = found
        return found

    async def events(self) -> list[tuple[str, str]]:
        await self.ledger.write(lambda c: None)  # with all that was posted
        found = await self.ledger.events()
        return [(event.kind, event.facts["compute"]) for event in found if event.kind.startswith("compute.")]


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Computes]:
    (tmp_path / "lab").mkdir()
    ledger = await Ledger.open(tmp_path, SystemClock())
    try:
        yield Computes(ledger, tmp_path)
    finally:
        await ledger.close()


ON_EITHER = {"name": "a", "compute": ["gpu1", "gpu2"]}


async def test_a_step_whose_submit_was_not_taken_is_fenced_and_goes_elsewhere(lab: Computes) -> None:
    lab.one.sentence = "no route to host"
    execution = await lab.open(ON_EITHER)
    async with anyio.create_task_group() as tasks:
        lab.hosts.watch(tasks)
        with anyio.fail_after(20):
            assert await execution.run() is RunOutcome.SUCCEEDED
        tasks.cancel_scope.cancel()
    attempts = await lab.ledger.attempts(execution.id, 0)
    assert attempts[-1].compute == "gpu2"
    assert all(lab.one.world[a.token] is None for a in attempts if a.compute == "gpu1"), "a token that was not fenced"
    assert await lab.events() == [("compute.unwell", "gpu1")]


async def test_who_waits_is_told_since_when_and_why_and_goes_on_when_it_is_well(lab: Computes) -> None:
    lab.one.sentence = "no route to host"
    await lab.hosts.look("gpu1")
    execution = await lab.open({"name": "a", "compute": ["gpu1"]})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        while (said := lab.dispatch.why_waiting(execution.id, 0)) is None:
            await anyio.sleep(0.01)
        assert said.startswith("waits for a place: gpu1: no route to host (since ")
        assert lab.one.submitted == 0
        lab.one.sentence = None
        await lab.hosts.look("gpu1")
        with anyio.fail_after(20):
            await execution.over.wait()
    assert execution.outcome() is RunOutcome.SUCCEEDED
    assert await lab.events() == [("compute.unwell", "gpu1"), ("compute.well", "gpu1")]


async def test_a_compute_that_says_it_is_well_and_takes_nothing_is_one_incident(lab: Computes) -> None:
    class Slow(Ill):
        """No submit before it has been looked at after the last one, as pauses have it."""

        async def submit(self, job: Job) -> Handle:
            while lab.hosts._failed:
                await anyio.sleep(0.001)
            return await super().submit(job)

    lab.one.__class__ = Slow
    lab.one.refuses = SUBMITS + 2
    execution = await lab.open({"name": "a", "compute": ["gpu1"]})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        with anyio.fail_after(20):
            while not execution.over.is_set():
                await lab.hosts.look("gpu1")
                await anyio.sleep(0.005)
    assert execution.outcome() is RunOutcome.SUCCEEDED
    assert lab.one.submitted == SUBMITS + 3
    await lab.hosts.look("gpu1")
    assert await lab.events() == [("compute.unwell", "gpu1"), ("compute.well", "gpu1")]


class Deaf(Ill):
    """Nobody can be asked for a step's end while `sentence` is set."""

    waited = 0

    async def wait(self, handle: Handle) -> Any:
        self.waited += 1
        await anyio.lowlevel.checkpoint()
        if self.sentence is not None:
            raise BackendUnavailable(self.sentence)
        return await super().wait(handle)


class Patient(QuickClock):
    """A pause of an attempt takes no time while they are short, and no end of it when they are long."""

    async def sleep(self, seconds: float) -> None:
        await (anyio.sleep_forever() if seconds > 30 else anyio.lowlevel.checkpoint())


@pytest.fixture
async def held(lab: Computes) -> AsyncIterator[Execution]:
    """A run whose two steps are on gpu1, which is away: their pauses have grown long."""
    lab.one.__class__, lab.clock = Deaf, Patient()
    one = lab.one
    assert isinstance(one, Deaf)
    one.run_for = 0.0
    execution = await lab.open(*({"name": name, "compute": ["gpu1"], "salt": name} for name in "ab"))
    submit = one.submit

    async def and_away(job: Job) -> Handle:
        handle = await submit(job)
        one.sentence = "no route to host" if len(one.world) == 2 else None
        return handle

    one.submit = and_away  # type: ignore[method-assign]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        with anyio.fail_after(20):
            while len(one.world) < 2 or one.waited < 12:
                await anyio.sleep(0.001)
            await lab.hosts.look("gpu1")
        with anyio.fail_after(20):
            yield execution
        tasks.cancel_scope.cancel()


async def test_H2_steps_that_wait_for_a_compute_go_on_at_once_when_it_is_found_well(
    lab: Computes, held: Execution
) -> None:
    lab.one.sentence = None
    await lab.hosts.look("gpu1")
    await held.over.wait()
    assert held.outcome() is RunOutcome.SUCCEEDED


async def test_H2_who_gets_an_answer_first_has_the_others_go_on_too(lab: Computes, held: Execution) -> None:
    lab.one.sentence = None
    first = held.tries[0].attempt
    assert first is not None
    lab.hosts._soon["gpu1"] = anyio.Event()
    first.asking.well_again()
    await lab.hosts._soon["gpu1"].wait()
    await lab.hosts.look("gpu1")
    await held.over.wait()
    assert held.outcome() is RunOutcome.SUCCEEDED


async def test_an_incident_that_outlives_the_daemon_is_still_one(lab: Computes) -> None:
    lab.one.sentence = "no route to host"
    await lab.hosts.look("gpu1")
    since = lab.dispatch.places["gpu1"].unwell_since
    assert await lab.events() == [("compute.unwell", "gpu1")]
    lab.begin()
    lab.one.sentence = "no route to host"
    await lab.hosts.restore()
    await lab.hosts.look("gpu1")
    assert lab.dispatch.places["gpu1"].unwell_since == since
    assert await lab.events() == [("compute.unwell", "gpu1")]
    lab.begin()
    await lab.hosts.restore()
    await lab.hosts.look("gpu1")
    assert await lab.events() == [("compute.unwell", "gpu1"), ("compute.well", "gpu1")]


async def test_a_compute_that_cannot_be_started_is_tried_again_and_keeps_nobody_from_starting(lab: Computes) -> None:
    failures = ["no such host", "no such host"]

    async def begin(backend: Any) -> None:
        if backend.name == "gpu1" and failures:
            raise OSError(failures.pop())

    lab.hosts.begin = begin
    await lab.hosts.start()
    assert lab.dispatch.places["gpu1"].unwell == "it could not be started: no such host"
    assert lab.dispatch.places["gpu2"].unwell is None
    await lab.hosts.look("gpu1")
    assert lab.dispatch.places["gpu1"].unwell is not None
    await lab.hosts.look("gpu1")
    assert lab.dispatch.places["gpu1"].unwell is None


async def test_a_backend_with_a_fault_of_its_own_takes_nobody_down(lab: Computes) -> None:
    async def health() -> str | None:
        raise RuntimeError("a bug")

    lab.one.health = health  # type: ignore[method-assign]
    await lab.hosts.look("gpu1")
    assert lab.dispatch.places["gpu1"].unwell == "it could not be asked: a bug"


async def test_when_somebody_says_that_it_is_mended_a_compute_is_tried_at_once(lab: Computes) -> None:
    lab.one.sentence = "it refused our key 3 times"
    for _ in range(12):
        lab.hosts.breakers["gpu1"].looked(lab.one.sentence)
    assert lab.hosts.breakers["gpu1"].pause() > 60
    asked: list[str] = []

    def mended() -> None:
        asked.append("gpu1")
        lab.one.sentence = None

    lab.one.try_again = mended  # type: ignore[attr-defined]
    async with anyio.create_task_group() as tasks:
        lab.hosts.watch(tasks)
        while lab.dispatch.places["gpu1"].unwell is None:
            await anyio.sleep(0.01)
        lab.hosts.look_again()
        with anyio.fail_after(20):
            while lab.dispatch.places["gpu1"].unwell is not None:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert asked == ["gpu1"]


# --- people -----------------------------------------------------------------------------------------------------
async def test_a_drained_compute_gets_nothing_new_over_a_restart_too(lab: Computes) -> None:
    await lab.hosts.drain("gpu1", True, "alice")
    await lab.hosts.drain("gpu1", True, "bob")  # it is drained already
    execution = await lab.open(ON_EITHER, {"name": "b", "compute": ["gpu1"], "salt": "b"})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        while lab.two.world == {} or lab.dispatch.why_waiting(execution.id, 1) is None:
            await anyio.sleep(0.01)
        told = "waits for a place: gpu1 is drained by alice: its steps finish, nothing new starts (since "
        assert (lab.dispatch.why_waiting(execution.id, 1) or "").startswith(told)
        since = lab.dispatch.places["gpu1"].drained_since
        tasks.cancel_scope.cancel()
    await lab.events()
    lab.begin()
    await lab.hosts.restore()
    assert lab.dispatch.places["gpu1"].drained and not lab.dispatch.places["gpu2"].drained
    assert (lab.dispatch.places["gpu1"].drained_by, lab.dispatch.places["gpu1"].drained_since) == ("alice", since)
    again = await lab.execution(execution.id)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again.run)
        while lab.dispatch.why_waiting(again.id, 1) is None:
            await anyio.sleep(0.01)
        assert lab.one.submitted == 0
        await lab.hosts.drain("gpu1", False, "alice")
        with anyio.fail_after(20):
            await again.over.wait()
    assert again.outcome() is RunOutcome.SUCCEEDED and lab.one.submitted == 1
    assert await lab.events() == [("compute.drained", "gpu1"), ("compute.undrained", "gpu1")]


async def test_only_a_compute_of_the_config_is_drained(lab: Computes) -> None:
    with pytest.raises(UnknownName, match="gpu3"):
        await lab.hosts.drain("gpu3", True, "alice")


# --- cards and shares over a restart -------------------------------------------------------------------------------
def cards(*names: str) -> tuple[Card, ...]:
    return tuple(Card(name, n, "RTX", 24 << 30) for n, name in enumerate(names))


async def test_an_adopted_attempt_has_the_cards_that_it_had(lab: Computes) -> None:
    lab.one.cards = cards("GPU-a", "GPU-b")
    await lab.hosts.look("gpu1")
    lab.one.run_for = 1000.0
    execution = await lab.open({"name": "a", "compute": ["gpu1"], "resources": {"gpus": 1}})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(execution.run)
        while not (attempts := await lab.ledger.attempts(execution.id, 0)) or attempts[0].handle is None:
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert attempts[0].cards == lab.one.gpus == ("GPU-a",)
    world = lab.one.world
    await lab.events()
    lab.begin()
    lab.one.world = world
    again = await lab.execution(execution.id)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again.run)
        while not lab.dispatch.places["gpu1"].holders:
            await anyio.sleep(0.01)
        assert lab.dispatch.places["gpu1"].leased.keys() == {"GPU-a"}
        lab.one.cards = cards("GPU-a", "GPU-b")
        await lab.hosts.look("gpu1")
        other = await lab.open({"name": "b", "salt": "b", "compute": ["gpu1"], "resources": {"gpus": 1}})
        lab.one.run_for = 0.0
        await other.run()
        assert lab.one.gpus == ("GPU-b",)
        tasks.cancel_scope.cancel()


async def test_what_owners_had_is_known_after_a_restart(lab: Computes) -> None:
    lab.one.run_for = 0.2
    execution = await lab.open({"name": "a", "compute": ["gpu1"]})
    assert await execution.run() is RunOutcome.SUCCEEDED
    lab.begin()
    await lab.hosts.restore()
    shares = lab.dispatch.waiting.shares
    now = lab.clock.now() / 1e6
    assert shares.of("a", now) == pytest.approx(0.2, rel=0.5)
    assert shares.of("b", now) == 0.0


async def test_a_step_goes_where_what_it_needs_lies_already(lab: Computes) -> None:
    inner = lab.folder / "lab" / "big.bin"
    inner.write_bytes(b"x" * (64 << 20))
    asked: list[dict[str, int]] = []

    class Far(Ill):
        def missing(self, contents: Any) -> int:
            asked.append(dict(contents))
            return sum(contents.values())

    lab.one.__class__ = Far
    source = {"kind": "reference", "datastore": "lab", "path": "big.bin"}
    step = {"inputs": [{"name": "big", "source": source}], "arguments": [{"kind": "input", "port": "big"}]}
    execution = await lab.open({**ON_EITHER, **step}, {**ON_EITHER, "name": "b", "salt": "b"})
    assert await execution.run() is RunOutcome.SUCCEEDED
    rows = await lab.ledger.steps(execution.id)
    assert [row.compute for row in rows] == ["gpu2", "gpu1"]
    assert [list(each.values()) for each in asked] == [[64 << 20]]


async def test_two_computes_of_one_host_never_lease_the_same_card() -> None:
    found: list[Sequence[str]] = []
    places = [Place("local", 4, cards=cards("GPU-a")), Place("box", 4, images=True, cards=cards("GPU-a"))]
    dispatch = Dispatch(places, {}, None, QuickClock().now)

    class Walk:
        id = 1

        def granted(self, index: int, compute: str, cards: Sequence[str]) -> None:
            found.append((compute, *cards))

    from mlpiped.placement.decide import Need

    dispatch.executions[1] = walk = Walk()  # type: ignore[assignment]
    dispatch.request(walk, 0, Need(1, 0, gpus=1), None)  # type: ignore[arg-type]
    dispatch.request(walk, 1, Need(1, 1, gpus=1, images=True), None)  # type: ignore[arg-type]
    assert found == [("local", "GPU-a")]
    dispatch.release(1, 0)
    assert found[1:] == [("box", "GPU-a")]
