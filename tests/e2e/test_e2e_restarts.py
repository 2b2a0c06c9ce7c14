"""Stopping, killing and starting the daemon while there is work: nothing is lost and nothing happens twice.

What happened is judged by files that the steps themselves append to (O_APPEND), outside of the state folder.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from collections import Counter
from typing import TYPE_CHECKING

from harness import BIN, Daemon, lines, step, steps, until

if TYPE_CHECKING:
    from pathlib import Path


def chain(daemon: Daemon, name: str, count: int, *, width: int = 1) -> tuple[Path, Path]:
    """A pipeline of `count` steps one after another, `width` times; each leaves `NAME start` and `NAME end`, and
    waits in between until the second of the two files that are returned has more lines than its number."""
    effects, steps_allowed = daemon.root / f"{name}-effects", daemon.root / f"{name}-allowed"
    steps_allowed.touch()
    daemon.install(
        name,
        f"""
steps = []
for lane in range({width}):
    above = None
    for i in range({count}):
        out, me = PipelineData(f"o{{lane}}_{{i}}"), f"s{{lane}}_{{i}}"
        hold = f"while [ $(wc -l < {steps_allowed}) -le {{i}} ]; do sleep 0.02; done"
        command = f"echo {{me}} start >> {effects}; {{hold}}; echo {{me}} > {{out}}; echo {{me}} end >> {effects}"
        steps.append(CommandStep(command, name=me, outputs=[out], inputs=[above] if i else []))
        above = out
pipeline = Pipeline("{name}", steps=steps)
""",
    )
    return effects, steps_allowed


def allow(path: Path, count: int = 1) -> None:
    with path.open("a") as file:
        file.write("go\n" * count)


def each_once(effects: Path, count: int) -> None:
    found = Counter(lines(effects))
    assert len(found) == 2 * count, found
    assert set(found.values()) == {1}, found


def test_a_step_outlives_sigterm_and_its_run_goes_on_after_the_next_start(own: Daemon) -> None:
    effects, allowed = chain(own, "term", 3)
    number = own.run("term")
    until(lambda: lines(effects), "the first step has started")
    assert own.term() == 0
    assert lines(effects) == ["s0_0 start"]
    allow(allowed)
    until(lambda: "s0_0 end" in lines(effects), "the step ends while no daemon runs")
    own.start()
    allow(allowed, 2)
    run = own.end(number)
    assert run["outcome"] == "succeeded"
    assert set(steps(run).values()) == {"succeeded"}
    assert {s["attempts"] for s in run["steps"]} == {1}
    each_once(effects, 3)


def test_a_step_that_still_runs_at_the_next_start_is_found_again(own: Daemon) -> None:
    effects, allowed = chain(own, "found", 2)
    number = own.run("found")
    until(lambda: lines(effects), "the first step has started")
    own.restart()
    assert own.show(number)["state"] == "running"
    assert step(own.show(number), "s0_0")["state"] == "running"
    allow(allowed, 2)
    assert own.end(number)["outcome"] == "succeeded"
    each_once(effects, 2)


def test_a_run_that_another_version_began_and_this_one_cannot_read_waits_and_stops_nobody_else(own: Daemon) -> None:
    effects, allowed = chain(own, "old", 2)
    chain(own, "well", 1)
    number = own.run("old")
    until(lambda: lines(effects), "the first step has started")
    own.term()
    with contextlib.closing(sqlite3.connect(own.state / "ledger.sqlite3", isolation_level=None)) as ledger:
        change = "UPDATE definitions SET spec = replace(spec, ?, ?) WHERE pipeline = 'old'"
        ledger.execute(change, ('"steps":', '"steps_of_tomorrow":'))
        own.start()
        why = own.ctl("why", f"{number}/s0_0").stdout
        assert "held: this mlpiped cannot read the definition" in why
        refused = own.ctl("cancel", number)
        assert refused.returncode == 1
        assert "with that one installed, the run goes on" in refused.stderr
        allow(own.root / "well-allowed")
        assert own.go("well")["outcome"] == "succeeded"
        own.term()
        ledger.execute(change, ('"steps_of_tomorrow":', '"steps":'))
    own.start()
    allow(allowed, 2)
    assert own.end(number)["outcome"] == "succeeded"
    each_once(effects, 2)


def test_kill_9_at_any_moment_loses_no_step_and_repeats_none(own: Daemon) -> None:
    rounds, width = 6, 3
    effects, allowed = chain(own, "kill", rounds, width=width)
    number = own.run("kill")
    for turn in range(rounds):
        until(lambda: len(lines(effects)) > turn * 2 * width, f"a step of round {turn} has started")  # noqa: B023
        own.kill9()
        allow(allowed)
        own.start()
    run = own.end(number)
    assert run["outcome"] == "succeeded"
    assert set(steps(run).values()) == {"succeeded"}
    each_once(effects, rounds * width)
    assert set(steps(own.go("kill")).values()) == {"reused"}


def test_a_step_killed_together_with_the_daemon_is_not_said_to_run_for_ever(own: Daemon) -> None:
    effects, _ = chain(own, "power", 1)
    number = own.run("power")
    until(lambda: lines(effects), "the step has started")
    own.kill9()
    for pid in own.processes():  # as a power cut would: supervisor and step too
        os.kill(pid, 9)
    own.start()
    allow(own.root / "power-allowed")
    run = own.end(number)
    found = step(run, "s0_0")
    assert found["outcome"] in ("succeeded", "lost")
    if found["outcome"] == "succeeded":  # run again, as a new attempt
        assert found["attempts"] == 2


def test_a_run_that_was_asked_for_and_a_pause_survive_kill_9(own: Daemon) -> None:
    own.install(
        "ticks",
        'tick = CommandStep(["true"], name="tick", effect=True)\n'
        'pipeline = Pipeline("ticks", steps=[tick], triggers=[Every("1s")])\n',
    )
    own.next_run("ticks")
    assert own.ctl("pause", "ticks").returncode == 0
    own.kill9()
    own.start()
    until(lambda: own.version("ticks"), "`ticks` loaded")
    paused = next(p for p in own.pipelines() if p["name"] == "ticks")
    assert paused["paused"] is True
    until(lambda: all(run["state"] == "finished" for run in own.runs("ticks")), "what had begun has ended")
    last = own.runs("ticks")[0]["id"]
    own.install(  # a second clock that is not paused: when it has ticked, the first one would have
        "other",
        'tock = CommandStep(["true"], name="tock", effect=True)\n'
        'pipeline = Pipeline("other", steps=[tock], triggers=[Every("1s")])\n',
    )
    second = own.next_run("other", own.next_run("other")["id"])
    assert own.end(second["id"])["outcome"] == "succeeded"
    assert own.runs("ticks")[0]["id"] == last
    assert own.ctl("resume", "ticks").returncode == 0
    assert own.next_run("ticks", last)["cause"]["kind"] == "cron"


def test_what_arrived_while_the_daemon_was_down_is_found_and_what_was_known_is_not_fired_again(own: Daemon) -> None:
    own.install(
        "late",
        """
samples = DataReference(lab, "late/*.csv")
pipeline = Pipeline(
    "late", steps=[CommandStep(["cat", samples], name="look")], triggers=[OnArrival(samples, settle="0.2s")]
)
""",
    )
    folder = own.lab / "late"
    folder.mkdir()
    (folder / "1.csv").write_text("one\n")
    first = own.end(own.next_run("late")["id"])
    own.term()
    (folder / "2.csv").write_text("two\n")
    (folder / "1.csv").touch()
    own.start()
    second = own.end(own.next_run("late", first["id"])["id"])
    assert "2.csv" in second["cause"]["detail"]
    assert "1.csv" not in second["cause"]["detail"]
    own.restart()
    (folder / "3.csv").write_text("three\n")
    third = own.end(own.next_run("late", second["id"])["id"])
    assert [run["id"] for run in own.runs("late")] == [third["id"], second["id"], first["id"]]


def test_a_queued_run_is_started_after_kill_9(own: Daemon) -> None:
    effects, allowed = chain(own, "queued", 1)
    first = own.run("queued")
    until(lambda: lines(effects), "the first has started")
    second = own.run("queued", "--force")
    assert own.show(second)["state"] == "queued"
    own.kill9()
    own.start()
    allow(allowed)
    assert own.end(first)["outcome"] == "succeeded"
    assert own.end(second)["outcome"] == "succeeded"
    assert Counter(lines(effects)) == {"s0_0 start": 2, "s0_0 end": 2}


def test_a_second_daemon_on_the_same_state_folder_is_refused(own: Daemon) -> None:
    twin = own.config.with_name("twin.toml")
    twin.write_text(own.config.read_text().replace(f'"{own.socket}"', f'"{own.socket}2"'))
    done = subprocess.run(
        [BIN / "mlpiped", "serve", "--config", twin],
        env=own.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 75
    assert str(own.pid) in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert own.ctl("status").returncode == 0


def test_a_ledger_that_cannot_be_read_stops_the_start_and_is_left_as_it_is(own: Daemon) -> None:
    own.term()
    ledger = own.state / "ledger.sqlite3"
    for name in ("-wal", "-shm"):
        ledger.with_name(ledger.name + name).unlink(missing_ok=True)
    ledger.write_bytes(b"this is no ledger" * 1000)
    done = subprocess.run(
        [BIN / "mlpiped", "serve", "--config", own.config],
        env=own.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 78
    assert "ledger" in done.stderr + done.stdout
    assert ledger.read_bytes().startswith(b"this is no ledger")


def test_a_run_that_was_cancelled_stays_so_after_kill_9(own: Daemon) -> None:
    effects, allowed = chain(own, "stopped", 3)
    number = own.run("stopped")
    until(lambda: lines(effects), "the first step has started")
    assert own.ctl("cancel", str(number)).returncode == 0
    own.kill9()
    allow(allowed, 3)
    own.start()
    run = own.end(number)
    assert run["outcome"] == "cancelled"
    assert set(steps(run).values()) == {"cancelled"}
    assert not any(line.startswith(("s0_1", "s0_2")) for line in lines(effects))


def test_the_pause_before_a_retry_goes_on_over_a_restart(own: Daemon) -> None:
    effects = own.root / "late-effects"
    own.install(
        "late",
        f"""
command = 'echo $MLPIPED_ATTEMPT $(date +%s%N) >> {effects}; [ $MLPIPED_ATTEMPT = 2 ]'
pipeline = Pipeline("late", steps=[CommandStep(command, name="s", retry=Retry(attempts=2, delay="4s"))])
""",
    )
    number = own.run("late")
    until(lambda: "tried again in" in (own.json("why", f"{number}/s")["waiting"] or ""), "it waits for its retry")
    own.kill9()
    own.start()
    run = own.end(number)
    assert run["outcome"] == "succeeded"
    (first, began), (second, again) = (line.split() for line in lines(effects))
    assert (first, second) == ("1", "2")
    assert int(again) - int(began) >= 4_000_000_000


def test_a_step_on_a_compute_that_the_config_has_lost_waits_for_it_or_is_given_up_in_so_many_words(own: Daemon) -> None:
    effects, allowed = chain(own, "moved", 1)
    number = own.run("moved")
    until(lambda: lines(effects), "the step has started")
    own.term()
    config = own.config.read_text()
    own.config.write_text(config.replace("[compute.local]", "[compute.here]"))
    own.start()
    held = "its attempt is on compute `local`, which the config no longer has"
    assert f"held: {held}" in own.ctl("why", f"{number}/s0_0").stdout
    said = own.ctl("doctor").stdout
    assert f"`{number}/s0_0` is held: {held}" in said
    assert f"`mlpipectl cancel {number}`" in said
    own.term()
    own.config.write_text(config)
    own.start()
    allow(allowed)
    assert own.end(number)["outcome"] == "succeeded", "it was put back, and goes on"
    allowed.write_text("")
    number = own.run("moved", "--force")
    until(lambda: len(lines(effects)) == 3, "the step has started again")
    own.term()
    own.config.write_text(config.replace("[compute.local]", "[compute.here]"))
    own.start()
    assert own.ctl("cancel", number).returncode == 0
    assert "is ended when the config has that again" in step(own.end(number), "s0_0")["why"]
    assert "is held" not in own.ctl("doctor").stdout
    own.term()
    own.config.write_text(config)
    own.start()
    attempt = lambda: own.json("why", f"{number}/s0_0")["attempts"][0]["end"]  # noqa: E731
    until(lambda: attempt() == "cancelled", "it is put back, and what ran on is ended")
