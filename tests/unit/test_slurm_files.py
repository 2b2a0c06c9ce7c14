"""Job folders of a cluster, where the daemon's machine sees them in a work folder of their own."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from mlpiped.backends.base import NeverRan
from mlpiped.backends.slurm.files import SharedFiles
from mlpiped.config.computes import SlurmCompute
from mlpiped.retention import keeping

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
TOKEN = "mlp-1-0-1-abc"


async def test_a_token_that_was_fenced_before_it_was_built_is_found_by_who_cleans_up(tmp_path: Path) -> None:
    state, shared = tmp_path / "state", tmp_path / "shared"
    files = SharedFiles("cluster", state, SlurmCompute(kind="slurm", work_dir=shared), sys.executable)
    await files.start()
    assert isinstance(await files.fence(TOKEN), NeverRan)
    assert [token for token, _ in keeping.listed(state / "jobs")] == [TOKEN]
    await files.discard(TOKEN, keep_logs=False)
    left = [name for kind in ("jobs", "slurm/records") for name in os.listdir(shared / kind) if name.startswith("mlp-")]
    assert left == os.listdir(state / "jobs") == []
