"""Retention on a real ledger, store and folders: what is old goes, and nothing that anything unfinished needs."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from ledger_scene import event, opening

from mlpiped.artifacts import Store
from mlpiped.backends.base import JobOutput
from mlpiped.clock import SystemClock
from mlpiped.config.settings import Retention
from mlpiped.errors import BackendUnavailable
from mlpiped.files.fingerprint import Fingerprinter
from mlpiped.files.hashing import StatRow
from mlpiped.ledger import Ledger, StepRow, moves
from mlpiped.model import OutputFact, RunOutcome, StepOutcome, StepState
from mlpiped.retention import keeping
from mlpiped.retention.keeper import Keeper
from mlpiped.retention.plan import JobFolder, Span, leapt, spent_jobs

pytestmark = pytest.mark.anyio

DAY = 86_400_000_000
OLD = 200  # days: beyond any default


@dataclass
class Scene:
    """A state folder with a past. Ages are in days before now."""

    ledger: Ledger
    store: Store
    keeper: Keeper
    state: Path
    lab: Path

    def at(self, age: float) -> int:
        return SystemClock().now() - int(age * DAY)

    def retain(self, **how: Any) -> None:
        self.keeper.retention = Retention(**how)

    async def run(
        self, age: float, *, pipeline: str = "p", made: str | None = None, steps: int = 1, end: bool = True,
        compute: str = "local",
    ) -> int:  # fmt: skip
        """A run of steps that committed, whose first made a file with the content `made`."""
        at = self.at(age)
        [run] = await self.ledger.write(opening(event(pipeline), now=at, tags={"age": str(age)}))
        rows = [StepRow(i, f"s{i}") for i in range(steps)]
        await self.ledger.write(moves.start_run(run, at), moves.add_steps(run, rows, at))
        for i in range(steps):
            await self.step(run, i, at, made if i == 0 else None, compute)
        if end:
            await self.ledger.write(moves.finish_run(run, RunOutcome.SUCCEEDED, at))
        return int(run)

    async def step(self, run: int, i: int, at: int, made: str | None, compute: str) -> None:
        token, key = f"mlp-{run}-{i}", f"k{run}-{i}"
        await self.ledger.write(
            moves.queue_step(run, i, key, "never ran", at), moves.intent(run, i, token, 1, compute, key, "{}", at)
        )
        facts = [await self.artifact(token, made, at)] if made else []
        self.job(token)
        await self.ledger.write(moves.commit_result(token, key, facts, 60_000_000, at, True))

    async def artifact(self, token: str, content: str, at: int) -> OutputFact:
        folder = self.state / "making" / token
        (folder / "out" / "made").mkdir(parents=True)
        (folder / "out" / "made" / "file").write_text(content)
        [fact] = await self.store.collect(folder, [JobOutput("made", "file", "file")])
        aged(Path(fact.path).parent, at)
        return fact

    def job(self, token: str, metrics: str = "") -> Path:
        folder = self.state / "jobs" / token
        (folder / "claim").mkdir(parents=True)
        (folder / "claim" / "handle.json").write_text("{}")
        (folder / "stdout").write_text("x" * 1000)
        (folder / "metrics.jsonl").write_text(metrics)
        return folder

    async def clean(self) -> dict[str, int]:
        """What went, by kind."""
        answer = await self.keeper.clean()
        assert answer["faults"] == []
        return {part["what"]: part["count"] for part in answer["parts"] if part["count"]}


def aged(path: Path, at: int) -> Path:
    os.utime(path, ns=(at * 1000, at * 1000))
    return path


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    state, lab = tmp_path / "state", tmp_path / "lab"
    lab.mkdir()
    (lab / "there").write_text("")
    ledger = await Ledger.open(state, SystemClock())
    store = Store(state, Fingerprinter(ledger, moves.put_stat_cache))
    keeper = Keeper(ledger, store, {}, Retention(), {"lab": lab}, SystemClock())
    yield Scene(ledger, store, keeper, state, lab)
    await ledger.close()


async def test_a_job_s_folder_that_is_a_link_to_a_shared_one_goes_with_what_it_names(
    scene: Scene, tmp_path: Path
) -> None:
    run = await scene.run(40)
    link, shared = scene.state / "jobs" / f"mlp-{run}-0", tmp_path / "shared"
    link.rename(shared)
    link.symlink_to(shared)
    away = scene.state / "jobs" / "mlp-77-0"
    away.symlink_to(tmp_path / "not mounted now")
    assert (await scene.clean())["logs"] == 1
    assert not link.is_symlink() and not shared.exists() and away.is_symlink()


# --- images -------------------------------------------------------------------------------------------------
class Engine:
    """As much of one as keeps images."""

    name = "box"

    def __init__(self) -> None:
        self.asked: list[tuple[float, bool]] = []
        self.away = False

    async def drop_images(self, before: float, *, only_look: bool) -> int:
        if self.away:
            raise BackendUnavailable("the Docker engine does not answer")
        self.asked.append((before, only_look))
        return 3


async def test_images_go_that_no_run_has_asked_for_in_its_time_and_none_that_an_unfinished_run_may_want(
    scene: Scene,
) -> None:
    engine = Engine()
    scene.keeper.backends = {"box": engine}  # type: ignore[dict-item]
    assert (await scene.clean())["images"] == 3
    assert engine.asked.pop() == (pytest.approx(scene.at(180) / 1e6, abs=60), False)
    await scene.run(OLD, end=False)
    await scene.keeper.plan()
    before, only_look = engine.asked.pop()
    assert scene.at(OLD + 1) / 1e6 < before < scene.at(OLD) / 1e6 and only_look
    engine.away = True
    assert "images" not in await scene.clean()
    scene.retain(runs=None)
    engine.away = False
    await scene.clean()
    assert engine.asked == []


# --- elsewhere ----------------------------------------------------------------------------------------------
class Machine:
    """As much of one as has job folders."""

    kind = "ssh"

    def __init__(self, name: str, scene: Scene) -> None:
        self.name, self.scene = name, scene
        self.folders: set[str] = set()
        self.away = False
        self.stubborn = ""
        self.at_once = self.most = 0

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        assert not keep_logs
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await anyio.sleep(0)
        self.at_once -= 1
        if self.away or token == self.stubborn:
            raise BackendUnavailable(f"`{self.name}` does not answer")
        self.folders.discard(token)

    async def run(self, age: float, steps: int = 1) -> int:
        run = await self.scene.run(age, steps=steps, compute=self.name)
        self.folders |= {f"mlp-{run}-{i}" for i in range(steps)}
        return run


@pytest.fixture
def box(scene: Scene) -> Machine:
    machine = Machine("box", scene)
    scene.keeper.backends = {"box": machine}  # type: ignore[dict-item]
    return machine


@pytest.mark.parametrize("age", [40, OLD], ids=["its logs are old", "its run is old"])
async def test_what_lies_on_a_machine_that_is_away_goes_when_it_is_back(scene: Scene, box: Machine, age: float) -> None:
    run = await box.run(age)
    await scene.run(0)
    box.away = True
    await scene.clean()
    assert not (scene.state / "jobs" / f"mlp-{run}-0").exists() and box.folders == {f"mlp-{run}-0"}
    assert (await scene.ledger.run(run) is None) == (age == OLD)
    scene.keeper.backends = {}
    await scene.clean()  # by a daemon whose config does not name it
    box.away, scene.keeper.backends = False, {"box": box}  # type: ignore[dict-item]
    await scene.clean()
    assert box.folders == set() and not any((scene.state / "left-there" / "box").iterdir())


async def test_a_daemon_that_dies_between_the_folder_here_and_the_one_there_leaves_neither(
    scene: Scene, box: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await box.run(40)
    with monkeypatch.context() as dying:
        dying.setattr(keeping.jobs, "discard", lambda folder, keep_logs: 1 / 0)
        with pytest.raises(AssertionError):
            await scene.clean()
    assert os.listdir(scene.state / "left-there" / "box") == sorted(box.folders)
    await scene.clean()
    assert box.folders == set()


async def test_what_cannot_be_noted_keeps_no_folder_here_and_is_not_forgotten(scene: Scene, box: Machine) -> None:
    """As on a full disk, which the removal is to help."""
    run = await box.run(40)
    (scene.state / "left-there").mkdir()
    (scene.state / "left-there" / "box").write_text("no folder")
    assert (await scene.keeper.clean())["faults"] != []
    assert not (scene.state / "jobs" / f"mlp-{run}-0").exists()
    (scene.state / "left-there" / "box").unlink()
    await scene.clean()
    assert box.folders == set()


async def test_thousands_of_folders_elsewhere_are_asked_for_many_at_once_and_one_that_will_not_go_holds_up_no_other(
    scene: Scene, box: Machine
) -> None:
    run = await box.run(40, steps=1200)
    box.stubborn = f"mlp-{run}-0"
    await scene.clean()
    assert box.folders == {box.stubborn} and 100 < box.most <= 500
    assert os.listdir(scene.state / "left-there" / "box") == [box.stubborn]
    box.stubborn = ""
    await scene.clean()
    assert box.folders == set()


# --- rows ---------------------------------------------------------------------------------------------------
async def test_by_default_runs_go_after_180_days_and_what_they_made_stays(scene: Scene) -> None:
    old, recent, new = await scene.run(OLD, made="old"), await scene.run(170), await scene.run(0)
    events = await scene.ledger.last_event()
    assert (await scene.clean())["runs"] == 1
    assert await scene.ledger.run(old) is None and await scene.ledger.steps(old) == []
    assert await scene.ledger.events(run=old) == [] and await scene.ledger.attempts(old, 0) == []
    assert [run.id for run in await scene.ledger.runs()] == [new, recent]
    assert await scene.ledger.last_event() == events  # so that no number is given twice
    result = (await scene.ledger.results([f"k{old}-0"]))[f"k{old}-0"]
    assert await scene.store.intact(result.outputs) == set() and (result.run_id, result.cost_us) == (old, 60_000_000)


async def test_the_newest_run_of_each_pipeline_stays_however_old(scene: Scene) -> None:
    first, last = await scene.run(OLD, pipeline="once a year"), await scene.run(OLD, pipeline="once a year")
    await scene.clean()
    assert [run.id for run in await scene.ledger.runs()] == [last]
    assert await scene.ledger.run(first) is None


async def test_a_run_whose_result_is_reused_stays_with_what_it_printed_and_measured(scene: Scene) -> None:
    maker = await scene.run(OLD, made="model")
    now = scene.at(0)
    [reuser] = await scene.ledger.write(opening(event("p"), now=now))
    row = StepRow(0, "s0", outcome=StepOutcome.REUSED, key=f"k{maker}-0")
    await scene.ledger.write(moves.start_run(reuser, now), moves.add_steps(reuser, [StepRow(0, "s0")], now))
    await scene.ledger.write(moves.finish_steps(reuser, [row], now))
    await scene.ledger.write(moves.finish_run(reuser, RunOutcome.SUCCEEDED, now))
    assert "runs" not in await scene.clean()
    assert await scene.ledger.run(maker) is not None


async def test_an_unfinished_run_stays_however_old_with_its_job_folders_and_artifacts(scene: Scene) -> None:
    run = await scene.run(OLD, made="needed", end=False)
    await scene.run(0)
    scene.retain(runs="1s", logs="1s", artifacts="1")
    assert await scene.clean() == {}
    assert (await scene.ledger.run(run)) is not None
    assert (scene.state / "jobs" / f"mlp-{run}-0" / "stdout").exists()
    assert await scene.store.intact(await scene.ledger.outputs(run, 0)) == set()


async def test_nothing_goes_that_is_to_be_kept_for_ever(scene: Scene) -> None:
    await scene.run(4000, made="x")
    await scene.run(4000)
    scene.retain(runs="forever", logs="forever", artifacts="forever")
    assert await scene.clean() == {}
    assert Retention() == Retention(runs="180d", logs="30d", artifacts="forever")


async def test_a_large_run_goes_in_bites_that_never_hold_the_writer_long(scene: Scene) -> None:
    at = scene.at(OLD)
    [run] = await scene.ledger.write(opening(event("wide"), now=at))
    rows = [StepRow(i, f"s{i}", StepState.FINISHED, StepOutcome.SKIPPED) for i in range(20_000)]
    await scene.ledger.write(moves.start_run(run, at), moves.add_steps(run, rows, at))
    await scene.ledger.write(moves.finish_run(run, RunOutcome.SUCCEEDED, at))
    await scene.run(0, pipeline="wide")
    before = scene.ledger.commits
    assert (await scene.clean())["runs"] == 1
    assert await scene.ledger.run(run) is None and len(await scene.ledger.steps(run)) == 0
    assert scene.ledger.commits - before > 3
    assert scene.keeper.longest < 0.2  # 0.02 when nobody else is about; one bite would take a second


async def test_a_pass_that_was_cut_off_is_gone_on_with(scene: Scene) -> None:
    runs = [await scene.run(OLD, steps=3) for _ in range(5)]
    await scene.run(0)
    await scene.ledger.write(moves.forget_run(runs[0]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(scene.keeper.clean)
        while await scene.ledger.run(runs[1]) is not None:
            await anyio.sleep(0)
        tasks.cancel_scope.cancel()
    await scene.clean()
    assert len(await scene.ledger.runs()) == 1
    assert await scene.ledger.faults() == []


async def test_a_run_that_has_not_finished_cannot_be_forgotten(scene: Scene) -> None:
    run = await scene.run(OLD, end=False)
    with pytest.raises(Exception, match=f"run {run} has not finished"):
        await scene.ledger.write(moves.forget_run(run))


async def test_old_fires_leave_the_events_and_stay_remembered(scene: Scene) -> None:
    fire = event("p", dedupe="cron:1")
    await scene.ledger.write(moves.record_fire(fire, scene.at(OLD), "skipped"))
    await scene.run(0)
    await scene.clean()
    assert all(row.run_id is not None for row in await scene.ledger.events())
    assert await scene.ledger.write(moves.record_fire(fire, scene.at(0), "skipped")) == [False]


# --- job folders --------------------------------------------------------------------------------------------
async def test_logs_go_after_30_days_and_metrics_with_their_run(scene: Scene) -> None:
    old, recent = await scene.run(40), await scene.run(20)
    folder = scene.state / "jobs" / f"mlp-{old}-0"
    (folder / "metrics.jsonl").write_text('{"name": "a", "value": 1}\n')
    (scene.state / "jobs" / ".no-params.json").write_text("{}")
    assert await scene.clean() == {"logs": 1}
    assert os.listdir(folder) == ["metrics.jsonl"]
    assert (scene.state / "jobs" / f"mlp-{recent}-0" / "stdout").exists()
    assert (scene.state / "jobs" / ".no-params.json").exists()
    assert await scene.clean() == {}
    scene.retain(runs="35d")
    assert await scene.clean() == {"runs": 1}
    assert not folder.exists()


async def test_a_folder_whose_supervisor_lives_stays(scene: Scene) -> None:
    run = await scene.run(OLD)
    await scene.run(0)
    folder = scene.state / "jobs" / f"mlp-{run}-0"
    with (folder / "claim" / "handle.json").open() as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        assert await scene.clean() == {"runs": 1}
        assert (folder / "stdout").exists()
    aged(folder, scene.at(OLD))
    assert await scene.clean() == {"logs": 1}
    assert not folder.exists()


def test_spent_jobs_are_of_runs_that_ended_or_of_nobody() -> None:
    now = 1000 * DAY
    folders = [
        JobFolder("running", True, None, 0),
        JobFolder("ended", True, now - 31 * DAY, now),
        JobFolder("recent", True, now - 29 * DAY, 0),
        JobFolder("stranger", False, None, now - 31 * DAY),
        JobFolder("new stranger", False, None, now - 29 * DAY),
    ]
    assert spent_jobs(folders, now=now, logs=30 * 86_400.0) == ["ended", "stranger"]
    assert spent_jobs(folders, now=now, logs=None) == []
    young = [JobFolder("stranger", False, None, now - 6 * DAY), JobFolder("ended", True, now - DAY, 0)]
    assert spent_jobs(young, now=now, logs=1.0) == ["ended"]  # what nobody knows is kept for a week's look


# --- artifacts ----------------------------------------------------------------------------------------------
async def test_artifacts_go_by_budget_keep_their_digest_and_are_not_reused(scene: Scene) -> None:
    first, second = await scene.run(3, made="a" * 600), await scene.run(2, made="b" * 600)
    assert await scene.clean() == {}
    scene.retain(artifacts="1000")
    plan = await scene.keeper.plan()
    [removal] = plan["artifacts"]
    assert (removal["size"], removal["seconds"], plan["bytes"]) == (600, 60.0, 600)
    assert await scene.clean() == {"artifacts": 1}
    [gone], [left] = await scene.ledger.outputs(first, 0), await scene.ledger.outputs(second, 0)
    assert gone.path == "" and gone.digest.startswith("b3:") and not Path(removal["path"]).exists()
    assert await scene.store.intact([left]) == set()
    assert (await scene.keeper.plan())["artifacts"] == []


async def test_what_is_collected_again_while_gc_runs_stays(scene: Scene) -> None:
    run = await scene.run(3, made="same")
    [fact] = await scene.ledger.outputs(run, 0)
    await scene.artifact("again", "same", scene.at(-1))  # collected now; its commit is on its way
    scene.retain(artifacts="1")
    await scene.clean()
    assert Path(fact.path).exists()
    later = await scene.run(0, made="same")
    assert await scene.store.intact(await scene.ledger.outputs(later, 0)) == set()
    assert await scene.store.intact(await scene.ledger.outputs(run, 0)) == set()


async def test_store_entries_that_nobody_refers_to_go_after_a_week(scene: Scene) -> None:
    run = await scene.run(20, made="kept")
    stray = await scene.artifact("lost", "stray", scene.at(8))
    young = await scene.artifact("young", "young", scene.at(6))
    assert (await scene.keeper.plan())["bytes"] == len("stray")
    assert await scene.clean() == {"strays": 1}
    assert not Path(stray.path).exists() and Path(young.path).exists()
    assert await scene.store.intact(await scene.ledger.outputs(run, 0)) == set()


async def test_what_a_living_attempt_collected_before_a_long_absence_of_the_daemon_is_no_stray(scene: Scene) -> None:
    at = scene.at(20)
    [run] = await scene.ledger.write(opening(event("p"), now=at))
    await scene.ledger.write(moves.start_run(run, at), moves.add_steps(run, [StepRow(0, "s")], at))
    await scene.ledger.write(
        moves.queue_step(run, 0, "k", "", at), moves.intent(run, 0, "t", 1, "local", "k", "{}", at)
    )
    fact = await scene.artifact("t", "not committed", scene.at(10))
    assert await scene.clean() == {}
    assert Path(fact.path).exists()


# --- code, environments, stat cache -------------------------------------------------------------------------
def snapshot(scene: Scene, raw: str, age: float) -> Path:
    folder = scene.state / "code" / raw[:2] / raw[2:]
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("pass\n")
    return aged(folder, scene.at(age))


async def test_snapshots_go_that_nothing_was_run_from_for_long_unless_a_change_is_explained_against_them(
    scene: Scene,
) -> None:
    used, old, recent = (snapshot(scene, c * 64, age) for c, age in (("a", OLD), ("b", OLD), ("c", 100)))
    at = scene.at(OLD)
    [run] = await scene.ledger.write(opening(event("p"), now=at))
    await scene.ledger.write(moves.start_run(run, at), moves.add_steps(run, [StepRow(0, "s")], at))
    parts = f'{{"code": {{"digest": "b3t:x", "raw": "b3t:{"a" * 64}", "files": {{}}}}}}'
    await scene.ledger.write(moves.queue_step(run, 0, "k", "", at), moves.intent(run, 0, "t", 1, "l", "k", parts, at))
    await scene.ledger.write(moves.commit_result("t", "k", [], 1, at, True))
    assert await scene.clean() == {"code": 1}
    assert (used.exists(), old.exists(), recent.exists()) == (True, False, True)


def test_a_snapshot_that_is_used_again_just_when_it_goes_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "aa" / "x"
    folder.mkdir(parents=True)
    assert keeping.drop_code(tmp_path, "aa/x", folder.stat().st_mtime - 1, False) is None
    assert folder.is_dir() and os.listdir(tmp_path / "aa") == ["x"]


async def test_environments_go_in_which_no_step_has_started_for_long(scene: Scene) -> None:
    if os.statvfs(scene.state).f_flag & keeping.NOATIME:
        pytest.skip("this file system does not note when a file was read")
    homes = {}
    for name, age in (("a" * 32, OLD), ("b" * 32, OLD), ("c" * 32, 10), ("d" * 32, OLD)):
        home = homes[name[0]] = scene.state / "envs" / name
        home.mkdir(parents=True)
        for file in (home / "pyvenv.cfg", home / ".mlpiped-complete"):
            aged_file = file
            aged_file.write_text("x" * 100)
            aged(aged_file, scene.at(age))
        home.with_suffix(".log").write_text("")
        aged(home, scene.at(age))
    os.utime(homes["b"] / ".mlpiped-complete")  # a backend says that it was used
    with (scene.state / "envs" / f"{'d' * 32}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # somebody builds there
        assert (await scene.keeper.plan())["bytes"] == 400
        assert await scene.clean() == {"environments": 1}
    assert [home.exists() for home in homes.values()] == [False, True, True, True]
    assert not homes["a"].with_suffix(".log").exists()


async def test_the_stat_cache_forgets_files_that_are_no_more_but_none_of_a_datastore_that_is_away(
    scene: Scene,
) -> None:
    away = scene.lab.parent / "away"
    away.mkdir()
    scene.keeper.datastores = {"lab": scene.lab, "away": away}
    old, new = scene.at(OLD) * 1000, scene.at(0) * 1000
    rows = {
        name: StatRow(os.fsencode(path), 1, 2, 3, 4, 5, hashed, "b3:x")
        for name, path, hashed in (
            ("there", scene.lab / "there", old), ("gone", scene.lab / "gone", old), ("new", scene.lab / "new", new),
            ("away", away / "gone", old),
        )
    }  # fmt: skip
    await scene.ledger.write(moves.put_stat_cache(list(rows.values())))
    assert await scene.clean() == {"stat cache": 1}
    left = await scene.ledger.stat_cache([row.path for row in rows.values()])
    assert set(left) == {rows[name].path for name in ("there", "new", "away")}


# --- the rest -----------------------------------------------------------------------------------------------
async def test_what_goes_wrong_with_one_part_is_told_and_the_others_go_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.run(OLD)
    await scene.run(0)

    def broken(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "code")

    monkeypatch.setattr(keeping, "old_code", broken)
    answer = await scene.keeper.clean()
    assert [fault.partition(":")[0] for fault in answer["faults"]] == ["code"]
    assert await scene.ledger.counts() and len(await scene.ledger.runs()) == 1


class Boxes:
    """What was sent to a box: a backend that prunes."""

    name = "box"

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.away = False

    async def prune(self, *, only_look: bool) -> tuple[int, int]:
        self.asked.append(only_look)
        if self.away:
            raise BackendUnavailable("`box` does not answer")
        return 2, 3 << 20


async def test_what_was_sent_to_boxes_goes_and_one_that_is_away_is_left_for_later(scene: Scene) -> None:
    near, away = Boxes(), Boxes()
    away.away = True
    scene.keeper.backends = {"away": away, "near": near}  # type: ignore[dict-item]
    answer = await scene.keeper.clean()
    assert [(part["count"], part["bytes"]) for part in answer["parts"] if part["what"] == "sent"] == [(2, 3 << 20)]
    assert answer["faults"] == [] and near.asked == away.asked == [False]
    plan = await scene.keeper.plan()
    assert [part["count"] for part in plan["parts"] if part["what"] == "sent"] == [2] and near.asked[1:] == [True]


async def test_a_plan_removes_nothing(scene: Scene) -> None:
    run = await scene.run(OLD, made="xx")
    await scene.run(0)
    stray = await scene.artifact("lost", "stray", scene.at(8))
    code = snapshot(scene, "b" * 64, OLD)
    scene.retain(artifacts="1")
    plan = await scene.keeper.plan()
    assert {p["what"]: p["count"] for p in plan["parts"] if p["count"]} == {
        "logs": 1, "artifacts": 1, "strays": 1, "code": 1, "runs": 1,
    }  # fmt: skip
    assert plan["seconds"] == 60.0
    assert await scene.ledger.run(run) is not None and Path(stray.path).exists() and code.exists()
    assert (scene.state / "jobs" / f"mlp-{run}-0" / "stdout").exists()


def test_a_clock_that_leaps_forward_is_not_trusted_and_one_that_walks_or_goes_back_is() -> None:
    before = Span(1000 * DAY, 50.0)
    assert leapt(before, Span(1000 * DAY + DAY // 24, 50.0 + 3600)) == 0.0
    assert leapt(before, Span(990 * DAY, 50.0 + 3600)) == 0.0
    assert leapt(before, Span(1400 * DAY, 50.0 + 3600)) > 300 * 86_400


async def test_processes_of_jobs_that_nobody_waits_for_are_named(scene: Scene) -> None:
    alive = await scene.run(0, end=False)
    [run] = await scene.ledger.write(opening(event("q"), now=scene.at(0)))
    now = scene.at(0)
    await scene.ledger.write(moves.start_run(run, now), moves.add_steps(run, [StepRow(0, "s")], now))
    await scene.ledger.write(
        moves.queue_step(run, 0, "k", "", now), moves.intent(run, 0, "mlp-live", 1, "local", "k", "{}", now)
    )

    def start(token: str, jobs: Path) -> subprocess.Popen[bytes]:
        env = {"MLPIPED_TOKEN": token, "MLPIPED_METRICS": f"{jobs}/{token}/metrics.jsonl"}
        code = "import sys; print(flush=True); sys.stdin.read()"
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        return process

    jobs = scene.state / "jobs"
    started: Sequence[subprocess.Popen[bytes]] = [
        start("mlp-live", jobs), start("mlp-unknown", jobs), start("mlp-unknown", scene.lab),
        start(f"mlp-{alive}-0", jobs),
    ]  # fmt: skip
    try:
        assert await scene.keeper.orphans() == {"mlp-unknown": [started[1].pid]}  # one ended only just now
    finally:
        for process in started:
            process.kill()
            process.wait()
