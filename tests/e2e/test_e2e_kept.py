"""`keep="remote"`: what a box makes stays there until it is needed elsewhere; a daemon, a real sshd, a counted wire."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, step, steps, until
from lab import ssh_rig

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.lab
SIZE = 4_000_000
PLUGIN = """
model, told, here = PipelineData("model", keep="remote"), PipelineData("told"), PipelineData("here")
note = PipelineData("note")
big = PipelineData("big", keep="remote")
rate = PipelineParameter("rate", default=1)
SUM = ["sh", "-c", "sha256sum < $0 > $1"]
make = ["sh", "-c", "yes $1 | head -c 4000000 > $0; echo $1 > $2", model, rate, note]
train = CommandStep(make, outputs=[note, model], name="train", compute_target="gpu1")
count = CommandStep([*SUM, model, told], outputs=[told], name="count", compute_target="gpu1")
there = Pipeline("there", steps=[train, count])
local = CommandStep([*SUM, model, here], outputs=[here], name="local", compute_target="local")
both = Pipeline("both", steps=[train, count, local])
fill = ["sh", "-c", "yes | head -c 40000000 > $0", big]
large = CommandStep(fill, outputs=[big], name="large", compute_target="gpu1")
anywhere = CommandStep([*SUM, big, told], outputs=[told], name="anywhere")
free = Pipeline("free", steps=[large, anywhere])
"""
EXPECTED = hashlib.sha256((b"1\n" * SIZE)[:SIZE]).hexdigest()


class Scene:
    def __init__(self, lab: ssh_rig.Lab) -> None:
        self.box = lab.box()
        self.cable = ssh_rig.Cable(self.box)
        self.daemon = Daemon(
            extra=f"""
[compute.gpu1]
kind = "ssh"
host = "{self.box.address}"
port = {self.cable.port}
key_file = "{self.box.key}"
work_dir = "~/work"
python = "{sys.executable}"
slots = 2
"""
        )
        self.daemon.state.mkdir()
        (self.daemon.state / "known_hosts").write_text(self.box.known(self.cable.port))
        self.daemon.start()
        self.daemon.install("kept", PLUGIN, "there", "both", "free")

    @property
    def content(self) -> Path:
        (found,) = (self.box.home / "work").glob("*/.cas/s2-*/model")
        return found

    def read(self, run: int, name: str) -> str:
        done = self.daemon.ctl("get", f"{run}/{name}", "-")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[0]

    def close(self) -> None:
        self.daemon.close()
        self.cable.close()
        self.box.stop()


@pytest.fixture
def scene(ssh_lab: ssh_rig.Lab) -> Iterator[Scene]:
    found = Scene(ssh_lab)
    yield found
    found.close()


def test_what_is_kept_is_read_where_it_lies_and_comes_home_once_when_it_is_needed_here(scene: Scene) -> None:
    daemon = scene.daemon
    first = daemon.go("there")
    assert steps(first) == {"train": "succeeded", "count": "succeeded"}
    assert scene.cable.down < SIZE / 4, "it went nowhere"
    assert scene.read(first["id"], "told") == EXPECTED
    assert scene.read(first["id"], "note") == "1", "what is not kept comes home"
    assert hashlib.sha256(scene.content.read_bytes()).hexdigest() == EXPECTED
    assert steps(daemon.go("there")) == {"train": "reused", "count": "reused"}
    before = scene.cable.down
    second = daemon.go("both")
    assert steps(second) == {"train": "reused", "count": "reused", "local": "succeeded"}
    assert scene.read(second["id"], "here") == EXPECTED
    assert SIZE <= scene.cable.down - before < 1.3 * SIZE
    before = scene.cable.down
    assert steps(daemon.go("both", "--force", "local")) == {"train": "reused", "count": "reused", "local": "succeeded"}
    assert scene.cable.down - before < SIZE / 4, "it is here already"
    daemon.restart()
    assert steps(daemon.go("both")) == {"train": "reused", "count": "reused", "local": "reused"}


def test_a_step_that_may_run_anywhere_runs_where_its_input_lies(scene: Scene) -> None:
    found = scene.daemon.go("free")
    assert step(found, "anywhere")["compute"] == "gpu1" and scene.cable.down < SIZE / 4


def test_get_brings_home_what_is_kept_and_says_when_its_box_is_away(scene: Scene, tmp_path: Path) -> None:
    daemon = scene.daemon
    run = daemon.go("there")["id"]
    scene.box.stop()
    scene.cable.cut()
    done = daemon.ctl("get", f"{run}/model", tmp_path / "no")
    assert done.returncode != 0 and "gpu1" in done.stderr and not (tmp_path / "no").exists()
    scene.box.start()

    def got() -> bool:
        return daemon.ctl("get", f"{run}/model", tmp_path / "model").returncode == 0

    until(got, "the box is back", 60)
    assert hashlib.sha256((tmp_path / "model").read_bytes()).hexdigest() == EXPECTED


def test_a_step_here_is_held_while_the_box_that_keeps_its_input_is_away(scene: Scene) -> None:
    daemon = scene.daemon
    daemon.go("there")
    scene.box.stop()
    scene.cable.cut()
    run = daemon.run("both")
    until(lambda: "held: an input is on `gpu1`" in daemon.ctl("why", f"{run}/local").stdout, "the reason", 30)
    scene.box.start()
    assert steps(daemon.end(run, 90))["local"] == "succeeded" and scene.read(run, "here") == EXPECTED


def test_what_was_changed_on_the_box_is_not_reused_once_that_is_known(scene: Scene) -> None:
    daemon = scene.daemon
    daemon.go("there")
    changed = scene.content
    changed.chmod(0o644)
    changed.write_bytes(b"2\n" * (SIZE // 2))
    first = daemon.go("both")
    assert steps(first) == {"train": "reused", "count": "reused", "local": "failed"}, "nobody has looked"
    why = step(first, "local")["why"]
    assert "output `model` is gone from `gpu1`, or was changed there" in why, why
    second = daemon.go("both")
    assert steps(second) == {"train": "succeeded", "count": "reused", "local": "succeeded"}
    assert scene.read(second["id"], "here") == EXPECTED


def test_a_daemon_that_starts_looks_at_what_is_kept(scene: Scene) -> None:
    daemon = scene.daemon
    daemon.go("there")
    daemon.term()
    scene.content.unlink()
    daemon.start()
    until(lambda: "gone or was changed" in daemon.tail(), "its look")
    assert steps(daemon.go("there")) == {"train": "succeeded", "count": "reused"}
