"""Images of Apptainer, by a daemon over a real cluster; in place of Apptainer there is `lab/apptainer_standin.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import SDK, steps, until
from lab import slurm_images, slurm_rig
from lab.slurm_desk import Desk, behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.slurm_apart import Apart

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


def test_an_image_goes_to_a_cluster_that_shares_no_files_by_content(slurm_apart: Apart, tmp_path: Path) -> None:
    more = f'shared = false\napptainer = "{slurm_images.program(tmp_path)}"'
    with behind(slurm_apart.login, slurm_apart.work_dir, more) as desk:
        daemon, images = desk.daemon, desk.daemon.plugins / "images"
        images.mkdir()
        slurm_images.image(images / "app.sif", "the first")
        daemon.start()
        daemon.install("imaged", BODY.replace("COMPUTE", '"cluster"'))
        for words in ("the first", "the second"):
            slurm_images.image(images / "app.sif", words)
            found = daemon.go("imaged")
            assert steps(found) == {"step": "succeeded"}, desk.why(found["id"])
            assert daemon.ctl("get", f"{found['id']}/made", "-").stdout == f"{words}\n"
        assert steps(daemon.go("imaged")) == {"step": "reused"}
        there = slurm_apart.there("sh", "-c", f"ls {slurm_apart.work_dir}/*/.cas/*/app.sif").split()
        assert len(there) == 2
        assert slurm_apart.seen_here() == []


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
