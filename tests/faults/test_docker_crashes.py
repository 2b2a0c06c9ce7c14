"""50 crash-injected runs whose steps are containers, with a dockerd that is killed among them: 0 lost, 0 duplicated,
0 stuck.

The engine keeps its containers over its own death (live-restore): no step may start twice, and none may be lost. What
an engine without that does to steps is in tests/lab/test_docker.py. MLPIPED_DOCKER_CRASH_RUNS says how many.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from crash.elsewhere import TrialElsewhere

if TYPE_CHECKING:
    from lab.docker_rig import Engine

RUNS = int(os.environ.get("MLPIPED_DOCKER_CRASH_RUNS", "50"))
IN_CONTAINERS = """
from functools import partial
CommandStep = partial(CommandStep, environment=Environment(image="lab-python:latest"))
"""
NOT_OURS = re.compile(r"process \d+ is left: runc init ")
"""What a dockerd that is killed while it starts a container leaves of it: it waits for ever for a word to go on."""


class ContainerTrial(TrialElsewhere):
    def __init__(self, seed: int, engine: Engine) -> None:
        super().__init__(seed, prelude=IN_CONTAINERS, alive=30, finished=180.0)
        self.engine = engine
        self.kills = 0
        root = self.daemon.root
        allowed = [f"{root}/effects:rw", f"{root}/flags:rw", f"{root}/mark"]
        self.configure(
            f'\n[compute.box]\nkind = "docker"\nurl = "{engine.url}"\nslots = 6\npull = "never"\n'
            f"allow_mounts = {allowed}\n"
        )

    def shake(self) -> None:
        """The engine dies, and is started again as systemd does."""
        self.engine.kill()
        self.engine.start(live_restore=True)
        self.kills += 1


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(120 + 15 * RUNS)
def test_no_step_in_a_container_is_lost_or_runs_twice_however_often_daemon_and_engine_die(
    own_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    own_engine.stop()
    own_engine.start(live_restore=True)
    with ContainerTrial(3000, own_engine) as trial:
        verdict = trial.go(runs=RUNS)
        verdict.violations[:] = [each for each in verdict.violations if not NOT_OURS.fullmatch(each)]
        with capsys.disabled():
            print(f"\n{trial.kills} deaths of dockerd; {verdict}")
        assert not verdict.violations, f"{verdict}\n{trial.daemon.tail()}"
    assert verdict.injected >= RUNS and trial.kills >= 3
