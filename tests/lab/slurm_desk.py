"""A daemon beside a Slurm cluster, for tests that look at both from a person's place."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness import BIN, Daemon
from lab import packages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import slurm_rig
    from lab.slurm_login import LoginNode

WAITS = """
step = CommandStep("echo $MLPIPED_TOKEN >> EFFECTS; until test -e GO; do sleep 0.05; done", name="step",
                   compute_target="COMPUTE", version="NAME")
pipeline = Pipeline("NAME", steps=[step])
"""


class Desk:
    """A daemon beside a cluster. Its compute `first` has only the cluster's first node."""

    def __init__(self, cluster: slurm_rig.Cluster, more: str = "") -> None:
        self.cluster = cluster
        self.before = set(cluster.jobs())
        words = f'kind = "slurm"\npartition = "main"\npoll_interval = "200ms"\n{more}\n'
        extra = f'[compute.cluster]\n{words}[compute.first]\n{words}options = ["--nodelist=n1"]\n'
        env = {**cluster.env, "PATH": f"{BIN}:{packages.PATH}"}
        self.daemon = Daemon(extra=extra, env={name: env[name] for name in ("SLURM_CONF", "LC_ALL", "PATH")})
        self.effects, self.go = self.daemon.root / "effects", self.daemon.root / "go"

    def waits(self, compute: str, name: str = "waits") -> int:
        """A run whose step is in that compute's hands until `go` is there. Of another name, it is another step."""
        words = {"EFFECTS": str(self.effects), "GO": str(self.go), "COMPUTE": compute, "NAME": name}
        body = WAITS
        for word, value in words.items():
            body = body.replace(word, value)
        self.daemon.install(name, body)
        return self.daemon.run(name)

    def why(self, run: int) -> str:
        return self.daemon.ctl("why", f"{run}/step").stdout

    def jobs(self) -> list[str]:
        """States of the jobs that were submitted since."""
        return [state for job, (state, _) in sorted(self.cluster.jobs().items()) if job not in self.before]

    def reason(self, job: int) -> str:
        """Slurm's, for which that job waits."""
        return self.cluster.command("squeue", "-h", "-j", str(job), "-o", "%r", check=False).strip()

    @contextmanager
    def drained(self, nodes: str) -> Iterator[None]:
        self.cluster.command("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=test")
        try:
            yield
        finally:
            self.cluster.ready()

    def close(self) -> None:
        self.daemon.close()
        self.cluster.command("scancel", "-u", "root", check=False)


@contextmanager
def behind(login: LoginNode, work_dir: Path, more: str = "") -> Iterator[Desk]:
    """A desk whose machine has none of Slurm's commands; nor has it the cluster's files, with `shared = false`."""
    desk = Desk(login.cluster, f'via = "login"\nwork_dir = "{work_dir}"\n{more}')
    try:
        daemon = desk.daemon
        daemon.config.write_text(daemon.config.read_text() + login.config("login"))
        del daemon.env["SLURM_CONF"]
        daemon.state.mkdir(mode=0o700)
        (daemon.state / "known_hosts").write_text(login.box.known())
        yield desk
    finally:
        desk.close()
