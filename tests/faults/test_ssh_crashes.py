"""50 crash-injected runs whose steps run on two boxes, with sshd killed and the way to it cut among them: 0 lost,
0 duplicated, 0 stuck, and nothing of ours is left there.

A box keeps its steps over all that: none may start twice, and none may be lost. Some of the outputs stay where they
were made (`keep="remote"`), until a step on the other box needs them. MLPIPED_SSH_CRASH_RUNS says how many.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from crash import mutants
from crash.elsewhere import WAYS, TrialElsewhere, harm
from harness import until
from lab.ssh_rig import Box, Cable, name_of

if TYPE_CHECKING:
    from pathlib import Path

    from lab.ssh_rig import Lab

RUNS = int(os.environ.get("MLPIPED_SSH_CRASH_RUNS", "50"))
TRIALS = 3  # a mutant's race is lost in the first one, or nearly always
ON_BOXES = """
from functools import partial
CommandStep = partial(CommandStep, compute_target="boxes")
stays = {"left", "tree", "two"}
plain = PipelineData
def PipelineData(name, **how):
    return plain(name, keep="remote", **how) if name in stays else plain(name, **how)
"""


class BoxTrial(TrialElsewhere):
    """Two boxes, each behind a cable of its own. All of both lies below the daemon's scratch folder."""

    def __init__(self, seed: int, lab: Lab, **more: Any) -> None:
        self.shaken: Counter[str] = Counter()
        self.boxes: list[Box] = []
        self.cables: list[Cable] = []
        super().__init__(seed, prelude=ON_BOXES, **{"finished": 120.0} | more)
        try:
            for number in (1, 2):
                self._box(number, lab.key)
            self.configure('\n[pools]\nboxes = ["box1", "box2"]\n')
        except BaseException:
            self.close()
            raise

    def _box(self, number: int, key: Path) -> None:
        box = Box(self.daemon.root / f"box{number}", key, 100 + number)
        self.boxes.append(box)
        self.evidence.kept[f"box{number}"] = box.home / "work"
        box.start()
        cable = Cable(box)
        self.cables.append(cable)
        known = self.daemon.root / "known_hosts"
        with known.open("a") as file:
            file.write(box.known(cable.port))
        settings = box.settings(port=cable.port, slots=4, known_hosts=known, keepalive="1s", gpus=0)
        words = [f"{name} = {json.dumps(value, default=str)}" for name, value in settings.items()]
        self.configure("\n".join(["", f"[compute.box{number}]", *words, ""]))

    def close(self) -> None:
        for cable in self.cables:
            cable.close()
        for box in self.boxes:
            box.stop()
        super().close()

    def shake(self) -> None:
        """What happens to a box, or to the way to it."""
        which = self.random.randrange(len(self.boxes))
        box, cable = self.boxes[which], self.cables[which]
        what = WAYS[self.shaken.total() % len(WAYS)]
        harm(what, box, cable, self.random.uniform(0, 0.3))
        self.shaken[what] += 1

    def processes(self) -> set[int]:
        return {pid for pid in super().processes() if not name_of(pid).startswith("sshd")}

    def jobs(self) -> list[Path]:
        """The job folders on the boxes."""
        return [path for box in self.boxes for path in (box.home / "work").glob("*/mlp-*")]

    def kept(self) -> int:
        """How many outputs stayed there."""
        return sum(len(list(place.glob("*/.cas/s2*-*"))) for place in self.evidence.kept.values())

    def clean(self) -> None:
        """Everything is old enough for `gc`."""
        self.configure('\n[retention]\nruns = "1ms"\nlogs = "1ms"\n')
        self.daemon.start()
        until(lambda: self.daemon.json("gc")["faults"] == [] and not self.jobs(), "the job folders are gone", 60, 0.5)
        self.daemon.term()


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(120 + 15 * RUNS)
def test_no_step_on_a_box_is_lost_or_runs_twice_however_often_daemon_sshd_and_link_die(
    ssh_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    with BoxTrial(4000, ssh_lab) as trial:
        verdict = trial.go(runs=RUNS)
        with capsys.disabled():
            print(f"\n{dict(trial.shaken)} on the boxes, {trial.kept()} outputs kept there; {verdict}")
        assert not verdict.violations, f"{verdict}\n{trial.daemon.tail()}"
        assert trial.kept() > 0
        trial.clean()
        until(lambda: not trial.processes(), "the end of every process on the boxes")
    assert verdict.injected >= RUNS and min(trial.shaken[kind] for kind in WAYS) >= 1


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_daemon_that_does_not_fence_on_a_box_is_found_out(ssh_lab: Lab) -> None:
    program = (sys.executable, mutants.__file__, "fence_removed_from_boxes")
    for seed in range(4000, 4000 + TRIALS):
        with BoxTrial(seed, ssh_lab, program=program, points=("after_submit", "after_handle"), finished=30) as trial:
            verdict = trial.go(deaths=5)
        if any(re.search("duplicated|never_ran and has left", each) for each in verdict.violations):
            return
    pytest.fail(f"it was not found out: {verdict}")
