"""Crash-injected runs whose steps are jobs of a Slurm cluster behind a login node, with files that both sides see and
without: beside all that may happen to Slurm (crash/cluster.py), the login node's sshd is killed, its sessions too, and
the way to it is cut. 0 lost, 0 duplicated, 0 stuck; and when `gc` has removed everything and an hour has gone by,
nothing of ours is left in the queue, on the login node or in the cluster's folder.

MLPIPED_LOGIN_CRASH_RUNS says how many, of each form.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from crash.cluster import ClusterTrial
from crash.elsewhere import WAYS, harm
from harness import processes_below, until
from lab import slurm_apart, slurm_login, slurm_rig
from lab.ssh_rig import Cable

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.slurm_apart import Apart
    from lab.slurm_login import LoginNode
    from lab.ssh_rig import Lab

RUNS = int(os.environ.get("MLPIPED_LOGIN_CRASH_RUNS", "16"))
DEATHS = 10  # each has all runs alive, or nearly
HOUR = 3601.0
FACTS = ("orders", "records", "released", "uses")
OF_JOBS = ("jobs/mlp-*", *(f"slurm/{kind}/[!.]*" for kind in FACTS), "mlp-*", ".cas/*", ".used/*")
MAYBE_IN_USE = ("jobs/.mlp-*", "slurm/*/.*", "slurm/arrays/*", ".new/*")  # until it has been there for an hour


class LoginTrial(ClusterTrial):
    """No command of Slurm's works on the daemon's machine."""

    kinds = tuple(kind for pair in zip(ClusterTrial.kinds, WAYS, strict=True) for kind in pair)

    lives = (1.0, 5.0)  # what is asked over there takes its time
    often = 0.65

    def __init__(self, seed: int, login: LoginNode, apart: Apart | None = None, **more: Any) -> None:
        """`apart`: the cluster, if it shares no files."""
        self.login, self.apart, self.work_dir = login, apart, apart and apart.work_dir
        self.cable = Cable(login.box)
        super().__init__(seed, login.cluster, **{"alive": min(RUNS, 16)} | more)

    def reach(self) -> None:
        known = self.daemon.root / "known_hosts"
        known.write_text(self.login.box.known(self.cable.port))
        self.configure(self.login.config("login", port=self.cable.port, known_hosts=known, keepalive="1s"))
        where = self.work_dir or self.daemon.root / "shared"
        self.name_cluster(via='"login"', work_dir=f'"{where}"', shared="false" if self.work_dir else "true")

    def happens(self, what: str) -> None:
        if what in WAYS:
            harm(what, self.login.box, self.cable, self.random.uniform(0, 0.3))
        else:
            super().happens(what)

    def job_folder(self, token: str) -> Path:
        if self.apart is None:
            return super().job_folder(token)
        found = self.apart.from_here(self.apart.work_dir).glob(f"*/jobs/{token}")
        return next(found, Path("/nowhere"))

    def processes(self) -> set[int]:
        return super().processes() | (processes_below(self.work_dir) if self.work_dir else set())

    def left(self, *patterns: str) -> list[Path]:
        """Of the cluster's folder."""
        place = self.daemon.root / "shared"
        if self.apart is not None:
            [place] = self.apart.from_here(self.apart.work_dir).iterdir()
        return [path for pattern in patterns for path in place.glob(pattern)]

    def clean(self) -> list[str]:
        """Everything is old enough for `gc`, and then for whoever starts an hour later; what is left all the same."""
        assert self.left("jobs/mlp-*") and self.left("slurm/records/*")
        text = self.daemon.config.read_text() + '\n[retention]\nruns = "1ms"\nlogs = "1ms"\n'
        if self.apart is not None:
            text = text.replace("[compute.cluster]", '[compute.cluster]\nstore = "1K"')
        self.daemon.config.write_text(text)
        self._gc(lambda: not self.left(*OF_JOBS))
        old = self.left(*MAYBE_IN_USE)
        for path in old:
            os.utime(path, (time.time() - HOUR, time.time() - HOUR))
        self._gc(lambda: not any(path.exists() for path in old))
        noted = self.daemon.state.glob("left-there/*/*")
        found = [*self.left(*OF_JOBS), *(path for path in old if path.exists()), *noted]
        return [*(f"{path} is left" for path in found), *self.jobs()]

    def _gc(self, enough: Callable[[], bool]) -> None:
        with self.living(), contextlib.suppress(AssertionError):  # `clean` names what is left
            until(lambda: self.daemon.json("gc")["faults"] == [] and enough(), "all is gone", 60, 0.5)

    def close(self) -> None:
        self.cable.close()
        super().close()


def judged(trial: LoginTrial, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = trial.go(runs=RUNS, deaths=DEATHS)
    with capsys.disabled():
        print(f"\n{dict(trial.shaken)} in the cluster; {verdict}")
    assert not verdict.violations, f"{verdict}\n{trial.daemon.tail()}"
    assert verdict.injected >= RUNS and len(trial.shaken) > len(WAYS)
    left = trial.clean()
    assert not left, "\n".join([*left, trial.daemon.tail()])


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(180 + 15 * RUNS)
def test_no_job_is_lost_or_runs_twice_however_often_daemon_controller_and_login_node_die(
    ssh_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    with slurm_rig.running() as cluster:
        login = slurm_login.node(ssh_lab, cluster)
        with LoginTrial(6000, login) as trial:
            judged(trial, capsys)
        login.box.stop()


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(180 + 15 * RUNS)
def test_no_job_of_a_cluster_that_shares_no_files_is_lost_or_runs_twice(
    ssh_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    with slurm_apart.running(ssh_lab) as apart:
        with LoginTrial(6500, apart.login, apart) as trial:
            judged(trial, capsys)
        assert apart.seen_here() == []
