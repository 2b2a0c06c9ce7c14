"""B2, C1 to C3: a whole daemon whose ledger another program locks, or lies on a disk that is full, hangs or fails."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from crash import power
from harness import BIN, Daemon, lines, until

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD = 6
"""So many times SQLite's 5 s of patience another program keeps the lock."""

PATIENCE = 5.0  # seconds that these daemons wait for a disk to get well
FEED_WITHIN = 3.0  # seconds, the watchdog's
HURRIED = f"""
import os, signal, sys, time
import mlpiped.crash, mlpiped.daemon, mlpiped.ledger.writer
point = mlpiped.crash.point
def hang(name):
    while name == "in_commit" and os.path.exists(os.environ["HANG"]):
        time.sleep(0.05)
    point(name)
mlpiped.crash.point = hang
mlpiped.daemon.BROKEN_LIMIT, mlpiped.ledger.writer.SPACE_PAUSE = {PATIENCE}, 0.5
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(120))
from mlpiped.cli.admin import main
sys.exit(main(sys.argv[1:]))
"""
LOCKER = """
import sqlite3, sys
conn = sqlite3.connect(sys.argv[1], isolation_level=None)
conn.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def own() -> Iterator[Daemon]:
    with Daemon(slots=4) as daemon:
        yield daemon


@contextlib.contextmanager
def locked(daemon: Daemon) -> Iterator[subprocess.Popen[str]]:
    """Another program, with a write transaction of its own."""
    command = [sys.executable, "-c", LOCKER, daemon.state / "ledger.sqlite3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            yield other
        finally:
            other.kill()


def gated(daemon: Daemon, name: str) -> tuple[Path, Path]:
    """A pipeline of two steps, the first of which waits for a file: (what the steps say, that file)."""
    effects, go = daemon.root / f"{name}-effects", daemon.root / f"{name}-go"
    daemon.install(
        name,
        f"""
steps = [
    CommandStep(
        "echo first >> {effects}; until [ -e {go} ]; do sleep 0.02; done; echo over >> {effects}", name="first"
    ),
    CommandStep("echo second >> {effects}", name="second"),
]
steps[1].run_after(steps[0])
pipeline = Pipeline("{name}", steps=steps)
""",
    )
    return effects, go


# --- C1 -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_C1_a_write_lock_held_for_30_s_by_another_program_is_waited_for_and_nothing_is_lost(own: Daemon) -> None:
    effects, go = gated(own, "waits")
    number = own.run("waits")
    until(lambda: lines(effects), "the first step has started")
    pid = own.pid
    with locked(own):
        go.touch()
        until(lambda: lines(effects) == ["first", "over"], "the first step has ended, which cannot be recorded")
        words = [BIN / "mlpipectl", "run", "waits", "--force"]
        asked = subprocess.Popen(words, env=own.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: f"trying again ({HELD})" in own.tail(), f"the lock was met {HELD} times", 5 * HELD + 30)
        assert own.json("status")["runs"]["running"] == 1, "it answers meanwhile"
        assert asked.poll() is None, "who asks for a write waits, too"
        assert lines(effects) == ["first", "over"], "nothing is begun that cannot be recorded"
    said, wrong = asked.communicate(timeout=60)
    assert asked.returncode == 0, wrong + said
    assert own.end(number)["outcome"] == "succeeded"
    runs = own.runs("waits")
    assert len(runs) == 2
    assert own.end(runs[0]["id"])["outcome"] == "succeeded"
    assert lines(effects) == ["first", "over", "second"] * 2
    assert own.pid == pid and own.process is not None and own.process.poll() is None
    assert '"level":"error"' not in own.tail(100_000)


def test_C1_a_daemon_that_starts_while_another_program_has_the_lock_waits_for_it(own: Daemon) -> None:
    effects, go = gated(own, "early")
    number = own.run("early")
    until(lambda: lines(effects), "the first step has started")
    own.kill9()
    go.touch()
    own.log.unlink()
    with locked(own) as other:

        def give_back() -> None:
            until(lambda: own.log.exists() and "trying again" in own.tail(), "the lock was met", 40)
            other.kill()

        giver = threading.Thread(target=give_back)
        giver.start()
        own.start(timeout=60)
        giver.join()
    assert own.end(number)["outcome"] == "succeeded"
    assert lines(effects) == ["first", "over", "second"]


# --- a disk of its own --------------------------------------------------------------------------------------------
class OnDisk:
    """A daemon whose state folder is a disk that can fail."""

    def __init__(self) -> None:
        self.daemon = Daemon(slots=4)
        self.daemon.program = (sys.executable, "-c", HURRIED)
        self.daemon.env["HANG"] = str(self.daemon.root / "hang")
        self.disk = power.Disk(self.daemon.state, self.daemon.root / "disk.img")
        self.daemon.state.chmod(0o700)

    def close(self) -> None:
        self.disk.thaw()
        if self.daemon.process is not None:
            self.daemon.kill9()
        for pid in self.daemon.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.disk.close()
        self.daemon.close()


@pytest.fixture
def on_disk() -> Iterator[OnDisk]:
    if (why := power.missing()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    found = OnDisk()
    try:
        yield found
    finally:
        found.close()


def cpu(pid: int) -> float | None:
    """Seconds of processor time that it has used; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- C2 ---
def test_C2_a_start_on_a_full_disk_says_so_and_is_tried_again_by_systemd(on_disk: OnDisk) -> None:
    daemon = on_disk.daemon.start()
    daemon.term()
    unit = (Path(__file__).parents[2] / "systemd/mlpiped.service").read_text()
    filler = daemon.state / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    (daemon.state / "ballast").unlink()
    with pytest.raises(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 10))
    words = [BIN / "mlpiped", "serve", "--config", daemon.config]
    done = subprocess.run(words, env=daemon.env, capture_output=True, text=True, timeout=60, check=False)
    final = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)[0].split()
    assert str(done.returncode) not in ("0", *final)
    assert "error: no space left for the" in done.stderr
    filler.unlink()
    daemon.start()
    assert daemon.json("status")["daemon"]["disk_full"] is False


# --- C3 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["make_read_only", "cut"], ids=["read_only", "EIO"])
def test_C3_a_disk_that_takes_no_writes_stops_dispatch_and_ends_the_daemon_with_75_and_a_sentence(
    on_disk: OnDisk, fault: str
) -> None:
    daemon = on_disk.daemon
    daemon.start()
    effects, go = gated(daemon, "dark")
    number = daemon.run("dark")
    until(lambda: lines(effects), "the first step has started")
    process, before = daemon.process, daemon.log.stat().st_size
    assert process is not None
    getattr(on_disk.disk, fault)()
    asked = daemon.ctl("run", "dark", "--force")
    assert asked.returncode == 1
    assert "the disk of the ledger fails" in asked.stderr
    if fault == "make_read_only":  # what is there can be read
        status = daemon.json("status")
        assert "the disk of the ledger fails" in status["daemon"]["ledger_broken"]
        assert "nothing new is dispatched" in daemon.ctl("status").stdout
        assert "the disk of the ledger fails" in daemon.ctl("doctor").stdout
    go.touch()
    until(lambda: lines(effects) == ["first", "over"], "the step goes on")
    began = used = cpu(process.pid) or 0.0
    while process.poll() is None:
        used = cpu(process.pid) or used
        time.sleep(0.05)
    daemon.process = None
    assert process.returncode == 75
    said = daemon.log.read_bytes()[before:].decode(errors="replace")
    assert re.search(r"^error: the disk of the ledger fails: `.*ledger\.sqlite3`: .+$", said, re.MULTILINE), said
    assert "\nhint: look at that disk and its mount, then start again" in said
    assert used - began < PATIENCE / 3, "it waited, and did not spin"
    assert said.count("\n") < 100, said
    assert lines(effects) == ["first", "over"], "nothing was dispatched"
    until(lambda: not daemon.processes(), "the step's processes are gone")
    on_disk.disk.unmount()
    on_disk.disk.mount()
    daemon.start()
    assert daemon.end(number)["outcome"] == "succeeded"
    assert lines(effects)[-1] == "second"


def test_C3_a_daemon_that_starts_on_a_disk_that_takes_no_writes_says_so_and_ends_with_75(on_disk: OnDisk) -> None:
    daemon = on_disk.daemon.start()
    daemon.term()
    on_disk.disk.make_read_only()
    words = [BIN / "mlpiped", "serve", "--config", daemon.config]
    done = subprocess.run(words, env=daemon.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75, done.stderr
    assert f"error: the state folder cannot be used: `{daemon.state}`: Read-only file system\nhint: " in done.stderr


# --- B2 -----------------------------------------------------------------------------------------------------------
class Systemd:
    """As much of it as a daemon sees: a socket that hears that it is well."""

    def __init__(self, daemon: Daemon) -> None:
        self.ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ear.bind(str(daemon.root / "notify"))
        self.ear.settimeout(FEED_WITHIN)
        wanted = {"NOTIFY_SOCKET": str(daemon.root / "notify"), "WATCHDOG_USEC": str(int(FEED_WITHIN * 1e6))}
        daemon.env |= wanted

    def fed(self) -> bool:
        """The next time that it is; False when systemd would not have waited any longer."""
        try:
            while self.ear.recv(4096) != b"WATCHDOG=1":
                pass
        except TimeoutError:
            return False
        return True

    def drained(self) -> None:
        self.ear.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.ear.recv(4096)
        self.ear.settimeout(FEED_WITHIN)


@pytest.fixture
def systemd(on_disk: OnDisk) -> Iterator[Systemd]:
    found = Systemd(on_disk.daemon)
    yield found
    found.ear.close()


def test_B2_a_daemon_that_is_well_feeds_the_watchdog_and_one_whose_loop_is_blocked_does_not(
    on_disk: OnDisk, systemd: Systemd
) -> None:
    daemon = on_disk.daemon.start()
    effects, go = gated(daemon, "blocked")
    number = daemon.run("blocked")
    until(lambda: lines(effects), "the first step has started")
    systemd.drained()
    assert all(systemd.fed() for _ in range(5))
    os.kill(daemon.pid, 10)  # SIGUSR1: the loop sleeps, its threads do not
    until(lambda: not systemd.fed(), "the watchdog's patience is at an end")
    daemon.kill9()  # as systemd does it then
    go.touch()
    daemon.start()
    assert daemon.end(number)["outcome"] == "succeeded"
    assert lines(effects) == ["first", "over", "second"]


def test_B2_a_daemon_whose_ledger_is_on_a_disk_that_hangs_is_not_fed_until_that_is_over(
    on_disk: OnDisk, systemd: Systemd
) -> None:
    daemon = on_disk.daemon.start()
    gated(daemon, "frozen")
    systemd.drained()
    assert all(systemd.fed() for _ in range(3))
    on_disk.disk.freeze()
    until(lambda: not systemd.fed(), "the watchdog's patience is at an end")
    on_disk.disk.thaw()
    until(systemd.fed, "it is well again")


def test_B2_a_daemon_whose_writing_thread_hangs_is_not_fed_though_its_loop_and_its_reading_go_on(
    on_disk: OnDisk, systemd: Systemd
) -> None:
    daemon = on_disk.daemon.start()
    gated(daemon, "stuck")
    systemd.drained()
    assert all(systemd.fed() for _ in range(3))
    hang = daemon.root / "hang"
    hang.touch()
    until(lambda: not systemd.fed(), "the watchdog's patience is at an end")
    assert daemon.json("status")["daemon"]["pid"] == daemon.pid
    hang.unlink()
    until(systemd.fed, "it is well again")


def test_B2_an_idle_daemon_proves_that_it_can_write_without_a_row(on_disk: OnDisk, systemd: Systemd) -> None:
    daemon = on_disk.daemon.start()
    gated(daemon, "idle")

    def newest() -> int:
        return max((each["id"] for each in map(dict, daemon.json("events", "-n", 1)["events"])), default=0)

    wal = daemon.state / "ledger.sqlite3-wal"
    events, written = newest(), wal.stat().st_mtime_ns
    systemd.drained()
    assert all(systemd.fed() for _ in range(3))
    assert wal.stat().st_mtime_ns > written
    assert newest() == events
