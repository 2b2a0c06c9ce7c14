"""Job folders of a cluster, where the daemon's machine sees them in a work folder of their own."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mlpiped.backends.base import NeverRan
from mlpiped.backends.slurm.files import SharedFiles
from mlpiped.config.computes import SlurmCompute
from mlpiped.errors import BackendUnavailable
from mlpiped.retention import keeping

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
TOKEN = "mlp-1-0-1-abc"


@pytest.fixture
async def files(tmp_path: Path) -> SharedFiles:
    compute = SlurmCompute(kind="slurm", work_dir=tmp_path / "shared")
    files = SharedFiles("cluster", tmp_path / "state", compute, sys.executable)
    await files.start()
    return files


async def test_a_token_that_was_fenced_before_it_was_built_is_found_by_who_cleans_up(
    files: SharedFiles, tmp_path: Path
) -> None:
    state, shared = tmp_path / "state", tmp_path / "shared"
    assert isinstance(await files.fence(TOKEN), NeverRan)
    assert [token for token, _ in keeping.listed(state / "jobs")] == [TOKEN]
    await files.discard(TOKEN, keep_logs=False)
    left = [name for kind in ("jobs", "slurm/records") for name in os.listdir(shared / kind) if name.startswith("mlp-")]
    assert left == os.listdir(state / "jobs") == []


async def test_nothing_is_called_removed_while_its_file_system_is_not_mounted(
    files: SharedFiles, tmp_path: Path
) -> None:
    await files.fence(TOKEN)
    (tmp_path / "shared").rename(tmp_path / "away")
    with pytest.raises(BackendUnavailable):
        await files.discard(TOKEN, keep_logs=False)
    (tmp_path / "away").rename(tmp_path / "shared")
    await files.discard(TOKEN, keep_logs=False)
    assert not (tmp_path / "shared" / "jobs" / TOKEN).exists()


async def test_what_a_step_has_measured_stays_until_its_run_goes(files: SharedFiles, tmp_path: Path) -> None:
    await files.fence(TOKEN)
    here, there = tmp_path / "state" / "jobs" / TOKEN, tmp_path / "shared" / "jobs" / TOKEN
    (there / "stdout").write_text("said")
    (there / "metrics.jsonl").write_text("{}")
    await files.discard(TOKEN, keep_logs=False)
    assert os.listdir(here) == ["metrics.jsonl"]
    keeping.clear_job(here, keep_metrics=False)
    await files.discard(TOKEN, keep_logs=False)
    assert not here.is_symlink() and not there.exists()


async def test_lists_of_arrays_of_which_nothing_is_left_go_while_the_daemon_lives(
    files: SharedFiles, tmp_path: Path
) -> None:
    slurm, hours = tmp_path / "shared" / "slurm", 3 * 3600
    for array in ("gone", "lives", "new"):
        await files.enlist(array, [f"mlp-{array}-{n}" for n in range(3)])
    await files.fence("mlp-lives-2")
    ago = time.time() - hours
    for path in (slurm / ".swept", slurm / "arrays" / "gone", slurm / "arrays" / "lives"):
        os.utime(path, (ago, ago))
    assert await files.health() is None
    assert sorted(os.listdir(slurm / "arrays")) == ["lives", "new"]
    assert time.time() - (slurm / ".swept").stat().st_mtime < hours
