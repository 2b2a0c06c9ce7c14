"""Benchmarks of what keeping the promises costs: adopting what ran on, commits per step, and a flood of arrivals."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench import gauges, graphs
from tests.bench.figures import Figure
from tests.harness import Daemon, until

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNNING = 1_000
SYNCED = re.compile(r"(?:fsync|fdatasync)\(\d+<([^>]+)>")


def adopt() -> Iterator[Figure]:
    """1,000 real steps run on while the daemon is killed: from its next start until it holds a pidfd of each."""
    turns: list[tuple[float, float]] = []
    with Daemon(slots=RUNNING) as daemon:
        gate = daemon.root / "gate"
        os.mkfifo(gate)
        daemon.plugin("many", graphs.gated("many", RUNNING, gate))
        until(lambda: daemon.version("many"), "`many` loaded", timeout=60, pause=0.1)
        number = daemon.run("many")
        until(lambda: _running(daemon, number) == RUNNING, "every step runs", timeout=180, pause=0.2)
        for _ in range(3):
            daemon.kill9()
            turns.append(_adopted(daemon))
        gate.open("wb").close()  # whoever waits for it now reads its end
        assert daemon.ctl("wait", number, "--timeout", "120s", timeout=130).returncode == 0, "the run has not succeeded"
        attempts = {step["attempts"] for step in daemon.show(number)["steps"]}
    assert attempts == {1}, attempts
    serves, all_found = (statistics.median(times) for times in zip(*turns, strict=True))
    note = f"worst of {len(turns)}: {max(each for _, each in turns):.2f} s; its socket accepts after {serves:.2f} s"
    yield Figure("adopting 1,000 running steps, from kill -9 and start", all_found, "s", 2, note=note)


def _adopted(daemon: Daemon) -> tuple[float, float]:
    """Start it; seconds until it accepts, and until it waits for all that runs."""
    began = time.perf_counter()
    daemon.start(timeout=60)
    serves = time.perf_counter() - began
    until(lambda: _waited_for(daemon.pid) >= RUNNING, "every step is found again", timeout=60, pause=0.01)
    return serves, time.perf_counter() - began


def _running(daemon: Daemon, number: int) -> int:
    return sum(step["state"] == "running" for step in daemon.show(number)["steps"])


def _waited_for(pid: int) -> int:
    """How many processes of an earlier daemon it would be told the end of."""
    count, folder = 0, f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            count += os.readlink(f"{folder}/{name}") == "anon_inode:[pidfd]"
    return count


def flood() -> Iterator[Figure]:
    """1,000,000 files arrive at once: until their one run has ended, what the daemon takes, how soon it answers."""
    count, answers = 1_000_000, []
    with Daemon() as daemon:
        folder = daemon.lab / "in"
        folder.mkdir()
        trigger = 'OnArrival(DataReference(lab, "in/*.csv"), settle="2s")'
        daemon.plugin("flood", graphs.stamp("flood", daemon.root / "effects", trigger))
        until(lambda: daemon.json("schedules")["schedules"], "its trigger is known")
        for n in range(count):
            with open(folder / f"{n}.csv", "w") as file:
                file.write(str(n))
        began = time.perf_counter()
        api = gauges.Api(daemon.socket)
        runs: list[dict[str, Any]] = []
        while not (runs and runs[-1]["state"] == "finished"):
            asked = time.perf_counter()
            runs = api.ask("GET", "/v1/runs")["runs"]
            answers.append(time.perf_counter() - asked)
            assert time.perf_counter() - began < 400, "no run has come of it"
            time.sleep(0.02)
        took = time.perf_counter() - began
        api.close()
        assert [run["cause"]["detail"] for run in runs] == [f"{count} files new"], runs
        peak = gauges.status_kb(daemon.pid, "VmHWM")
    answers.sort()
    note = f"one run; {took:.0f} s after the last file had been written"
    yield Figure("a flood of 1,000,000 files, the daemon's peak memory", peak, "MB", 500, note=note)
    note = f"median {statistics.median(answers) * 1000:.0f} ms of {len(answers):,} answers"
    yield Figure("a flood of 1,000,000 files, slowest answer", answers[-1] * 1000, "ms", 200, note=note)


def commits() -> Iterator[Figure]:
    """What a step waits for: group commits of the ledger per step of a chain, where no step shares one with another.

    By the difference between a long and a short run: the run itself has commits too. On a busy machine a step may take
    longer than a handle waits for company, and then costs a third that it does not wait for.
    """
    short, long = 10, 110
    with Daemon(slots=2) as daemon:
        graphs.sources(daemon.lab / "src", 1)
        for count in (short, long):
            daemon.plugin(f"chain{count}", graphs.chain(f"chain{count}", count, "src"))
        daemon.plugin("trues", graphs.trivial("trues", 300))
        until(lambda: len(daemon.pipelines()) == 3, "all loaded", timeout=60)
        spent = [
            statistics.median(_commits(daemon, f"chain{count}", "--force") for _ in range(3)) for count in (short, long)
        ]
        alone = (spent[1] - spent[0]) / (long - short)
        many = _commits(daemon, "trues") / 300
        synced = _syncs(daemon, f"chain{long}") / long if shutil.which("strace") else None
    note = "" if synced is None else f"the kernel saw {synced:.2f} fsyncs of the ledger's files a step, all told"
    yield Figure("group commits a step, in a chain of outputs", alone, "", 2, note=note)
    yield Figure("group commits a step, 300 `true` on 2 slots", many, "", 2)


def _commits(daemon: Daemon, *run: str) -> float:
    """How many a run takes, by the daemon's own counter."""
    before = _counter(daemon)
    assert daemon.go(*run)["outcome"] == "succeeded"
    return _counter(daemon) - before


def _counter(daemon: Daemon) -> float:
    api = gauges.Api(daemon.socket)
    try:
        api.connection.request("GET", "/metrics")
        text = api.connection.getresponse().read().decode()
    finally:
        api.close()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("mlpiped_ledger_commits_total"))


def _syncs(daemon: Daemon, pipeline: str) -> int:
    """fsyncs of the ledger's files in a forced run, as the kernel is asked for them."""
    trace = daemon.root / "trace"
    words = ["strace", "-f", "-qq", "-y", "-e", "trace=fsync,fdatasync", "-o", str(trace), "-p", str(daemon.pid)]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as tracer:
        try:
            until(lambda: _traced(daemon.pid), "strace is attached", pause=0.01)
            assert daemon.go(pipeline, "--force")["outcome"] == "succeeded"
        finally:
            tracer.terminate()
    paths = SYNCED.findall(trace.read_text())
    return sum("ledger" in Path(path).name for path in paths)


def _traced(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)
