from __future__ import annotations

import pytest
from lab.docker_rig import docker_engine, own_engine, registry
from lab.slurm_apart import slurm_apart
from lab.slurm_login import slurm_login
from lab.slurm_rig import slurm_cluster
from lab.ssh_rig import ssh_box, ssh_lab

__all__ = [
    "anyio_backend",
    "docker_engine",
    "own_engine",
    "registry",
    "slurm_apart",
    "slurm_cluster",
    "slurm_login",
    "ssh_box",
    "ssh_lab",
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
