"""Two runs that need the same key share one attempt, whoever of them is cancelled."""

from __future__ import annotations

from harness import Daemon, lines, until

BODY = """
out = PipelineData("out")
step = CommandStep(
    f"echo began >> {effects}; while ! test -e {go}; do sleep 0.05; done; echo 1 > {{out}}", name="s", outputs=[out]
)
pipeline = Pipeline("{name}", steps=[step])
"""


def test_a_shared_attempt_outlives_the_cancelling_of_its_run_and_then_the_death_of_the_daemon() -> None:
    with Daemon() as daemon:
        effects, go = daemon.root / "effects", daemon.root / "go"
        for name in ("one", "two"):
            daemon.install(name, BODY.format(name=name, effects=effects, go=go))
        first = daemon.run("one")
        until(lambda: lines(effects), "the step runs")
        second = daemon.run("two")
        until(lambda: "shares the attempt" in daemon.ctl("why", f"{second}/s").stdout, "the second run follows")
        assert daemon.ctl("cancel", first).returncode == 0
        assert daemon.end(first)["outcome"] == "cancelled"
        assert f"its attempt goes on for run {second}/s" in daemon.ctl("why", f"{first}/s").stdout
        daemon.kill9()
        daemon.start()
        go.touch()
        assert daemon.end(second)["outcome"] == "succeeded"
        assert f"goes on with the attempt of run {first}/s" in daemon.ctl("why", f"{second}/s").stdout
        assert lines(effects) == ["began"]
