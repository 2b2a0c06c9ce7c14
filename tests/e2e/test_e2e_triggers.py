"""Runs that start by themselves: the clock, files that land, and other pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Daemon, until

if TYPE_CHECKING:
    from pathlib import Path


def land(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{name}.part"
    fresh.write_text(text)
    fresh.rename(folder / name)


def test_the_clock_fires_and_each_time_fires_once(daemon: Daemon) -> None:
    daemon.install(
        "clock",
        """
tick = CommandStep(["true"], name="tick", effect=True)
pipeline = Pipeline("clock", steps=[tick], triggers=[Every("1s"), Cron("0 6 * * mon", timezone="Europe/Warsaw")])
""",
    )
    first = daemon.next_run("clock")
    second = daemon.next_run("clock", first["id"])
    assert first["cause"]["kind"] == second["cause"]["kind"] == "cron"
    assert first["cause"]["detail"] != second["cause"]["detail"]
    rows = [row for row in daemon.json("schedules")["schedules"] if row["pipeline"] == "clock"]
    assert len(rows) == 2
    assert all(row["next_fire"] for row in rows)
    (daemon.plugins / "clock.py").unlink()


def test_a_pipeline_runs_after_another_has_succeeded_and_only_then(daemon: Daemon) -> None:
    flag = daemon.root / "upstream-good"
    daemon.install(
        "chained",
        f"""
up = Pipeline("upstream", steps=[CommandStep("[ -e {flag} ]", name="try", effect=True)])
down = Pipeline("downstream", steps=[CommandStep(["true"], name="then", effect=True)], triggers=[OnSuccess(up)])
""",
        "upstream",
        "downstream",
    )
    assert daemon.go("upstream")["outcome"] == "failed"
    flag.touch()
    good = daemon.go("upstream")
    assert good["outcome"] == "succeeded"
    run = daemon.end(daemon.next_run("downstream")["id"])
    assert run["cause"]["kind"] == "pipeline"
    assert str(good["id"]) in run["cause"]["detail"]
    assert len(daemon.runs("downstream")) == 1


def test_batch_file_runs_once_a_file_with_its_path_as_the_parameter(daemon: Daemon) -> None:
    daemon.install(
        "single",
        """
files = DataReference(lab, "single/*.txt")
which, out = PipelineParameter("which", default=""), PipelineData("out")
read = CommandStep(f"cat {which} > {out}", name="read", outputs=[out], allow_reuse=False)
trigger = OnArrival(files, settle="0.2s", batch="file", parameter=which)
pipeline = Pipeline("single", steps=[read], triggers=[trigger], overlap="parallel")
""",
    )
    for name in ("a", "b", "c"):
        land(daemon.lab / "single", f"{name}.txt", f"{name}\n")
    until(lambda: len(daemon.runs("single")) == 3, "a run for each file")
    read = set()
    for run in daemon.runs("single"):
        ended = daemon.end(run["id"])
        assert ended["outcome"] == "succeeded", ended
        target = daemon.root / f"single-{run['id']}"
        assert daemon.ctl("get", f"{run['id']}/read/out", target).returncode == 0
        read.add(target.read_text().strip())
    assert read == {"a", "b", "c"}


def test_with_a_marker_nothing_fires_before_it_is_there(daemon: Daemon) -> None:
    daemon.install(
        "marked",
        """
files = DataReference(lab, "marked/*.txt")
look = CommandStep(["true"], name="look", inputs=[files])
pipeline = Pipeline("marked", steps=[look], triggers=[OnArrival(files, settle="0.1s", marker="_SUCCESS")])
witness = DataReference(lab, "witness/*.txt")
other = CommandStep(["true"], name="other", inputs=[witness])
pipeline2 = Pipeline("witness", steps=[other], triggers=[OnArrival(witness, settle="1s")])
""",
        "marked",
        "witness",
    )
    land(daemon.lab / "marked", "1.txt", "one\n")
    land(daemon.lab / "witness", "1.txt", "one\n")
    daemon.end(daemon.next_run("witness")["id"])  # a trigger that settles ten times longer has fired
    assert daemon.runs("marked") == []
    row = next(row for row in daemon.json("schedules")["schedules"] if row["pipeline"] == "marked")
    assert "_SUCCESS" in row["waits_for"]
    land(daemon.lab / "marked", "_SUCCESS", "")
    assert daemon.end(daemon.next_run("marked")["id"])["outcome"] == "succeeded"


def test_a_file_that_still_grows_does_not_fire(daemon: Daemon) -> None:
    daemon.install(
        "growing",
        """
files = DataReference(lab, "growing/*.txt")
out = PipelineData("out")
read = CommandStep(["cp", files, out], name="read", outputs=[out])
pipeline = Pipeline("growing", steps=[read], triggers=[OnArrival(files, settle="4s")])
""",
    )
    folder = daemon.lab / "growing"
    folder.mkdir()
    with (folder / "1.txt").open("w") as file:
        for number in range(10):
            file.write(f"{number}\n")
            file.flush()
            until(lambda: daemon.json("schedules"), "the daemon answers")  # about a tenth of a second
            assert daemon.runs("growing") == []
    run = daemon.end(daemon.next_run("growing")["id"])
    target = daemon.root / "grown"
    assert daemon.ctl("get", f"{run['id']}/read/out", target).returncode == 0
    assert len(target.read_text().splitlines()) == 10
    assert len(daemon.runs("growing")) == 1


def test_a_watched_folder_that_does_not_exist_yet_is_awaited(daemon: Daemon) -> None:
    daemon.install(
        "early",
        """
files = DataReference(lab, "early/deep/er/*.txt")
look = CommandStep(["cat", files], name="look")
pipeline = Pipeline("early", steps=[look], triggers=[OnArrival(files, settle="0.2s")])
""",
    )
    assert any(row["pipeline"] == "early" for row in daemon.json("schedules")["schedules"])
    land(daemon.lab / "early/deep/er", "1.txt", "one\n")
    assert daemon.end(daemon.next_run("early")["id"])["outcome"] == "succeeded"


def test_events_tell_each_move_in_order_to_whoever_follows(daemon: Daemon) -> None:
    daemon.install("told", 'pipeline = Pipeline("told", steps=[CommandStep(["true"], name="step", effect=True)])\n')
    with daemon.following("events", "-f", "--json") as events:
        import json

        number = daemon.run("told")
        assert events.stdout is not None
        seen = []
        for line in events.stdout:
            event = json.loads(line)
            if event["run"] == number:
                seen.append(event)
            if event["run"] == number and "run" in event["kind"] and "finish" in json.dumps(event):
                break
    assert [event["id"] for event in seen] == sorted({event["id"] for event in seen})
    assert any(event["step"] == "step" for event in seen)
