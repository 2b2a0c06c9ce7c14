"""Environment modules, by a daemon over a real cluster: what a person writes, and what they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import SDK, step, steps, until
from lab import packages, slurm_rig
from lab.slurm_desk import Desk
from lab.slurm_modules import PACKAGES, modulefiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]
BODY = """
step = CommandStep("echo $CUDA_HOME; of-the-module", name="step", compute_target="COMPUTE",
                   retry=Retry(attempts=3, delay="1s"), environment=Environment(modules=MODULES))
pipeline = Pipeline("modules", steps=[step])
"""


@pytest.fixture
def desk(slurm_cluster: slurm_rig.Cluster, tmp_path: Path) -> Iterator[Desk]:
    packages.install(PACKAGES)
    found = Desk(slurm_cluster, f'modules_init = "{modulefiles(tmp_path)}"')
    found.daemon.start()
    yield found
    found.close()


def install(desk: Desk, modules: list[str], compute: str = "cluster") -> None:
    desk.daemon.install("modules", BODY.replace("MODULES", repr(modules)).replace("COMPUTE", compute))


def test_modules_are_loaded_and_another_module_makes_the_step_run_again(desk: Desk) -> None:
    install(desk, ["cuda/12"])
    found = desk.daemon.go("modules")
    assert steps(found) == {"step": "succeeded"}
    assert desk.daemon.ctl("logs", f"{found['id']}/step").stdout == "/opt/cuda-12\nbrought by the module\n"
    assert steps(desk.daemon.go("modules")) == {"step": "reused"}
    install(desk, ["cuda/12", "gcc/11"])
    found = desk.daemon.go("modules")
    assert steps(found) == {"step": "succeeded"}
    assert "environment: modules" in desk.why(found["id"])


def test_a_module_that_does_not_exist_fails_the_step_at_once_with_the_tool_s_words(desk: Desk) -> None:
    install(desk, ["nosuch/1"])
    found = desk.daemon.go("modules")
    assert steps(found) == {"step": "failed"} and step(found, "step")["attempts"] == 1
    why = desk.why(found["id"])
    assert "cannot load modules nosuch/1: " in why and "Unable to locate a modulefile for 'nosuch/1'" in why


def test_a_step_that_needs_modules_and_could_never_have_them_is_named_when_its_plugin_is_loaded(desk: Desk) -> None:
    desk.daemon.plugin("modules", SDK + BODY.replace("MODULES", repr(["cuda/12"])).replace("COMPUTE", "local"))
    (fault,) = until(desk.daemon.broken, "the plugin is read")
    assert fault["message"] == "step `step` needs environment modules, and `local` loads none"
