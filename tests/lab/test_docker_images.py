"""What Dockerfiles leave on a real engine, and that it goes: after `gc` the engine is as it was."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from contract.conftest import DockerBench
from lab.docker_scene import bench, folder, gated, open_gate, said, served

from mlpiped.backends.base import Exited
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from mlpiped.backends.docker import DockerBackend

__all__ = ["bench"]

pytestmark = [pytest.mark.anyio, pytest.mark.lab]


def dockerfile(*more: str) -> str:
    """Of two stages, like nobody else's."""
    lines = [
        "FROM lab-python AS first",
        f"RUN echo {secrets.token_hex(8)} > /made",
        "VOLUME /cache",
        "FROM lab-python",
        "COPY --from=first /made /made",
        *more,
    ]
    return "\n".join(lines) + "\n"


async def drop(backend: DockerBackend, before: float | None = None, *, only_look: bool = False) -> int:
    """By default what was asked for up to now; the engine tells times to the second."""
    await anyio.sleep(1.1)
    return await backend.drop_images(time.time() if before is None else before, only_look=only_look)


async def test_what_dockerfiles_made_goes_with_its_stages_and_what_builds_that_failed_left(bench: DockerBench) -> None:
    async with served(bench) as backend:
        before = bench.engine.holds()
        image = await backend.image(None, dockerfile("RUN date > /date"))
        with pytest.raises(InvalidJob):
            await backend.image(None, dockerfile("RUN date > /date", "RUN false"))
        job = bench.job("cat", "/made", image=image.run)
        assert isinstance(await backend.wait(await backend.submit(job)), Exited)
        await backend.discard(job.token, keep_logs=False)
        await backend.removed()
        assert len(bench.engine.holds()["images"]) > len(before["images"]) + 3
        count = await drop(backend, only_look=True)
        assert count >= 3, "the image, its first stage, what failed"
        assert await drop(backend, time.time() - 60) == 0, "it was asked for since"
        assert await drop(backend) == count
    assert bench.engine.holds() == before
    assert list((bench.place / "state/docker-images").iterdir()) == []


async def test_a_build_that_finds_the_engines_disk_full_waits_and_is_no_fault_of_its_dockerfile(
    bench: DockerBench,
) -> None:
    copies = f"FROM lab-python\nCOPY --from=lab-python /usr/lib /{secrets.token_hex(4)}\n"
    writes = f"FROM lab-python\nRUN cp -r /usr/lib /{secrets.token_hex(4)}\n"
    async with served(bench) as backend:
        with bench.engine.short_of_space(2000):
            for text in (copies, writes):
                with pytest.raises(BackendUnavailable, match="the Dockerfile does not build: ") as fault:
                    await backend.image(None, text)
                assert "no space left on device" in fault.value.advice.lower()
        assert (await backend.image(None, writes)).run


async def test_what_was_asked_for_again_stays_and_what_goes_is_made_again_when_it_is_wanted(bench: DockerBench) -> None:
    text = dockerfile()
    async with served(bench) as backend:
        image = await backend.image(None, text)
        await anyio.sleep(1.1)
        since = time.time()
        assert await backend.image(None, text) == image
    async with served(bench) as backend:  # another life of the daemon
        assert await drop(backend, since) == 1, "the stage, which nobody asks for"
        assert bench.engine.image(image.run) == image.run
        await drop(backend)
        assert bench.engine.docker("image", "inspect", image.run, check=False).returncode != 0
        again = await backend.image(None, text)
        assert again.identity == image.identity, "so nothing runs again that stands on it"
        assert (await said(bench, "cat", "/made", image=again.run))[1]
        await drop(backend)


async def test_an_image_that_a_container_is_of_stays_and_one_that_people_made_of_it(bench: DockerBench) -> None:
    async with served(bench) as backend:
        image = await backend.image(None, dockerfile())
        theirs = await backend.image(None, dockerfile("RUN true"))
        name = f"people-{secrets.token_hex(4)}"
        bench.engine.docker("build", "--tag", name, "-", stdin=f"FROM {theirs.run}\nRUN touch /theirs\n")
        step = await gated(bench, backend, image=image.run)
        await drop(backend)
        assert bench.engine.image(image.run) == image.run
        open_gate(bench, step)
        outcome = await backend.wait(step)
        assert isinstance(outcome, Exited) and outcome.code == 0, (folder(bench, step) / "stderr").read_text()
        await backend.discard(step["token"], keep_logs=False)
        await backend.removed()
        assert await drop(backend) == 1
        assert bench.engine.image(name)
        bench.engine.docker("rmi", name)


async def test_daemons_on_one_engine_take_no_image_from_each_other(bench: DockerBench) -> None:
    other = DockerBench(bench.place / "other", bench.stack, bench.engine)
    text = dockerfile()
    async with served(bench) as backend, served(other) as theirs:
        ours, same = await backend.image(None, text), await theirs.image(None, text)
        assert ours.identity == same.identity
        assert await drop(backend) >= 1
        assert (await said(other, "cat", "/made", image=same.run))[1]
        with pytest.raises(InvalidJob, match="no image"):
            await backend.submit(bench.job("true", image=ours.run))
        await drop(theirs)


async def test_nothing_is_removed_while_a_build_stands_on_it_and_a_build_that_is_cut_off_leaves_nothing(
    bench: DockerBench,
) -> None:
    async with served(bench) as backend:
        before = bench.engine.holds()
        with pytest.raises(InvalidJob):
            await backend.image(None, dockerfile("RUN false"))
        slow = dockerfile("RUN echo begun; while :; do sleep 0.1; done")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.image, None, slow)
            with anyio.fail_after(30):
                while not bench.engine.holds()["ps"] - before["ps"]:
                    await anyio.sleep(0.05)
            assert await drop(backend) == 0
            tasks.cancel_scope.cancel()
        with anyio.fail_after(30):
            while bench.engine.holds()["ps"] != before["ps"]:
                await anyio.sleep(0.1)
        assert await drop(backend) >= 2
    assert bench.engine.holds() == before


async def test_the_sdk_of_an_earlier_version_goes_when_no_container_sees_it(bench: DockerBench) -> None:
    async with served(bench) as backend:
        sdks = backend._folders._sdk.parent
        backend._folders._sdk.rename(sdks / "earlier")
        backend._folders._sdk = sdks / "earlier"
        step = await gated(bench, backend)
    (sdks / "before-that").mkdir()
    async with served(bench) as backend:
        await backend.drop_images(0.0, only_look=True)
        assert {path.name for path in sdks.iterdir()} == {"earlier", "before-that", backend._folders._sdk.name}
        await backend.drop_images(0.0, only_look=False)
        assert {path.name for path in sdks.iterdir()} == {"earlier", backend._folders._sdk.name}
        open_gate(bench, step)
        await backend.wait(step)
        await backend.removed()
        await backend.drop_images(0.0, only_look=False)
        assert [path.name for path in sdks.iterdir()] == [backend._folders._sdk.name]
