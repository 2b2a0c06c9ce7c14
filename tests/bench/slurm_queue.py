"""A cluster's queue as a daemon watches it: how often it asks, and what thousands of idle jobs cost."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.figures import Figure
from tests.bench.gauges import Api, Cpu
from tests.harness import BIN, SDK, Daemon, lines, until
from tests.lab import packages, slurm_rig

if TYPE_CHECKING:
    from collections.abc import Iterator

FEW, MANY = 20, 5000
INTERVAL = 10.0  # seconds: the default
LOOKS = 2  # at the queue, after which nothing is new
SPAN = 100.0  # seconds in which nothing happens
MOST_CPU = 1.0  # percent of a core
BODY = """
pipeline = Pipeline("waiting", steps=[
    CommandStep(["true"], name=f"s{n}", version=str(n), compute_target="cluster") for n in range(COUNT)
])
"""


def queue() -> Iterator[Figure]:
    """Jobs that wait in a partition which is down, so that nothing becomes of them; Slurm is asked as by default."""
    with slurm_rig.running(min_job_age=300) as cluster, tempfile.TemporaryDirectory(prefix="mlpd-asked-") as folder:
        cluster.command("scontrol", "update", "partition=main", "state=down")
        for count in (FEW, MANY):
            asked, spent, submitted = _watched(cluster, Path(folder, f"{count}"), count)
            note = f"in {SPAN:.0f} s of nothing; `poll_interval` is {INTERVAL:.0f} s"
            yield Figure(f"squeue in an interval, of {count} jobs", asked * INTERVAL / SPAN, "", 1, note=note)
            limit = MOST_CPU if count == MANY else None
            note = f"the daemon and all that it starts; in the queue {submitted:.0f} s after the request"
            yield Figure(f"{count} jobs in the queue, of a core", spent / SPAN * 100, "%", limit, note=note)
            cluster.command("scancel", "-u", "root")
            cluster.wait_for(lambda: not _pending(cluster), "the queue is empty")


def _watched(cluster: slurm_rig.Cluster, folder: Path, count: int) -> tuple[int, float, float]:
    """(how often squeue was asked, CPU seconds, seconds until all were in the queue) of a daemon with so many jobs."""
    asked, cpu = _counting(folder), Cpu()
    env = {**cluster.env, "PATH": f"{folder}:{BIN}:{packages.PATH}"}
    extra = f'[compute.cluster]\nkind = "slurm"\npartition = "main"\nslots = {count}\n'
    daemon = Daemon(extra=extra, env={name: env[name] for name in ("SLURM_CONF", "LC_ALL", "PATH")})
    try:
        daemon.start(before=cpu.join)
        daemon.plugin("waiting", SDK + BODY.replace("COUNT", str(count)))
        until(lambda: daemon.version("waiting"), "`waiting` loaded", 60)
        api, began = Api(daemon.socket), time.monotonic()
        daemon.run("waiting")
        until(lambda: _told(api) == {"PENDING": count}, f"{count} jobs in the queue", 900, pause=1.0)
        submitted, seen = time.monotonic() - began, len(lines(asked))
        until(lambda: len(lines(asked)) >= seen + LOOKS, "each has been told what it waits for", 300, pause=1.0)
        api.close()
        before = len(lines(asked)), cpu.seconds()
        time.sleep(SPAN)
        return len(lines(asked)) - before[0], cpu.seconds() - before[1], submitted
    finally:
        daemon.close()
        cpu.close()


def _told(api: Api) -> Any:
    """Slurm's word -> how many jobs, as the daemon last saw them."""
    (found,) = (each for each in api.ask("GET", "/v1/compute")["compute"] if each["name"] == "cluster")
    return found["cluster"]["jobs"]


def _counting(folder: Path) -> Path:
    """A `squeue` for PATH that writes a line for each time it is asked; where they are."""
    folder.mkdir()
    real, asked = shutil.which("squeue", path=packages.PATH), folder / "asked"
    (folder / "squeue").write_text(f'#!/bin/sh\necho >> {asked}\nexec {real} "$@"\n')
    (folder / "squeue").chmod(0o755)
    return asked


def _pending(cluster: slurm_rig.Cluster) -> str:
    return cluster.command("squeue", "-h", "-t", "pending,running,completing", "-o", "%i")
