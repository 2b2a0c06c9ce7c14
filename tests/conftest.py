from __future__ import annotations

import pytest
from lab.docker_rig import docker_engine, own_engine, registry

__all__ = ["anyio_backend", "docker_engine", "own_engine", "registry"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
