"""Images of Apptainer, by a daemon over a real cluster; in place of Apptainer there is `lab/apptainer_standin.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import SDK, steps, until
from lab import slurm_images, slurm_rig
from lab.slurm_desk import Desk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]
BODY = """
made = PipelineData("made")
step = CommandStep(f"cat /etc/which | tee {made}", name="step", outputs=[made], compute_target=COMPUTE,
                   environment=Environment(image="images/app.sif"))
pipeline = Pipeline("imaged", steps=[step])
"""


@pytest.fixture
def desk(slurm_cluster: slurm_rig.Cluster, tmp_path: Path) -> Iterator[Desk]:
    found = Desk(slurm_cluster, f'apptainer = "{slurm_images.program(tmp_path)}"')
    (found.daemon.plugins / "images").mkdir()
    slurm_images.image(found.daemon.plugins / "images" / "app.sif", "the first")
    found.daemon.start()
    yield found
    found.close()


def test_a_step_runs_in_a_file_s_image_and_again_when_the_file_holds_another(desk: Desk) -> None:
    daemon = desk.daemon
    daemon.install("imaged", BODY.replace("COMPUTE", '["local", "cluster"]'))
    found = daemon.go("imaged")
    assert steps(found) == {"step": "succeeded"} and found["steps"][0]["compute"] == "cluster"
    assert daemon.ctl("get", f"{found['id']}/made", "-").stdout == "the first\n"
    assert steps(daemon.go("imaged")) == {"step": "reused"}
    slurm_images.image(daemon.plugins / "images" / "app.sif", "the second")
    found = daemon.go("imaged")
    assert steps(found) == {"step": "succeeded"} and "app.sif is now b3:" in desk.why(found["id"])
    assert daemon.ctl("get", f"{found['id']}/made", "-").stdout == "the second\n"


def test_where_no_compute_has_apptainer_the_step_is_named_when_its_plugin_is_loaded(desk: Desk) -> None:
    desk.daemon.plugin("imaged", SDK + BODY.replace("COMPUTE", '"local"'))
    (fault,) = until(desk.daemon.broken, "the plugin is read")
    assert fault["message"] == "step `step` runs in an image that is a file, and `local` runs none"
    assert "`apptainer = true`" in fault["hint"]


def test_an_image_that_is_not_there_fails_the_step_with_a_sentence(desk: Desk) -> None:
    (desk.daemon.plugins / "images" / "app.sif").unlink()
    desk.daemon.install("imaged", BODY.replace("COMPUTE", '"cluster"'))
    found = desk.daemon.go("imaged")
    assert steps(found) == {"step": "failed"} and "there is no file `" in desk.why(found["id"])
