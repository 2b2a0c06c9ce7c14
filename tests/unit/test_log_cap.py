"""Logs that are cut in their middle while somebody appends to them: real files, on a file system that can."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import anyio
import pytest

from mlpiped import log_cap
from mlpiped.control import log_files

MIB = 1 << 20
HEAD = TAIL = 2 * MIB
MOST = 6 * MIB


def line(number: int) -> bytes:
    return f"line {number:>58}\n".encode()  # 64 bytes


def trim(path: Path) -> int:
    return log_cap.trim(str(path), head=HEAD, tail=TAIL, most=MOST)


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def read(path: Path) -> tuple[list[int], bytes]:
    """(how much was skipped each time, all that is there), as `mlpipectl logs` reads it."""
    at, skipped, text = 0, [], b""
    while found := log_files._read(path, at):
        gap, data = found
        skipped += [gap] if gap else []
        at, text = at + gap + len(data), text + data
    return skipped, text


def test_of_a_log_that_is_too_long_head_and_tail_stay_and_the_writer_goes_on(tmp_path: Path) -> None:
    path, count = tmp_path / "stdout", 1_000_000
    freed, written = 0, threading.Event()

    def write() -> None:
        with open(path, "ab", buffering=1 << 16) as log:
            for number in range(count):
                log.write(line(number))
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not written.wait(0.01):
        if path.exists():
            freed += trim(path)
    writer.join()
    freed += trim(path)
    assert path.stat().st_size == 64 * count, "offsets are what they were"
    assert on_disk(path) <= MOST < freed
    skipped, text = read(path)
    assert len(skipped) == 1 and skipped[0] + len(text) == 64 * count
    lines = text.splitlines()
    assert lines[0] == line(0).strip() and lines[-1] == line(count - 1).strip()
    assert text.startswith(b"".join(map(line, range(HEAD // 64)))), "the head is whole"
    assert text.endswith(b"".join(map(line, range(count - TAIL // 64, count)))), "so is the tail"
    assert b"\0" not in text


def test_a_log_of_usual_length_is_left_alone_and_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "stdout"
    path.write_bytes(b"x" * (MOST - MIB))
    assert trim(path) == 0
    assert read(path) == ([], b"x" * (MOST - MIB))
    path.write_bytes(b"a\0\0\0b")
    with path.open("r+b") as file:  # a small gap that the step made is no cut
        file.seek(100_000)
        file.write(b"end")
    assert read(path) == ([], b"a\0\0\0b" + b"\0" * 99_995 + b"end")


def test_reading_from_within_the_cut_goes_on_behind_it_and_a_cut_at_the_end_is_an_end(tmp_path: Path) -> None:
    path = tmp_path / "stdout"
    path.write_bytes(b"x" * 4 * MOST)
    assert trim(path) > 0
    skipped, data = log_files._read(path, HEAD + 1) or (0, b"")
    assert skipped == 4 * MOST - TAIL - HEAD - 1 and data[:1] == b"x"
    os.truncate(path, HEAD)
    os.truncate(path, 4 * MOST)
    assert log_files._read(path, HEAD) is None


def test_only_a_regular_file_of_one_name_is_cut(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"x" * 4 * MOST)
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "hard").hardlink_to(data)
    os.mkfifo(tmp_path / "fifo")
    assert [trim(tmp_path / name) for name in ("hard", "fifo", "none")] == [0, 0, 0]
    assert log_cap.trim(str(tmp_path / "link"), head=HEAD, tail=TAIL, most=-1) == 0
    assert on_disk(data) >= 4 * MOST


@pytest.mark.anyio
async def test_logs_of_what_runs_and_of_what_has_just_ended_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    running, shown = [["a"], ["a", "b"], ["b"], [], []], [[""]]
    done = anyio.Event()

    def now() -> list[str]:
        if not running:
            done.set()
        shown.append(running.pop(0) if running else [])
        return shown[-1]

    monkeypatch.setattr(log_cap, "trim", lambda path: looked.append(path) or 0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(log_cap.LogCap("jobs", now, lambda: shown[-1], every=0, round=0).run)
        await done.wait()
        tasks.cancel_scope.cancel()
    assert sorted(looked) == sorted(f"jobs/{f}/{s}" for f in "aaabbb" for s in ("stdout", "stderr"))


@pytest.mark.anyio
async def test_what_prints_little_is_looked_at_when_it_begins_and_ends_and_all_when_the_disk_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    free = [1000, 1000, 1000, 990, 980, 979, 979, 979, 950, 950]  # when noted, at each look; twice where all are due
    monkeypatch.setattr(log_cap, "trim", lambda path: looked.append(path[-8]) or 0)
    monkeypatch.setattr(log_cap._Disk, "left", lambda disk: free.pop(0))
    waits: set[str] = set()
    cap = log_cap.LogCap(str(tmp_path), list, lambda: {"a", "b"} - waits, round=1e9, filled=20)
    cap._looked = log_cap.time.monotonic()
    seen = []
    a, b = {"a"}, {"b"}
    for now, before in ((a, set()), (a | b, a), (a | b, a | b), (a | b, a | b), (b, a | b)):
        await cap._look(now, before)
        seen.append("".join(sorted(set(looked))))
        looked.clear()
    assert seen == ["a", "b", "", "ab", "a"]
    waits |= a
    await cap._look(a | b, a | b)
    await cap._look(a | b, a | b)
    assert set(looked) == b, "one that waits in a queue prints nothing"


def test_a_file_system_that_cannot_give_back_is_told_of(tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "ramfs", "log", str(tmp_path)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = tmp_path / "stdout"
        path.write_bytes(b"x" * 4 * MOST)
        with pytest.raises(OSError, match="Operation not supported"):
            log_cap.trim(str(path), head=HEAD, tail=TAIL, most=-1)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
