"""`gc` while a machine is away: what lies there goes when it is back, also by the next daemon. What a step there has
measured stays here as long as its run.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, until
from lab import slurm_apart
from lab.slurm_desk import behind

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.ssh_rig import Box, Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]
SAYS = """
line = '{"name": "a", "value": 1}'
say = CommandStep(f"echo said; echo '{line}' >> $MLPIPED_METRICS", name="say", version="VERSION", compute_target="far")
pipeline = Pipeline("says", steps=[say])
"""
OLD_AT_ONCE = '\n[retention]\nruns = "1ms"\nlogs = "1ms"\n'


def run_and_forget(daemon: Daemon, box: Box, there: Callable[[], list[str]]) -> None:
    """Of two runs the first is forgotten, as the newest of a pipeline never is."""
    with daemon:
        for version in "12":  # or the second would be reused
            daemon.install("says", SAYS.replace("VERSION", version))
            run = daemon.go("says")["id"]
        left = sorted(there())
        assert len(set(left)) == 2
        box.stop()
        assert daemon.json("gc")["faults"] == []
        assert [each["id"] for each in daemon.runs()] == [run]
        assert [path.name for path in (daemon.state / "jobs").glob("mlp-*/*")] == ["metrics.jsonl"]
        assert sorted(there()) == left
        daemon.kill9()
        daemon.start()
        box.start()
        until(lambda: daemon.json("gc")["faults"] == [] and not there(), "nothing is left there", 60, 0.2)
        assert not list((daemon.state / "left-there").glob("*/*"))
        assert [step["last"] for step in daemon.json("metrics", run)["steps"]] == [{"a": 1}]


def test_gc_removes_what_lies_on_a_box_once_it_is_back(ssh_lab: Lab) -> None:
    box = ssh_lab.box()
    words = [f"{name} = {json.dumps(value, default=str)}" for name, value in box.settings(gpus=0).items()]
    daemon = Daemon(extra="\n".join(["[compute.far]", *words, OLD_AT_ONCE]))
    daemon.state.mkdir(mode=0o700)
    (daemon.state / "known_hosts").write_text(box.known())
    run_and_forget(daemon, box, lambda: [path.name for path in (box.home / "work").glob("*/mlp-*")])


def test_gc_removes_what_lies_on_a_cluster_once_its_login_node_is_back(ssh_lab: Lab) -> None:
    with slurm_apart.running(ssh_lab) as apart, behind(apart.login, apart.work_dir, "shared = false") as desk:
        daemon = desk.daemon
        text = daemon.config.read_text().replace("[compute.cluster]", "[compute.far]")
        daemon.config.write_text(text + OLD_AT_ONCE)

        def there() -> list[str]:
            found = apart.from_here(apart.work_dir).glob("*/**/mlp-*")
            return [path.name for path in found]

        run_and_forget(daemon, apart.login.box, there)
