"""F1, F6, L1: more than the kernel's queues hold and than a daemon should keep in its memory, on a real daemon."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Daemon, until

from mlpiped import log_cap

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


def test_L1_a_log_without_end_takes_a_bounded_part_of_the_disk_and_its_ends_are_kept_over_a_kill(own: Daemon) -> None:
    go, count = own.root / "go", 800 << 20
    own.install(
        "loud",
        f"""
command = (
    "echo first; yes 'a line that is said again and again' | head -c {count}; "
    "while [ ! -e {go} ]; do sleep 0.02; done; echo last"
)
pipeline = Pipeline("loud", steps=[CommandStep(command, name="loud")])
""",
    )
    number = own.run("loud")
    log = until(lambda: next(own.state.glob("jobs/*/stdout"), None), "it has a log")
    until(lambda: log.stat().st_size > count // 4, "much has been said")
    own.kill9()
    until(lambda: log.stat().st_size >= count, "all has been said while there was no daemon", 60)
    own.start()
    until(lambda: log.stat().st_blocks * 512 <= log_cap.MOST, "the next daemon cuts it")
    go.touch()
    assert own.end(number)["outcome"] == "succeeded"
    said = own.ctl("logs", f"{number}/loud")
    assert said.stdout.startswith("first\na line that") and said.stdout.endswith("last\n")
    assert "were not kept" in said.stderr and "\0" not in said.stdout
    assert len(said.stdout) >= log_cap.HEAD + log_cap.TAIL
