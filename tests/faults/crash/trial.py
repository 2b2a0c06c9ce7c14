"""The loop: arm a point, start, ask for work, let it die, start again; at the end all must be done, and is judged.

A daemon's life is long enough for several runs, and several of them are alive when it dies: that is what makes 500
crash-injected runs cheap. A run counts as crash-injected if the daemon died at least once after the run was durable
and before it was finished.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Daemon, until

from crash.judge import ALL_ASKED, Evidence, Verdict, judge
from crash.scenario import TICKING, Scenario
from mlpiped.cli.client import Client
from mlpiped.crash import POINTS
from mlpiped.errors import MlpipedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from crash.power import Disk

OUTSIDE = "from outside"
EVERYWHERE = (*POINTS, OUTSIDE, OUTSIDE, OUTSIDE)
ALIVE = 24
"""So many runs that were asked for are kept going at a time."""

FINISHED = 90.0  # seconds for all that was asked for, once nobody dies any more


def now_us() -> int:
    return time.time_ns() // 1000


class Trial:
    """One daemon with its scenario, and what becomes of it.

    With `power` each death is a power cut; with `murder` it takes some of the supervisors with it, and leaves their
    steps behind. With `cuts`, what steps run on ends some of them by itself.
    """

    def __init__(
        self,
        seed: int,
        *,
        program: Sequence[str | Path] | None = None,
        power: bool = False,
        murder: bool = False,
        cuts: bool = False,
        clocks: bool = True,
        slots: int = 12,
        alive: int = ALIVE,
        points: Sequence[str] = EVERYWHERE,
        finished: float = FINISHED,
        prelude: str = "",
    ) -> None:
        self.random = random.Random(seed)
        self.name = f"t{seed}"
        self.daemon = Daemon(slots=slots)
        if program is not None:
            self.daemon.program = program
        self.evidence = Evidence(cuts=self.job_folder if cuts else None)
        self.disk: Disk | None = None
        self.murder = murder
        self.alive, self.points, self.finished = alive, points, finished
        self._tries: Counter[str] = Counter()
        self._asked = 0
        self._open: set[str] = set()  # seeds of runs that have not been seen to end
        self._hit: set[str] = set()  # … and that have seen a death
        self._clocks = clocks
        try:
            if power:
                from crash.power import Disk

                self.disk = Disk(self.daemon.state, self.daemon.root / "disk.img")
                self.daemon.state.chmod(0o700)
            self.scenario = Scenario(self.daemon, repeatable=power or murder or cuts, prelude=prelude)
            if not clocks:
                for name in TICKING:
                    (self.daemon.plugins / f"{name}.py").unlink()
            self.client = Client(str(self.daemon.socket))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        if self.disk is not None:  # the daemon's folder cannot be removed below a mount
            if self.daemon.process is not None:
                self.daemon.kill9()
            self._kill_all()
            self.disk.close()
        self.daemon.close()

    # --- the whole of it -------------------------------------------------------------------------------------------
    def go(self, *, runs: int = 0, deaths: int = 0, hits: int = 0) -> Verdict:
        """Until so many crash-injected runs, deaths, and deaths at each point (what is asked for); the verdict."""
        self.begin()
        # The judge counts from the ledger at the end. Here only runs count whose number was told before a death, and
        # whose last step had not ended at it: never more than there are.
        while (
            len(self._hit) < runs
            or len(self.evidence.deaths) < deaths
            or min(self._deaths_at(point) for point in self.points) < hits
        ):
            self.life()
        return self.finish()

    def begin(self) -> None:
        """The first life, which nobody ends before all plugins are taken up."""
        self.daemon.start()
        names = {path.stem for path in self.daemon.plugins.glob("*.py")}
        until(lambda: {p["name"] for p in self.client.get("/v1/pipelines")["pipelines"]} == names, "all plugins loaded")
        if self._clocks:
            until(lambda: len(self._cursors()) == len(TICKING), "the clocks have their first cursor")
        self.evidence.clocks_from = now_us()
        self._die(OUTSIDE)

    def life(
        self,
        point: str | None = None,
        count: int | None = None,
        patience: float | None = None,
        files: int | None = None,
    ) -> None:
        """Start the daemon, armed or not; ask for work, let so many files arrive; it dies."""
        point = point or self._next_point()
        patience = self.random.uniform(0.05, 1.2) if patience is None else patience
        self.daemon.env.pop("MLPIPED_CRASH_AT", None)
        if point != OUTSIDE:
            often = 60 if point in ("in_commit", "committed") else 12
            self.daemon.env["MLPIPED_CRASH_AT"] = f"{point}:{count or self.random.randint(1, often)}"
            patience = max(patience, 1.0)
        if not self.start():
            self._died(point)
            return
        with self._listening():
            self.feed(self.random.randint(0, 3) if files is None else files)
            until_then = time.monotonic() + patience
            process = self.daemon.process
            assert process is not None
            while time.monotonic() < until_then and process.poll() is None:
                time.sleep(0.003)
            if process.poll() is not None:
                self._died(point)
            else:
                self._die(OUTSIDE)

    def finish(self) -> Verdict:
        """The last life: all must come to its end; then the clocks stop, the daemon ends, and the judge looks."""
        self.daemon.env.pop("MLPIPED_CRASH_AT", None)
        assert self.start(), f"unarmed, it died:\n{self.daemon.tail()}"
        with contextlib.suppress(AssertionError):  # the judge names what is stuck
            until(self._ask_again, "every run asked for is told", self.finished)
            self._stop_clocks()
            until(lambda: self._seen_all() and not self._unfinished(), "all runs finished", self.finished, 0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.daemon.term()
        if self.daemon.process is not None:
            self.daemon.kill9()
            self.evidence.deaths.append((now_us(), "would not stop"))
        with contextlib.suppress(AssertionError):
            until(lambda: not self.processes(), "the end of every process", 10)
        ledger = self.daemon.state / "ledger.sqlite3"
        verdict = judge(ledger, self.scenario.marks(), self.evidence, self.processes())
        verdict.violations += self._errors()
        return verdict

    def job_folder(self, token: str) -> Path:
        """Where it was executed."""
        return self.daemon.state / "jobs" / token

    def processes(self) -> set[int]:
        """Those of ours; none is to be left at the end."""
        return self.daemon.processes()

    def _errors(self) -> list[str]:
        """A SIGKILL is no error of the daemon's: whoever reads its log must not be sent to look for one."""
        if self.evidence.harsh:
            return []
        lines = self.daemon.log.read_text(errors="replace").splitlines()
        return [f"it logged an error: {line[:300]}" for line in lines if '"level":"error"' in line]

    # --- births and deaths -----------------------------------------------------------------------------------------
    def start(self) -> bool:
        """Whether it serves; False if it died on the way there, as it may when it is armed."""
        try:
            self.daemon.start()
        except AssertionError:
            process = self.daemon.process
            if process is None or process.poll() != -signal.SIGKILL:
                raise
            return False
        return True

    def _die(self, where: str) -> None:
        process = self.daemon.process
        assert process is not None
        if self.disk is not None and self.random.random() < 0.5:
            self.disk.cut()  # it lives on for a moment, on a disk that takes nothing
            time.sleep(self.random.uniform(0, 0.05))
        process.kill()
        self._died(where)

    def _died(self, where: str) -> None:
        process = self.daemon.process
        assert process is not None
        code = process.wait()
        assert code == -signal.SIGKILL, f"it ended with {code}:\n{self.daemon.tail()}"
        self.daemon.process = None
        self.evidence.deaths.append((now_us(), where))
        done = self.scenario.done()
        told, asked = self.evidence.told, self.evidence.asked
        self._hit |= {seed for seed in self._open if seed in told and (asked[seed], seed) not in done}
        if self.murder:
            self.evidence.harsh += 1
            for pid in sorted(self.daemon.processes()):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text() == "mlpiped-step\n" and self.random.random() < 0.5:
                        os.kill(pid, signal.SIGKILL)
        if self.disk is not None:
            self.disk.cut()
            self.evidence.harsh += 1
            self._kill_all()
            self.disk.unmount()
            self.disk.mount()

    def _kill_all(self) -> None:
        """What a power cut ends besides the daemon."""
        while pids := self.daemon.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _deaths_at(self, point: str) -> int:
        return sum(where == point for _, where in self.evidence.deaths)

    def _next_point(self) -> str:
        """Each as often as it is listed; what was armed in vain comes again sooner."""

        def turns(point: str) -> float:
            return (self._deaths_at(point) + 0.3 * self._tries[point]) / self.points.count(point)

        least = min(turns(point) for point in self.points)
        found = self.random.choice([point for point in dict.fromkeys(self.points) if turns(point) == least])
        self._tries[found] += 1
        return found

    # --- work ------------------------------------------------------------------------------------------------------
    def feed(self, files: int) -> None:
        """Let files arrive, and ask for as many new runs as others have finished."""
        for _ in range(files):
            name = f"{self.name}-{len(self.evidence.arrived)}.txt"
            self.evidence.arrived.append(name)
            self.scenario.drop(name)
        done = self.scenario.done()
        self._open = {seed for seed in self._open if (self.evidence.asked[seed], seed) not in done}
        for _ in range(self.alive - len(self._open)):
            self._asked += 1
            pipeline = ALL_ASKED[self._asked % len(ALL_ASKED)]
            self.evidence.asked[f"{self.name}-{self._asked}"] = pipeline
            self._open.add(f"{self.name}-{self._asked}")
        for seed in sorted(self._open - self.evidence.told.keys()):
            if not self._ask(seed):
                return

    def _ask(self, seed: str) -> bool:
        """The daemon may die before, while or after it does what it is asked: the same key is used again then."""
        path = f"/v1/pipelines/{self.evidence.asked[seed]}/runs"
        headers = {"Idempotency-Key": seed}
        try:
            with self.client.open("POST", path, {"parameters": {"seed": seed}}, headers=headers, timeout=20) as answer:
                self.evidence.told[seed] = int(answer.document()["id"])
        except (MlpipedError, OSError, ValueError, IndexError):
            return False
        return True

    def _ask_again(self) -> bool:
        return all(self._ask(seed) for seed in self.evidence.asked if seed not in self.evidence.told)

    # --- the end ---------------------------------------------------------------------------------------------------
    def _stop_clocks(self) -> None:
        if not self._clocks:
            return
        wanted = now_us()

        until(lambda: min(self._cursors().values(), default=0) >= wanted, "both clocks have fired", 30, 0.05)
        self.evidence.clocks_until = wanted
        for name in TICKING:
            (self.daemon.plugins / f"{name}.py").unlink()
        until(
            lambda: not {p["name"] for p in self.client.get("/v1/pipelines")["pipelines"]} & TICKING.keys(),
            "the clocks are gone",
        )

    def _cursors(self) -> dict[str, int]:
        schedules = self.client.get("/v1/schedules")["schedules"]
        return {s["pipeline"]: s["cursor"]["at"] for s in schedules if s["pipeline"] in TICKING and s["cursor"]}

    def _seen_all(self) -> bool:
        """Each file's run has told so itself."""
        ends = {mark.seed for mark in self.scenario.marks() if mark.step == "tell" and mark.word == "end"}
        return ends >= set(self.evidence.arrived)

    def _unfinished(self) -> bool:
        runs = self.client.get("/v1/status")["runs"]
        return bool(runs.get("running", 0) + runs.get("queued", 0)) if isinstance(runs, dict) else bool(runs)

    # --- what it says while it lives -------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """With a disk to be cut: every event that was streamed is a fact that somebody acted on."""
        if self.disk is None:
            yield
            return

        def listen() -> None:
            after = max(self.evidence.events, default=0)
            with contextlib.suppress(MlpipedError, OSError, ValueError, IndexError):
                for kind, event in self.client.events(f"/v1/events?follow=1&after={after}"):
                    if kind != "end":
                        self.evidence.events[event["id"]] = (event["kind"], event["run"])

        ear = threading.Thread(target=listen)
        ear.start()
        try:
            yield
        finally:
            ear.join(10)
