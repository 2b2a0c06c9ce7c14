"""What a real cluster does to steps (J1 to J8), as a person sees it: what `why`, `compute` and the run say, and that
machines' faults cost no try of the step's own."""

from __future__ import annotations

import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import lines, step, steps, until
from lab import slurm_rig
from lab.slurm_desk import Desk

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]
KILLS = "JobAcctGatherParams=OverMemoryKill\n"  # it ends what takes more memory than it asked for, on whichever node
IMPATIENT = Path(__file__).parent.parent / "faults/crash/impatient.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_rig.Cluster]:
    """It keeps accounts, preempts by killing, and forgets what has ended as soon as Slurm can."""
    with slurm_rig.running(accounting=True, min_job_age=2, preempt="CANCEL", more=KILLS) as found:
        yield found


@pytest.fixture
def desk(cluster: slurm_rig.Cluster) -> Iterator[Desk]:
    found = Desk(cluster)
    found.daemon.start()
    yield found
    found.close()


def begun(desk: Desk, count: int = 1) -> int:
    """Wait until so many attempts of the step have begun; the Slurm job of the last."""
    until(lambda: len(lines(desk.effects)) >= count, f"attempt {count} has begun", 60)
    name = f"mlp-{lines(desk.effects)[-1]}"
    return next(job for job, (_, of) in desk.cluster.jobs().items() if of == name)


def told(desk: Desk, run: int, words: str) -> str:
    """`why` of the step, once it says this."""
    return until(lambda: said if words in (said := desk.why(run)) else "", f"`why` says {words!r}", 60)


def succeeds_after_a_loss(desk: Desk, run: int, words: str) -> None:
    """The next attempt is another job; the run says how the first one ended."""
    desk.go.touch()
    found = desk.daemon.end(run, 120)
    assert steps(found) == {"step": "succeeded"} and step(found, "step")["attempts"] == 2
    assert len(set(lines(desk.effects))) == 2
    assert words in desk.why(run)


@contextmanager
def no_controller(desk: Desk) -> Iterator[None]:
    desk.cluster.save()
    desk.cluster.kill("slurmctld")
    try:
        yield
    finally:
        desk.cluster.restart()
        desk.cluster.ready()


# --- compute: what the cluster has ----------------------------------------------------------------------------------
def test_compute_shows_partition_nodes_and_our_jobs_and_names_a_drained_node_with_its_reason(desk: Desk) -> None:
    def seen() -> dict[str, Any]:
        (found,) = (each for each in desk.daemon.json("compute")["compute"] if each["name"] == "first")
        return dict(found["cluster"])

    until(lambda: seen()["nodes_up"] == 2, "both nodes are seen", 60)
    assert seen() == {"partition": "main", "nodes_up": 2, "nodes_down": 0, "away": [], "jobs": {}, "full": None}
    (local,) = (each for each in desk.daemon.json("compute")["compute"] if each["name"] == "local")
    assert local["cluster"] is None
    run = desk.waits("first")
    begun(desk)
    until(lambda: seen()["jobs"] == {"RUNNING": 1}, "our job is counted", 60)
    desk.cluster.command("scontrol", "update", "nodename=n2", "state=drain", "reason=bad disk | see ticket 7")
    try:
        until(lambda: seen()["nodes_down"] == 1, "the drained node is seen", 60)
        assert seen()["away"] == [{"nodes": "n2", "state": "drained", "reason": "bad disk | see ticket 7"}]
        shown = desk.daemon.ctl("compute").stdout
        assert re.search(r"^first +main +1 +1 +1 RUNNING$", shown, re.MULTILINE), shown
        assert re.search(r"^first +n2 +drained +bad disk \| see ticket 7$", shown, re.MULTILINE), shown
    finally:
        desk.cluster.ready()
    desk.go.touch()
    assert steps(desk.daemon.end(run)) == {"step": "succeeded"}
    until(lambda: seen()["jobs"] == {}, "what has ended is not counted")


# --- J1, J2: the controller -----------------------------------------------------------------------------------------
def test_J1_without_a_controller_the_step_runs_on_why_says_so_and_it_is_known_when_it_is_back(desk: Desk) -> None:
    run = desk.waits("cluster")
    begun(desk)
    with no_controller(desk):
        said = told(desk, run, "does not answer")
        assert "held: " in said and "the Slurm of `cluster` does not answer" in said
        until(lambda: "Slurm does not answer" in desk.daemon.ctl("compute").stdout, "the compute is not well", 60)
        later = desk.waits("cluster", "later")
        until(lambda: "Slurm does not answer" in desk.why(later), "what comes later waits for it", 60)
    desk.go.touch()
    assert steps(desk.daemon.end(run, 120)) == {"step": "succeeded"}
    assert step(desk.daemon.show(run), "step")["attempts"] == 1
    assert desk.daemon.end(later, 120)["outcome"] == "succeeded"


def test_J2_a_job_that_the_controller_took_without_saying_so_runs_once(desk: Desk) -> None:
    desk.go.touch()
    desk.cluster.kill("slurmctld", signal.SIGSTOP)
    try:
        run = desk.waits("cluster")
        told(desk, run, "sbatch")
    finally:
        desk.cluster.kill("slurmctld", signal.SIGCONT)
    assert steps(desk.daemon.end(run, 150)) == {"step": "succeeded"}
    assert len(lines(desk.effects)) == 1


# --- J3: the machine is taken away ----------------------------------------------------------------------------------
def test_J3_a_node_that_fails_costs_no_try_and_why_names_it(desk: Desk) -> None:
    run = desk.waits("cluster")
    node = desk.cluster.command("squeue", "-h", "-j", str(begun(desk)), "-o", "%N").strip()
    desk.cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        begun(desk, 2)
        assert "its node failed" in desk.why(run)
    finally:
        desk.cluster.ready()
    succeeds_after_a_loss(desk, run, "its node failed")


def test_J3_preemption_costs_no_try_and_why_names_it(desk: Desk) -> None:
    run = desk.waits("cluster")
    begun(desk)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    desk.cluster.command(*urgent)
    begun(desk, 2)
    succeeds_after_a_loss(desk, run, "Slurm preempted it for a job of higher priority")


def test_J3_a_requeue_by_hand_costs_no_try_and_starts_nothing_twice(desk: Desk) -> None:
    run = desk.waits("cluster")
    job = str(begun(desk))
    desk.cluster.command("scontrol", "update", f"jobid={job}", "requeue=1")
    desk.cluster.command("scontrol", "requeue", job)
    begun(desk, 2)
    succeeds_after_a_loss(desk, run, "somebody requeued it in Slurm")


# --- J4, J7: forgotten ----------------------------------------------------------------------------------------------
def test_J4_a_job_that_ended_and_was_forgotten_while_no_daemon_ran_is_told_by_its_exit_file(desk: Desk) -> None:
    run = desk.waits("cluster")
    job = begun(desk)
    desk.daemon.kill9()
    desk.go.touch()
    until(lambda: job not in desk.cluster.jobs(), "Slurm has forgotten the job", 150)
    desk.daemon.start()
    found = desk.daemon.end(run)
    assert steps(found) == {"step": "succeeded"} and step(found, "step")["attempts"] == 1
    assert len(lines(desk.effects)) == 1


def test_J7_a_job_that_a_killed_controller_forgot_costs_no_try_and_whoever_has_its_id_now_is_left_alone(
    cluster: slurm_rig.Cluster,
) -> None:
    desk = Desk(cluster)
    desk.daemon.program = [sys.executable, IMPATIENT]
    stranger = ["sbatch", "--parsable", "--output=/dev/null", "--chdir=/tmp", "--job-name=stranger"]

    def ours() -> list[int]:
        return [job for job, (state, name) in cluster.jobs().items() if name.startswith("mlp-") and state == "PENDING"]

    try:
        desk.daemon.start()
        desk.go.touch()
        full = int(cluster.command(*stranger, "-N2", "--exclusive", "--wrap=sleep 300"))
        cluster.wait_for(lambda: cluster.jobs()[full][0] == "RUNNING", "both nodes are taken")
        with cluster.forgetting():
            run = desk.waits("cluster")
            told(desk, run, "waits in the queue of cluster: ")
            (job,) = ours()
        taken = full
        while taken < job:
            taken = int(cluster.command(*stranger, "--wrap=sleep 1"))
        until(ours, "another job is submitted for the step", 90)
        assert cluster.jobs()[job] == ("PENDING", "stranger")
        cluster.command("scancel", str(full))
        assert steps(desk.daemon.end(run, 120)) == {"step": "succeeded"}
        assert f"Slurm does not know job {job} any more, and it had not started" in desk.why(run)
        assert len(lines(desk.effects)) == 1
    finally:
        desk.close()


# --- J8: ended by others or by its limits; what waits ---------------------------------------------------------------
def test_J8_an_administrators_scancel_fails_the_step_and_why_says_who_it_was_not(desk: Desk) -> None:
    run = desk.waits("cluster")
    desk.cluster.command("scancel", str(begun(desk)))
    found = desk.daemon.end(run)
    assert steps(found) == {"step": "failed"} and step(found, "step")["attempts"] == 1
    assert "cancelled in Slurm, not by mlpiped" in desk.why(run)


def test_J8_slurm_s_time_limit_is_a_timeout_of_the_step(desk: Desk) -> None:
    run = desk.waits("cluster")
    desk.cluster.command("scontrol", "update", f"jobid={begun(desk)}", "TimeLimit=1", "EndTime=now+5seconds")
    found = desk.daemon.end(run, 150)
    assert steps(found) == {"step": "timed_out"}
    assert "timed out" in desk.why(run) or "time limit" in desk.why(run)


def test_J8_a_step_over_its_memory_says_so(desk: Desk) -> None:
    body = (
        'hungry = "import time; kept = bytearray(300 << 20); print(len(kept)); time.sleep(300)"\n'
        'step = CommandStep(["python3", "-c", hungry], name="step", compute_target="cluster",\n'
        '                   resources=Resources(memory="64M"))\npipeline = Pipeline("hungry", steps=[step])\n'
    )
    desk.daemon.install("hungry", body)
    found = desk.daemon.go("hungry", timeout=120)
    assert steps(found) == {"step": "failed"}
    assert "out of memory" in desk.why(found["id"])


def test_J8_one_rank_over_its_memory_ends_the_others_and_the_log_says_so(desk: Desk) -> None:
    code = desk.daemon.plugins / "code"
    code.mkdir()
    (code / "ranks.py").write_text(
        "import os, time\nkept = b'x' * (300 << 20) if os.environ['SLURM_PROCID'] == '1' else b''\ntime.sleep(300)\n"
    )
    body = (
        'step = MpiStep("ranks.py", source_directory="code", name="step", node_count=2, compute_target="cluster",\n'
        '               resources=Resources(memory="64M"))\npipeline = Pipeline("ranks", steps=[step])\n'
    )
    desk.daemon.install("ranks", body)
    found = desk.daemon.go("ranks", timeout=120)
    assert steps(found) == {"step": "failed"} and step(found, "step")["attempts"] == 1
    assert "exited with status 137" in desk.why(found["id"])
    said = desk.daemon.ctl("logs", f"{found['id']}/step", "--stderr").stdout
    assert "exceeded memory limit" in said and "task 0: Killed" in said, said


@pytest.mark.parametrize("reason", ["Resources", "Priority"])
def test_J8_what_waits_for_room_or_behind_others_has_slurm_s_reason_in_why_and_status(desk: Desk, reason: str) -> None:
    """A stranger fills both nodes; for `Priority`, another waits before us."""
    stranger = ["sbatch", "--parsable", "-p", "main", "-N2", "--exclusive", "--output=/dev/null", "--chdir=/tmp"]
    first = desk.cluster.command(*stranger, "--wrap=sleep 300").strip()
    desk.cluster.wait_for(lambda: desk.cluster.jobs()[int(first)][0] == "RUNNING", "the stranger runs")
    held = [first]
    if reason == "Priority":
        held.append(desk.cluster.command(*stranger, "--wrap=sleep 300").strip())
        desk.cluster.wait_for(lambda: desk.reason(int(held[1])) == "Resources", "the other waits first")
    try:
        desk.go.touch()
        run = desk.waits("cluster")
        assert f"waits in the queue of cluster: {reason}" in told(desk, run, reason)
        assert f"waits in the queue of cluster: {reason}" in desk.daemon.ctl("status").stdout
    finally:
        for job in held:
            desk.cluster.command("scancel", job)
    assert steps(desk.daemon.end(run, 120)) == {"step": "succeeded"}


def test_J8_a_limit_of_the_qos_is_named_and_waited_for(desk: Desk) -> None:
    desk.cluster.command("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxJobsPerUser=1")
    try:
        first = desk.waits("cluster")
        begun(desk)
        second = desk.waits("cluster", "later")
        assert "waits in the queue of cluster: QOSMaxJobsPerUserLimit" in told(desk, second, "QOSMax")
        assert "QOSMaxJobsPerUserLimit" in desk.daemon.ctl("status").stdout
        desk.go.touch()
        assert [desk.daemon.end(run, 120)["outcome"] for run in (first, second)] == ["succeeded"] * 2
    finally:
        desk.cluster.command("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxJobsPerUser=-1")


def test_J8_a_full_queue_is_waited_for_and_why_and_compute_have_slurm_s_words(desk: Desk) -> None:
    desk.cluster.command("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=1")
    try:
        first = desk.waits("cluster")
        begun(desk)
        second = desk.waits("cluster", "later")
        told(desk, second, "QOSMaxSubmitJobPerUserLimit")
        assert "its queue takes no more jobs: " in (shown := desk.daemon.ctl("compute").stdout), shown
        desk.go.touch()
        assert [desk.daemon.end(run, 120)["outcome"] for run in (first, second)] == ["succeeded"] * 2
        assert "takes no more jobs" not in desk.daemon.ctl("compute").stdout
    finally:
        desk.cluster.command("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=-1")
