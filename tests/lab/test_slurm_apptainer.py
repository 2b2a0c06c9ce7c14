"""Images of Apptainer on a real cluster, with a stand-in for Apptainer itself (`apptainer_standin.py`), which cannot be
had here: that it is called as its manual says, and that what the step then sees and leaves is what it should.
"""

from __future__ import annotations

import os
import secrets
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from lab import slurm_images, slurm_rig

from mlpiped.backends.base import Exited, Job, JobOutput, Part
from mlpiped.backends.slurm import SlurmBackend
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.config.computes import SlurmCompute
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mlpiped.backends.base import Image

pytestmark = [pytest.mark.anyio, pytest.mark.lab, pytest.mark.timeout(200)]


class Site:
    """A cluster with something like Apptainer, and an image."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.program = slurm_images.program(folder)
        self.sif = slurm_images.image(folder / "app.sif", "the first")
        self.backend: SlurmBackend

    async def image(self) -> Image:
        """As soon as the file's stamp vouches for it."""
        with anyio.fail_after(20):
            while True:
                try:
                    return await self.backend.image(os.fspath(self.sif), None)
                except BackendUnavailable as fault:
                    assert "was written just now" in fault.message
                    await anyio.sleep(0.05)

    def job(self, script: str, image: Image, **fields: Any) -> Job:
        """The paths of its outputs end the script."""
        token = f"t-{secrets.token_hex(6)}"
        parts = (Part("text", script), *(Part("output", output.name) for output in fields.get("outputs", ())))
        return Job(token, (parts,), shell=True, image=image.run, grace=3.0, **fields)

    async def run(self, job: Job) -> tuple[Exited, str]:
        """(how it ended, what it printed and complained of)"""
        outcome = await self.backend.wait(await self.backend.submit(job))
        assert isinstance(outcome, Exited)
        place = self.state / "jobs" / job.token
        return outcome, (place / "stdout").read_text() + (place / "stderr").read_text()


@pytest.fixture
async def site(slurm_cluster: slurm_rig.Cluster, tmp_path: Path, anyio_backend: str) -> AsyncIterator[Site]:
    found = Site(tmp_path)
    settings = SlurmCompute(kind="slurm", poll_interval="200ms", apptainer=os.fspath(found.program))
    async with AsyncExitStack() as stack:
        runner = HostRunner(slurm_cluster.env)
        found.backend = SlurmBackend("cluster", found.state, settings, instance="0" * 32, runner=runner)
        await found.backend.start(stack)
        yield found


async def test_a_step_runs_in_its_image_and_sees_its_inputs_and_its_folder_and_nothing_else(site: Site) -> None:
    given, other = site.folder / "given", site.folder / "other"
    given.write_text("data\n")
    other.write_text("a secret\n")
    script = (
        f"cat /etc/which {given}; cat {other} || echo unseen; echo x >> {given} || echo read only; pwd; ls /root; "
        f"echo $APPTAINER_CONTAINER $$; wc -c < {given} > "
    )
    made = JobOutput("n", "n", "file")
    job = site.job(script, await site.image(), inputs={"in": (os.fspath(given),)}, outputs=(made,))
    outcome, said = await site.run(job)
    place = site.state / "jobs" / job.token
    assert outcome.code == 0, said
    out = (place / "stdout").read_text().splitlines()
    assert out == ["the first", "data", "unseen", "read only", f"{place}/work", "yes 1"]
    assert (place / "out" / "n" / "n").read_text() == "5\n" and given.read_text() == "data\n"


async def test_the_step_s_variables_reach_it_as_they_are_and_the_machine_s_do_not(site: Site) -> None:
    base = site.backend._environments._base
    base.update(OF_THE_DAEMON="x", APPTAINER_BIND="/root", SINGULARITYENV_OF_THE_DAEMON="x")
    odd = "a 'b' $(id) `id` \"c\", d\ne"
    quoted = " ".join(f'"${name}"' for name in ("ODD", "OF_THE_DAEMON", "SLURM_JOB_NAME", "MLPIPED_TOKEN"))
    script = f'printf "%s|" {quoted} "${{PATH%%:*}}"; python3 -c "import mlpiped"'
    job = site.job(script, await site.image(), env={"ODD": odd, "PATH": "/opt/mine"})
    outcome, said = await site.run(job)
    assert outcome.code == 0 and said == f"{odd}||mlp-{job.token}|{job.token}|/opt/mine|"


async def test_cards_are_asked_for_with_nv_and_the_queue_s_choice_of_them_is_seen(site: Site) -> None:
    script = "echo $STANDIN_NV $CUDA_VISIBLE_DEVICES"
    _, said = await site.run(site.job(script, await site.image(), gpus=("a", "b")))
    assert said == "1 0,1\n"
    _, said = await site.run(site.job(script, await site.image()))
    assert said == "0\n"


async def test_an_image_is_its_content_and_one_that_was_made_anew_does_not_start_for_an_old_run(site: Site) -> None:
    first = await site.image()
    assert first.identity.startswith("b3:") and (await site.image()) == first
    slurm_images.image(site.sif, "the second")
    second = await site.image()
    assert second.identity != first.identity
    outcome, _ = await site.run(site.job("cat /etc/which", first))
    assert outcome.final and outcome.code is None and "has changed since the run looked at it" in (outcome.error or "")
    outcome, said = await site.run(site.job("cat /etc/which", second))
    assert outcome.code == 0 and said == "the second\n"


async def test_cancel_and_the_time_limit_end_what_runs_in_the_image(site: Site) -> None:
    image = await site.image()
    outcome, _ = await site.run(site.job("sleep 300 & sleep 300", image, timeout=1.0))
    assert outcome.timed_out
    job = site.job("trap '' TERM; echo started; sleep 300", image)
    handle = await site.backend.submit(job)
    out = site.state / "jobs" / job.token / "stdout"
    with anyio.fail_after(60):
        while not (out.exists() and out.read_text()):
            await anyio.sleep(0.05)
    await site.backend.cancel(handle)
    outcome = await site.backend.wait(handle)  # type: ignore[assignment]
    assert isinstance(outcome, Exited) and outcome.cancelled


async def test_where_it_is_not_installed_or_the_image_is_no_image_the_step_says_so(site: Site) -> None:
    image = await site.image()
    site.program.unlink()
    outcome, _ = await site.run(site.job("true", image))
    assert outcome.final and f"there is no `{site.program}` on " in (outcome.error or "")
    slurm_images.program(site.folder)
    site.sif.write_text("nonsense\n")
    outcome, said = await site.run(site.job("true", await site.image()))
    assert outcome.code == 255 and "image format not recognized" in said
    for name, words in ((f"{site.folder}/gone.sif", "there is no file"), ("app:latest", "images that are files")):
        with pytest.raises(InvalidJob, match=words):
            await site.backend.image(name, None)


async def test_a_path_that_apptainer_cannot_bind_is_refused(site: Site) -> None:
    odd = site.folder / "a:b"
    odd.write_text("")
    with pytest.raises(InvalidJob, match="cannot bind a path that has a colon"):
        await site.backend.submit(site.job("true", await site.image(), inputs={"in": (os.fspath(odd),)}))
