from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from ledger_scene import NOW, begun, committed, event, made, opened, opening, running

from mlpiped.errors import IllegalMove, StaleReuse
from mlpiped.ledger import moves
from mlpiped.ledger.db import guard
from mlpiped.ledger.rows import StepRow
from mlpiped.ledger.store import Ledger
from mlpiped.model import (
    ATTEMPT_MOVES,
    RUN_MOVES,
    STEP_MOVES,
    AttemptEnd,
    AttemptState,
    Cause,
    CauseKind,
    RunOutcome,
    RunState,
    StepOutcome,
    StepState,
)

pytestmark = pytest.mark.anyio


def ended(token: str = "t1", end: AttemptEnd = AttemptEnd.FAILED, step_to: StepState | None = None, **f: Any) -> Any:
    told = {"why": None, "exit_code": None, "reason": None, "usage_json": None, "now": NOW} | f
    return moves.attempt_ended(token, end, step_to, **told)


def test_guards_are_the_tables_of_legal_moves() -> None:
    for kind, table in (("run", RUN_MOVES), ("step", STEP_MOVES), ("attempt", ATTEMPT_MOVES)):
        for to in {to for targets in table.values() for to in targets}:
            allowed = {state for state, targets in table.items() if to in targets}
            named = {state for state in table if f"state = '{state.value}'" in guard(kind, to.value)}
            assert named == allowed


async def test_a_run_and_its_step_go_from_fire_to_success(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        fire = event(cause=Cause(CauseKind.CRON, "0 6 * * *"), dedupe="cron:1", parameters={"lr": 0.1})
        [run_id] = await ledger.write(opening(fire, tags={"a": "b"}, options={"force": ["train"]}))
        await ledger.write(moves.start_run(run_id, NOW + 1), moves.add_steps(run_id, [StepRow(0, "train")], NOW + 1))
        await ledger.write(moves.queue_step(run_id, 0, "b3:k", "never ran", NOW + 2))
        await ledger.write(moves.intent(run_id, 0, "t1", 1, "gpu1", "b3:k", '{"code":"c"}', NOW + 3))
        await ledger.write(moves.handle("t1", '{"v":1,"pid":7}', NOW + 4))
        await ledger.write(moves.collecting("t1", 0, '{"cpu":2.0}', NOW + 5))
        outputs = [made("a", "b3:1"), made("b", "b3:2")]
        assert await ledger.write(moves.commit_result("t1", "b3:k", outputs, 99, NOW + 6, True)) == [True]
        await ledger.write(moves.finish_run(run_id, RunOutcome.SUCCEEDED, NOW + 7))

        run = await ledger.run(run_id)
        assert run is not None
        assert (run.cause, run.parameters, run.tags, run.options) == (
            fire.cause, {"lr": 0.1}, {"a": "b"}, {"force": ["train"]},
        )  # fmt: skip
        assert (run.state, run.outcome) == (RunState.FINISHED, RunOutcome.SUCCEEDED)
        assert (run.created_at, run.started_at, run.finished_at) == (NOW, NOW + 1, NOW + 7)
        [step] = await ledger.steps(run_id)
        assert step == StepRow(
            0, "train", StepState.FINISHED, StepOutcome.SUCCEEDED, "never ran", "gpu1", 1, 0, "b3:k", None,
            NOW + 4, NOW + 6, run_id,
        )  # fmt: skip
        [attempt] = await ledger.attempts(run_id, 0)
        assert (attempt.end, attempt.handle, attempt.usage) == (AttemptEnd.COMMITTED, {"v": 1, "pid": 7}, {"cpu": 2.0})
        result = (await ledger.results(["b3:k", "b3:other"])).pop("b3:k")
        assert (result.run_id, result.step_name, result.outputs, result.cost_us) == (
            run_id,
            "train",
            tuple(outputs),
            99,
        )
        assert await ledger.outputs(run_id, 0) == tuple(outputs)
        assert (await ledger.heads("digits", ["train"]))["train"].parts == '{"code":"c"}'
        assert await ledger.durations("digits") == {"train": 99}
        assert [e.kind for e in await ledger.events(run=run_id)] == [
            "run.queued", "run.running", "step.waiting", "step.queued", "attempt.intent", "step.submitting",
            "attempt.submitted", "step.running", "step.collecting", "attempt.ended", "step.finished", "run.finished",
        ]  # fmt: skip


async def test_a_fire_opens_one_run_and_moves_its_cursor_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        fire = event(dedupe="cron:1", cursor=("s1", {"at": 1}))
        again = event(dedupe="cron:1", cursor=("s1", {"at": 2}))
        assert await ledger.write(opening(fire)) == [1]
        assert await ledger.write(opening(again)) == [None]
        assert await ledger.write(moves.record_fire(again, NOW, "skipped")) == [False]
        assert await ledger.write(moves.merge_fire(1, again, NOW)) == [False]
        schedule = await ledger.schedule("s1")
        assert schedule is not None
        assert (schedule.cursor, schedule.fired_at, schedule.verdict, schedule.run_id) == ({"at": 1}, NOW, "opened", 1)
        assert len(await ledger.runs()) == 1
        found = await ledger.fire("cron:1")
        assert found is not None and found.run_id == 1


async def test_a_fire_that_fails_leaves_neither_run_nor_cursor(tmp_path: Path) -> None:
    def burst(_: Any) -> None:
        raise RuntimeError("burst")

    async with opened(tmp_path) as ledger:
        with pytest.raises(RuntimeError, match="burst"):
            await ledger.write(opening(event(dedupe="d", cursor=("s1", {}))), burst)
        assert await ledger.runs() == [] and await ledger.schedules() == [] and await ledger.fire("d") is None
        assert await ledger.events() == []


async def test_fires_merge_into_a_queued_run_only(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        [run_id] = await ledger.write(opening(event()))
        other = event(cause=Cause(CauseKind.ARRIVAL, "a.csv arrived"), dedupe="d2")
        assert await ledger.write(moves.merge_fire(run_id, other, NOW)) == [True]
        run = await ledger.run(run_id)
        assert run is not None and run.cause.detail == "alice; a.csv arrived"
        await ledger.write(moves.start_run(run_id, NOW))
        with pytest.raises(IllegalMove, match="not queued"):
            await ledger.write(moves.merge_fire(run_id, event(dedupe="d3"), NOW))
        assert await ledger.fire("d3") is None


async def test_a_run_does_not_finish_before_its_steps(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        with pytest.raises(IllegalMove, match="steps that are not finished"):
            await ledger.write(moves.finish_run(run_id, RunOutcome.FAILED, NOW))
        rows = [StepRow(i, n, outcome=StepOutcome.SKIPPED, why="w") for i, n in enumerate(("prepare", "train"))]
        await ledger.write(moves.finish_steps(run_id, rows, NOW), moves.finish_run(run_id, RunOutcome.FAILED, NOW))
        with pytest.raises(IllegalMove, match="from finished to running"):
            await ledger.write(moves.start_run(run_id, NOW))


STEP_TO = [to for to in StepState if to is not StepState.WAITING]


@pytest.mark.parametrize(("source", "to"), list(itertools.product(StepState, STEP_TO)))
async def test_a_step_moves_exactly_as_the_table_says(tmp_path: Path, source: StepState, to: StepState) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        token = "t1"
        if source is not StepState.WAITING:
            await ledger.write(moves.queue_step(run_id, 0, "k", None, NOW))
        if source not in (StepState.WAITING, StepState.QUEUED):
            await ledger.write(moves.intent(run_id, 0, token, 1, "local", "k", "{}", NOW))
        if source in (StepState.RUNNING, StepState.COLLECTING):
            await ledger.write(moves.handle(token, "{}", NOW))
        if source is StepState.COLLECTING:
            await ledger.write(moves.collecting(token, 0, None, NOW))
        if source is StepState.FINISHED:
            await ledger.write(moves.finish_step(run_id, 0, StepOutcome.CANCELLED, None, NOW))
        if source in (StepState.WAITING, StepState.QUEUED) and to in (StepState.RUNNING, StepState.COLLECTING):
            return  # there is no attempt that could say so
        has_attempt = source not in (StepState.WAITING, StepState.QUEUED)
        tried = {
            StepState.QUEUED: ended(step_to=StepState.QUEUED)
            if has_attempt
            else moves.queue_step(run_id, 0, "k", "", NOW),
            StepState.SUBMITTING: moves.intent(run_id, 0, "t2", 2, "local", "k", "{}", NOW),
            StepState.RUNNING: moves.handle(token, "{}", NOW),
            StepState.COLLECTING: moves.collecting(token, 0, None, NOW),
            StepState.FINISHED: moves.finish_step(run_id, 0, StepOutcome.FAILED, None, NOW),
        }[to]
        before = await ledger.step(run_id, "prepare")
        try:
            await ledger.write(tried)
        except IllegalMove:
            assert to not in STEP_MOVES[source]
            assert await ledger.step(run_id, "prepare") == before
            return
        step = await ledger.step(run_id, "prepare")
        assert step is not None and before is not None
        # what is not legal was told late and changed nothing
        assert step.state is (to if to in STEP_MOVES[source] else before.state)


async def alive(ledger: Ledger, run_id: int) -> list[str]:
    """The tokens of its first step's attempts that have not ended."""
    return [attempt.token for attempt in await ledger.attempts(run_id, 0) if attempt.end is None]


async def test_a_step_has_one_live_attempt(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id)
        with pytest.raises(IllegalMove):
            await ledger.write(moves.queue_step(run_id, 0, None, None, NOW))
        assert await alive(ledger, run_id) == ["t1"]
        await ledger.write(ended(end=AttemptEnd.LOST, step_to=StepState.QUEUED, why="host rebooted"))
        await ledger.write(moves.intent(run_id, 0, "t2", 2, "local", "b3:k", "{}", NOW))
        step = await ledger.step(run_id, "prepare")
        assert step is not None and (step.attempts, step.why) == (2, "host rebooted")
        assert await alive(ledger, run_id) == ["t2"]


async def test_a_token_is_used_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id, 0)
        await ledger.write(moves.queue_step(run_id, 1, "k", None, NOW))
        with pytest.raises(IllegalMove, match="token"):
            await ledger.write(moves.intent(run_id, 1, "t1", 1, "local", "k", "{}", NOW))
        step = await ledger.step(run_id, "train")
        assert step is not None and step.state is StepState.QUEUED and step.attempts == 0


async def test_nothing_is_dispatched_for_a_run_whose_turn_has_not_come(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        [run_id] = await ledger.write(opening(event()))
        await ledger.write(moves.add_steps(run_id, [StepRow(0, "a", StepState.QUEUED)], NOW))
        with pytest.raises(IllegalMove):
            await ledger.write(moves.intent(run_id, 0, "t1", 1, "local", "k", "{}", NOW))


async def test_an_attempt_that_never_ran_is_not_counted(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id)
        [state] = await ledger.write(ended(end=AttemptEnd.NEVER_RAN, step_to=StepState.QUEUED))
        step = await ledger.step(run_id, "prepare")
        assert step is not None and step.attempts == 0 and step.state is state is StepState.QUEUED


async def test_an_attempt_ends_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id)
        for _ in range(2):
            await ledger.write(ended(end=AttemptEnd.LOST))
        with pytest.raises(IllegalMove, match="ended as lost"):
            await ledger.write(ended(end=AttemptEnd.FAILED))
        assert await ledger.write(moves.handle("t1", "{}", NOW)) == [False]
        [attempt] = await ledger.attempts(run_id, 0)
        assert (attempt.state, attempt.end) == (AttemptState.ENDED, AttemptEnd.LOST)
        assert [e.facts["end"] for e in await ledger.events() if e.kind == "attempt.ended"] == ["lost"]


async def test_the_end_of_an_attempt_does_not_wake_a_cancelled_step(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id)
        await ledger.write(moves.finish_step(run_id, 0, StepOutcome.CANCELLED, "by alice", NOW))
        assert await alive(ledger, run_id) == ["t1"]
        assert await ledger.write(ended(step_to=StepState.QUEUED)) == [StepState.FINISHED]
        assert await alive(ledger, run_id) == []


async def test_a_result_that_comes_after_its_step_was_finished_is_superseded_and_never_reused(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id)
        await ledger.write(moves.finish_step(run_id, 0, StepOutcome.CANCELLED, None, NOW))
        assert await ledger.write(moves.commit_result("t1", "b3:k", [made()], 1, NOW, True)) == [False]
        [attempt] = await ledger.attempts(run_id, 0)
        assert attempt.end is AttemptEnd.SUPERSEDED
        assert await ledger.results(["b3:k"]) == {} and await ledger.heads("digits", ["prepare"]) == {}


@pytest.mark.parametrize("end", [e for e in AttemptEnd if e is not AttemptEnd.COMMITTED])
async def test_no_attempt_that_was_given_up_is_ever_committed(tmp_path: Path, end: AttemptEnd) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id)
        await ledger.write(ended(end=end, step_to=StepState.QUEUED))
        assert await ledger.write(moves.commit_result("t1", "b3:k", [made()], 1, NOW, True)) == [False]
        assert await ledger.results(["b3:k"]) == {}
        step = await ledger.step(run_id, "prepare")
        assert step is not None and step.state is StepState.QUEUED


async def test_a_commit_that_is_repeated_after_a_crash_says_that_it_is_done(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await committed(ledger, run_id)
        events = await ledger.last_event()
        assert await ledger.write(moves.commit_result("t1", "b3:k", [made()], 1, NOW, True)) == [True]
        assert await ledger.last_event() == events


async def test_a_result_is_committed_for_the_key_of_its_intent_only(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id, key="b3:k")
        with pytest.raises(IllegalMove, match="another key"):
            await ledger.write(moves.commit_result("t1", "b3:else", [made()], 1, NOW, True))


async def test_what_is_not_reusable_is_a_head_but_no_result(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await begun(ledger, run_id)
        await ledger.write(moves.commit_result("t1", "b3:k", [made()], 1, NOW, False))
        assert await ledger.results(["b3:k"]) == {}
        assert (await ledger.heads("digits", ["prepare"]))["prepare"].key == "b3:k"
        assert await ledger.outputs(run_id, 0) == (made(),)


async def test_a_step_succeeds_by_a_commit_and_by_nothing_else(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        bad = StepRow(5, "x", StepState.FINISHED, StepOutcome.SUCCEEDED)
        for op in (
            moves.finish_step(run_id, 0, StepOutcome.SUCCEEDED, None, NOW),
            moves.add_steps(run_id, [bad], NOW),
            moves.add_steps(run_id, [StepRow(5, "x", StepState.RUNNING)], NOW),
        ):
            with pytest.raises(IllegalMove):
                await ledger.write(op)
        with pytest.raises(ValueError, match="commit_result"):
            ended(end=AttemptEnd.COMMITTED)


def reused(source: tuple[int, str] | None, idx: int = 0, key: str | None = "b3:k") -> StepRow:
    return StepRow(idx, "prepare", StepState.FINISHED, StepOutcome.REUSED, "same", key=key, reused_from=source)


async def test_reuse_takes_outputs_and_moves_the_head_of_the_reusing_pipeline(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        first = await running(ledger)
        await committed(ledger, first)
        second = await running(ledger, pipeline="other")
        await ledger.write(moves.finish_step(second, 0, StepOutcome.REUSED, "same", NOW, key="b3:k"))
        third = await running(ledger, ["x"], pipeline="third")
        await ledger.write(moves.add_steps(third, [reused((first, "prepare"), idx=4)], NOW))
        for run_id, idx, pipeline in ((second, 0, "other"), (third, 4, "third")):
            assert await ledger.outputs(run_id, idx) == (made(),)
            assert await ledger.outputs_of_run(run_id) == {idx: (made(),)}
            step = await ledger.step(run_id, "prepare")
            assert step is not None and step.reused_from == (first, "prepare")
            head = (await ledger.heads(pipeline, ["prepare"]))["prepare"]
            assert (head.key, head.run_id) == ("b3:k", run_id)
            assert await ledger.durations(pipeline) == {"prepare": 7}


@pytest.mark.parametrize("how", ["add_steps", "finish_steps"])
@pytest.mark.parametrize("why_not", ["no result", "dropped", "made anew", "no key"])
async def test_reuse_of_what_is_not_the_committed_result_now_is_refused_whole(
    tmp_path: Path, how: str, why_not: str
) -> None:
    async with opened(tmp_path) as ledger:
        first = await running(ledger)
        source: tuple[int, str] | None = (first, "prepare")
        if why_not == "no result":
            await begun(ledger, first)  # it runs, and has not been committed
        else:
            await committed(ledger, first)
        if why_not == "dropped":
            assert await ledger.write(moves.drop_results(["b3:k"])) == [1]
        if why_not == "made anew":
            await committed(ledger, await running(ledger), token="t2")
        row = reused(source, 0, None if why_not == "no key" else "b3:k")
        second = await running(ledger, ["prepare", "b"])
        other = StepRow(1, "b", StepState.FINISHED, StepOutcome.SKIPPED)
        if how == "add_steps":
            [second] = await ledger.write(opening(event()))
            op = moves.add_steps(second, [other, row], NOW)
        else:
            op = moves.finish_steps(second, [other, row], NOW)
        with pytest.raises(StaleReuse):
            await ledger.write(op)
        assert all(step.state is StepState.WAITING for step in await ledger.steps(second))


async def test_a_forced_run_s_result_is_what_is_reused_next(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await committed(ledger, await running(ledger))
        forced = await running(ledger)
        await committed(ledger, forced, token="t2")
        assert (await ledger.results(["b3:k"]))["b3:k"].run_id == forced


async def test_bulk_finish_is_all_or_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await ledger.write(moves.finish_step(run_id, 1, StepOutcome.SKIPPED, "w", NOW))
        rows = [StepRow(i, "", outcome=StepOutcome.SKIPPED) for i in (0, 1)]
        with pytest.raises(IllegalMove, match="train"):
            await ledger.write(moves.finish_steps(run_id, rows, NOW))
        assert [s.state for s in await ledger.steps(run_id)] == [StepState.WAITING, StepState.FINISHED]


async def test_names_that_are_not_utf8_are_kept_in_sentences_and_json(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        run_id = await running(ledger)
        await ledger.write(moves.queue_step(run_id, 0, "k", "input b\udcff.csv is new", NOW))
        await ledger.write(moves.intent(run_id, 0, "t1", 1, "local", "k", '{"in":"\udcff"}', NOW))
        step = await ledger.step(run_id, "prepare")
        assert step is not None and step.why == r"input b\udcff.csv is new"
        assert await ledger.parts("k") == '{"in":"\\udcff"}'


async def shared(ledger: Ledger, *, submitted: bool = True) -> tuple[int, int]:
    """A run whose step 0 has an attempt, and one whose step 1 is queued for the same key."""
    first, second = await running(ledger), await running(ledger)
    await ledger.write(
        moves.queue_step(first, 0, "b3:k", "never ran", NOW),
        moves.queue_step(second, 1, "b3:k", "never ran", NOW),
        moves.intent(first, 0, "t1", 1, "gpu1", "b3:k", "{}", NOW),
    )
    if submitted:
        await ledger.write(moves.handle("t1", '{"v":1}', NOW))
    return first, second


def handing_over(run_id: int, idx: int = 1, n: int = 1) -> Any:
    return moves.hand_over("t1", '{"v":1}', run_id, idx, n, NOW + 1, why="goes on", left="cancelled")


@pytest.mark.parametrize("submitted", [True, False])
async def test_a_live_attempt_is_handed_over_to_an_equal_step_whole(tmp_path: Path, submitted: bool) -> None:
    async with opened(tmp_path) as ledger:
        first, second = await shared(ledger, submitted=submitted)
        await ledger.write(handing_over(second))
        left, heir = (await ledger.steps(first))[0], (await ledger.steps(second))[1]
        assert (left.state, left.outcome, left.why, left.attempts) == (
            StepState.FINISHED, StepOutcome.CANCELLED, "cancelled", 0,
        )  # fmt: skip
        assert (heir.state, heir.why, heir.attempts, heir.compute) == (StepState.RUNNING, "goes on", 1, "gpu1")
        assert await ledger.attempts(first, 0) == []
        [attempt] = await ledger.attempts(second, 1)
        assert (attempt.token, attempt.state, attempt.handle) == ("t1", AttemptState.SUBMITTED, {"v": 1})
        assert await ledger.write(moves.commit_result("t1", "b3:k", [made()], 9, NOW + 2, True)) == [True]
        assert [step.outcome for step in await ledger.steps(second)] == [None, StepOutcome.SUCCEEDED]
        kinds = [(row.run_id, row.kind) for row in await ledger.events()]
        told = kinds.index((first, "attempt.handed_over"))
        assert kinds[told + 1 : told + 3] == [(first, "step.finished"), (second, "step.running")]


@pytest.mark.parametrize("why_not", ["ended", "has one", "not queued", "run not running"])
async def test_an_attempt_is_handed_over_to_a_step_that_waits_for_it_or_not_at_all(
    tmp_path: Path, why_not: str
) -> None:
    async with opened(tmp_path) as ledger:
        first, second = await shared(ledger)
        if why_not == "ended":
            await ledger.write(ended())
        elif why_not == "has one":
            await ledger.write(moves.intent(second, 1, "t2", 1, "gpu1", "b3:k", "{}", NOW))
        elif why_not == "not queued":
            await ledger.write(moves.finish_step(second, 1, StepOutcome.CANCELLED, "cancelled", NOW))
        else:
            [second] = await ledger.write(opening(event()))
            await ledger.write(moves.add_steps(second, [StepRow(1, "a", StepState.QUEUED, key="b3:k")], NOW))
        before = [await ledger.steps(run) for run in (first, second)]
        with pytest.raises(IllegalMove):
            await ledger.write(handing_over(second, n=2))
        assert [await ledger.steps(run) for run in (first, second)] == before
        assert len(await ledger.attempts(first, 0)) == 1
