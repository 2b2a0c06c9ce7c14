"""50 crash-injected runs whose steps are jobs of a Slurm cluster, with slurmctld and slurmd killed, slurmctld frozen,
and sbatch killed in mid-submission among them: 0 lost, 0 duplicated, 0 stuck, and nothing of ours is left in the queue.

MLPIPED_SLURM_CRASH_RUNS says how many.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from crash.cluster import ClusterTrial
from lab import slurm_rig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.slurm_rig import Cluster

RUNS = int(os.environ.get("MLPIPED_SLURM_CRASH_RUNS", "50"))
DEATHS = 14  # each has several runs alive


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """For tests that kill it."""
    with slurm_rig.running() as cluster:
        yield cluster


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(120 + 15 * RUNS)
def test_no_job_of_slurm_is_lost_or_runs_twice_however_often_daemon_and_controller_die(
    own_cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with ClusterTrial(5000, own_cluster, alive=min(RUNS, 40)) as trial:
        verdict = trial.go(runs=RUNS, deaths=DEATHS)
        with capsys.disabled():
            print(f"\n{dict(trial.shaken)} in the cluster; {verdict}")
        assert not verdict.violations, f"{verdict}\n{trial.daemon.tail()}"
    assert verdict.injected >= RUNS and min(trial.shaken[kind] for kind in trial.kinds) >= 1


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_daemon_that_believes_sbatch_is_found_out(own_cluster: Cluster) -> None:
    with ClusterTrial(5000, own_cluster, "sbatch_believed", alive=6, finished=30) as trial:
        trial.begin()
        assert trial.start()
        with trial.frozen():
            trial.feed(0)
            trial.cut_off(within=30)
        trial.daemon.kill9()
        verdict = trial.finish()
    assert any("is left: PENDING" in each for each in verdict.violations), f"it was not found out: {verdict}"
