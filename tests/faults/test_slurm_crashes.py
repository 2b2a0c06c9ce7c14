"""50 crash-injected runs whose steps are jobs of a Slurm cluster, with slurmctld and slurmd killed, slurmctld frozen,
and sbatch killed in mid-submission among them: 0 lost, 0 duplicated, 0 stuck, and nothing of ours is left in the queue.

A controller that is killed forgets what it took last, and its nodes then end what they run of that: such a step may
start once more, as another attempt. MLPIPED_SLURM_CRASH_RUNS says how many.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from crash import impatient
from crash.elsewhere import TrialElsewhere
from harness import BIN, until
from lab import packages, slurm_rig

from mlpiped.backends.slurm.commands import ENDED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crash.judge import Verdict
    from lab.slurm_rig import Cluster

RUNS = int(os.environ.get("MLPIPED_SLURM_CRASH_RUNS", "50"))
DEATHS = 14  # each has several runs alive
TRIALS = 3
MISSED = 20  # seconds; Slurm's own BatchStartTimeout is 10, and MessageTimeout comes on top
KINDS = ("controller", "frozen", "sbatch", "node")
IN_SLURM = """
from functools import partial
CommandStep = partial(CommandStep, compute_target="cluster")
"""


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """For tests that kill it."""
    with slurm_rig.running() as cluster:
        yield cluster


class ClusterTrial(TrialElsewhere):
    """All of it is on this machine: the nodes see the state folder as the daemon does."""

    def __init__(self, seed: int, cluster: Cluster, mutant: str | None = None, **more: Any) -> None:
        self.cluster = cluster
        self.shaken: Counter[str] = Counter()
        program = [sys.executable, impatient.__file__, *([] if mutant is None else [mutant])]
        super().__init__(
            seed, prelude=IN_SLURM, program=program, cuts=True, **{"alive": min(RUNS, 40), "finished": 180.0} | more
        )
        env = {**cluster.env, "PATH": f"{BIN}:{packages.PATH}"}
        self.daemon.env |= {name: env[name] for name in ("SLURM_CONF", "LC_ALL", "PATH")}
        self._over = threading.Event()
        self._administrator = threading.Thread(target=self._look_after)
        self._administrator.start()
        self.configure('\n[compute.cluster]\nkind = "slurm"\npartition = "main"\npoll_interval = "300ms"\n')

    def life(self, *words: object, **more: object) -> None:
        more.setdefault("files", self.random.randint(0, 1))
        super().life(*words, **more)

    def shake(self, what: str = "") -> None:
        """What happens to Slurm."""
        what = what or KINDS[self.shaken.total() % len(KINDS)]
        if what == "controller":
            self.cluster.kill("slurmctld")
            time.sleep(self.random.uniform(0, 0.3))
            self.cluster.restart()
        elif what == "node":
            node = self.random.choice(slurm_rig.NODES)
            self.cluster.kill(node)
            time.sleep(self.random.uniform(0, 0.3))
            self.cluster.serve(node)
        else:
            self._freeze(kill=what == "sbatch")
        self.shaken[what] += 1

    def _freeze(self, *, kill: bool) -> None:
        """The controller hears nothing for a while; those who tell it something meanwhile may not live to see it."""
        self.cluster.kill("slurmctld", signal.SIGSTOP)
        if kill:
            with contextlib.suppress(AssertionError):
                until(self._submitting, "somebody submits", 1)
        time.sleep(self.random.uniform(0.2, 0.8))  # what it asks for is on its way
        for pid in self._submitting() if kill else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.cluster.kill("slurmctld", signal.SIGCONT)

    def _look_after(self) -> None:
        """An administrator. Nodes that have drained themselves are resumed; a job that runs for too long is one that
        its node does not know, which Slurm finds out by itself within minutes."""
        while not self._over.wait(2):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.cluster.resume()
                said = self.cluster.command("squeue", "-h", "-t", "running", "-o", "%M", check=False).split()
                if any(_seconds(spent) > MISSED for spent in said):
                    self.cluster.compare()
                    self._over.wait(MISSED)  # for so long the nodes take no jobs, at worst

    def _submitting(self) -> list[int]:
        return [pid for pid in self.daemon.processes() if _name(pid) == "sbatch"]

    def jobs(self) -> list[str]:
        """Those of ours that are in the queue or run."""
        said = self.cluster.command("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%j")
        found = [line.split("|", 2) for line in said.splitlines()]
        return [
            f"job {n} is left: {state}" for n, state, name in found if name.startswith("mlp") and state not in ENDED
        ]

    def finish(self) -> Verdict:
        verdict = super().finish()
        with self.living():  # a daemon that starts looks at what its queue holds
            with contextlib.suppress(AssertionError):
                until(lambda: not self.jobs(), "the queue is empty", self.finished, 0.2)
        verdict.violations += self.jobs()
        with contextlib.suppress(AssertionError):
            until(lambda: not self.cluster.stepds(), "the end of every process of Slurm's jobs", 10)
        verdict.violations += [f"slurmstepd {pid} is left" for pid in self.cluster.stepds()]
        return verdict

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """One more life, which nothing disturbs."""
        self.daemon.start()
        yield
        self.daemon.term()

    def close(self) -> None:
        self._over.set()
        self._administrator.join()
        self.cluster.command("scancel", "-u", "root", check=False)
        super().close()


def _seconds(spent: str) -> int:
    """ "1:05" """
    minutes, _, seconds = spent.rpartition(":")
    return 60 * int(minutes.rpartition(":")[2] or 0) + int(seconds)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(120 + 15 * RUNS)
def test_no_job_of_slurm_is_lost_or_runs_twice_however_often_daemon_and_controller_die(
    own_cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with ClusterTrial(5000, own_cluster) as trial:
        verdict = trial.go(runs=RUNS, deaths=DEATHS)
        with capsys.disabled():
            print(f"\n{dict(trial.shaken)} in the cluster; {verdict}")
        assert not verdict.violations, f"{verdict}\n{trial.daemon.tail()}"
    assert verdict.injected >= RUNS and min(trial.shaken[kind] for kind in KINDS) >= 1


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_daemon_that_believes_sbatch_is_found_out(own_cluster: Cluster) -> None:
    for seed in range(5000, 5000 + TRIALS):
        with ClusterTrial(seed, own_cluster, "sbatch_believed", alive=6, finished=30) as trial:
            trial.begin()
            assert trial.start()
            trial.feed(0)
            trial.shake("sbatch")
            trial.daemon.kill9()
            verdict = trial.finish()
        if any("is left: PENDING" in each for each in verdict.violations):
            return
    pytest.fail(f"it was not found out: {verdict}")
