"""Steps of images that hold a static program and nothing else: no script of ours runs in them, and the same holds."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from lab.docker_rig import BARE
from lab.docker_scene import bench, folder, said, served, shown

from mlpiped.backends.base import Exited, Lost, Part
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from pathlib import Path

    from contract.conftest import DockerBench

    from mlpiped.backends.base import Handle, Outcome
    from mlpiped.backends.docker import DockerBackend

__all__ = ["bench"]

pytestmark = [pytest.mark.anyio, pytest.mark.lab]

GATED = """
echo ready; echo aside >&2
while ! /busybox test -e go; do /busybox sleep 0.02; done
echo went
"""


async def bare(bench: DockerBench, backend: DockerBackend, script: str = GATED, **fields: Any) -> Handle:
    """A step of an image in which there is no /bin/sh; its one program can read scripts, which only the step knows."""
    image = bench.engine.image(BARE)
    return await backend.submit(bench.job("/busybox", "sh", "-c", script, image=image, **fields))


def go(bench: DockerBench, handle: Handle) -> None:
    (folder(bench, handle) / "work/go").touch()


def printed(bench: DockerBench, handle: Handle) -> tuple[bytes, bytes]:
    place = folder(bench, handle)
    return (place / "stdout").read_bytes(), (place / "stderr").read_bytes()


async def test_an_image_without_a_shell_runs_and_its_output_is_kept(bench: DockerBench) -> None:
    image = bench.engine.image(BARE)
    outcome, text = await said(bench, "/busybox", "echo", "said", image=image, env={"PATH": "/x", "A": "b:"})
    assert isinstance(outcome, Exited) and outcome.code == 0 and text == "said\n"
    outcome, text = await said(bench, "/busybox", "ls", "/missing", image=image)
    assert isinstance(outcome, Exited) and outcome.code == 1 and "No such file" in text
    outcome, _ = await said(bench, "/no/such/program", image=image)
    assert isinstance(outcome, Exited) and outcome.error == "command not found: `/no/such/program`"
    with pytest.raises(InvalidJob, match="no UTF-8"):
        await said(bench, "/busybox", "echo", os.fsdecode(b"\xff"), image=image)


async def test_a_step_of_an_image_without_a_shell_can_be_cancelled_and_timed(bench: DockerBench) -> None:
    script = '/busybox touch "$MLPIPED_SCRATCH/on"; exec /busybox sleep 300'
    fields: dict[str, Any] = {"image": bench.engine.image(BARE), "grace": 5.0}
    async with served(bench) as backend:
        handle = await backend.submit(bench.job("/busybox", "sh", "-c", script, **fields))
        await shown(folder(bench, handle) / "work/on", b"")
        await backend.cancel(handle)
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.cancelled and outcome.signal == 15
        handle = await backend.submit(bench.job("/busybox", "sh", "-c", script, timeout=0.5, **fields))
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.timed_out and outcome.signal == 15


async def test_what_it_prints_is_seen_while_it_runs(bench: DockerBench) -> None:
    async with served(bench) as backend:
        handle = await bare(bench, backend)
        seen: list[bytes] = []
        outcomes: list[Outcome] = []

        async def wait() -> None:
            outcomes.append(await backend.wait(handle))

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                async for chunk in backend.logs(handle, "stdout", 0, follow=True):
                    seen.append(chunk)
                    if seen == [b"ready\n"]:
                        assert not outcomes
                        go(bench, handle)
        assert b"".join(seen) == b"ready\nwent\n"
    assert isinstance(outcomes[0], Exited) and outcomes[0].code == 0
    assert printed(bench, handle) == (b"ready\nwent\n", b"aside\n")


async def test_what_it_prints_while_daemons_come_and_go_is_there_once(bench: DockerBench) -> None:
    script = "n=0; while ! /busybox test -e go; do echo $n; echo $n >&2; n=$((n+1)); /busybox usleep 2000; done"
    async with served(bench) as backend:
        handle = await bare(bench, backend, script)
    for _ in range(4):
        async with served(bench) as backend:
            with anyio.move_on_after(0.5):
                await backend.wait(handle)
    go(bench, handle)
    with anyio.fail_after(20):
        while (facts := bench.engine.inspect(handle["id"])) is None or facts["State"]["Running"]:
            await anyio.sleep(0.02)
    async with served(bench) as backend:  # it has ended while nobody looked
        assert isinstance(await backend.wait(handle), Exited)
        await backend.removed()
    out, err = printed(bench, handle)
    count = len(out.splitlines())
    assert count > 20 and out == err == b"".join(b"%d\n" % n for n in range(count))
    assert bench.engine.inspect(handle["id"]) is None


async def test_many_megabytes_of_anything_come_whole(bench: DockerBench) -> None:
    script = "/busybox dd if=/dev/urandom of=data bs=1M count=12 2>/dev/null; /busybox cat data; /busybox cat data >&2"
    async with served(bench) as backend:
        handle = await bare(bench, backend, script)
        assert isinstance(await backend.wait(handle), Exited)
    whole = (folder(bench, handle) / "work/data").read_bytes()
    assert len(whole) == 12 << 20 and printed(bench, handle) == (whole, whole)


async def test_I3_one_that_needs_too_much_memory_says_so(bench: DockerBench) -> None:
    job = ("/busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1")
    outcome, _ = await said(bench, *job, image=bench.engine.image(BARE), memory=64 << 20)
    assert isinstance(outcome, Exited) and outcome.out_of_memory
    assert outcome.error == "out of memory: it needed more than its limit of 64 MiB"


async def test_I3_one_whose_program_is_missing_or_is_none_says_so(bench: DockerBench) -> None:
    image = bench.engine.image(BARE)
    outcome, _ = await said(bench, "/missing", image=image)
    assert isinstance(outcome, Exited) and outcome.error == "command not found: `/missing`"
    outcome, _ = await said(bench, "/proc/version", image=image)
    assert (
        isinstance(outcome, Exited) and outcome.error == "permission denied: `/proc/version` is not an executable file"
    )


async def test_a_text_for_a_shell_is_refused_with_what_to_write_and_leaves_no_container(bench: DockerBench) -> None:
    async with served(bench) as backend:
        with pytest.raises(InvalidJob) as fault:
            await backend.submit(bench.job("echo hello", shell=True, image=bench.engine.image(BARE)))
    assert fault.value.message == "the step's command is a text for /bin/sh, and its image has none"
    assert "as a list" in str(fault.value.hint)
    assert bench.engine.containers(bench.instance) == set()


async def test_a_cancellation_ends_all_that_it_started_though_all_of_it_is_deaf(bench: DockerBench) -> None:
    deaf = (
        "trap '' TERM; for n in 1 2; do /busybox sh -c \"trap '' TERM; exec /busybox sleep 3$RANDOM\" & done; " + GATED
    )
    async with served(bench) as backend:
        handle = await bare(bench, backend, deaf, grace=0.5)
        with anyio.move_on_after(0.5):
            await backend.wait(handle)
        await shown(folder(bench, handle) / "stdout", b"ready")
        facts = bench.engine.inspect(handle["id"])
        assert facts is not None
        pid = facts["State"]["Pid"]
        await backend.cancel(handle)
    async with served(bench) as backend:  # the daemon died over it
        with anyio.fail_after(20):
            outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.cancelled and outcome.signal == 9
    assert not os.path.exists(f"/proc/{pid}")


async def test_A2_one_that_was_claimed_and_not_started_never_starts(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job("/busybox", "true", image=bench.engine.image(BARE), env={"SECRET": "hush"})
    async with served(bench) as backend:

        async def crash(container: str) -> None:
            raise BackendUnavailable("crashed before the start")

        monkeypatch.setattr(backend._engine, "start", crash)
        with pytest.raises(BackendUnavailable, match="crashed"):
            await backend.submit(job)
    async with served(bench) as backend:
        handle = await backend.fence(job.token)
        assert isinstance(handle, dict)
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Lost) and "had started is not known" in outcome.reason
        assert bench.engine.inspect(job.token) is None
    left = [path for path in folder(bench, job).rglob("*") if path.is_file()]
    assert not [path for path in left if b"hush" in path.read_bytes()]


async def test_I5_one_that_is_removed_or_killed_by_hand_is_lost(bench: DockerBench) -> None:
    async with served(bench) as backend:
        for how in (("rm", "--force"), ("kill",)):
            handle = await bare(bench, backend)
            bench.engine.docker(*how, handle["id"])
            assert isinstance(await backend.wait(handle), Lost)


async def test_an_image_from_scratch_is_built_and_runs(bench: DockerBench, tmp_path: Path) -> None:
    text = f"FROM lab-bare AS tools\nFROM scratch\nCOPY --from=tools /busybox /{secrets.token_hex(4)}/busybox\n"
    program = text.split()[-1]
    (tmp_path / "in").write_text("content")
    async with served(bench) as backend:
        image = await backend.image(None, text)
        inputs = {"data": (str(tmp_path / "in"),)}
        job = bench.job(program, "cat", Part("input", "data"), image=image.run, inputs=inputs)
        outcome = await backend.wait(await backend.submit(job))
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert (folder(bench, job) / "stdout").read_text() == "content"
