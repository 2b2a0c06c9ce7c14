"""A login node: a real sshd from which a cluster is reached, and nothing else of the machine needs to know of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from lab import slurm_rig, ssh_rig

from mlpiped.backends.ssh import SshBackend
from mlpiped.config.computes import SshCompute

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = "echo Welcome to the cluster; printf 'no newline'; "


@dataclass
class LoginNode:
    cluster: slurm_rig.Cluster
    box: ssh_rig.Box

    def backend(self, state: Path, **settings: Any) -> SshBackend:
        """The compute that `via` names, of a daemon with this state folder."""
        (state / "known_hosts").write_text(self.box.known(settings.get("port")))
        facts = SshCompute(**self.box.settings(**{"gpus": 0, "slots": 0, **settings}))
        return SshBackend("login", state, facts, instance="0" * 32, datastores={})

    def config(self, via: str, **settings: Any) -> str:
        facts = self.box.settings(**{"gpus": 0, "slots": 0, **settings})
        words = [f"{name} = {json.dumps(value, default=str)}" for name, value in facts.items()]
        return "\n".join([f"[compute.{via}]", *words, ""])


def node(lab: ssh_rig.Lab, cluster: slurm_rig.Cluster, *tools: Path, **facts: Any) -> LoginNode:
    """Its login shell greets, and settings of sbatch that would harm lie in wait in its environment."""
    path = [*tools, *cluster.env["PATH"].split(":")]
    force = f'{GREETING}exec sh -c "$SSH_ORIGINAL_COMMAND"'
    settings = {"SLURM_CONF": str(cluster.conf), "SBATCH_PARTITION": "nowhere"}
    return LoginNode(cluster, lab.box(path=path, force=force, **settings, **facts))


@pytest.fixture(scope="session")
def slurm_login(slurm_cluster: slurm_rig.Cluster, ssh_lab: ssh_rig.Lab) -> Iterator[LoginNode]:
    """One that nothing harms."""
    found = node(ssh_lab, slurm_cluster)
    yield found
    found.box.stop()
