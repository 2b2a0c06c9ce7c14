"""F1, F6: more than the kernel's queues hold and than a daemon should keep in its memory, on a real daemon."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Daemon, until

MANY = 60_000
QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
PEAK = 250  # MB
LANDING = """
data = DataReference(lab, "in/*.csv")
say = CommandStep(["true"], name="say", effect=True)
pipeline = Pipeline("landing", steps=[say], triggers=[OnArrival(data, settle="2s")])
"""


@pytest.fixture
def own() -> Iterator[Daemon]:
    with Daemon() as daemon:
        (daemon.lab / "in").mkdir()
        daemon.install("landing", LANDING)
        until(lambda: _waits(daemon) == "new files", "the folder is watched")
        yield daemon


def _waits(daemon: Daemon) -> str:
    return str(daemon.json("schedules")["schedules"][0]["waits_for"])


def _flood(daemon: Daemon, first: int, count: int) -> None:
    for n in range(first, first + count):
        with open(daemon.lab / "in" / f"{n}.csv", "w") as file:
            file.write(str(n))


def test_F1_F6_a_flood_that_overflows_the_kernels_queue_is_one_run_found_whole_in_little_memory(own: Daemon) -> None:
    assert int(QUEUE.read_text()) < MANY, "the kernel drops events here only when its queue is shorter than the flood"
    os.kill(own.pid, signal.SIGSTOP)  # nobody empties the queue
    try:
        _flood(own, 0, MANY)
    finally:
        os.kill(own.pid, signal.SIGCONT)
    run = own.next_run("landing", timeout=80)
    assert run["cause"]["detail"] == f"{MANY} files new"
    assert own.end(run["id"])["outcome"] == "succeeded"
    until(lambda: _waits(own) == "new files", "all is taken")
    status = Path(f"/proc/{own.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) // 1000
    assert peak < PEAK, f"{peak} MB"
    own.kill9()
    own.start()
    until(lambda: _waits(own) == "new files", "the next daemon has looked")
    assert len(own.runs("landing")) == 1, "it knows every one of them"
    _flood(own, MANY, 1)
    assert own.next_run("landing", run["id"])["cause"]["detail"] == f"in/{MANY}.csv is new"


def test_F6_a_flood_while_the_daemon_looks_is_one_run_too_and_what_changes_meanwhile_is_another(own: Daemon) -> None:
    count = 20_000  # more than the queue holds
    _flood(own, 0, count)
    run = own.next_run("landing", timeout=60)
    assert run["cause"]["detail"] == f"{count} files new"
    for n in range(5):
        (own.lab / "in" / f"{n}.csv").write_text(f"another {n}")
    (own.lab / "in" / "5.csv").unlink()
    assert own.next_run("landing", run["id"])["cause"]["detail"] == "5 files changed"
    assert len(own.runs("landing")) == 2
