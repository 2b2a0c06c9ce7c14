"""The supervisor alone, as other hosts run it (`--run FOLDER`), and the claim that it makes."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mlpiped.backends import folder as folders
from mlpiped.backends import processes, supervisor
from mlpiped.backends.base import Exited, NeverRan
from mlpiped.backends.memory_group import MemoryGroup

COMMAND = [sys.executable, "-I", "-S", supervisor.__file__]


def job_folder(place: Path, *argv: str, **facts: Any) -> Path:
    folder = place / f"t-{secrets.token_hex(4)}"
    for name in ("work", "out", "scratch"):
        (folder / name).mkdir(parents=True)
    order = {"v": 1, "token": folder.name, "argv": argv, "env": {"PATH": os.defpath, "MLPIPED_TOKEN": folder.name}}
    (folder / "job.json").write_text(json.dumps({**order, "grace": 5, **facts}))
    return folder


def supervise(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, "--run", str(folder)])


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the file is there; the process ending first is a failure."""
    while not path.exists():
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        assert path.exists(), "it ended without making the file"


def test_it_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    alone = tmp_path / "copied.py"
    alone.write_bytes(Path(supervisor.__file__).read_bytes())
    folder = job_folder(tmp_path, "sh", "-c", "echo done", memory=1 << 30)
    assert subprocess.run([sys.executable, "-I", "-S", str(alone), "--run", str(folder)], cwd="/").returncode == 0
    assert folders.witness(folder) == Exited(**{**vars_of(folders.witness(folder)), "code": 0})
    assert (folder / "stdout").read_bytes() == b"done\n"


def vars_of(outcome: Exited | None) -> dict[str, Any]:
    assert outcome is not None
    return {name: getattr(outcome, name) for name in Exited.__slots__}


def test_the_order_is_gone_once_it_is_read_and_the_claim_names_who_has_it(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, "sh", "-c", "touch here; while ! test -e go; do sleep 0.01; done")
    process = supervise(folder)
    wait_for(folder / "work/here", process)
    assert not (folder / "job.json").exists()
    handle = folders.read_claim(folder)
    assert handle is not None and handle["pid"] == process.pid
    assert handle["start"] == supervisor.start_time(process.pid) and handle["boot"] == supervisor.boot_id()
    assert folders.held(folder) and not folders.over(folder)
    (folder / "work/go").touch()
    assert process.wait(10) == 0
    assert not folders.held(folder) and folders.over(folder)


def test_of_many_supervisors_of_one_token_one_runs_and_the_others_do_nothing(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, "sh", "-c", "echo started")
    processes_ = [supervise(folder) for _ in range(8)]
    assert sorted(process.wait(20) for process in processes_) == [0] + [supervisor.LOST_CLAIM] * 7
    assert (folder / "stdout").read_bytes() == b"started\n"
    assert not list(folder.glob("claim.*"))


def test_A2_one_that_comes_after_the_fence_does_nothing(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, "sh", "-c", "echo started")
    assert isinstance(folders.fence(folder), NeverRan)
    assert supervise(folder).wait(10) == supervisor.LOST_CLAIM
    assert not (folder / "stdout").exists() and not (folder / "exit.json").exists()
    assert not (folder / "job.json").exists()


def test_of_claims_made_at_once_one_wins(tmp_path: Path) -> None:
    for number in range(50):
        folder = tmp_path / str(number)
        folder.mkdir()
        start = threading.Barrier(4)
        locks: list[int | None] = []

        def race(folder: Path = folder, start: threading.Barrier = start, locks: list[int | None] = locks) -> None:
            start.wait()
            locks.append(supervisor.claim(str(folder), {"v": 1}))

        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [lock for lock in locks if lock is not None]
        assert len(winners) == 1 and folders.held(folder)
        os.close(winners[0])
        assert not folders.held(folder)


def test_two_who_ask_whether_a_claim_is_held_do_not_mistake_each_other_for_its_holder(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim/handle.json").touch()
    with open(tmp_path / "claim/handle.json") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not folders.held(tmp_path)


@pytest.mark.parametrize("torn", [b"", b"\0" * 4096, b'{"v": 1, "co', b"[]", b"{}", b'{"v": 2, "code": 0}'])
def test_B4_a_torn_witness_is_no_witness(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "exit.json").write_bytes(torn)
    assert folders.witness(tmp_path) is None


def test_B3_after_a_reboot_a_success_counts_unless_its_witness_says_that_its_outputs_were_not_durable(
    tmp_path: Path,
) -> None:
    folder = job_folder(tmp_path, "sh", "-c", "echo made > ../out/made")
    assert supervise(folder).wait(20) == 0
    said = vars_of(folders.witness(folder))
    record = json.loads((folder / "exit.json").read_text())
    assert record["synced"] is True, "with nobody to hear it, the supervisor makes all of it durable"
    for code, synced, counts in ((0, True, True), (0, False, False), (3, False, True), (0, None, True)):
        told = {**record, "code": code, "synced": synced}
        if synced is None:  # of an earlier version, which made all of them durable
            del told["synced"]
        (folder / "exit.json").write_text(json.dumps(told))
        assert folders.outlives(folder, Exited(**{**said, "code": code})) is counts


def test_H6_a_step_that_fills_the_disk_cannot_silence_its_witness(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=True)
    try:
        folder = job_folder(place, "sh", "-c", "cat /dev/zero > fill; exit 9")
        assert supervise(folder).wait(20) == 0
        outcome = folders.witness(folder)
        assert outcome is not None and outcome.code == 9
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_cancellation_that_comes_before_the_start_prevents_it(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, "touch", "started")
    code = (
        "import sys, os, signal, runpy; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); os.kill(os.getpid(), 15);"
        f"sys.argv = ['s', '--run', {str(folder)!r}]; runpy.run_path({supervisor.__file__!r}, run_name='__main__')"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    outcome = folders.witness(folder)
    assert outcome is not None and outcome.cancelled and outcome.code is None
    assert not (folder / "work/started").exists()


SHUT_DOWN = """
import os, runpy, signal, sys
wait = signal.sigtimedwait
def woken(signals, timeout):
    got = wait(signals, timeout)
    if got is not None and got.si_signo == signal.SIGCHLD and timeout > 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return got
signal.sigtimedwait = woken
sys.argv[0:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_B3_a_step_that_was_quicker_than_its_supervisor_to_heed_the_SIGTERM_to_all_was_cancelled_by_it(
    tmp_path: Path,
) -> None:
    """The signal comes just when the supervisor wakes for the step's end."""
    folder = job_folder(tmp_path, "sh", "-c", "sleep 0.2; exit 3")
    assert subprocess.run([sys.executable, "-c", SHUT_DOWN, supervisor.__file__, "--run", folder]).returncode == 0
    outcome = folders.witness(folder)
    assert outcome is not None and outcome.code == 3 and outcome.cancelled


def test_an_order_that_cannot_be_read_is_told_by_the_witness(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, "true")
    (folder / "job.json").write_text("{")
    assert supervise(folder).wait(10) == 0
    outcome = folders.witness(folder)
    assert outcome is not None and outcome.code is None and outcome.error is not None


def test_D3_a_process_with_the_same_pid_and_another_start_is_somebody_else() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        start = supervisor.start_time(process.pid)
        assert start is not None
        handle = {"v": 1, "pid": process.pid, "start": start - 1, "boot": supervisor.boot_id()}
        assert not processes.terminate(handle, supervisor.boot_id())
        assert not processes.terminate({**handle, "start": start, "boot": "another"}, supervisor.boot_id())
        assert process.poll() is None
        assert processes.terminate({**handle, "start": start}, supervisor.boot_id())
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()


def test_a_sweep_ends_the_bearers_of_one_token_and_nobody_else() -> None:
    def bearer(token: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], env={**os.environ, "MLPIPED_TOKEN": token}, start_new_session=True)

    ours, other = bearer("t-1"), bearer("t-11")
    try:
        assert processes.sweep("t-1")
        assert ours.wait(10) == -signal.SIGKILL and other.poll() is None
    finally:
        other.kill()
        ours.kill()


def memory_allowed() -> bool:
    group = MemoryGroup.make(f"probe-{os.getpid()}", 1 << 30)
    if group is not None:
        group.remove()
    return group is not None


@pytest.mark.skipif(not memory_allowed(), reason="no memory control group may be made here")
def test_D1_a_step_over_its_memory_limit_is_killed_and_the_witness_says_why(tmp_path: Path) -> None:
    hungry = "x = bytearray(300 << 20)"
    folder = job_folder(tmp_path, sys.executable, "-I", "-S", "-c", hungry, memory=64 << 20)
    before = Path("/proc/self/cgroup").read_text()
    assert supervise(folder).wait(30) == 0
    outcome = folders.witness(folder)
    assert outcome is not None and outcome.signal == signal.SIGKILL
    assert outcome.error == "out of memory: it needed more than its limit of 64 MiB"
    assert Path("/proc/self/cgroup").read_text() == before
    assert supervise(modest := job_folder(tmp_path, "true", memory=64 << 20)).wait(30) == 0
    assert (witness := folders.witness(modest)) is not None and witness.code == 0 and witness.error is None
