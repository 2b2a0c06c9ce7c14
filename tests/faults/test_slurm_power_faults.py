"""B4 at the files that a cluster shares: what was said of a submission, or of a fence, stands after a power cut, and
what the cut has taken is as if it had never been asked for. Each record is one of many names of one file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from crash import power

from mlpiped.backends import folder as folders
from mlpiped.backends.slurm import submission
from mlpiped.backends.slurm.records import Records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKENS = [f"mlp-1-{n}-1-cafe" for n in range(600)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[power.Disk]:
    if (why := power.missing()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    disk = power.Disk(tmp_path / "shared", tmp_path / "disk.img")
    records_on(disk)
    os.sync()
    yield disk
    disk.close()


def records_on(disk: power.Disk) -> Records:
    records = Records(str(disk.place))
    records.prepare()
    return records


def cut(disk: power.Disk) -> Records:
    disk.cut()
    disk.unmount()
    disk.mount()
    return records_on(disk)


def submitted(tokens: list[str]) -> dict[str, dict[str, object]]:
    return {token: submission.submitted(f"7_{n}", 10.0, "00ff") for n, token in enumerate(tokens)}


def test_B4_records_that_were_settled_survive_a_power_cut_however_many_names_a_file_has(disk: power.Disk) -> None:
    said = records_on(disk).settle(submitted(TOKENS))
    after = cut(disk)
    assert {token: submission.record_of(after.home, token) for token in TOKENS} == said


def test_B4_a_list_of_an_array_is_on_the_disk_before_slurm_hears_of_it(disk: power.Disk) -> None:
    assert records_on(disk).enlist("00ff", TOKENS) == {}
    assert cut(disk).arrays(["00ff"]) == {"00ff": TOKENS}


def test_B4_a_fence_stands_after_a_power_cut_and_no_submission_wins_against_it(disk: power.Disk) -> None:
    token = TOKENS[0]
    assert records_on(disk).fence(token) is None
    after = cut(disk)
    assert after.settle(submitted([token]))[token] == submission.FENCED
    assert folders.fenced(after.at(token))


def test_B4_a_submission_that_was_settled_wins_against_a_fence_after_a_power_cut(disk: power.Disk) -> None:
    token = TOKENS[0]
    records_on(disk).settle(submitted([token]))
    handle = cut(disk).fence(token)
    assert handle is not None and handle["job"] == "7_0"


def test_B4_what_was_never_synced_is_no_record_or_a_whole_one(disk: power.Disk) -> None:
    before = records_on(disk)
    submission.write_orders(before.home, {token: {"v": 1, "grace": 10.0} for token in TOKENS})
    before.released(TOKENS)
    after = cut(disk)
    for token in TOKENS:
        assert submission.record_of(after.home, token) is None
        assert after.fence(token) is None
