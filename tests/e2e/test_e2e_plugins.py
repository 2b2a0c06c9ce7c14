"""Plugins come, change, break and go while the daemon runs."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from harness import BIN, SDK, Daemon, steps, until

if TYPE_CHECKING:
    from typing import Any


def echo(name: str, word: str) -> str:
    return f"""
out = PipelineData("out")
pipeline = Pipeline("{name}", steps=[CommandStep(f"echo {word} > {{out}}", name="say", outputs=[out])])
"""


def fault(daemon: Daemon, name: str, timeout: float = 20) -> dict[str, Any]:
    """What is said of the plugin file `name`, once it is."""
    return until(
        lambda: next((f for f in daemon.broken() if f["file"].endswith(f"/{name}.py")), None),
        f"a fault of `{name}`",
        timeout,
    )


def test_a_plugin_is_taken_up_when_dropped_changed_and_removed(daemon: Daemon) -> None:
    daemon.install("visitor", echo("visitor", "one"))
    first = daemon.version("visitor")
    assert daemon.go("visitor")["outcome"] == "succeeded"
    daemon.install("visitor", echo("visitor", "two"))
    assert daemon.version("visitor") != first
    assert steps(daemon.go("visitor")) == {"say": "succeeded"}
    (daemon.plugins / "visitor.py").unlink()
    until(lambda: daemon.version("visitor") is None, "`visitor` gone")
    assert daemon.ctl("run", "visitor").returncode == 2
    assert len(daemon.runs("visitor")) == 2  # what happened stays


def test_a_broken_plugin_keeps_its_last_good_version_and_is_named_with_its_line(daemon: Daemon) -> None:
    daemon.install("fragile", echo("fragile", "good"))
    good = daemon.version("fragile")
    daemon.plugin("fragile", SDK + echo("fragile", "bad") + "\nthis is no python\n")
    found = fault(daemon, "fragile")
    assert found["line"] == len((SDK + echo("fragile", "bad")).splitlines()) + 2
    assert daemon.version("fragile") == good
    assert daemon.go("fragile")["outcome"] == "succeeded"
    for verb in ("pipelines", "status"):
        done = daemon.ctl(verb)
        assert f"fragile.py:{found['line']}" in done.stdout + done.stderr
    done = subprocess.run(
        [BIN / "mlpiped", "check", "--config", daemon.config],
        env=daemon.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"fragile.py:{found['line']}" in done.stdout + done.stderr
    daemon.install("fragile", echo("fragile", "better"))
    until(lambda: not any("fragile" in f["file"] for f in daemon.broken()), "the fault of `fragile` is gone")


def test_plugins_that_exit_crash_flood_and_hang_cost_nothing_but_themselves(daemon: Daemon) -> None:
    for name, body in {
        "quits": "import sys\nsys.exit(3)\n",
        "crashes": "import os\nos.abort()\n",
        "floods": "while True:\n    print('x' * 65536)\n",
        "hangs": "import time\nwhile True:\n    time.sleep(1)\n",
        "cycles": SDK + 'a, b = CommandStep(["true"], name="a"), CommandStep(["true"], name="b")\n'
        'a.run_after(b)\nb.run_after(a)\npipeline = Pipeline("cycles", steps=[a, b])\n',
    }.items():
        daemon.plugin(name, body)
    daemon.install("bystander", echo("bystander", "fine"), timeout=60)
    assert daemon.go("bystander")["outcome"] == "succeeded"
    for name in ("quits", "crashes", "floods", "hangs", "cycles"):
        found = fault(daemon, name, timeout=60)
        assert found["message"]
        assert "Traceback" not in found["message"]
        (daemon.plugins / f"{name}.py").unlink()
    assert daemon.go("bystander", "--force")["outcome"] == "succeeded"


def test_of_two_pipelines_with_one_name_the_first_stays_and_the_second_is_the_fault(daemon: Daemon) -> None:
    daemon.install("original", echo("namesake", "first"), "namesake")
    version = daemon.version("namesake")
    daemon.plugin("copycat", SDK + echo("namesake", "second"))
    assert "namesake" in fault(daemon, "copycat")["message"]
    assert daemon.version("namesake") == version
    (daemon.plugins / "original.py").unlink()
    until(lambda: daemon.version("namesake") not in (None, version), "the second takes its place")


def test_a_run_keeps_the_version_that_it_started_with(daemon: Daemon) -> None:
    flag = daemon.root / "kept-go-on"
    body = """
one, two = PipelineData("one"), PipelineData("two")
first = CommandStep(f"while [ ! -e %s ]; do sleep 0.02; done; echo 1 > {one}", name="first", outputs=[one])
second = CommandStep(f"echo %s > {two}", name="second", inputs=[one], outputs=[two])
pipeline = Pipeline("kept", steps=[first, second])
"""
    daemon.install("kept", body % (flag, "old"))
    version = daemon.version("kept")
    number = daemon.run("kept")
    daemon.install("kept", body % (flag, "new"))
    flag.touch()
    run = daemon.end(number)
    assert run["version"] == version
    target = daemon.root / "kept-two"
    assert daemon.ctl("get", f"{number}/second/two", target).returncode == 0
    assert target.read_text() == "old\n"


def test_check_finds_every_fault_of_config_and_plugins_at_once(daemon: Daemon) -> None:
    bad = daemon.root / "bad.toml"
    bad.write_text(daemon.config.read_text().replace("slots = 4", 'slots = "many"\nslotz = 1') + "\n[contrl]\n")
    done = subprocess.run(
        [BIN / "mlpiped", "check", "--config", bad], env=daemon.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "slotz" in text and "slots" in text and "contrl" in text
    assert "`control`" in text or "[control]" in text  # the near name
    assert "Traceback" not in text


def test_json_of_a_run_is_what_the_contract_says(daemon: Daemon) -> None:
    daemon.install("shape", echo("shape", "x"))
    run = daemon.go("shape")
    assert {
        "id", "pipeline", "version", "experiment", "owner", "cause", "parameters", "tags", "state", "outcome",
        "created_at", "started_at", "finished_at", "steps",
    } <= set(run)  # fmt: skip
    assert {
        "name", "state", "outcome", "why", "compute", "attempts", "exit_code", "key", "reused_from", "started_at",
        "finished_at",
    } <= set(run["steps"][0])  # fmt: skip
    assert run["cause"]["kind"] == "manual"
    assert run["steps"][0]["key"].startswith("b3:")
    for line in daemon.ctl("events", "--json").stdout.splitlines():
        json.loads(line)
