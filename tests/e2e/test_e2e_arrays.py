"""Like steps of a run on a cluster: one array for them, an attempt of its own for each, and no more than `max_jobs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import lines, steps, until
from lab.slurm_desk import Desk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import slurm_rig

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
SHARDS = """
shards = [CommandStep("set -e; echo SHARD >> EFFECTS; test SHARD != 3 || test $MLPIPED_ATTEMPT = 2; "
                      "echo $SLURM_ARRAY_JOB_ID".replace("SHARD", str(n)), name=f"shard{n}", compute_target="cluster",
                      retry=Retry(attempts=2, delay="100ms")) for n in range(COUNT)]
pipeline = Pipeline("shards", steps=shards)
"""


@pytest.fixture
def desk(slurm_cluster: slurm_rig.Cluster) -> Iterator[Desk]:
    found = Desk(slurm_cluster)
    yield found
    found.close()


def test_like_steps_of_a_run_are_one_array_and_the_one_that_fails_is_tried_again_alone(desk: Desk) -> None:
    daemon = desk.daemon.start()
    daemon.install("shards", SHARDS.replace("EFFECTS", str(desk.effects)).replace("COUNT", "8"))
    found = daemon.go("shards", timeout=150)
    assert set(steps(found).values()) == {"succeeded"}
    assert [step["attempts"] for step in found["steps"]] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert sorted(lines(desk.effects)) == sorted(map(str, [*range(8), 3]))
    arrays = [daemon.ctl("logs", f"{found['id']}/shard{n}").stdout.strip() for n in range(8)]
    alone = arrays.pop(3)
    assert alone == "" and len(set(arrays)) == 1 and arrays[0].isdigit()


def test_there_are_never_more_jobs_than_max_jobs_elements_of_arrays_included(slurm_cluster: slurm_rig.Cluster) -> None:
    desk = Desk(slurm_cluster, "max_jobs = 3")
    try:
        daemon = desk.daemon.start()
        desk.cluster.command("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
        daemon.install("shards", SHARDS.replace("EFFECTS", str(desk.effects)).replace("COUNT", "8"))
        run = daemon.run("shards")
        desk.cluster.ready()
        most = 0

        def over() -> bool:
            nonlocal most
            said = desk.cluster.command("squeue", "-h", "-r", "-t", "PENDING,RUNNING,COMPLETING", "-o", "%i")
            most = max(most, len(said.split()))
            return bool(daemon.show(run)["outcome"])

        until(over, "the run is over", 150)
        assert 0 < most <= 3 and set(steps(daemon.show(run)).values()) == {"succeeded"}
    finally:
        desk.close()
