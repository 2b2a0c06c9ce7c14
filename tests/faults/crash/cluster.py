"""Steps that are jobs of a Slurm cluster, whose servers die too; an administrator looks after its nodes.

A controller that is killed forgets what it took last, and its nodes then end what they run of that: such a step may
start once more, as another attempt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness import BIN, until
from lab import packages, slurm_rig

from crash import impatient
from crash.elsewhere import TrialElsewhere
from mlpiped.backends.slurm.commands import ENDED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.slurm_rig import Cluster

    from crash.judge import Verdict

MISSED = 20  # seconds; Slurm's own BatchStartTimeout is 10, and MessageTimeout comes on top
IN_SLURM = """
from functools import partial
CommandStep = partial(CommandStep, compute_target="cluster")
"""


class ClusterTrial(TrialElsewhere):
    """All of it is on this machine: the nodes see the state folder as the daemon does."""

    kinds: ClassVar[tuple[str, ...]] = ("controller", "frozen", "sbatch", "node")
    """What may happen, in turn."""

    def __init__(self, seed: int, cluster: Cluster, mutant: str | None = None, **more: Any) -> None:
        self.cluster = cluster
        self.shaken: Counter[str] = Counter()
        program = [sys.executable, impatient.__file__, *([] if mutant is None else [mutant])]
        super().__init__(seed, prelude=IN_SLURM, program=program, cuts=True, **{"alive": 40, "finished": 180.0} | more)
        self._over = threading.Event()
        self._administrator = threading.Thread(target=self._look_after)
        self._administrator.start()
        self.reach()

    def reach(self) -> None:
        """Tell the daemon how it gets at the cluster."""
        env = {**self.cluster.env, "PATH": f"{BIN}:{packages.PATH}"}
        self.daemon.env |= {name: env[name] for name in ("SLURM_CONF", "LC_ALL", "PATH")}
        self.name_cluster()

    def name_cluster(self, **settings: str) -> None:
        found = {"kind": '"slurm"', "partition": '"main"', "poll_interval": '"300ms"', **settings}
        words = [f"{name} = {value}" for name, value in found.items()]
        self.configure("\n".join(["", "[compute.cluster]", *words, ""]))

    def life(self, *words: object, **more: object) -> None:
        more.setdefault("files", self.random.randint(0, 1))
        super().life(*words, **more)

    def shake(self, what: str = "") -> None:
        """What happens to Slurm."""
        what = what or self.kinds[self.shaken.total() % len(self.kinds)]
        self.happens(what)
        self.shaken[what] += 1

    def happens(self, what: str) -> None:
        if what == "controller":
            self.cluster.kill("slurmctld")
            time.sleep(self.random.uniform(0, 0.3))
            self.cluster.restart()
        elif what == "node":
            node = self.random.choice(slurm_rig.NODES)
            self.cluster.kill(node)
            time.sleep(self.random.uniform(0, 0.3))
            self.cluster.serve(node)
        else:
            with self.frozen():
                if what == "sbatch":
                    with contextlib.suppress(AssertionError):
                        self.cut_off(1)
                else:
                    time.sleep(self.random.uniform(0.2, 0.8))  # what it asks for is on its way

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The controller hears nothing meanwhile; what it is told, it finds afterwards."""
        self.cluster.kill("slurmctld", signal.SIGSTOP)
        try:
            yield
        finally:
            self.cluster.kill("slurmctld", signal.SIGCONT)

    def cut_off(self, within: float) -> None:
        """Those who have handed a job in, as a frozen controller will find, do not live to see it."""
        until(self._handed_in, "somebody has handed a job in", within, 0.02)
        for pid in self._handed_in():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _handed_in(self) -> list[int]:
        """The sbatch of ours whose words lie unread at the controller."""
        unread = self.cluster.unread()
        return [pid for pid in self.processes() if _name(pid) == "sbatch" and _sockets(pid) & unread]

    def _look_after(self) -> None:
        """An administrator. Nodes that have drained themselves are resumed; a job that runs for too long is one that
        its node does not know, which Slurm finds out by itself within minutes."""
        while not self._over.wait(2):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.cluster.resume()
                said = self.cluster.command("squeue", "-h", "-t", "running", "-o", "%M", check=False).split()
                if any(_seconds(spent) > MISSED for spent in said):
                    self.cluster.compare()
                    self._over.wait(MISSED)  # for so long the nodes take no jobs, at worst

    def jobs(self) -> list[str]:
        """Those of ours that are in the queue or run."""
        said = self.cluster.command("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%j")
        found = [line.split("|", 2) for line in said.splitlines()]
        return [
            f"job {n} is left: {state}" for n, state, name in found if name.startswith("mlp") and state not in ENDED
        ]

    def finish(self) -> Verdict:
        verdict = super().finish()
        with self.living():  # a daemon that starts looks at what its queue holds
            with contextlib.suppress(AssertionError):
                until(lambda: not self.jobs(), "the queue is empty", self.finished, 0.2)
        verdict.violations += self.jobs()
        with contextlib.suppress(AssertionError):
            until(lambda: not self.cluster.stepds(), "the end of every process of Slurm's jobs", 10)
        verdict.violations += [f"slurmstepd {pid} is left" for pid in self.cluster.stepds()]
        return verdict

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """One more life, which nothing disturbs."""
        self.daemon.start()
        yield
        self.daemon.term()

    def close(self) -> None:
        self._over.set()
        self._administrator.join()
        self.cluster.command("scancel", "-u", "root", check=False)
        super().close()


def _seconds(spent: str) -> int:
    """ "1:05" """
    minutes, _, seconds = spent.rpartition(":")
    return 60 * int(minutes.rpartition(":")[2] or 0) + int(seconds)


def _sockets(pid: int) -> set[int]:
    """Their inodes."""
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if (name := os.readlink(link)).startswith("socket:["):
                    found.add(int(name[8:-1]))
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
