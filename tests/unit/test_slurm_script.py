"""The script that is submitted for a job, run as a node runs it: by sh, as often as Slurm launches it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlpiped.backends import folder as folders
from mlpiped.backends.slurm import submission, tools
from mlpiped.backends.slurm.records import Records

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN = "t.1-0-abc"


@pytest.fixture
def records(tmp_path: Path) -> Records:
    records = Records(str(tmp_path))
    records.prepare()
    return records


@pytest.fixture
def launch(records: Records, tmp_path: Path) -> Callable[[], int]:
    """Its exit status."""
    (tmp_path / "script").write_bytes(tools.script(str(tmp_path), TOKEN, tools.install(tmp_path), sys.executable))

    def run() -> int:
        return subprocess.run(["/bin/sh", tmp_path / "script"], check=False, timeout=30).returncode

    return run


def order(effects: Path) -> dict[str, object]:
    lacks = dict.fromkeys(("work", "out", "scratch"))
    argv = ["sh", "-c", f"echo started >> {effects}"]
    return {"v": 1, "token": TOKEN, "argv": argv, "env": {"PATH": os.defpath}, "grace": 5, "lacks": lacks}


def test_however_often_it_is_launched_the_step_starts_once(
    records: Records, launch: Callable[[], int], tmp_path: Path
) -> None:
    submission.write_orders(records.home, {TOKEN: order(tmp_path / "effects")})
    assert [launch() for _ in range(3)] == [0, 75, 75]
    assert (tmp_path / "effects").read_text() == "started\n"


def test_J7_what_was_killed_between_its_order_and_its_claim_starts_when_slurm_launches_it_again(
    records: Records, launch: Callable[[], int], tmp_path: Path
) -> None:
    submission.write_orders(records.home, {TOKEN: order(tmp_path / "effects")})
    supervisor = next(tmp_path.glob("**/supervisor.py"))
    supervisor.rename(tmp_path / "away")
    assert launch() != 0  # it has made its job.json, and came no further
    assert not Path(records.home, "orders", TOKEN).exists() and not (tmp_path / "effects").exists()
    (tmp_path / "away").rename(supervisor)
    assert launch() == 0
    assert (tmp_path / "effects").read_text() == "started\n"
    witness = folders.witness(records.at(TOKEN))
    assert witness is not None and witness.code == 0


def test_what_was_fenced_does_not_start_on_a_node(records: Records, launch: Callable[[], int], tmp_path: Path) -> None:
    submission.write_orders(records.home, {TOKEN: order(tmp_path / "effects")})
    assert records.fence(TOKEN) is None
    assert launch() == 75
    assert not (tmp_path / "effects").exists()


def test_what_was_discarded_leaves_nothing_when_it_is_launched(
    records: Records, launch: Callable[[], int], tmp_path: Path
) -> None:
    submission.write_orders(records.home, {TOKEN: order(tmp_path / "effects")})
    records.discard(TOKEN, keep_logs=False)
    assert launch() == 75
    assert not Path(records.at(TOKEN)).exists()
