"""C7, E1, E2, E5, E6, F7, G9: faults that a whole daemon meets, on a real one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import BIN, Daemon, lines, step, until

if TYPE_CHECKING:
    from collections.abc import Iterator

# libfaketime breaks clock_nanosleep() where it leaves the monotonic clock alone: select() sleeps as well.
ENTRY = """
import select, sys, time
time.sleep = lambda seconds: select.select([], [], [], seconds)
from mlpiped.cli.admin import main
sys.exit(main(sys.argv[1:]))
"""
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
HOUR = 3600


@pytest.fixture
def own() -> Iterator[Daemon]:
    with Daemon(slots=4) as daemon:
        yield daemon


# --- C7 -----------------------------------------------------------------------------------------------------------
def test_C7_of_twenty_daemons_started_at_once_one_serves_and_the_others_name_it() -> None:
    daemon, count = Daemon(), 20
    starting: list[subprocess.Popen[bytes]] = []
    logs = [daemon.root / f"log{i}" for i in range(count)]
    try:
        for log in logs:
            with log.open("wb") as file:
                words = [BIN / "mlpiped", "serve", "--config", daemon.config]
                starting.append(subprocess.Popen(words, env=daemon.env, stdout=file, stderr=file))
        until(lambda: sum(p.poll() is None for p in starting) == 1, "all but one have ended", 90)
        winner = next(p for p in starting if p.poll() is None)
        until(daemon.accepts, "the one that is left serves")
        assert daemon.json("status")["daemon"]["pid"] == winner.pid
        for process, log in zip(starting, logs, strict=True):
            if process is not winner:
                assert process.returncode == 75, log.read_text()
                assert f"pid {winner.pid}" in log.read_text()
        for name in ("pid", "instance"):  # what a lock file would not survive
            (daemon.state / name).unlink(missing_ok=True)
        late = subprocess.run(words, env=daemon.env, capture_output=True, text=True, timeout=30, check=False)
        assert late.returncode == 75
        assert str(winner.pid) in late.stderr + late.stdout
        winner.terminate()
        assert winner.wait(20) == 0
    finally:
        for process in starting:
            process.kill()
            process.wait()
        daemon.close()


# --- E1, E2 -------------------------------------------------------------------------------------------------------
class Clocked:
    """A daemon whose wall clock is set while it lives; its monotonic clock goes on as it did."""

    def __init__(self) -> None:
        self.daemon = Daemon(slots=4)
        self.daemon.program = (sys.executable, "-c", ENTRY)
        self.file = self.daemon.root / "clock"
        self.set(0)
        self.daemon.env |= {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1",
        }

    def set(self, seconds: int) -> None:
        """The wall clock is so far ahead of the true one from now on."""
        fresh = self.file.with_name("clock.new")
        fresh.write_text(f"{seconds:+d}\n")
        fresh.rename(self.file)

    def fires(self, pipeline: str) -> list[dict[str, Any]]:
        """The runs of a clock, oldest first."""
        return [run for run in reversed(self.daemon.runs(pipeline)) if run["cause"]["kind"] == "cron"]

    def clock(self, name: str) -> None:
        self.daemon.install(
            name,
            f'beat = CommandStep(["true"], name="beat", effect=True)\n'
            f'pipeline = Pipeline("{name}", steps=[beat], triggers=[Every("1s")], overlap="parallel")\n',
        )

    def beats(self, name: str, more: int = 2) -> list[dict[str, Any]]:
        """Wait for so many further fires of a clock."""
        count = len(self.fires(name)) + more
        until(lambda: len(self.fires(name)) >= count, f"{more} more fires of `{name}`", 40, 0.2)
        return self.fires(name)


@pytest.fixture
def clocked() -> Iterator[Clocked]:
    if FAKETIME is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("setting a live daemon's clock needs libfaketime")
    clocked = Clocked()
    try:
        clocked.daemon.start()
        yield clocked
    finally:
        clocked.daemon.close()


def test_E1_a_live_clock_set_forward_by_an_hour_gives_one_run_that_says_what_was_missed(clocked: Clocked) -> None:
    clocked.clock("ahead")
    before = clocked.beats("ahead")
    clocked.set(HOUR)
    after = clocked.beats("ahead", 3)
    new = after[len(before) :]
    told = [run["cause"]["detail"] for run in new]
    assert sum("more than 1000 fires" in each for each in told) == 1, told
    assert len(new) < 60, "one run for the hour, not one for each second of it"
    assert all(clocked.daemon.end(run["id"])["outcome"] == "succeeded" for run in new[:3])


def test_E2_a_live_clock_set_back_by_an_hour_repeats_nothing_and_goes_on_when_its_time_has_come(
    clocked: Clocked,
) -> None:
    clocked.clock("back")
    clocked.beats("back")
    clocked.set(-HOUR)
    clocked.clock("witness")  # new: it counts from the clock as it is now
    clocked.beats("witness", 1)
    still = clocked.fires("back")  # a fire may have been under way when the clock was set
    clocked.beats("witness", 4)
    assert len(clocked.fires("back")) == len(still)
    clocked.daemon.kill9()
    clocked.daemon.start()  # a restart under the wrong clock repeats nothing either
    clocked.beats("witness", 2)
    assert len(clocked.fires("back")) == len(still)
    clocked.set(10)
    clocked.beats("back", 2)


# --- E5 -----------------------------------------------------------------------------------------------------------
def test_E5_a_machine_that_slept_has_one_run_for_what_it_missed_and_no_step_timed_out_in_its_sleep(
    clocked: Clocked,
) -> None:
    """Asleep: nothing of ours moves, and the wall clock is ten minutes on when it does."""
    daemon, go = clocked.daemon, clocked.daemon.root / "go"
    clocked.clock("asleep")
    wait = f"while [ ! -e {go} ]; do sleep 0.02; done"
    daemon.install("long", f'pipeline = Pipeline("long", steps=[CommandStep({wait!r}, name="wait", timeout="2m")])\n')
    number = daemon.run("long")
    until(lambda: daemon.show(number)["steps"][0]["state"] == "running", "the step runs")
    before = clocked.beats("asleep")
    ours = [*daemon.processes()]
    under_this_clock = [pid for pid in ours if "faketime" in _maps(pid)]
    assert len(under_this_clock) > 1, "a supervisor too sees the clock that is set"
    for pid in ours:
        _signal(pid, signal.SIGSTOP)
    clocked.set(600)
    for pid in ours:
        _signal(pid, signal.SIGCONT)
    after = clocked.beats("asleep", 3)
    told = [run["cause"]["detail"] for run in after[len(before) :]]
    assert sum("missed" in each for each in told) == 1, told
    assert len(told) < 60, "one run for the ten minutes, not one for each second of them"
    go.touch()
    assert daemon.end(number)["outcome"] == "succeeded"


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


# --- E6 -----------------------------------------------------------------------------------------------------------
def test_E6_a_daemon_that_was_down_for_a_year_serves_and_makes_up_for_it_by_one_run(clocked: Clocked) -> None:
    daemon = clocked.daemon
    daemon.install(
        "minutely",
        'pipeline = Pipeline("minutely", steps=[CommandStep(["true"], name="beat", effect=True)], '
        'triggers=[Cron("* * * * *", timezone="Europe/Warsaw")], overlap="parallel")\n',
    )
    until(lambda: any(s["next_fire"] for s in daemon.json("schedules")["schedules"]), "its clock has begun")
    daemon.term()
    clocked.set(366 * 24 * HOUR)
    daemon.start()
    made_up = daemon.next_run("minutely")
    assert "more than 1000 fires" in made_up["cause"]["detail"]
    assert daemon.end(made_up["id"])["outcome"] == "succeeded"
    later = [run["cause"]["detail"] for run in clocked.fires("minutely") if run["id"] != made_up["id"]]
    assert not [each for each in later if "missed" in each] and len(later) <= 2, later  # a minute may have begun


# --- F7 -----------------------------------------------------------------------------------------------------------
def test_F7_an_input_that_changes_during_the_run_taints_the_attempt_and_the_change_has_one_run(own: Daemon) -> None:
    said, go = own.root / "said", own.root / "go"
    folder = own.lab / "in"
    folder.mkdir()
    own.install(
        "moving",
        f"""
data, out = DataReference(lab, "in/x.txt"), PipelineData("out")
command = (
    f"cat {{data}} >> {said}; while [ ! -e {go} ]; do sleep 0.02; done; cat {{data}} > {{out}}"
)
read = CommandStep(command, name="read", inputs=[data], outputs=[out])
pipeline = Pipeline("moving", steps=[read], triggers=[OnArrival(data, settle="0.2s")])
""",
    )
    first = folder / ".x"
    first.write_text("one\n")
    first.rename(folder / "x.txt")
    number = own.next_run("moving")["id"]
    until(lambda: lines(said) == ["one"], "the step has read the first content")
    first.write_text("two\n")
    first.rename(folder / "x.txt")
    second = own.next_run("moving", number)["id"]
    assert own.show(second)["state"] == "queued"
    go.touch()
    run = own.end(number)
    assert run["outcome"] == "succeeded"
    attempts = own.json("why", f"{number}/read")["attempts"]
    assert [each["end"] for each in attempts] == ["tainted", "committed"]
    assert own.end(second)["outcome"] == "succeeded"
    assert step(own.show(second), "read")["outcome"] == "reused", "the retried attempt has read the new content"
    assert lines(said) == ["one", "two"]
    time.sleep(0.5)  # longer than it takes to settle: a third run would be there
    assert len(own.runs("moving")) == 2


# --- G9 -----------------------------------------------------------------------------------------------------------
def test_G9_a_plugin_removed_during_a_run_does_not_end_it_not_even_over_a_restart(own: Daemon) -> None:
    said, go = own.root / "said", own.root / "go"
    own.install(
        "gone",
        f"""
steps = [
    CommandStep("echo one >> {said}; while [ ! -e {go} ]; do sleep 0.02; done", name="one"),
    CommandStep("echo two >> {said}", name="two"),
]
steps[1].run_after(steps[0])
pipeline = Pipeline("gone", steps=steps)
""",
    )
    number = own.run("gone")
    until(lambda: lines(said) == ["one"], "the first step has started")
    (own.plugins / "gone.py").unlink()
    until(lambda: own.version("gone") is None, "the plugin is gone")
    own.kill9()
    own.start()
    assert own.show(number)["state"] == "running"
    go.touch()
    run = own.end(number)
    assert run["outcome"] == "succeeded"
    assert lines(said) == ["one", "two"]
    assert own.ctl("run", "gone").returncode == 2


def test_G9_scripts_that_are_removed_during_a_run_are_run_as_they_were_when_it_began(own: Daemon) -> None:
    go, source = own.root / "go", own.plugins / "src"
    files = {"two.py": "import helper\nprint(helper.WORD)\n", "helper.py": "WORD = 'as it was'\n"}
    body = f"""
one = CommandStep("while [ ! -e {go} ]; do sleep 0.02; done", name="one")
two = PythonScriptStep("two.py", source_directory="src", name="two")
two.run_after(one)
pipeline = Pipeline("scripts", steps=[one, two])
"""

    def install() -> None:
        source.mkdir()
        for name, text in files.items():
            (source / name).write_text(text)
        own.install("scripts", body)

    install()
    number = own.run("scripts")
    until(lambda: list((own.state / "code").glob("*/*/helper.py")), "its code is kept")
    until(lambda: own.show(number)["steps"][0]["state"] == "running", "the first step has started")
    (own.plugins / "scripts.py").unlink()
    shutil.rmtree(source)
    until(lambda: own.version("scripts") is None, "the plugin is gone")
    time.sleep(0.2)  # what is posted to the ledger may lie for a moment; a kill in that moment is as one before the run
    own.kill9()
    own.start()
    go.touch()
    run = own.end(number)
    assert run["outcome"] == "succeeded", run["steps"]
    assert own.ctl("logs", f"{number}/two").stdout == "as it was\n"
    install()
    assert step(own.go("scripts"), "two")["outcome"] == "reused", "it has the identity that it had"


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_G9_a_script_that_is_edited_or_removed_while_its_step_waits_for_a_place_is_run_as_it_was(change: str) -> None:
    with Daemon(slots=1) as own:
        go, source = own.root / "go", own.plugins / "src"
        source.mkdir()
        (source / "say.py").write_text("print('as it was')\n")
        own.install(
            "waits",
            f"""
ahead = Pipeline("ahead", steps=[CommandStep("while [ ! -e {go} ]; do sleep 0.02; done", name="a")])
waits = Pipeline("waits", steps=[PythonScriptStep("say.py", source_directory="src", name="say")])
""",
            "ahead",
            "waits",
        )
        first = own.run("ahead")
        until(lambda: own.show(first)["steps"][0]["state"] == "running", "the place is taken")
        number = own.run("waits")
        until(lambda: list((own.state / "code").glob("*/*/say.py")), "its code is kept")
        if change == "edited":
            (source / "say.py").write_text("print('another')\n")
        else:
            shutil.rmtree(source)
        go.touch()
        run = own.end(number)
        assert run["outcome"] == "succeeded", run["steps"]
        assert own.ctl("logs", f"{number}/say").stdout == "as it was\n"
