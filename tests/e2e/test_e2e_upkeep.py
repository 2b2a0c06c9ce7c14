"""A ledger in years, with a real daemon: copied while it runs, brought back, cleaned, examined, and opened when old."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest
from harness import BIN, Daemon, step, steps, until

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
FIXTURE = Path(__file__).parents[1] / "fixtures" / "ledger-v1.sqlite3"

HELLO = """
out = PipelineData("out")
make = CommandStep(["sh", "-c", "echo made > $0", out], outputs=[out], name="make")
use = CommandStep(["sh", "-c", "until [ -e $0/open ]; do sleep 0.02; done; cat $1", str(LAB), out], name="use")
hello = Pipeline("hello", steps=[make, use])
quick = Pipeline("quick", steps=[CommandStep(["true"], name="nothing", allow_reuse=False)])
"""


def admin(daemon: Daemon, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "mlpiped"), *map(str, words), "--config", str(daemon.config)],
        env=daemon.env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def install(daemon: Daemon) -> None:
    daemon.install("hello", HELLO.replace("str(LAB)", repr(str(daemon.lab))), "hello", "quick")


def opened(path: Path) -> sqlite3.Connection:
    """A copy, to be looked at by any SQLite."""
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def test_a_backup_taken_while_runs_go_on_is_whole_and_a_daemon_goes_on_from_it(own: Daemon, tmp_path: Path) -> None:
    install(own)
    (own.lab / "open").write_text("")
    going, copies = threading.Event(), []

    def work() -> None:
        while not going.is_set():
            own.ctl("run", "quick", "--wait")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        first = own.go("hello")["id"]
        for number in range(4):
            done = admin(own, "backup", tmp_path / f"copy{number}")
            assert done.returncode == 0, done.stderr
            assert "runs, until 20" in done.stdout
            copies.append(tmp_path / f"copy{number}")
    finally:
        going.set()
        worker.join()
    assert not list((own.state / "incoming").iterdir())
    counts = []
    for copy in copies:
        connection = opened(copy)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counts.append(connection.execute("SELECT count(*) FROM runs").fetchone()[0])
        connection.close()
        assert copy.stat().st_mode & 0o077 == 0
    assert counts == sorted(counts) and counts[0] >= 1

    refused = admin(own, "restore", copies[0])
    assert (
        refused.returncode == 75 and f"pid {own.pid}" in refused.stderr and "hint: stop that daemon" in refused.stderr
    )
    last = own.go("quick")["id"]
    own.term()
    done = admin(own, "restore", copies[0])
    assert done.returncode == 0, done.stderr
    aside = next(own.state.glob("ledger.sqlite3.before-*"))
    assert str(aside) in done.stdout and "is not in the ledger" in done.stdout
    connection = opened(aside)
    assert connection.execute("SELECT max(id) FROM runs").fetchone()[0] == last
    connection.close()
    own.start()
    assert len(own.runs()) == counts[0]
    assert steps(own.show(first)) == {"make": "succeeded", "use": "succeeded"}
    assert steps(own.go("hello"))["make"] == "reused"


def test_without_a_daemon_a_backup_is_made_all_the_same_and_a_new_daemon_starts(own: Daemon, tmp_path: Path) -> None:
    install(own)
    own.go("quick")
    own.kill9()
    done = admin(own, "backup", tmp_path / "copy")
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path}/copy: 1 runs"), done.stderr
    own.start()
    own.go("quick")
    assert admin(own, "backup", tmp_path / "copy").stdout.startswith(f"{tmp_path}/copy: 2 runs")
    for wrong, code, words in (
        (tmp_path, 2, "is a folder"),
        (tmp_path / "no" / "copy", 2, "there is no folder"),
        (own.state / "ledger.sqlite3", 1, "cannot be its own backup"),
    ):
        done = admin(own, "backup", wrong)
        assert done.returncode == code and words in done.stderr, done.stderr
    own.term()
    before = (own.state / "ledger.sqlite3").read_bytes()
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    done = admin(own, "restore", tmp_path / "junk")
    assert done.returncode == 78 and "no SQLite file" in done.stderr
    assert (own.state / "ledger.sqlite3").read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, who restores for another user")
def test_what_root_restores_belongs_to_the_owner_of_the_state_folder(own: Daemon, tmp_path: Path) -> None:
    assert admin(own, "backup", tmp_path / "copy").returncode == 0
    own.term()
    (own.state / "pid").unlink()
    os.chown(own.state, 12345, 12345)
    assert admin(own, "restore", tmp_path / "copy").returncode == 0
    for name in ("ledger.sqlite3", "pid"):
        assert (own.state / name).stat().st_uid == 12345, name
    os.chown(own.state, 0, 0)


def test_a_state_folder_holds_what_the_operations_manual_names_and_nothing_else(own: Daemon) -> None:
    install(own)
    (own.lab / "open").write_text("")
    own.go("hello")
    table = OPERATIONS.read_text().partition("## What lies in the state folder\n")[2].partition("\n## ")[0]
    named = {name.rstrip("/") for row in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE) for name in words(row)}
    there = {path.name for path in own.state.iterdir()}
    assert {"ledger.sqlite3", "ledger.sqlite3-wal", "jobs"} <= there <= named


def words(row: str) -> list[str]:
    """The names in a cell; one that begins with a dash is an end of the first."""
    first, *others = re.findall("`(.+?)`", row)
    return [first, *(first + other if other.startswith("-") else other for other in others)]


def test_gc_frees_what_is_old_and_leaves_what_a_running_run_needs() -> None:
    with Daemon(extra='[retention]\nruns = "1ms"\nlogs = "1ms"\nartifacts = "1"') as daemon:
        install(daemon)
        for _ in range(3):
            daemon.go("quick")
        number = daemon.run("hello")
        until(lambda: steps(daemon.show(number)).get("use") == "running", "`use` waits")
        plan = daemon.json("gc", "--plan")
        counts = {part["what"]: part["count"] for part in plan["parts"] if part["count"]}
        assert counts == {"logs": 3, "runs": 2} and plan["artifacts"] == []
        assert len(daemon.runs("quick")) == 3
        done = daemon.json("gc")
        assert {part["what"]: part["count"] for part in done["parts"] if part["count"]} == counts
        assert done["faults"] == [] and done["bytes"] > 0
        assert len(daemon.runs("quick")) == 1
        (daemon.lab / "open").write_text("")
        assert daemon.end(number)["outcome"] == "succeeded"
        text = daemon.ctl("gc", "--plan")
        assert "over the budget of 1 B" in text.stdout and "nothing was removed" in text.stderr
        freed = daemon.json("gc")
        assert [p["count"] for p in freed["parts"] if p["what"] == "artifacts"] == [1]
        gone = daemon.ctl("get", f"{number}/make/out", "-")
        assert gone.returncode == 1 and "removed to free space" in gone.stderr
        assert steps(daemon.go("hello")) == {"make": "succeeded", "use": "reused"}  # made again, to the same bytes
        assert daemon.json("events", "-n", 1)["events"][0]["id"] > 0


def test_doctor_names_a_step_that_a_restored_ledger_does_not_know(own: Daemon, tmp_path: Path) -> None:
    install(own)
    own.go("quick")
    assert admin(own, "backup", tmp_path / "copy").returncode == 0
    number = own.run("hello")
    until(lambda: steps(own.show(number)).get("use") == "running", "`use` waits")
    own.term()
    assert admin(own, "restore", tmp_path / "copy").returncode == 0
    own.start()
    own.state.chmod(0o777)
    (own.state / "ballast").unlink()
    answer = own.ctl("doctor", "--json")
    found = {check["name"]: check for check in json.loads(answer.stdout)["checks"] if check["level"] != "ok"}
    assert answer.returncode == 1
    assert f"mlp-{number}-" in found["processes"]["message"] and "kill " in found["processes"]["hint"]
    assert found["state"]["hint"]
    own.state.chmod(0o700)
    well = own.json("doctor")
    names = [check["name"] for check in well["checks"]]
    for name in ("versions", "ledger", "sqlite", "disk", "state", "socket", "plugins", "datastores", "inotify", "clock",
                 "tools", "compute"):  # fmt: skip
        assert name in names, name
    own.term()
    done = own.ctl("doctor")
    assert done.returncode == 3 and "`mlpiped check`" in done.stderr


def test_a_daemon_takes_up_a_ledger_of_schema_1_with_the_runs_that_were_not_finished() -> None:
    daemon = Daemon(slots=4)
    try:
        daemon.state.mkdir(mode=0o700)
        shutil.copy(FIXTURE, daemon.state / "ledger.sqlite3")
        daemon.start()
        running, queued = sorted(run["id"] for run in daemon.runs("long") if run["outcome"] is None)
        # its process and its folder are on another machine, if anywhere: lost, and tried again
        until(lambda: step(daemon.show(running), "sleeps")["attempts"] == 2, "its second attempt")
        until(lambda: steps(daemon.show(running)) == {"sleeps": "running"}, "that it runs")
        assert daemon.ctl("cancel", running).returncode == 0
        assert daemon.end(running)["outcome"] == "cancelled"
        until(lambda: daemon.show(queued)["state"] == "running", "the turn of the one behind it")
        daemon.ctl("cancel", queued)
        assert daemon.end(queued)["outcome"] == "cancelled"
        assert daemon.json("doctor")["level"] != "fail"
    finally:
        daemon.close()
