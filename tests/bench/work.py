"""Benchmarks of runs: nothing to do, many steps, one after another, and what a step costs."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench import gauges, graphs
from tests.bench.figures import Figure
from tests.harness import Daemon, until

if TYPE_CHECKING:
    from collections.abc import Iterator


def _load(daemon: Daemon, name: str, text: str) -> None:
    daemon.plugin(name, text)
    until(lambda: daemon.version(name), f"`{name}` loaded", timeout=60, pause=0.1)


def _good(run: dict[str, Any], *outcomes: str) -> None:
    assert run["outcome"] == "succeeded", run["outcome"]
    counted = Counter(step["outcome"] for step in run["steps"])
    assert set(counted) <= set(outcomes), counted


def noop() -> Iterator[Figure]:
    """A run over a graph in which everything is up to date: 1,000, 3,000 and 10,000 steps in 10 layers.

    The smaller graphs are parts of the large one, so that nearly all of their steps are made once for all three.
    """
    took: dict[int, float] = {}
    with Daemon() as daemon:
        graphs.sources(daemon.lab / "src", 1_000)
        for size in (10_000, 3_000, 1_000):
            name = f"noop{size}"
            _load(daemon, name, graphs.layered(name, size, 10, "src"))
            run = daemon.go(name, timeout=400)
            _good(run, "succeeded", "reused")
            cold = gauges.lasted(run)
            if size == 10_000:  # alone in a fresh daemon, whose memory is then its own
                daemon.restart()
                until(lambda: daemon.version("noop10000"), "`noop10000` loaded", timeout=60)
            walls, parts = [], []
            for _ in range(3):
                walls.append(gauges.wall(lambda: daemon.ctl("run", name, "--wait")))  # noqa: B023
                run = daemon.show("latest")
                _good(run, "reused")
                parts.append(gauges.lasted(run))
            took[size] = statistics.median(walls)
            if size == 10_000:
                yield from _noop_figures(daemon, walls, parts, cold)
    yield Figure("noop, linear: a step at 10,000 ÷ at 3,000", took[10_000] / took[3_000] * 0.3, "×", 1.25)
    yield Figure("noop, 3,000 steps", took[3_000], "s")
    yield Figure("noop, 1,000 steps", took[1_000], "s")


def _noop_figures(daemon: Daemon, walls: list[float], parts: list[float], cold: float) -> Iterator[Figure]:
    peak = gauges.status_kb(daemon.pid, "VmHWM")
    files = [path for path in (daemon.state / "artifacts").rglob("*") if path.is_file()]
    stat = gauges.wall(lambda: [path.stat() for path in files])
    note = f"{len(files):,} artifacts; a stat of each in Python: {stat:.3f} s"
    yield Figure("noop, 10,000 steps, mlpipectl included", statistics.median(walls), "s", 0.8, note=note)
    first = "its digests come from the ledger, not from memory; no limit is set for it"
    yield Figure("noop, 10,000 steps, first after a start", walls[0], "s", note=first)
    yield Figure("noop, 10,000 steps, by the ledger", statistics.median(parts), "s")
    yield Figure("noop, the daemon's peak memory", peak, "MB", 200)
    yield Figure("noop, the same graph from nothing", cold, "s", note=f"{10_000 / cold:,.0f} steps a second")


def throughput() -> Iterator[Figure]:
    """1,000 independent `cp` steps on two slots from a cold state, against `xargs -P2` in the same minute."""
    count, ours, theirs = 1_000, [], []
    with Daemon(slots=2) as daemon:
        for turn in range(3):
            source = daemon.lab / f"src{turn}"
            graphs.sources(source, count, salt=str(turn))
            with tempfile.TemporaryDirectory(dir=daemon.root) as target:
                script = f"ls {source} | xargs -P2 -I@ cp {source}/@ {target}/@"
                theirs.append(count / gauges.shell(script, daemon.root))
            name = f"copies{turn}"
            _load(daemon, name, graphs.independent(name, count, f"src{turn}"))
            seconds = gauges.wall(lambda: daemon.ctl("run", name, "--wait", timeout=120))  # noqa: B023
            _good(daemon.show("latest"), "succeeded")
            ours.append(count / seconds)
    limit = statistics.median(theirs)
    note = f"a third of xargs -P2, which does {limit:,.0f}/s here"
    yield Figure(
        "throughput, 1,000 `cp` steps on 2 slots", statistics.median(ours), "/s", limit / 3, floor=True, note=note
    )


def cpu() -> Iterator[Figure]:
    """CPU of a step of `true`: daemon, zygote, supervisor and the process itself."""
    meter, count = gauges.Cpu(), 500
    if meter.folder is None:
        raise AssertionError("no cgroup can be made here, and no other sum over detached processes is whole")
    daemon = Daemon(slots=2)
    try:
        daemon.start(before=meter.join)
        _load(daemon, "trues", graphs.trivial("trues", count))
        daemon.go("trues")
        before = meter.seconds()
        number = int(daemon.json("run", "trues")["id"])
        run = daemon.end(number)
        spent = meter.seconds() - before
        _good(run, "succeeded")
        bare = f"i=0; while [ $i -lt {count} ]; do /bin/true; i=$((i+1)); done"
        alone = meter.seconds()
        subprocess.run(["/bin/sh", "-c", bare], preexec_fn=meter.join, check=True)
        alone = (meter.seconds() - alone) / count * 1000
    finally:
        daemon.close()
        meter.close()
    note = f"fork and exec of `true` by sh: {alone:.2f} ms"
    yield Figure("CPU of a step of `true`, all told", spent / count * 1000, "ms", 6, note=note)


def chain() -> Iterator[Figure]:
    """50 `cp` steps one after another: what each costs beyond the process itself."""
    count, beyond, alone = 50, [], []
    with Daemon(slots=2) as daemon:
        for turn in range(3):
            graphs.sources(daemon.lab / f"src{turn}", 1, salt=f"chain {turn}")
            name = f"chain{turn}"
            _load(daemon, name, graphs.chain(name, count, f"src{turn}"))
            with tempfile.TemporaryDirectory(dir=daemon.root) as target:
                first = f"cp {daemon.lab}/src{turn}/00000 0"
                script = f"{first}; i=0; while [ $i -lt {count} ]; do cp $i $((i+1)); i=$((i+1)); done"
                alone.append(gauges.shell(script, Path(target)) / count * 1000)
            run = daemon.go(name)
            _good(run, "succeeded")
            beyond.append(gauges.lasted(run) / count * 1000 - alone[-1])
    note = f"the process itself: {statistics.median(alone):.2f} ms; fsync {_fsync():.2f} ms"
    yield Figure("chain of 50, a step beyond its process", statistics.median(beyond), "ms", 12, note=note)


def _fsync() -> float:
    """Milliseconds of one small append made durable, where the state folder lies."""
    with tempfile.NamedTemporaryFile(dir=tempfile.gettempdir(), buffering=0) as file:
        import os

        def once() -> None:
            file.write(b"x" * 512)
            os.fsync(file.fileno())

        return statistics.median(gauges.wall(once) for _ in range(30)) * 1000
