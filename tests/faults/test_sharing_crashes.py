"""A1–A7 where an attempt is handed over: the daemon dies before, in and after the move, and the step runs once."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, lines, until

from mlpiped.crash import SHARING

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = """
out = PipelineData("out")
command = (
    "echo $MLPIPED_TOKEN start >> {effects}; while [ ! -e {go} ]; do sleep 0.02; done;"
    f" echo $MLPIPED_TOKEN > {{out}}; echo $MLPIPED_TOKEN end >> {effects}"
)
pipeline = Pipeline("twin", steps=[CommandStep(command, name="wait", outputs=[out])], overlap="parallel")
"""


@pytest.fixture
def own() -> Iterator[Daemon]:
    with Daemon(slots=4) as daemon:
        yield daemon


@pytest.mark.parametrize("point", SHARING)
@pytest.mark.parametrize("ended", [False, True], ids=["while it runs", "after it has ended"])
def test_A_a_daemon_that_dies_where_an_attempt_is_handed_over_runs_the_step_once_for_those_who_need_it(
    own: Daemon, point: str, ended: bool
) -> None:
    effects, go = own.root / "effects", own.root / "go"
    own.install("twin", BODY.format(effects=effects, go=go))
    own.kill9()
    own.env["MLPIPED_CRASH_AT"] = point
    own.start()
    leader = own.run("twin")
    until(lambda: lines(effects), "the step has started")
    follower = own.run("twin")
    until(lambda: "shares the attempt" in own.ctl("why", f"{follower}/wait").stdout, "the second run follows")
    own.ctl("cancel", leader)
    assert own.process is not None
    assert own.process.wait(20) == -signal.SIGKILL, "it was never there"
    own.process = None
    if ended:
        go.touch()
        until(lambda: len(lines(effects)) == 2, "the step has ended")
    del own.env["MLPIPED_CRASH_AT"]
    own.start()
    assert own.end(leader)["outcome"] == "cancelled"
    go.touch()
    run = own.end(follower)
    assert run["outcome"] == "succeeded"
    words = lines(effects)
    assert [line.split()[1] for line in words] == ["start", "end"]
    (token,) = {line.split()[0] for line in words}
    made = own.json("why", f"{leader}/wait")["attempts"] + own.json("why", f"{follower}/wait")["attempts"]
    assert [each["end"] for each in made] == ["committed"]
    assert own.ctl("get", f"{follower}/wait/out", own.root / "got").returncode == 0
    assert (own.root / "got").read_text().strip() == token
