"""The example of two machines, as a person would attach them: a box by SSH, and a Docker engine."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import BIN, Daemon, steps, until
from lab import docker_rig, ssh_rig
from moons_rig import moons
from smi_rig import Smi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.docker_rig import Engine

pytestmark = pytest.mark.lab
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def box(ssh_lab: ssh_rig.Lab, tmp_path: Path) -> Iterator[ssh_rig.Box]:
    smi = Smi.make(tmp_path / "smi", f"GPU-{secrets.token_hex(8)}")
    found = ssh_lab.box(path=[smi.folder, "/usr/bin", "/bin"])
    yield found
    found.stop()


@pytest.fixture
def daemon(box: ssh_rig.Box, docker_engine: Engine) -> Iterator[Daemon]:
    extra = f"""
[compute.gpu1]
kind = "ssh"
host = "{box.address}"
port = {box.port}
key_file = "{box.key}"
python = "{sys.executable}"
slots = 2
[compute.box]
kind = "docker"
url = "{docker_engine.url}"
[pools]
gpu = ["gpu1"]
"""
    found = Daemon(extra=extra)
    shutil.copytree(ROOT / "plugins/boxes", found.plugins / "boxes")
    text = (ROOT / "plugins/boxes.py").read_text()
    text = text.replace("python:3.12-slim", docker_rig.PYTHON)  # no registry here, so the lab's image
    (found.plugins / "boxes.py").write_text(text.replace(', triggers=[OnArrival(samples, settle="5s")]', ""))
    (found.lab / "moons").mkdir()
    for number, name in enumerate(("train-1.csv", "train-2.csv", "test.csv")):
        moons(found.lab / "moons" / name, 200, number)
    yield found.start()
    found.close()


def test_a_model_is_trained_on_a_box_and_judged_in_a_container(daemon: Daemon, docker_engine: Engine) -> None:
    first = daemon.run("boxes")
    until(lambda: "gpu1" in daemon.ctl("why", f"{first}/train").stdout, "the reason for which it waits")
    trust = [BIN / "mlpiped", "trust", "--config", daemon.config, "gpu1", "--yes"]
    done = subprocess.run(trust, env=daemon.env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found = daemon.end(first, 90)
    assert steps(found) == {"train": "succeeded", "evaluate": "succeeded"}
    assert {step["name"]: step["compute"] for step in found["steps"]} == {"train": "gpu1", "evaluate": "box"}
    assert steps(daemon.go("boxes")) == {"train": "reused", "evaluate": "reused"}
    # The tag moves: what runs in it runs again, and says why; what does not is reused.
    docker_engine.docker("build", "--tag", docker_rig.PYTHON, "-", stdin=f"FROM {docker_rig.PYTHON}\nENV A=1\n")
    assert steps(daemon.go("boxes")) == {"train": "reused", "evaluate": "succeeded"}
    why = until(lambda: daemon.ctl("why", "boxes:latest/evaluate").stdout, "the reason")
    assert f"environment: image {docker_rig.PYTHON} is now sha256:" in why
