"""A cluster with a login node that share a folder of which this machine sees nothing: their mount namespace is another.

Where the folder lies there is an empty one here, which must stay empty.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import slurm_login, slurm_rig, ssh_rig

if TYPE_CHECKING:
    from collections.abc import Iterator


UP = 10.0  # seconds


@dataclass
class Apart:
    login: slurm_login.LoginNode
    work_dir: Path
    within: list[str]

    @property
    def cluster(self) -> slurm_rig.Cluster:
        return self.login.cluster

    def there(self, *argv: str) -> str:
        """What a command says on the cluster's side."""
        return subprocess.run([*self.within, *argv], check=True, capture_output=True, text=True, timeout=60).stdout

    def from_here(self, path: Path) -> Path:
        """The way to a path of theirs."""
        return Path(f"/proc/{self.within[self.within.index('-t') + 1]}/root") / path.relative_to("/")

    def seen_here(self) -> list[str]:
        return [path.name for path in self.work_dir.iterdir()]


@contextmanager
def elsewhere() -> Iterator[tuple[list[str], Path]]:
    """(words before a command that is to see it, a folder of theirs)"""
    folder = Path(tempfile.mkdtemp(prefix="mlpd-apart-"))
    mount = f"mount -t tmpfs -o mode=755 mlpd-apart {folder} && echo ready && exec sleep infinity"
    holder = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", mount], stdout=subprocess.PIPE, text=True,
        preexec_fn=slurm_rig.die_with_parent,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        yield ["nsenter", "-t", str(holder.pid), "-m", "--"], folder
    finally:
        holder.kill()
        holder.wait()
        until = time.monotonic() + UP
        while time.monotonic() < until:
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


@contextmanager
def running(lab: ssh_rig.Lab, **facts: Any) -> Iterator[Apart]:
    with elsewhere() as (within, folder), slurm_rig.running(within=within) as cluster:
        login = slurm_login.node(lab, cluster, within=within, **facts)
        try:
            yield Apart(login, folder, within)
        finally:
            login.box.stop()


@pytest.fixture(scope="session")
def slurm_apart(ssh_lab: ssh_rig.Lab) -> Iterator[Apart]:
    """One that nothing harms."""
    with running(ssh_lab) as found:
        yield found
        assert found.seen_here() == []
