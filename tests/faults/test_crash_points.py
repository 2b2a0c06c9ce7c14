"""A1–A8, B3: the daemon dies at one named place in the life of a step or a trigger, and the next one goes on.

The judge is that of the crash harness: the steps' own marks, not the ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
from crash import power
from crash.trial import OUTSIDE, Trial
from harness import BIN, Daemon, lines, step, until

from mlpiped.crash import POINTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IDS = {
    "before_fire": "A1",
    "before_start": "A1",
    "after_fire": "A1",
    "before_intent": "A1",
    "after_intent": "A2",
    "after_submit": "A3",
    "after_handle": "A3",
    "before_outcome": "A5",
    "before_end": "A5",
    "mid_collect": "A6",
    "after_rename": "A6",
    "before_commit": "A7",
    "in_commit": "A7",
    "committed": "A7",
    "after_commit": "A7",
}


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """One state folder for all points: what the earlier ones left must stay true through the later ones."""
    with Trial(4000, clocks=False, alive=4) as trial:
        trial.begin()
        yield trial


@pytest.fixture
def own() -> Iterator[Daemon]:
    with Daemon(slots=4) as daemon:
        yield daemon


def test_every_crash_point_stands_for_a_fault_of_the_matrix() -> None:
    assert set(IDS) == set(POINTS)


@pytest.mark.parametrize(("fault", "point"), [(fault, point) for point, fault in IDS.items()])
def test_A_a_daemon_that_dies_at_a_point_leaves_nothing_undone_and_nothing_done_twice(
    trial: Trial, fault: str, point: str
) -> None:
    trial.life(point, count=1, patience=20, files=1)
    assert trial.evidence.deaths[-1][1] == point, "it was never there"
    verdict = trial.finish()
    assert not verdict.violations, f"{fault} {point}: {verdict}\n{trial.daemon.tail()}"


@pytest.fixture(scope="module")
def powered() -> Iterator[Trial]:
    """The same on a disk that loses, with each death, what was not synced."""
    if (why := power.missing()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    with Trial(4500, power=True, clocks=False, alive=4) as trial:
        trial.begin()
        yield trial


@pytest.mark.parametrize(("fault", "point"), [(fault, point) for point, fault in IDS.items()])
def test_B4_the_power_is_cut_at_a_point_and_all_that_was_acknowledged_is_there(
    powered: Trial, fault: str, point: str
) -> None:
    powered.life(point, count=1, patience=20, files=1)
    assert powered.evidence.deaths[-1][1] == point, "it was never there"
    verdict = powered.finish()
    assert not verdict.violations, f"{fault} {point}: {verdict}\n{powered.daemon.tail()}"


# --- A4 -----------------------------------------------------------------------------------------------------------
def test_A4_a_step_goes_on_while_its_daemon_is_killed_again_and_again_and_its_log_is_whole(own: Daemon) -> None:
    count, lives = 120, 5
    said = own.root / "said"
    own.install(
        "long",
        f"""
command = 'i=0; while [ $i -lt {count} ]; do i=$((i+1)); echo line $i; echo $i >> {said}; sleep 0.02; done'
pipeline = Pipeline("long", steps=[CommandStep(command, name="talk")])
""",
    )
    number = own.run("long")
    for life in range(1, lives + 1):
        until(lambda: len(lines(said)) >= life * count // (lives + 1), f"it talks in life {life}")  # noqa: B023
        own.kill9()
        own.start()
    run = own.end(number)
    assert run["outcome"] == "succeeded"
    assert step(run, "talk")["attempts"] == 1
    assert lines(said) == [str(i) for i in range(1, count + 1)]
    log = own.ctl("logs", f"{number}/talk")
    assert [line for line in log.stdout.splitlines() if "line " in line][-1].endswith(f"line {count}")
    assert sum("line " in line for line in log.stdout.splitlines()) == count, log.stdout


# --- B3, A8: another boot of the host -----------------------------------------------------------------------------
class Host:
    """A daemon that finds the boot id which we say: a file of ours lies over the kernel's, for it and its steps."""

    def __init__(self) -> None:
        self.daemon = Daemon(slots=4)
        self.boot = self.daemon.root / "boot_id"
        over = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        self.daemon.program = ("unshare", "--mount", "sh", "-c", over, self.boot, BIN / "mlpiped")
        self.boots = 0
        self.reboot()

    def reboot(self) -> None:
        self.boots += 1
        self.boot.write_text(f"00000000-0000-4000-8000-{self.boots:012d}\n")

    def kill_all(self) -> None:
        while pids := self.daemon.processes():
            signal_those_that_live(pids, signal.SIGKILL)
            until(lambda: not pids & self.daemon.processes(), "all are dead")
        if self.daemon.process is not None:
            self.daemon.process.wait()
            self.daemon.process = None


def signal_those_that_live(pids: set[int], number: int) -> None:
    """A waiting step starts and ends a `sleep` all the time, and some processes end with the daemon."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.fixture
def host() -> Iterator[Host]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "another boot id needs root: it is a mount over the kernel's"
        )
    host = Host()
    try:
        host.daemon.start()
        yield host
    finally:
        host.daemon.close()


def hold(daemon: Daemon, name: str) -> tuple[Path, Path]:
    """A pipeline of one step that waits for a file to appear: (what it says, that file)."""
    effects, go = daemon.root / f"{name}-effects", daemon.root / f"{name}-go"
    daemon.install(
        name,
        f"""
out = PipelineData("out")
command = (
    f"echo $MLPIPED_TOKEN start >> {effects}; while [ ! -e {go} ]; do sleep 0.02; done;"
    f" echo $MLPIPED_TOKEN > {{out}}; echo $MLPIPED_TOKEN end >> {effects}"
)
pipeline = Pipeline("{name}", steps=[CommandStep(command, name="wait", outputs=[out])])
""",
    )
    return effects, go


def ends(daemon: Daemon, number: int) -> list[str]:
    why = daemon.json("why", f"{number}/wait")
    return [f"{each['end']}: {each['reason']}" for each in why["attempts"]]


def test_B3_after_a_reboot_a_step_that_ran_is_lost_and_run_again_and_says_so(host: Host) -> None:
    effects, go = hold(host.daemon, "reboot")
    number = host.daemon.run("reboot")
    until(lambda: lines(effects), "the step has started")
    host.kill_all()
    host.reboot()
    go.touch()
    host.daemon.start()
    run = host.daemon.end(number)
    assert run["outcome"] == "succeeded"
    first, second = ends(host.daemon, number)
    assert first == "lost: host rebooted"
    assert second.startswith("committed")
    assert [line.split()[1] for line in lines(effects)] == ["start", "start", "end"]


def test_B3_after_a_reboot_what_had_ended_before_it_is_not_run_again(host: Host) -> None:
    effects, go = hold(host.daemon, "ended")
    number = host.daemon.run("ended")
    until(lambda: lines(effects), "the step has started")
    host.daemon.kill9()
    go.touch()
    until(lambda: len(lines(effects)) == 2, "the step has ended")
    token = lines(effects)[0].split()[0]
    until(lambda: (host.daemon.state / "jobs" / token / "exit.json").exists(), "its witness")
    until(lambda: not host.daemon.processes(), "no process of it is left")
    host.reboot()
    host.daemon.start()
    assert host.daemon.end(number)["outcome"] == "succeeded"
    assert len(lines(effects)) == 2


def test_A8_of_two_results_for_one_step_the_first_is_committed_and_the_late_one_changes_nothing(host: Host) -> None:
    effects, go = hold(host.daemon, "late")
    host.daemon.kill9()
    host.daemon.env["MLPIPED_CRASH_AT"] = "after_submit"  # the ledger has no handle yet: the claim is all there is
    host.daemon.start()
    host.daemon.ctl("run", "late")
    assert host.daemon.process is not None
    assert host.daemon.process.wait(20) == -signal.SIGKILL
    host.daemon.process = None
    until(lambda: lines(effects), "the step has started")
    token = lines(effects)[0].split()[0]
    frozen = host.daemon.processes()
    signal_those_that_live(frozen, signal.SIGSTOP)
    # As if another host had it: the claim is of another boot, and nobody here holds its lock.
    claim = host.daemon.state / "jobs" / token / "claim" / "handle.json"
    copy = claim.with_name("copy")
    record = json.loads(claim.read_text())
    copy.write_text(json.dumps({**record, "boot": "00000000-0000-4000-8000-00000000dead"}))
    copy.rename(claim)
    go.touch()
    del host.daemon.env["MLPIPED_CRASH_AT"]
    host.daemon.start()
    number = host.daemon.runs("late")[0]["id"]
    run = host.daemon.end(number)
    assert run["outcome"] == "succeeded"
    before = host.daemon.json("why", f"{number}/wait")["attempts"]
    assert [each["end"] for each in before] == ["lost", "committed"]
    output = host.daemon.root / "output"
    signal_those_that_live(frozen, signal.SIGCONT)
    until(lambda: f"{token} end" in lines(effects), "the late one has ended")
    until(lambda: not frozen & host.daemon.processes(), "its processes are gone")
    host.daemon.restart()
    assert host.daemon.json("why", f"{number}/wait")["attempts"] == before
    assert host.daemon.ctl("get", f"{number}/wait/out", output).returncode == 0
    assert output.read_text().strip() == lines(effects)[1].split()[0] != token
    assert host.daemon.show(number)["outcome"] == "succeeded"


def test_the_loop_can_kill_from_outside_at_any_moment(trial: Trial) -> None:
    for patience in (0.0, 0.05, 0.15, 0.4):
        trial.life(OUTSIDE, patience=patience)
    verdict = trial.finish()
    assert not verdict.violations, str(verdict)
