"""One pipeline of plugins/, as it is, on this machine, in a container, on a box by SSH and in a Slurm cluster: the
config alone says where, and what it makes is the same, byte for byte."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import BIN, Daemon, steps, until
from lab import docker_rig, packages
from leaves_rig import leaves

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lab.docker_rig import Engine
    from lab.slurm_rig import Cluster
    from lab.ssh_rig import Box

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("local", "docker", "ssh", "slurm")
DONE = dict.fromkeys(("prepare", "train", "evaluate"), "succeeded")


def block(settings: Mapping[str, Any]) -> str:
    words = "\n".join(f"{name} = {json.dumps(value, default=str)}" for name, value in settings.items())
    return f"[compute.work]\n{words}\n"


def in_container(engine: Engine) -> dict[str, Any]:
    return {"kind": "docker", "url": engine.url, "image": docker_rig.PYTHON, "pull": "never"}


def furnish(daemon: Daemon) -> Daemon:
    """The example, and its data."""
    shutil.copytree(ROOT / "plugins" / "leaves", daemon.plugins / "leaves")
    shutil.copy(ROOT / "plugins" / "leaves.py", daemon.plugins)
    (daemon.lab / "leaves").mkdir()
    for number in range(2):
        leaves(daemon.lab / "leaves" / f"batch-{number}.csv", 150, number)
    return daemon


class Desks:
    """A daemon for each kind. They differ in `[compute.work]`, and in nothing else."""

    def __init__(self, engine: Engine, box: Box, cluster: Cluster) -> None:
        self.engine, self.box, self.cluster = engine, box, cluster
        self.daemons: dict[str, Daemon] = {}
        blocks: dict[str, Mapping[str, Any]] = {
            "local": {"kind": "local", "slots": 2},
            "docker": in_container(engine),
            "ssh": box.settings(gpus=0),
            "slurm": {"kind": "slurm", "partition": "main", "poll_interval": "200ms"},
        }
        path = f"{BIN}:{packages.PATH}"
        env = {"SLURM_CONF": cluster.env["SLURM_CONF"], "LC_ALL": "C", "PATH": path}
        for kind in KINDS:
            self.daemons[kind] = furnish(Daemon(extra=block(blocks[kind]), env=env))

    def start(self) -> None:
        for daemon in self.daemons.values():
            daemon.start()
        trust = [BIN / "mlpiped", "trust", "--config", self.daemons["ssh"].config, "work", "--yes"]
        subprocess.run(trust, env=self.daemons["ssh"].env, capture_output=True, check=True, timeout=60)

    def ran_there(self, kind: str) -> set[str]:
        """The tokens that the machine itself says it has run, of whichever daemon."""
        if kind == "local":
            jobs = self.daemons["local"].state / "jobs"
            return {
                path.parents[1].name for path in jobs.glob("*/claim/handle.json") if not path.parents[1].is_symlink()
            }
        if kind == "docker":
            told = self.engine.docker(
                "events", "--since=1", "--until=0s", "--filter=event=die", "--format={{json .Actor.Attributes}}"
            )
            found = [json.loads(line) for line in told.stdout.splitlines()]
            return {one["mlpiped.token"] for one in found if one.get("exitCode") == "0" and "mlpiped.token" in one}
        if kind == "ssh":
            return {path.name for path in (self.box.home / "work").glob("*/mlp-*")}
        return {name.removeprefix("mlp-") for state, name in self.cluster.jobs().values() if state == "COMPLETED"}

    def close(self) -> None:
        for daemon in self.daemons.values():
            daemon.close()


def tokens(daemon: Daemon) -> set[str]:
    with closing(sqlite3.connect(f"file:{daemon.state}/ledger.sqlite3?mode=ro", uri=True)) as ledger:
        return {token for (token,) in ledger.execute("SELECT token FROM attempts WHERE \"end\" = 'committed'")}


def published(daemon: Daemon, run: int) -> dict[str, bytes]:
    """What others find in the datastore."""
    place = daemon.lab / "models" / "leaves" / str(run)
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_one_pipeline_runs_unchanged_on_all_four_and_makes_the_same_bytes(
    docker_engine: Engine, ssh_box: Box, slurm_cluster: Cluster
) -> None:
    desks = Desks(docker_engine, ssh_box, slurm_cluster)
    try:
        desks.start()
        runs = {kind: daemon.next_run("leaves", timeout=60)["id"] for kind, daemon in desks.daemons.items()}
        made = {}
        for kind, daemon in desks.daemons.items():
            found = daemon.end(runs[kind], 120)
            assert (steps(found), found["cause"]["kind"]) == (DONE, "arrival"), f"{kind}: {found}"
            assert {step["compute"] for step in found["steps"]} == {"work"}
            made[kind] = published(daemon, runs[kind])
            mine = tokens(daemon)
            assert len(mine) == len(DONE)
            until(lambda kind=kind, mine=mine: mine <= desks.ran_there(kind), f"{kind} says that it ran them")
            for other in set(KINDS) - {kind}:
                assert not mine & desks.ran_there(other), f"{kind} ran on {other}"
        assert set(made["local"]) == {"sets/train.csv", "sets/test.csv", "sets/scale.json", "model.json", "report.json"}
        assert json.loads(made["local"]["report.json"])["accuracy"] > 0.9
        for kind in KINDS:
            assert made[kind] == made["local"], f"{kind} made other bytes"
    finally:
        desks.close()


def test_what_moves_into_a_container_runs_again_and_says_why_and_is_reused_when_it_moves_back(
    docker_engine: Engine,
) -> None:
    here, there = block({"kind": "local", "slots": 2}), block(in_container(docker_engine))
    with furnish(Daemon(extra=here)) as daemon:
        first = daemon.end(daemon.next_run("leaves")["id"])
        assert steps(first) == DONE
        daemon.config.write_text(daemon.config.read_text().replace(here, there))
        daemon.restart()
        moved = daemon.go("leaves")
        assert steps(moved) == DONE
        assert (
            f"environment: image {docker_rig.PYTHON} is new: sha256:" in daemon.ctl("why", "leaves:latest/train").stdout
        )
        daemon.config.write_text(daemon.config.read_text().replace(there, here))
        daemon.restart()
        assert set(steps(daemon.go("leaves")).values()) == {"reused"}
