"""What goes wrong in a step or on the command line, and what the person at the terminal is told."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, lines, step, steps, until

if TYPE_CHECKING:
    from pathlib import Path


def waiting(effects: Path, flag: Path) -> str:
    """Shell text: leave a line, then wait for `flag`."""
    return f"echo $MLPIPED_TOKEN >> {effects}; while [ ! -e {flag} ]; do sleep 0.02; done"


def test_a_step_that_fails_says_so_and_a_retry_builds_on_what_was_finished(daemon: Daemon) -> None:
    healed = daemon.root / "healed"
    daemon.install(
        "sick",
        f"""
one, two, three = PipelineData("one"), PipelineData("two"), PipelineData("three")
good = CommandStep(f"echo 1 > {{one}}", name="good", outputs=[one])
bad = CommandStep(
    f"cp {{one}} {{two}}; echo some words; echo it hurts >&2; [ -e {healed} ] || exit 7", name="bad", outputs=[two]
)
last = CommandStep(f"cp {{two}} {{three}}", name="last", outputs=[three])
pipeline = Pipeline("sick", steps=[good, bad, last])
""",
    )
    done = daemon.ctl("run", "sick", "--wait")
    assert done.returncode == 1
    run = daemon.show("sick:latest")
    assert run["outcome"] == "failed"
    assert steps(run) == {"good": "succeeded", "bad": "failed", "last": "skipped"}
    assert step(run, "bad")["exit_code"] == 7
    assert daemon.ctl("wait", run["id"]).returncode == 1
    assert "7" in daemon.ctl("why", f"{run['id']}/bad").stdout
    assert "bad" in daemon.ctl("why", f"{run['id']}/last").stdout
    assert "some words" in daemon.ctl("logs", f"{run['id']}/bad").stdout
    assert "it hurts" in daemon.ctl("logs", f"{run['id']}/bad", "--stderr").stdout
    assert "sick" in daemon.ctl("status").stdout

    healed.touch()
    done = daemon.ctl("retry", run["id"])
    assert done.returncode == 0, done.stderr
    again = daemon.end(daemon.next_run("sick", run["id"])["id"])
    assert again["cause"]["kind"] == "retry"
    assert steps(again) == {"good": "reused", "bad": "succeeded", "last": "succeeded"}


def test_a_failed_attempt_is_tried_again_as_often_as_its_author_said(daemon: Daemon) -> None:
    effects = daemon.root / "tries"
    daemon.install(
        "stubborn",
        f"""
try_ = CommandStep(
    "echo $MLPIPED_ATTEMPT >> {effects}; [ $MLPIPED_ATTEMPT = 3 ]", name="try", retry=Retry(attempts=3, delay="0.1s")
)
pipeline = Pipeline("stubborn", steps=[try_])
""",
    )
    run = daemon.go("stubborn")
    assert steps(run) == {"try": "succeeded"}
    assert step(run, "try")["attempts"] == 3
    assert lines(effects) == ["1", "2", "3"]


def test_a_step_that_fails_at_every_attempt_fails(daemon: Daemon) -> None:
    daemon.install(
        "hopeless",
        """
pipeline = Pipeline("hopeless", steps=[CommandStep(["false"], name="no", retry=Retry(attempts=2, delay="0.05s"))])
""",
    )
    run = daemon.go("hopeless")
    assert steps(run) == {"no": "failed"}
    assert step(run, "no")["attempts"] == 2


def test_a_step_past_its_timeout_is_ended_with_all_its_children(daemon: Daemon) -> None:
    pids = daemon.root / "slow-pids"
    daemon.install(
        "slow",
        f"""
command = "sh -c 'echo $$ >> {pids}; sleep 300' & echo $$ >> {pids}; wait"
slow = CommandStep(command, name="slow", timeout="1s", grace="1s")
pipeline = Pipeline("slow", steps=[slow])
""",
    )
    run = daemon.go("slow")
    assert run["outcome"] == "failed"
    assert steps(run) == {"slow": "timed_out"}
    assert len(lines(pids)) == 2
    until(lambda: not any(alive(int(pid)) for pid in lines(pids)), "the end of the step's processes")


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_output_that_is_missing_fails_the_step_with_a_sentence(daemon: Daemon) -> None:
    daemon.install(
        "empty",
        """
promised = PipelineData("promised")
pipeline = Pipeline("empty", steps=[CommandStep(["true"], name="idle", outputs=[promised], inputs=[])])
""",
    )
    run = daemon.go("empty")
    assert steps(run) == {"idle": "failed"}
    assert "promised" in step(run, "idle")["why"]
    assert steps(daemon.go("empty")) == {"idle": "failed"}


def test_an_input_that_is_not_there_fails_the_step_and_names_it(daemon: Daemon) -> None:
    daemon.install(
        "hungry",
        """
pipeline = Pipeline("hungry", steps=[CommandStep(["cat", DataReference(lab, "hungry/nothing.txt")], name="eat")])
""",
    )
    run = daemon.go("hungry")
    assert steps(run) == {"eat": "failed"}
    assert "nothing.txt" in step(run, "eat")["why"]


def test_a_command_that_does_not_exist_fails_the_step_and_names_it(daemon: Daemon) -> None:
    daemon.install(
        "absent", 'pipeline = Pipeline("absent", steps=[CommandStep(["no-such-program-here"], name="call")])\n'
    )
    run = daemon.go("absent")
    assert steps(run) == {"call": "failed"}
    assert "no-such-program-here" in step(run, "call")["why"]


def test_cancel_ends_the_processes_and_gives_them_time_to_tidy_up(daemon: Daemon) -> None:
    effects, tidy = daemon.root / "cancelled", daemon.root / "tidied"
    daemon.install(
        "long",
        f"""
hold = CommandStep(
    "trap 'echo tidy >> {tidy}; exit 3' TERM; echo $$ >> {effects}; while :; do sleep 0.02; done", name="hold"
)
then = CommandStep(["true"], name="then", after=[hold])
pipeline = Pipeline("long", steps=[hold, then])
""",
    )
    number = daemon.run("long")
    until(lambda: lines(effects), "the step has started")
    done = daemon.ctl("cancel", number)
    assert done.returncode == 0, done.stderr
    run = daemon.end(number)
    assert run["outcome"] == "cancelled"
    assert steps(run)["hold"] == "cancelled"
    assert steps(run)["then"] in ("cancelled", "skipped")
    assert lines(tidy) == ["tidy"]
    assert not alive(int(lines(effects)[0]))
    assert daemon.ctl("cancel", number).returncode != 0  # it has ended


def test_logs_can_be_followed_while_the_step_runs(daemon: Daemon) -> None:
    effects, flag = daemon.root / "talk-effects", daemon.root / "talk-go-on"
    daemon.install(
        "talk",
        f"""
talk = CommandStep("echo begins; {waiting(effects, flag)}; echo ends", name="talk")
pipeline = Pipeline("talk", steps=[talk])
""",
    )
    number = daemon.run("talk")
    until(lambda: lines(effects), "the step has started")
    with daemon.following("logs", f"{number}/talk", "-f") as logs:
        assert logs.stdout is not None
        assert "begins" in logs.stdout.readline()
        flag.touch()
        assert "ends" in logs.stdout.readline()
        assert logs.wait(20) == 0


def test_a_second_run_waits_and_a_third_joins_it(daemon: Daemon) -> None:
    effects, flag = daemon.root / "queue-effects", daemon.root / "queue-go-on"
    daemon.install(
        "queueing",
        f"""
pipeline = Pipeline("queueing", steps=[CommandStep("{waiting(effects, flag)}", name="hold", allow_reuse=False)])
""",
    )
    first = daemon.run("queueing")
    until(lambda: lines(effects), "the first has started")
    second = daemon.run("queueing")
    assert daemon.show(second)["state"] == "queued"
    done = daemon.ctl("run", "queueing", "--json")
    assert json.loads(done.stdout)["id"] == second
    flag.touch()
    assert daemon.end(first)["outcome"] == "succeeded"
    assert daemon.end(second)["outcome"] == "succeeded"
    assert len(daemon.runs("queueing")) == 2


def test_overlap_parallel_runs_at_once_and_cancel_previous_ends_the_one_before(daemon: Daemon) -> None:
    for policy in ("parallel", "cancel_previous"):
        effects, flag = daemon.root / f"{policy}-effects", daemon.root / f"{policy}-go-on"
        daemon.install(
            policy,
            f"""
hold = CommandStep("{waiting(effects, flag)}", name="hold", allow_reuse=False, grace="1s")
pipeline = Pipeline("{policy}", steps=[hold], overlap="{policy}")
""",
        )
        first = daemon.run(policy)
        until(lambda: len(lines(effects)) == 1, f"{policy}: the first has started")  # noqa: B023
        second = daemon.run(policy)
        until(lambda: len(lines(effects)) == 2, f"{policy}: the second has started")  # noqa: B023
        if policy == "parallel":
            assert daemon.show(first)["state"] == "running"
        else:
            assert daemon.end(first)["outcome"] == "cancelled"
        flag.touch()
        assert daemon.end(second)["outcome"] == "succeeded"
        assert daemon.end(first)["outcome"] == ("succeeded" if policy == "parallel" else "cancelled")


def test_why_tells_what_a_step_is_waiting_for(daemon: Daemon) -> None:
    effects, flag = daemon.root / "full-effects", daemon.root / "full-go-on"
    daemon.install(
        "full",
        f"""
wide = CommandStep("{waiting(effects, flag)}", name="wide", resources=Resources(slots=4))
late = CommandStep(["true"], name="late", after=[wide])
other = CommandStep("true # other", name="other", resources=Resources(slots=4))
pipeline = Pipeline("full", steps=[wide, late, other])
""",
    )
    number = daemon.run("full")
    until(lambda: lines(effects), "the wide step has started")
    assert "wide" in daemon.ctl("why", f"{number}/late").stdout
    assert "slot" in daemon.ctl("why", f"{number}/other").stdout
    flag.touch()
    assert daemon.end(number)["outcome"] == "succeeded"


def test_wrong_words_end_with_2_and_name_what_is_near(daemon: Daemon) -> None:
    daemon.install("weather", 'pipeline = Pipeline("weather", steps=[CommandStep(["true"], name="look")])\n')
    for words, near in (
        (["run", "wether"], "weather"),
        (["statsu"], "status"),
        (["show", "999999"], "999999"),
        (["run", "weather", "--target", "lok"], "look"),
        (["logs", "latest/no-such-step"], "no-such-step"),
        (["pipelines", "--jsn"], "--json"),
        (["run"], ""),
    ):
        done = daemon.ctl(*words)
        assert done.returncode == 2, (words, done)
        assert near in done.stderr, (words, done.stderr)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_a_daemon_that_is_not_there_ends_with_3_and_names_the_socket(tmp_path: Path) -> None:
    ghost = Daemon()
    try:
        done = ghost.ctl("status")
        assert done.returncode == 3
        assert os.fspath(ghost.socket) in done.stderr
        assert "hint" in done.stderr
    finally:
        ghost.close()


def test_a_cancelled_run_can_be_retried_and_then_runs(daemon: Daemon) -> None:
    go = daemon.root / "go-on"
    wait = f"while [ ! -e {go} ]; do sleep 0.02; done"
    daemon.install("ended", f'pipeline = Pipeline("ended", steps=[CommandStep({wait!r}, name="wait")])\n')
    first = daemon.run("ended")
    until(lambda: step(daemon.show(first), "wait")["state"] == "running", "the step runs")
    daemon.ctl("cancel", first)
    assert daemon.end(first)["outcome"] == "cancelled"
    go.touch()
    again = daemon.json("retry", first)["id"]
    assert daemon.end(again)["outcome"] == "succeeded"
    assert "nothing to retry" in daemon.ctl("retry", again).stderr


@pytest.mark.parametrize("overlap", ["parallel", "queue", "skip"])
def test_of_two_who_retry_one_run_at_the_same_time_one_gets_a_run_and_the_other_is_told(
    daemon: Daemon, overlap: str
) -> None:
    name, effects, go = f"twice-{overlap}", daemon.root / f"effects-{overlap}", daemon.root / f"go-{overlap}"
    command = f"echo ran >> {effects}; while [ ! -e {go} ]; do sleep 0.02; done; exit 1"
    daemon.install(
        name,
        f'pipeline = Pipeline("{name}", steps=[CommandStep({command!r}, name="bad", effect=True)], '
        f'overlap="{overlap}")\n',
    )
    go.touch()
    first = daemon.go(name)["id"]
    go.unlink()
    with ThreadPoolExecutor(8) as people:
        answers = list(people.map(lambda _: daemon.ctl("retry", first, "--json"), range(8)))
    won = [json.loads(done.stdout)["id"] for done in answers if done.returncode == 0]
    assert len(won) == 1, answers
    assert all("is being retried already" in done.stderr for done in answers if done.returncode)
    until(lambda: len(lines(effects)) == 2, "the retry runs")
    go.touch()
    assert daemon.end(won[0])["outcome"] == "failed"
    assert daemon.end(daemon.json("retry", first)["id"])["outcome"] == "failed"  # it is over: once more is meant
    assert len(lines(effects)) == 3


def test_a_retry_is_not_skipped_while_another_run_is_under_way(daemon: Daemon) -> None:
    go = daemon.root / "go-busy"
    daemon.install(
        "busy",
        f"""
word = PipelineParameter("word", default="wait")
wait = CommandStep(["sh", "-c", '[ $0 = fail ] && exit 1; while [ ! -e {go} ]; do sleep 0.02; done', word], name="w")
pipeline = Pipeline("busy", steps=[wait], overlap="skip")
""",
    )
    failed = daemon.go("busy", "-p", "word=fail")["id"]
    daemon.run("busy")
    until(lambda: daemon.show("latest")["state"] == "running", "another run is under way")
    again = daemon.json("retry", failed)["id"]
    assert daemon.show(again)["cause"]["kind"] == "retry"
    go.touch()
    assert daemon.end(again)["outcome"] == "failed"
