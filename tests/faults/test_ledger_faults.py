"""The ledger under damage: what cannot be trusted is refused and left as it is; what was acknowledged is kept."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlpiped.clock import SystemClock
from mlpiped.errors import LedgerBusy, LedgerFull, LedgerTooNew, LedgerUnreadable
from mlpiped.ledger import moves, opening
from mlpiped.ledger.db import Connection, connect
from mlpiped.ledger.store import Ledger
from mlpiped.model import Cause, CauseKind, Event

pytestmark = pytest.mark.anyio

CHILD = """
import anyio, sys
from pathlib import Path
from mlpiped.clock import SystemClock
from mlpiped.ledger import moves
from mlpiped.ledger.store import Ledger
from mlpiped.model import Cause, CauseKind, Event

def opening(n):
    event = Event(f"p{n}", Cause(CauseKind.MANUAL), dedupe=f"d{n}", cursor=("s", {"n": n}))
    return moves.open_run(event, version="v", experiment="e", owner="o", tags={"n": str(n)}, options={}, now=n)

async def main():
    ledger = await Ledger.open(Path(sys.argv[1]), SystemClock())
    BODY
anyio.run(main)
"""


def child(state_dir: Path, body: str) -> subprocess.Popen[bytes]:
    code = CHILD.replace("BODY", body.replace("\n", "\n    "))
    return subprocess.Popen([sys.executable, "-c", code, str(state_dir)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)


def opening_of(pipeline: str) -> Any:
    event = Event(pipeline, Cause(CauseKind.MANUAL))
    return moves.open_run(event, version="v", experiment="e", owner="o", tags={}, options={}, now=1)


async def made(state_dir: Path, runs: int = 200) -> Path:
    ledger = await Ledger.open(state_dir, SystemClock())
    await ledger.write(*[opening_of(f"p{n}") for n in range(runs)])
    await ledger.close()
    return state_dir / opening.NAME


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damage_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(random.Random(1).randbytes(4096 * 4))


def damage_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(100))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def another_program_s(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE t (a)")


@pytest.mark.parametrize("damage", [damage_page, damage_header, truncate, empty, another_program_s])
async def test_C4_a_damaged_ledger_is_refused_and_left_as_it_is(tmp_path: Path, damage: Any) -> None:
    path = await made(tmp_path)
    damage(path)
    before = digest(path)
    with pytest.raises(LedgerUnreadable) as caught:
        await Ledger.open(tmp_path, SystemClock())
    assert digest(path) == before
    assert str(path) in caught.value.message and "restore" in (caught.value.hint or "")
    with pytest.raises(LedgerUnreadable):  # the lock was given back
        await Ledger.open(tmp_path, SystemClock())


WAL = f"{opening.NAME}-wal"
LIVE_FILES = (opening.NAME, WAL)


def killed(state_dir: Path, commits: int = 60) -> None:
    """Leave a ledger whose daemon did not close it: what it has committed is in the write-ahead log."""
    writes = f"for n in range({commits}):\n    await ledger.write(opening(n))\nprint(n, flush=True)\nsys.stdin.read()"
    process = child(state_dir, writes)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"%d\n" % (commits - 1)
    process.kill()
    process.communicate()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["its header", "its first frame", "somewhere", "deleted"])
async def test_C4_a_write_ahead_log_that_is_damaged_or_gone_is_refused_though_SQLite_would_begin_without_it(
    tmp_path: Path, where: str
) -> None:
    killed(tmp_path)
    wal = tmp_path / WAL
    if where == "deleted":
        wal.unlink()
    else:
        size = wal.stat().st_size
        at = {"its header": 20, "its first frame": 100, "somewhere": random.Random(7).randrange(100, size // 2)}[where]
        flip(wal, at)
    before = {name: digest(tmp_path / name) for name in LIVE_FILES if (tmp_path / name).exists()}
    for _ in range(2):
        with pytest.raises(LedgerUnreadable, match=r"write-ahead log is (missing|damaged)") as caught:
            await Ledger.open(tmp_path, SystemClock())
        assert "restore" in (caught.value.hint or "")
    assert {name: digest(tmp_path / name) for name in LIVE_FILES if (tmp_path / name).exists()} == before


async def test_C4_a_log_that_another_program_has_folded_into_the_ledger_is_missed_but_can_be_waived(
    tmp_path: Path,
) -> None:
    killed(tmp_path)
    subprocess.run([sys.executable, "-c", FOLD, tmp_path / opening.NAME], check=True)
    assert not (tmp_path / WAL).exists()
    with pytest.raises(LedgerUnreadable) as caught:
        await Ledger.open(tmp_path, SystemClock())
    assert f"remove `{tmp_path / opening.MARK}`" in (caught.value.hint or "")
    (tmp_path / opening.MARK).unlink()
    ledger = await Ledger.open(tmp_path, SystemClock())
    assert len(await ledger.runs(limit=100)) == 60
    await ledger.close()


FOLD = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM runs').fetchall(); c.close()"


async def test_C4_a_ledger_that_was_killed_or_closed_needs_no_help(tmp_path: Path) -> None:
    killed(tmp_path)
    for _ in range(2):
        ledger = await Ledger.open(tmp_path, SystemClock())
        assert len(await ledger.runs(limit=100)) == 60
        assert (tmp_path / opening.MARK).exists()
        await ledger.close()
        assert not (tmp_path / opening.MARK).exists() and not (tmp_path / WAL).exists()
    killed(tmp_path, 1)  # its second life, which begins a log anew
    ledger = await Ledger.open(tmp_path, SystemClock())
    assert len(await ledger.runs(limit=100)) == 60, "the second life has asked for what was there already"
    await ledger.close()


async def test_C4_a_restored_backup_does_not_miss_the_log_of_the_ledger_that_it_replaces(tmp_path: Path) -> None:
    killed(tmp_path / "state")
    (tmp_path / "state" / WAL).unlink()
    await made(tmp_path / "other")
    opening.restore(tmp_path / "state", tmp_path / "other" / opening.NAME)
    ledger = await Ledger.open(tmp_path / "state", SystemClock())
    assert len(await ledger.runs(limit=1000)) == 200
    await ledger.close()


async def test_C4_a_ledger_that_was_deleted_is_not_begun_anew(tmp_path: Path) -> None:
    (await made(tmp_path)).unlink()
    with pytest.raises(LedgerUnreadable, match="missing"):
        await Ledger.open(tmp_path, SystemClock())
    assert not (tmp_path / opening.NAME).exists()


async def test_a_start_that_was_killed_while_the_ledger_was_made_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f"{opening.NAME}.new").write_bytes(b"half")
    (tmp_path / f"{opening.NAME}.new-wal").write_bytes(b"half")
    await made(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [opening.BALLAST, opening.NAME, "pid"]


async def test_C5_a_newer_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = await made(tmp_path)
    conn = connect(path)
    conn.execute("PRAGMA user_version = 99")
    conn.close()
    before = digest(path)
    with pytest.raises(LedgerTooNew, match="version 99") as caught:
        await Ledger.open(tmp_path, SystemClock())
    assert digest(path) == before and caught.value.exit_code == 78


async def test_C5_a_newer_version_that_only_the_write_ahead_log_knows_of_is_refused_too(tmp_path: Path) -> None:
    path = await made(tmp_path / "a")
    conn = connect(path)
    conn.execute("PRAGMA user_version = 99")
    (tmp_path / "b").mkdir()
    for name in (opening.NAME, f"{opening.NAME}-wal"):  # as a crash would leave them
        shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
    conn.close()
    before = [digest(tmp_path / "b" / name) for name in (opening.NAME, f"{opening.NAME}-wal")]
    with pytest.raises(LedgerTooNew, match="version 99"):
        await Ledger.open(tmp_path / "b", SystemClock())
    assert [digest(tmp_path / "b" / name) for name in (opening.NAME, f"{opening.NAME}-wal")] == before


NEWEST = len(opening.migrations())
SECOND = "CREATE TABLE extra (a INTEGER) STRICT; ALTER TABLE runs ADD COLUMN note TEXT;"


def columns(path: Path) -> set[str]:
    conn = connect(path, readonly=True)
    try:
        return {row[1] for row in conn.execute("PRAGMA table_info(runs)")}
    finally:
        conn.close()


async def test_C6_a_migration_keeps_all_rows_and_a_copy_of_the_old_ledger(tmp_path: Path) -> None:
    path = await made(tmp_path)
    opening.prepare(path, [*opening.migrations(), SECOND])
    assert "note" in columns(path) and "note" not in columns(tmp_path / f"{opening.NAME}.v{NEWEST}")
    assert opening.check(tmp_path / f"{opening.NAME}.v{NEWEST}", NEWEST) == NEWEST
    conn = connect(path)
    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (200,)
    conn.close()
    with pytest.raises(LedgerTooNew):
        await Ledger.open(tmp_path, SystemClock())


async def test_C6_a_migration_that_fails_half_way_leaves_the_old_schema(tmp_path: Path) -> None:
    path = await made(tmp_path)
    with pytest.raises(Exception, match="no such table"):
        opening.prepare(path, [*opening.migrations(), f"{SECOND} INSERT INTO nowhere VALUES (1);"])
    assert "note" not in columns(path) and opening.check(path, NEWEST) == NEWEST
    await (await Ledger.open(tmp_path, SystemClock())).close()


async def test_C7_a_second_daemon_is_refused_by_the_pid_of_the_first_even_when_files_were_deleted(
    tmp_path: Path,
) -> None:
    first = child(tmp_path, "print('open', flush=True)\nsys.stdin.read()")
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == b"open\n"
        with pytest.raises(LedgerBusy, match=f"pid {first.pid}"):
            await Ledger.open(tmp_path, SystemClock())
        (tmp_path / "pid").unlink()
        with pytest.raises(LedgerBusy):
            await Ledger.open(tmp_path, SystemClock())
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    await (await Ledger.open(tmp_path, SystemClock())).close()


async def test_a_process_that_dies_without_closing_the_ledger_ends_at_once(tmp_path: Path) -> None:
    process = child(tmp_path, "raise SystemExit(7)")
    with anyio.fail_after(20):
        assert await anyio.to_thread.run_sync(lambda: process.wait(10)) == 7


@pytest.mark.parametrize("seed", range(5))
async def test_B4_what_was_acknowledged_before_a_kill_is_there_and_nothing_by_half(tmp_path: Path, seed: int) -> None:
    writes = """
async def write(n):
    [run_id] = await ledger.write(opening(n))
    print(n, flush=True)
n = 0
while True:
    async with anyio.create_task_group() as group:
        for _ in range(1 + n % 7):
            group.start_soon(write, n)
            n += 1
"""
    process = child(tmp_path, writes)
    assert process.stdout is not None
    chance = random.Random(seed)
    for _ in range(chance.randrange(1, 400)):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    process.wait()
    ledger = await Ledger.open(tmp_path, SystemClock())
    runs = await ledger.runs(limit=100_000)
    last = max([int(line) for line in rest.split(b"\n")[:-1]], default=0)
    numbers = sorted(int(run.tags["n"]) for run in runs)
    assert numbers == list(range(len(numbers))) and len(numbers) > last  # a prefix, with all that was acknowledged
    schedule = await ledger.schedule("s")
    assert schedule is not None and schedule.cursor == {"n": numbers[-1]} and schedule.run_id == runs[0].id
    assert len(await ledger.events(limit=100_000)) == len(runs) == await ledger.last_event()
    fire = await ledger.fire(f"d{numbers[-1]}")
    assert fire is not None and fire.run_id == runs[0].id
    await ledger.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a small disk of its own takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


async def test_C2_on_a_full_disk_the_ballast_lets_work_be_recorded_then_writes_fail_and_space_brings_all_back(
    small_disk: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("mlpiped.ledger.writer.SPACE_PAUSE", 0.02)
    monkeypatch.setattr("mlpiped.ledger.writer.RETRY_DELAY", 0.02)
    ledger = await Ledger.open(small_disk / "state", SystemClock())
    changes: list[bool] = []
    ledger.on_full = changes.append
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(4096))
            except OSError:
                break
    written = 0
    while not ledger.full:  # until the log has to grow
        await ledger.write(opening_of("before"))
        written += 1
    assert changes == [True] and not (small_disk / "state" / opening.BALLAST).exists()
    with pytest.raises(LedgerFull) as caught:
        while True:  # the ballast's space is used up too
            await ledger.write(opening_of("x" * 5000))
            written += 1
    assert "space" in (caught.value.hint or "")
    assert not await ledger._db.call(lambda c: c.in_transaction)
    assert len(await ledger.runs(limit=100_000)) == written  # reading goes on
    ledger.post(opening_of("posted" * 2000))
    (small_disk / "filler").unlink()
    with anyio.fail_after(20):
        while ledger.full or len(await ledger.runs(limit=100_000)) == written:
            await anyio.sleep(0.01)
    assert changes == [True, False] and (small_disk / "state" / opening.BALLAST).exists()
    await ledger.write(opening_of("after"))
    await ledger.close()
    assert opening.check(small_disk / "state" / opening.NAME, NEWEST) == NEWEST


async def test_C2_an_error_of_the_disk_in_one_caller_s_operation_undoes_nobody_else_s_for_good(tmp_path: Path) -> None:
    """SQLite rolls the whole transaction back: the others' operations are run again, not lost."""
    ledger = await Ledger.open(tmp_path, SystemClock())
    tries = 0

    def fails_once(c: Connection) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            error = sqlite_full()
            c.execute("ROLLBACK")
            raise error
        return "in the end"

    results: list[list[Any]] = []

    async def write(*ops: Any) -> None:
        results.append(await ledger.write(*ops))

    async with anyio.create_task_group() as group:
        group.start_soon(write, opening_of("a"))
        group.start_soon(write, fails_once)
        group.start_soon(write, opening_of("b"))
    assert sorted(map(str, results)) == ["['in the end']", "[1]", "[2]"]
    assert len(await ledger.runs()) == 2 and len(await ledger.events()) == 2
    await ledger.close()


FAILS = """
import resource
from mlpiped.errors import LedgerUnwritable
from mlpiped.ledger import writer
writer.SPACE_PAUSE = writer.RETRY_DELAY = 0.02
told = []
ledger.on_broken(told.append)
await ledger.write(opening(0))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
failed = 0
for n in range(1, 4):
    try:
        await ledger.write(opening(n))
    except LedgerUnwritable as error:
        failed += 1
ledger.post(opening(4))
await anyio.sleep(0.1)
assert failed == 3 and isinstance(ledger.broken, LedgerUnwritable) and len(told) == 1, (failed, told)
assert len(await ledger.runs()) == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
with anyio.fail_after(20):
    while ledger.broken or len(await ledger.runs()) < 2:
        await anyio.sleep(0.01)
assert told[1] is None and len(told) == 2
await ledger.write(opening(5))
await ledger.close()
print("well", flush=True)
"""


async def test_C3_writes_that_the_kernel_refuses_are_told_once_and_work_goes_on_by_itself_afterwards(
    tmp_path: Path,
) -> None:
    """EFBIG, by a limit to the size of files: an error of the disk for SQLite, and one that can be taken back."""
    process = child(tmp_path, FAILS)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"well\n")
    ledger = await Ledger.open(tmp_path, SystemClock())
    assert sorted(run.tags["n"] for run in await ledger.runs()) == ["0", "4", "5"]
    await ledger.close()


def sqlite_full() -> Exception:
    from mlpiped.ledger import db

    error = db.DatabaseError("database or disk is full")
    error.sqlite_errorcode = db.driver.SQLITE_FULL
    return error


async def test_restore_puts_a_backup_in_place_and_keeps_what_was_there(tmp_path: Path) -> None:
    ledger = await Ledger.open(tmp_path / "state", SystemClock())
    await ledger.write(opening_of("kept"))
    await ledger.backup(tmp_path / "copy")
    await ledger.write(opening_of("lost"))
    with pytest.raises(LedgerBusy):
        opening.restore(tmp_path / "state", tmp_path / "copy")
    await ledger.close()
    aside = opening.restore(tmp_path / "state", tmp_path / "copy")
    assert aside is not None and opening.check(aside, NEWEST) == NEWEST
    ledger = await Ledger.open(tmp_path / "state", SystemClock())
    assert [run.pipeline for run in await ledger.runs()] == ["kept"]
    await ledger.close()


async def test_restore_refuses_what_is_no_ledger_and_changes_nothing(tmp_path: Path) -> None:
    path = await made(tmp_path / "state")
    before = digest(path)
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    with pytest.raises(LedgerUnreadable):
        opening.restore(tmp_path / "state", tmp_path / "junk")
    assert digest(path) == before
