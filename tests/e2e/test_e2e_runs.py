"""What runs, what is reused, and why: a real daemon, real steps, asked through `mlpipectl`."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

from harness import SDK, lines, step, steps, until

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Daemon

CAT = """'o=$1; shift; cat "$@" > "$o"', "sh\""""
"""The rest of `["sh", "-c", …, OUT, IN…]`: its inputs, put together."""


def land(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{name}.part"
    fresh.write_text(text)
    return fresh.rename(folder / name)


def got(daemon: Daemon, what: str) -> str:
    """The content of an output, by `mlpipectl get`."""
    target = daemon.root / f"got-{len(os.listdir(daemon.root))}"
    done = daemon.ctl("get", what, target)
    assert done.returncode == 0, done.stderr
    return target.read_text()


def two_steps(daemon: Daemon, name: str, version: str = "") -> Path:
    """A pipeline `name`: `squeeze` takes the blanks out of `lab/name/in.txt`, `count` counts what is left.

    Only pipelines of one `version` (default: their name) can reuse each other's results.
    """
    source, version = land(daemon.lab / name, "in.txt", "a b c\n"), version or name
    daemon.install(
        name,
        f"""
source = DataReference(lab, "{name}/in.txt")
thin, size = PipelineData("thin"), PipelineData("size")
squeeze = CommandStep(f"tr -d ' ' < {{source}} > {{thin}}", name="squeeze", outputs=[thin], version="{version}")
count = CommandStep(f"wc -c < {{thin}} > {{size}}", name="count", outputs=[size], version="{version}")
pipeline = Pipeline("{name}", steps=[squeeze, count])
""",
    )
    return source


def test_an_arrival_fires_a_run_whose_outputs_are_made_of_all_that_lies_there(daemon: Daemon) -> None:
    daemon.install(
        "gather",
        f"""
samples, out = DataReference(lab, "gather/*.csv"), PipelineData("out")
join = CommandStep(["sh", "-c", {CAT}, out, samples], name="join", outputs=[out])
pipeline = Pipeline("gather", steps=[join], triggers=[OnArrival(samples, settle="0.2s")])
""",
    )
    land(daemon.lab / "gather", "1.csv", "one\n")
    first = daemon.end(daemon.next_run("gather")["id"])
    assert first["cause"]["kind"] == "arrival"
    assert steps(first) == {"join": "succeeded"}
    assert got(daemon, f"{first['id']}/join/out") == "one\n"

    land(daemon.lab / "gather", "2.csv", "two\n")
    second = daemon.end(daemon.next_run("gather", first["id"])["id"])
    assert got(daemon, f"{second['id']}/join/out") == "one\ntwo\n"
    assert "samples" in step(second, "join")["why"]
    assert "2.csv" in step(second, "join")["why"]


def test_the_same_content_fires_once_however_often_it_is_sent(daemon: Daemon) -> None:
    daemon.install(
        "twice",
        """
samples = DataReference(lab, "twice/*.csv")
look = CommandStep(["true"], name="look", inputs=[samples])
pipeline = Pipeline("twice", steps=[look], triggers=[OnArrival(samples, settle="0.2s")])
""",
    )
    folder = daemon.lab / "twice"
    land(folder, "1.csv", "one\n")
    first = daemon.end(daemon.next_run("twice")["id"])
    land(folder, "1.csv", "one\n")
    os.utime(folder / "1.csv")
    land(folder, "2.csv", "two\n")
    second = daemon.end(daemon.next_run("twice", first["id"])["id"])
    land(folder, "1.csv", "one\n")
    land(folder, "3.csv", "three\n")
    third = daemon.end(daemon.next_run("twice", second["id"])["id"])
    assert [run["id"] for run in daemon.runs("twice")] == [third["id"], second["id"], first["id"]]
    assert "2.csv" in second["cause"]["detail"]
    assert "1.csv" not in second["cause"]["detail"]


def test_what_is_up_to_date_is_reused_and_says_from_where(daemon: Daemon) -> None:
    two_steps(daemon, "again")
    first = daemon.go("again")
    assert steps(first) == {"squeeze": "succeeded", "count": "succeeded"}
    second = daemon.go("again")
    assert steps(second) == {"squeeze": "reused", "count": "reused"}
    assert step(second, "count")["reused_from"] == f"{first['id']}/count"
    assert f"run {first['id']}" in daemon.ctl("why", f"{second['id']}/count").stdout
    assert got(daemon, f"{second['id']}/count/size").strip() == "4"


def test_what_one_pipeline_made_is_reused_by_another_that_needs_the_same(daemon: Daemon) -> None:
    two_steps(daemon, "lender", "common")
    two_steps(daemon, "borrower", "common")
    first = daemon.go("lender")
    second = daemon.go("borrower")
    assert steps(second) == {"squeeze": "reused", "count": "reused"}
    assert step(second, "squeeze")["reused_from"] == f"{first['id']}/squeeze"


def test_a_step_that_makes_the_same_bytes_stops_the_wave(daemon: Daemon) -> None:
    source = two_steps(daemon, "wave")
    daemon.go("wave")
    source.write_text("ab   c\n")
    assert steps(daemon.go("wave")) == {"squeeze": "succeeded", "count": "reused"}
    source.write_text("other\n")
    assert steps(daemon.go("wave")) == {"squeeze": "succeeded", "count": "succeeded"}


def test_an_edit_that_keeps_size_and_mtime_is_seen(daemon: Daemon) -> None:
    source = two_steps(daemon, "sly")
    daemon.go("sly")
    before = source.stat()
    source.write_text("x y z\n")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    run = daemon.go("sly")
    assert steps(run)["squeeze"] == "succeeded"
    assert got(daemon, f"{run['id']}/squeeze/thin") == "xyz\n"


def test_a_parameter_reaches_the_step_and_explains_what_it_changes(daemon: Daemon) -> None:
    daemon.install(
        "tuned",
        """
rate, out, other = PipelineParameter("rate", default=0.1), PipelineData("out"), PipelineData("other")
use = CommandStep(f"echo {rate} $MLPIPED_PARAM_RATE > {out}", name="use", outputs=[out])
free = CommandStep(f"echo free > {other}", name="free", outputs=[other])
pipeline = Pipeline("tuned", steps=[use, free])
""",
    )
    daemon.go("tuned")
    run = daemon.go("tuned", "-p", "rate=0.5")
    assert run["parameters"] == {"rate": 0.5}
    assert steps(run) == {"use": "succeeded", "free": "reused"}
    assert got(daemon, f"{run['id']}/use/out") == "0.5 0.5\n"
    why = daemon.ctl("why", f"{run['id']}/use").stdout
    assert "rate" in why and "0.1" in why and "0.5" in why


def test_a_wrong_parameter_is_refused_before_anything_runs(daemon: Daemon) -> None:
    daemon.install(
        "strict",
        """
n = PipelineParameter("epochs", default=3)
pipeline = Pipeline("strict", steps=[CommandStep(["echo", n], name="say")])
""",
    )
    for words, named in ((["-p", "epochs=many"], "epochs"), (["-p", "epoch=4"], "epochs")):
        done = daemon.ctl("run", "strict", *words)
        assert done.returncode == 2
        assert named in done.stderr
    assert daemon.runs("strict") == []


def test_a_variable_of_the_environment_reaches_the_process_and_is_part_of_the_identity(daemon: Daemon) -> None:
    body = """
out = PipelineData("out")
colour = Environment(env={{"COLOUR": "{}"}})
say = CommandStep(f'echo "$COLOUR" > {{out}}', name="say", outputs=[out], environment=colour)
pipeline = Pipeline("coloured", steps=[say])
"""
    daemon.install("coloured", body.format("red"))
    assert got(daemon, f"{daemon.go('coloured')['id']}/say/out") == "red\n"
    daemon.install("coloured", body.format("blue"))
    run = daemon.go("coloured")
    assert steps(run) == {"say": "succeeded"}
    assert got(daemon, f"{run['id']}/say/out") == "blue\n"
    assert "environment" in step(run, "say")["why"]


def test_a_script_runs_with_its_modules_and_only_real_changes_of_it_count(daemon: Daemon) -> None:
    folder = daemon.plugins / "scripted"
    folder.mkdir()
    (folder / "words.py").write_text("WORD = 'hello'\n")
    (folder / "aside.py").write_text("# not reached by say.py\n")
    script = folder / "say.py"
    script.write_text(
        "import sys\nimport words\nfrom mlpiped import Run\n"
        "Run.get_context().log('length', len(words.WORD))\nopen(sys.argv[1], 'w').write(words.WORD)\n"
    )
    daemon.install(
        "scripted",
        """
out = PipelineData("out")
say = PythonScriptStep("say.py", source_directory="scripted", code="imports", arguments=[out], outputs=[out])
pipeline = Pipeline("scripted", steps=[say])
""",
    )
    first = daemon.go("scripted")
    assert first["outcome"] == "succeeded", daemon.ctl("logs", first["id"]).stdout
    assert got(daemon, f"{first['id']}/say/out") == "hello"
    metrics = daemon.ctl("metrics", first["id"]).stdout
    assert "length" in metrics and "5" in metrics

    script.write_text("# a comment\n" + script.read_text())
    (folder / "aside.py").write_text("x = 1\n")
    assert steps(daemon.go("scripted")) == {"say": "reused"}
    (folder / "words.py").write_text("WORD = 'goodbye'\n")
    changed = daemon.go("scripted")
    assert steps(changed) == {"say": "succeeded"}
    assert "words.py" in step(changed, "say")["why"]


def test_plan_says_what_the_run_then_does(daemon: Daemon) -> None:
    source = two_steps(daemon, "foretold")
    planned = daemon.json("plan", "foretold")
    assert [row["action"] for row in planned["steps"]] == ["run", "unknown"]  # the second takes what the first makes
    assert daemon.runs("foretold") == []
    daemon.go("foretold")
    assert [row["action"] for row in daemon.json("plan", "foretold")["steps"]] == ["reuse", "reuse"]
    source.write_text("changed\n")
    planned = daemon.json("plan", "foretold")
    assert [row["action"] for row in planned["steps"]] == ["run", "unknown"]
    assert "source" in planned["steps"][0]["why"]
    assert "squeeze" in planned["steps"][1]["why"]


def test_a_file_that_is_not_installed_can_be_planned_and_run_from_anywhere(daemon: Daemon) -> None:
    elsewhere = daemon.root / "elsewhere"
    elsewhere.mkdir()
    body = """
out = PipelineData("out")
pipeline = Pipeline("guest", steps=[CommandStep(f"echo guest > {out}", name="say", outputs=[out])])
"""
    (elsewhere / "guest.py").write_text(SDK + body)
    done = daemon.ctl("plan", "guest.py", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "say" in done.stdout
    done = daemon.ctl("submit", "guest.py", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    run = daemon.end(daemon.next_run("guest")["id"])
    assert steps(run) == {"say": "succeeded"}
    assert daemon.version("guest") is None  # it was run, not installed


def test_a_transfer_copies_data_to_its_place_in_a_datastore(daemon: Daemon) -> None:
    land(daemon.lab / "transfer", "from.txt", "cargo\n")
    daemon.install(
        "transfer",
        """
source, target = DataReference(lab, "transfer/from.txt"), DataReference(lab, "transfer/to/there.txt")
pipeline = Pipeline("transfer", steps=[DataTransferStep(source, target, name="carry")])
""",
    )
    run = daemon.go("transfer")
    assert run["outcome"] == "succeeded", daemon.ctl("logs", run["id"], "--stderr").stdout
    assert (daemon.lab / "transfer/to/there.txt").read_text() == "cargo\n"


def test_what_a_reused_step_made_is_published_for_each_run(daemon: Daemon) -> None:
    daemon.install(
        "published",
        """
report = PipelineData("report", "lab").publish("published/{run_id}.txt")
pipeline = Pipeline("published", steps=[CommandStep(["sh", "-c", "echo made > $0", report], outputs=[report])])
""",
    )
    first, second = daemon.go("published"), daemon.go("published")
    assert set(steps(second).values()) == {"reused"}
    for run in (first, second):
        assert (daemon.lab / f"published/{run['id']}.txt").read_text() == "made\n"


def test_force_runs_again_and_a_target_leaves_the_rest_out(daemon: Daemon) -> None:
    two_steps(daemon, "choosy")
    daemon.go("choosy")
    assert steps(daemon.go("choosy", "--force")) == {"squeeze": "succeeded", "count": "succeeded"}
    assert steps(daemon.go("choosy", "--force", "count")) == {"squeeze": "reused", "count": "succeeded"}
    run = daemon.go("choosy", "--force", "--target", "squeeze")
    assert steps(run)["squeeze"] == "succeeded"
    assert steps(run).get("count") in (None, "skipped")


def test_after_orders_steps_that_share_no_data(daemon: Daemon) -> None:
    effects = daemon.root / "ordered"
    daemon.install(
        "ordered",
        f"""
first = CommandStep("sleep 0.3; echo first >> {effects}", name="first")
second = CommandStep("echo second >> {effects}", name="second", after=[first])
pipeline = Pipeline("ordered", steps=[second, first])
""",
    )
    assert daemon.go("ordered")["outcome"] == "succeeded"
    assert lines(effects) == ["first", "second"]


def test_an_input_that_changes_while_the_step_runs_is_never_a_reason_to_reuse(daemon: Daemon) -> None:
    source = land(daemon.lab / "shaky", "in.txt", "before\n")
    effects, flag = daemon.root / "shaky-effects", daemon.root / "shaky-go-on"
    daemon.install(
        "shaky",
        f"""
source, out = DataReference(lab, "shaky/in.txt"), PipelineData("out")
hold = "while [ ! -e {flag} ]; do sleep 0.02; done"
copy = CommandStep(f"cp {{source}} {{out}}; echo read >> {effects}; {{hold}}", name="copy", outputs=[out])
pipeline = Pipeline("shaky", steps=[copy])
""",
    )
    number = daemon.run("shaky")
    until(lambda: lines(effects), "the step has read its input")
    source.write_text("after\n")
    flag.touch()
    daemon.end(number)
    source.write_text("before\n")  # what the tainted attempt's key says
    run = daemon.go("shaky")
    assert steps(run) == {"copy": "succeeded"}
    assert len(lines(effects)) >= 2
    assert got(daemon, f"{run['id']}/copy/out") == "before\n"


def test_an_artifact_changed_behind_our_back_is_made_again(daemon: Daemon) -> None:
    two_steps(daemon, "tampered")
    daemon.go("tampered")
    thin = next(path for path in (daemon.state / "artifacts").rglob("thin") if path.read_text() == "abc\n")
    thin.chmod(0o644)
    thin.write_text("xyz\n")
    run = daemon.go("tampered")
    assert steps(run)["squeeze"] == "succeeded"
    assert got(daemon, f"{run['id']}/squeeze/thin") == "abc\n"


def test_two_pipelines_that_need_the_same_step_at_the_same_time_share_one_attempt(daemon: Daemon) -> None:
    effects, flag = daemon.root / "shared-effects", daemon.root / "shared-go-on"
    body = textwrap.dedent(
        f"""
        out = PipelineData("out")
        wait = CommandStep(
            f"echo $MLPIPED_TOKEN >> {effects}; while [ ! -e {flag} ]; do sleep 0.02; done; echo done > {{out}}",
            name="wait",
            outputs=[out],
        )
        """
    )
    daemon.install("ann", body + 'pipeline = Pipeline("ann", steps=[wait])\n')
    daemon.install("bob", body + 'pipeline = Pipeline("bob", steps=[wait])\n')
    mine = daemon.run("ann")
    until(lambda: lines(effects), "the step of the first has started")
    theirs = daemon.run("bob")
    until(lambda: step(daemon.show(theirs), "wait")["state"] != "waiting", "the second run has come to its step")
    flag.touch()
    ended = [daemon.end(mine), daemon.end(theirs)]
    assert [run["outcome"] for run in ended] == ["succeeded", "succeeded"]
    assert len(lines(effects)) == 1
    assert got(daemon, f"{theirs}/wait/out") == "done\n"
