"""Benchmarks of moments: arrival, request, start, status, import; and of doing nothing."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.bench import gauges, graphs
from tests.bench.figures import Figure
from tests.bench.history import grow
from tests.harness import BIN, Daemon, lines, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TURNS = 7


def _stamped(effects: Path, count: int) -> float:
    """The time at which the last of `count` steps started, in seconds since the epoch."""
    return int(until(lambda: len(lines(effects)) >= count and lines(effects), f"{count} stamps")[-1]) / 1e9


def arrival() -> Iterator[Figure]:
    """From a file's rename into place to the first step's process, less the settle time."""
    settle, late = 0.5, []
    with Daemon() as daemon:
        effects, folder = daemon.root / "effects", daemon.lab / "incoming"
        folder.mkdir()
        trigger = f'OnArrival(DataReference(lab, "incoming/*.csv"), settle="{settle}s")'
        daemon.plugin("arrivals", graphs.stamp("arrivals", effects, trigger))
        until(lambda: daemon.version("arrivals"), "`arrivals` loaded")
        until(lambda: daemon.json("schedules"), "its trigger listed")
        for turn in range(TURNS):
            fresh = daemon.root / "fresh"
            fresh.write_text(f"batch {turn}\n")
            landed = time.time()
            fresh.rename(folder / f"{turn}.csv")
            late.append((_stamped(effects, turn + 1) - landed - settle) * 1000)
            daemon.ctl("wait", "latest")
    note = f"worst of {TURNS}: {max(late):.0f} ms; the clock starts at the rename"
    yield Figure("arrival to the step's process, beyond settle", statistics.median(late), "ms", 50, note=note)


def manual() -> Iterator[Figure]:
    """From the request on the socket to the first step's process."""
    late = []
    with Daemon() as daemon:
        effects = daemon.root / "effects"
        daemon.plugin("manual", graphs.stamp("manual", effects))
        until(lambda: daemon.version("manual"), "`manual` loaded")
        api = gauges.Api(daemon.socket)
        for turn in range(TURNS):
            asked = time.time()
            api.ask("POST", "/v1/pipelines/manual/runs", {"parameters": {}})
            late.append((_stamped(effects, turn + 1) - asked) * 1000)
            daemon.ctl("wait", "latest")
        api.close()
    note = f"worst of {TURNS}: {max(late):.0f} ms"
    yield Figure("manual run, request to the step's process", statistics.median(late), "ms", 40, note=note)


def idle() -> Iterator[Figure]:
    """A daemon with one compute and a watched folder, left alone for 20 s."""
    span = 20.0
    with Daemon() as daemon:
        (daemon.lab / "incoming").mkdir()
        trigger = 'OnArrival(DataReference(lab, "incoming/*.csv"), settle="1s"), Every("1h")'
        daemon.plugin("idle", graphs.stamp("idle", daemon.root / "effects", trigger))
        until(lambda: daemon.version("idle"), "`idle` loaded")
        daemon.go("idle")
        time.sleep(2)  # the span that is measured must not contain the load
        family = [daemon.pid, *gauges.descendants(daemon.pid)]
        before = {pid: gauges.thread_seconds(pid) for pid in family}
        time.sleep(span)
        spent = sum(gauges.thread_seconds(pid) - before[pid] for pid in family)
        sizes = [gauges.status_kb(pid, "VmRSS") for pid in family]
    note = f"with its {len(family) - 1} helper processes {sum(sizes):.0f} MB" if len(family) > 1 else ""
    yield Figure("idle, the daemon's memory", sizes[0], "MB", 90, note=note)
    yield Figure("idle, of a core", spent / span * 100, "%", 0.5)


def start() -> Iterator[Figure]:
    """From `mlpiped serve` to an answer that lists 100 plugins, all of them loaded before."""
    took = []
    daemon = Daemon()
    try:
        for number in range(100):
            daemon.plugin(f"p{number:03d}", graphs.chain(f"p{number:03d}", 5, "src"))
        daemon.start(timeout=60)
        until(lambda: len(daemon.pipelines()) == 100, "100 pipelines loaded", timeout=120, pause=0.2)
        for _ in range(3):
            daemon.term()
            began = time.perf_counter()
            daemon.start()
            api = gauges.Api(daemon.socket)
            listed = lambda: len(api.ask("GET", "/v1/pipelines")["pipelines"]) == 100  # noqa: B023, E731
            until(listed, "100 pipelines listed", pause=0.005)
            took.append(time.perf_counter() - began)
            api.close()
    finally:
        daemon.close()
    note = "until the socket's answer lists them all"
    yield Figure("start to serving, 100 plugins cached", statistics.median(took), "s", 1, note=note)


def status() -> Iterator[Figure]:
    """`mlpipectl status`, start of the process included, on a ledger with 100,000 runs."""
    with Daemon() as daemon:
        daemon.plugin("small", graphs.trivial("small", 3))
        until(lambda: daemon.version("small"), "`small` loaded")
        daemon.go("small")
        daemon.term()
        rows = grow(daemon.state / "ledger.sqlite3", 100_000)
        opened = gauges.wall(lambda: daemon.start(timeout=60))
        until(lambda: daemon.version("small"), "`small` loaded")
        words = [BIN / "mlpipectl", "status"]
        took = [gauges.command(words, env=daemon.env) for _ in range(15)]
        bare = [gauges.command([sys.executable, "-I", "-c", "pass"]) for _ in range(15)]
        runs = [gauges.command([BIN / "mlpipectl", "runs"], env=daemon.env) for _ in range(5)]
    note = f"{rows}; Python alone {statistics.median(bare) * 1000:.0f} ms"
    yield Figure("mlpipectl status, 100,000 runs", statistics.median(took) * 1000, "ms", 100, note=note)
    yield Figure("mlpipectl runs, 100,000 runs", statistics.median(runs) * 1000, "ms")
    yield Figure("start to serving, 100,000 runs", opened, "s")


def million() -> Iterator[Figure]:
    """The same with 1,000,000 steps of two years, and what retention of it costs those who ask meanwhile."""
    with Daemon(extra='[retention]\nruns = "forever"\nlogs = "forever"') as daemon:
        daemon.plugin("ten", graphs.nightly("ten", 10))
        until(lambda: daemon.version("ten"), "`ten` loaded")
        ran, reused = daemon.go("ten")["id"], daemon.go("ten")["id"]
        daemon.term()
        grow(daemon.state / "ledger.sqlite3", 20_000, ran, days=730)
        rows = grow(daemon.state / "ledger.sqlite3", 80_000, reused, days=730)
        size = (daemon.state / "ledger.sqlite3").stat().st_size / 1e9
        opened = gauges.wall(lambda: daemon.start(timeout=120))
        until(lambda: daemon.version("ten"), "`ten` loaded")

        def ask(*words: str, turns: int = 9) -> float:
            command = [BIN / "mlpipectl", *words]
            quiet = {"env": daemon.env, "stderr": subprocess.DEVNULL}
            return statistics.median(gauges.command(command, **quiet) for _ in range(turns)) * 1000

        note = f"{rows}; {size:.2f} GB"
        yield Figure("mlpipectl status, 1,000,000 steps", ask("status"), "ms", 100, note=note)
        yield Figure("mlpipectl runs, 1,000,000 steps", ask("runs"), "ms", 200)
        yield Figure("mlpipectl runs --outcome failed", ask("runs", "--outcome", "failed"), "ms", 200)
        yield Figure("mlpipectl pipelines, 1,000,000 steps", ask("pipelines"), "ms", 200)
        yield Figure("start to serving, 1,000,000 steps", opened, "s")
        yield Figure("mlpiped backup, 1,000,000 steps", _backup(daemon), "s")
        daemon.term()
        daemon.config.write_text(daemon.config.read_text().replace('runs = "forever"', 'runs = "700d"'))
        daemon.start(timeout=120)
        yield from _retire(daemon)


def _backup(daemon: Daemon) -> float:
    words = [BIN / "mlpiped", "backup", "--config", daemon.config, daemon.root / "copy"]
    return gauges.command(words, env=daemon.env)


def _retire(daemon: Daemon) -> Iterator[Figure]:
    """Runs a month past their time go while somebody asks for the status again and again, and starts runs."""
    before = daemon.json("runs", "-n", 1)["runs"][0]["id"]
    asked, started = [], []
    command = [BIN / "mlpipectl", "gc"]
    began = time.perf_counter()
    with subprocess.Popen(command, env=daemon.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as gc:
        while gc.poll() is None:
            asked.append(gauges.command([BIN / "mlpipectl", "status"], env=daemon.env) * 1000)
            words = [BIN / "mlpipectl", "run", "ten"]
            started.append(gauges.command(words, env=daemon.env, stderr=subprocess.DEVNULL) * 1000)
        out = gc.stdout.read().decode() if gc.stdout else ""
    took = time.perf_counter() - began
    gone = next((line.split()[1] for line in out.splitlines() if line.startswith("runs ")), "no")
    yield Figure("gc of a month of it", took, "s", note=f"{gone} runs gone, {before} before")
    yield Figure("status meanwhile, worst", max(asked), "ms", 250)
    note = f"of {len(started)}, median {statistics.median(started):.0f}"
    yield Figure("run meanwhile, worst", max(started), "ms", note=note)


def imports() -> Iterator[Figure]:
    """`import mlpiped` with every name of the SDK, in a fresh interpreter."""
    code = (
        "import time; a = time.perf_counter(); from mlpiped import *; from mlpiped import Pipeline, CommandStep, Run;"
        "print((time.perf_counter() - a) * 1000)"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-c", code]
    took = [float(subprocess.run(words, env=env, capture_output=True, check=True).stdout) for _ in range(9)]
    yield Figure("import mlpiped", statistics.median(took), "ms", 60)
