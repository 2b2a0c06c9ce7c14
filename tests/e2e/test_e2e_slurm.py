"""The daemon over a real cluster: data goes through its steps, kills are lived through, and `why` has Slurm's words."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from harness import lines, steps, until
from lab import slurm_rig
from lab.slurm_desk import Desk, behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]
CHAIN = """
made, counted = PipelineData("made"), PipelineData("counted")
make = CommandStep(f"echo made by $SLURM_JOB_NAME; printf 'a\\nb\\n' > {made}", name="make", outputs=[made],
                   compute_target="cluster")
count = CommandStep(f"wc -l < {made} > {counted}", name="count", outputs=[counted], compute_target="cluster")
pipeline = Pipeline("chain", steps=[make, count])
"""
TALKS = """
say = CommandStep("echo first; until test -e GO; do sleep 0.05; done; echo second", name="say",
                  compute_target="cluster")
pipeline = Pipeline("talks", steps=[say])
"""


@pytest.fixture
def desk(slurm_cluster: slurm_rig.Cluster) -> Iterator[Desk]:
    found = Desk(slurm_cluster)
    yield found
    found.close()


def test_steps_run_in_the_cluster_with_data_between_them_and_are_reused(desk: Desk) -> None:
    daemon = desk.daemon.start()
    daemon.install("chain", CHAIN)
    found = daemon.go("chain")
    assert steps(found) == {"make": "succeeded", "count": "succeeded"}
    assert {step["compute"] for step in found["steps"]} == {"cluster"}
    assert daemon.ctl("get", f"{found['id']}/counted", "-").stdout.strip() == "2"
    assert "made by mlp-" in daemon.ctl("logs", f"{found['id']}/make").stdout
    assert len(desk.jobs()) == 2
    assert steps(daemon.go("chain")) == {"make": "reused", "count": "reused"}
    assert len(desk.jobs()) == 2


def test_jobs_have_their_folders_in_the_work_dir_and_gc_follows_them_there(
    slurm_cluster: slurm_rig.Cluster, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    desk = Desk(slurm_cluster, f'work_dir = "{shared}"')
    try:
        desk.daemon.config.write_text(desk.daemon.config.read_text() + '[retention]\nlogs = "1s"\n')
        daemon = desk.daemon.start()
        daemon.install("chain", CHAIN)
        found = daemon.go("chain")
        assert steps(found) == {"make": "succeeded", "count": "succeeded"}
        assert daemon.ctl("get", f"{found['id']}/counted", "-").stdout.strip() == "2"
        assert "made by mlp-" in daemon.ctl("logs", f"{found['id']}/make").stdout

        def folders() -> list[str]:
            return [path.name for place in (shared, daemon.state) for path in (place / "jobs").glob("[!.]*")]

        assert len(set(folders())) == 2 and len(folders()) == 4
        until(lambda: daemon.ctl("gc").returncode == 0 and not folders(), "old logs go, and the links to them")
    finally:
        desk.close()


def test_a_killed_daemon_finds_its_job_in_the_cluster_again_and_it_runs_once(desk: Desk) -> None:
    daemon = desk.daemon.start()
    run = desk.waits("cluster")
    until(lambda: lines(desk.effects), "the step has begun")
    daemon.kill9()
    daemon.start()
    until(lambda: "runs on cluster" in desk.why(run), "it runs on")
    desk.go.touch()
    assert steps(daemon.end(run)) == {"step": "succeeded"}
    assert len(lines(desk.effects)) == len(desk.jobs()) == 1


@pytest.mark.parametrize("form", ["via", "staged"])
def test_a_cluster_behind_a_login_node_is_worked_with_over_a_kill_of_the_daemon(
    request: pytest.FixtureRequest, tmp_path: Path, form: str
) -> None:
    with reached(request, tmp_path, form) as desk:
        daemon = desk.daemon.start()
        daemon.install("chain", CHAIN)
        found = daemon.go("chain")
        assert steps(found) == {"make": "succeeded", "count": "succeeded"}
        assert daemon.ctl("get", f"{found['id']}/counted", "-").stdout.strip() == "2"
        assert "made by mlp-" in daemon.ctl("logs", f"{found['id']}/make").stdout
        run = desk.waits("cluster")
        until(lambda: lines(desk.effects), "the step has begun")
        daemon.kill9()
        daemon.start()
        until(lambda: "runs on cluster" in desk.why(run), "it runs on")
        desk.go.touch()
        assert steps(daemon.end(run)) == {"step": "succeeded"}
        assert len(lines(desk.effects)) == 1 and len(desk.jobs()) == 3


@pytest.mark.parametrize("form", ["via", "staged"])
def test_logs_of_a_step_behind_a_login_node_are_followed_while_it_runs(
    request: pytest.FixtureRequest, tmp_path: Path, form: str
) -> None:
    with reached(request, tmp_path, form) as desk:
        daemon = desk.daemon.start()
        daemon.install("talks", TALKS.replace("GO", str(desk.go)))
        run = daemon.run("talks")
        until(lambda: "runs on cluster" in daemon.ctl("why", f"{run}/say").stdout, "it runs", 60)
        with daemon.following("logs", f"{run}/say", "-f") as reader:
            assert reader.stdout is not None and reader.stdout.readline() == "first\n"
            assert daemon.show(run)["state"] == "running"
            desk.go.touch()
            assert reader.stdout.read() == "second\n" and reader.wait(20) == 0
        assert steps(daemon.end(run)) == {"say": "succeeded"}
        assert daemon.ctl("logs", f"{run}/say").stdout == "first\nsecond\n"


@contextmanager
def reached(request: pytest.FixtureRequest, tmp_path: Path, form: str) -> Iterator[Desk]:
    """`via`: the daemon's machine sees the files too. `staged`: it sees nothing of the cluster."""
    if form == "via":
        with behind(request.getfixturevalue("slurm_login"), tmp_path / "shared") as desk:
            yield desk
        return
    apart = request.getfixturevalue("slurm_apart")
    with behind(apart.login, apart.work_dir, "shared = false") as desk:
        yield desk
        assert apart.seen_here() == []


def test_what_waits_in_slurm_s_queue_says_slurm_s_reason_also_to_the_next_daemon(desk: Desk) -> None:
    daemon = desk.daemon.start()
    desk.go.touch()
    with desk.drained("n1"):
        run = desk.waits("first")
        words = until(lambda: why if "Node" in (why := desk.why(run)) else "", "Slurm's reason")
        assert "waits in the queue of first: " in words
        daemon.kill9()
        daemon.start()
        until(lambda: "waits in the queue of first: " in (why := desk.why(run)) and "Node" in why, "the same again")
        assert desk.jobs() == ["PENDING"] and not lines(desk.effects)
    assert steps(daemon.end(run)) == {"step": "succeeded"}
    assert len(lines(desk.effects)) == len(desk.jobs()) == 1


def test_a_step_that_fails_there_says_its_last_words_and_is_tried_again_as_another_job(desk: Desk) -> None:
    daemon = desk.daemon.start()
    body = (
        'step = CommandStep("echo no such model >&2; exit 3", name="step", compute_target="cluster",\n'
        '                   retry=Retry(attempts=2, delay="1s"))\npipeline = Pipeline("fails", steps=[step])\n'
    )
    daemon.install("fails", body)
    found = daemon.go("fails")
    assert steps(found) == {"step": "failed"}
    assert "no such model" in desk.why(found["id"]) and len(desk.jobs()) == 2


def test_cancel_takes_a_job_out_of_the_queue_and_ends_one_that_runs(desk: Desk) -> None:
    daemon = desk.daemon.start()
    with desk.drained("n1"):
        queued = desk.waits("first")
        until(lambda: "Node" in desk.why(queued), "it waits in the queue")
        assert daemon.ctl("cancel", queued).returncode == 0
        assert steps(daemon.end(queued)) == {"step": "cancelled"}
        until(lambda: desk.jobs() == ["CANCELLED"], "it is out of the queue")
    running = desk.waits("cluster")
    until(lambda: lines(desk.effects), "the step has begun")
    assert daemon.ctl("cancel", running).returncode == 0
    assert steps(daemon.end(running)) == {"step": "cancelled"}
    until(lambda: not {"RUNNING", "COMPLETING", "PENDING"}.intersection(desk.jobs()), "Slurm has ended it")
    assert len(lines(desk.effects)) == 1


def test_a_cluster_without_nodes_is_not_well_and_is_used_as_soon_as_it_has_some(desk: Desk) -> None:
    desk.go.touch()
    with desk.drained("n[1-2]"):
        daemon = desk.daemon.start()
        run = desk.waits("cluster")
        why = until(lambda: why if "no node" in (why := desk.why(run)) else "", "the reason for which it waits")
        assert "cluster: no node of partition `main` is up: 2 down or drained" in why
        assert "2 down or drained" in daemon.ctl("compute").stdout
        assert desk.jobs() == []
    assert steps(daemon.end(run, 120)) == {"step": "succeeded"}


def test_cards_are_slurm_s_to_give_and_no_lease_of_this_host_is_taken_for_them(desk: Desk) -> None:
    daemon = desk.daemon.start()
    body = (
        'step = CommandStep("echo cards: $CUDA_VISIBLE_DEVICES", name="step", compute_target="cluster",\n'
        '                   resources=Resources(gpus=2))\npipeline = Pipeline("cards", steps=[step])\n'
    )
    daemon.install("cards", body)
    found = daemon.go("cards")
    assert steps(found) == {"step": "succeeded"}
    assert daemon.ctl("logs", f"{found['id']}/step").stdout.strip() == "cards: 0,1"
    (cluster,) = (each for each in daemon.json("compute")["compute"] if each["name"] == "cluster")
    assert len(cluster["cards"]) == slurm_rig.GPUS * len(slurm_rig.NODES)
    assert not list((daemon.state / "gpus").glob("cluster/*"))
