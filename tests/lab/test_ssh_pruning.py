"""What was sent to a box and built there goes again: by age and beyond a size, never under a job; over a real sshd."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from blake3 import blake3
from lab.ssh_daemon import UNTIL_GO, Daemon, ended, job, log, outcome, said

from mlpiped.backends.base import Exited, JobOutput, Part, Prunes

if TYPE_CHECKING:
    from contextlib import AsyncExitStack
    from pathlib import Path

    from lab.ssh_rig import Box, Lab

    from mlpiped.backends.base import Job
    from mlpiped.backends.ssh import SshBackend

pytestmark = [pytest.mark.anyio, pytest.mark.lab]

SIZE = 1 << 20
DAY = 86_400.0


@pytest.fixture(scope="module")
def box(ssh_lab: Lab) -> Box:
    return ssh_lab.box()


class Data:
    """A file here, and what it is on the box."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.path.write_bytes(os.urandom(SIZE))
        self.digest = f"b3:{blake3(self.path.read_bytes()).hexdigest()}"
        self.content = self.digest.replace(":", "-")

    def job(self, *argv: str) -> Job:
        given = {"x": (str(self.path),)}
        return job(*argv or ("sha256sum",), Part("input", "x"), inputs=given, contents={str(self.path): self.digest})

    def on(self, daemon: Daemon) -> Path:
        return daemon.root / ".cas" / self.content


def aged(daemon: Daemon, data: Data, seconds: float) -> None:
    then = time.time() - seconds
    for path in (daemon.root / ".used" / data.content, data.on(daemon)):
        os.utime(path, (then, then))


async def go(backend: SshBackend, **how: bool) -> tuple[int, int]:
    assert isinstance(backend, Prunes)
    return await backend.prune(**{"only_look": False} | how)


async def test_beyond_the_size_the_least_recently_used_goes(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path / "state", store="3500K")
    backend = await daemon.life(stack)
    first, second, third = (Data(tmp_path, name) for name in ("first", "second", "third"))
    for data in (first, second, third):
        await ended(backend, data.job())
    for days, data in enumerate((third, second, first)):
        aged(daemon, data, (days + 1) * DAY)
    assert await go(backend) == (0, 0), "all three fit"
    await ended(backend, first.job())  # which is a use
    fourth = Data(tmp_path, "fourth")
    await ended(backend, fourth.job())
    count, size = await go(backend, only_look=True)
    assert count == 1 and SIZE <= size < SIZE * 1.1 and second.on(daemon).exists()
    assert await go(backend) == (count, size)
    assert [data.on(daemon).exists() for data in (first, second, third, fourth)] == [True, False, True, True]
    assert not list((daemon.root / ".new").glob("gone.*"))
    missing = {data.digest: 1 for data in (first, second, third, fourth)}
    assert backend.missing(missing) == 1, "the daemon knows what has to be sent again"


async def test_what_nobody_has_used_for_long_goes_and_what_is_kept_there_does_not(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    old, young = Data(tmp_path, "old"), Data(tmp_path, "young")
    for data in (old, young):
        await ended(backend, data.job())
    output = JobOutput("m", "m", "file")
    handle, _ = await ended(backend, job("sh", "-c", 'echo 1 >"$0"', Part("output", "m"), outputs=(output,)))
    [kept] = await backend.keep(handle, [output])
    os.utime(daemon.root / ".cas" / kept.digest.replace(":", "-"), (1e9, 1e9))
    aged(daemon, old, 31 * DAY)
    aged(daemon, young, 29 * DAY)
    assert (await go(backend))[0] == 1
    assert not old.on(daemon).exists() and young.on(daemon).exists()
    assert await backend.changed([kept.digest]) == set()


async def test_forever_is_for_ever(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path / "state", store="forever")
    backend = await daemon.life(stack)
    data = Data(tmp_path, "old")
    await ended(backend, data.job())
    aged(daemon, data, 400 * DAY)
    assert await go(backend) == (0, 0) and data.on(daemon).exists()


async def test_what_a_job_uses_that_has_not_ended_stays_whoever_started_it(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """Another life of the daemon prunes; it knows nothing of the job."""
    daemon = Daemon(box, tmp_path / "state", store="1K")
    first = await daemon.life(stack)
    used, idle = Data(tmp_path, "used"), Data(tmp_path, "idle")
    await ended(first, idle.job())
    handle = await first.submit(used.job("sh", "-c", UNTIL_GO.replace("exit 3", 'sha256sum "$1"'), "sh"))
    await said(first, handle, b"began")
    for data in (used, idle):
        aged(daemon, data, 40 * DAY)
    second = await daemon.life(stack, "second")
    await go(second)
    assert used.on(daemon).exists() and not idle.on(daemon).exists()
    daemon.let_go(handle)
    found = await outcome(first, handle)
    assert isinstance(found, Exited) and found.code == 0, found
    await go(second)
    assert not used.on(daemon).exists()


async def test_nothing_goes_while_a_job_runs_that_does_not_say_what_it_uses(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """As those of a version that did not."""
    daemon = Daemon(box, tmp_path / "state", store="1K")
    backend = await daemon.life(stack)
    data = Data(tmp_path, "data")
    await ended(backend, data.job())
    handle = await backend.submit(job(UNTIL_GO, shell=True))
    await said(backend, handle, b"began")
    who = daemon.root / handle["token"] / "claim/who"
    who.write_text(who.read_text().partition("\n")[0] + "\n")
    assert await go(backend) == (0, 0) and data.on(daemon).exists()
    daemon.let_go(handle)
    await outcome(backend, handle)
    assert (await go(backend))[0] > 0 and not data.on(daemon).exists()


async def test_what_was_removed_is_sent_again_to_a_step_that_needs_it(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """Also by a daemon which does not know yet that another one has removed it."""
    daemon = Daemon(box, tmp_path / "state", store="1K")
    backend, other = await daemon.life(stack), await daemon.life(stack, "other")
    data = Data(tmp_path, "data")
    code = tmp_path / "code"
    code.mkdir()
    (code / "run.sh").write_text("cat ./run.sh")

    def reads() -> Job:
        given = {"x": (str(data.path),)}
        contents = {str(data.path): data.digest}
        argv = ("sh", "-c", '. ./run.sh >/dev/null; cat "$1"', "sh", Part("input", "x"))
        return job(*argv, inputs=given, contents=contents, code=str(code))

    await ended(backend, reads())
    await ended(other, reads())
    for pruner in (backend, other):
        count, _ = await go(pruner)
        assert count == 3, "the input, the code, and what `import mlpiped` needs"
        for one in (backend, other):
            handle, found = await ended(one, reads())
            assert found.code == 0 and await log(one, handle) == data.path.read_bytes()


async def test_each_daemon_removes_its_own(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    ours, theirs = Daemon(box, tmp_path / "ours", store="1K"), Daemon(box, tmp_path / "theirs")
    backend, other = await ours.life(stack), await theirs.life(stack)
    data = Data(tmp_path, "data")
    for one in (backend, other):
        await ended(one, data.job())
    await go(backend)
    assert not data.on(ours).exists() and data.on(theirs).exists()


async def test_a_job_waits_for_who_prunes_and_not_for_one_that_is_gone(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    data = Data(tmp_path, "data")
    await ended(backend, data.job())
    (daemon.root / ".pruning/1.7").touch()  # pid 1 did not begin then
    await ended(backend, data.job())
    with open(f"/proc/{os.getpid()}/stat") as file:
        born = file.read().rpartition(") ")[2].split()[19]
    sign = daemon.root / f".pruning/{os.getpid()}.{born}"
    sign.touch()
    wanted = data.job()
    async with anyio.create_task_group() as group:
        group.start_soon(ended, backend, wanted)
        with anyio.fail_after(30):
            while not any(data.content in who.read_text() for who in daemon.root.glob(".new/*/claim/who")):
                await anyio.sleep(0.01)
        data.on(daemon).rename(tmp_path / "gone")  # which it has not looked for yet
        assert not (daemon.root / wanted.token).exists()
        sign.unlink()
    assert data.on(daemon).exists(), "it found that out, and had it sent again"
    await go(backend)
    assert not list((daemon.root / ".pruning").iterdir())


async def test_steps_that_start_while_everything_is_pruned_all_end_well(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state", store="1K")
    backend, other = await daemon.life(stack), await daemon.life(stack, "other")
    some = [Data(tmp_path, name) for name in "abc"]
    over = anyio.Event()
    gone = 0

    async def prunes() -> None:
        nonlocal gone
        while not over.is_set():
            gone += (await go(other))[0]

    async def steps(data: Data) -> None:
        for _ in range(8):
            while True:  # one that has lost the race thrice is held, and tried again
                wanted = data.job()
                try:
                    handle = await backend.submit(wanted)
                    break
                except Exception as fault:
                    assert "loses what is sent to it" in str(fault), fault
            found = await outcome(backend, handle)
            assert isinstance(found, Exited) and found.code == 0, found

    async with anyio.create_task_group() as group:
        group.start_soon(prunes)
        async with anyio.create_task_group() as inner:
            for data in some:
                inner.start_soon(steps, data)
        over.set()
    assert gone > 3


async def test_an_environment_that_was_removed_is_built_again(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path / "state", store="1K")
    backend = await daemon.life(stack)

    def in_it() -> Job:
        return job("python", "-c", "import sys; print(sys.prefix)", requirements="", token=f"t-{time.time_ns()}")

    handle, found = await ended(backend, in_it())
    assert found.code == 0, found
    home = (await log(backend, handle)).decode().strip()
    assert home.startswith(f"{daemon.root}/.envs/") and home != sys.prefix
    assert (await go(backend))[0] == 2 and not os.path.exists(home)
    handle, found = await ended(backend, in_it())
    assert found.code == 0 and (await log(backend, handle)).decode().strip() == home


async def test_a_use_that_cannot_be_noted_keeps_no_job_from_starting(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    data = Data(tmp_path, "data")
    await ended(backend, data.job())
    shutil.rmtree(daemon.root / ".used")
    (daemon.root / ".used").write_text("no folder")
    assert (await ended(backend, data.job()))[1].code == 0
