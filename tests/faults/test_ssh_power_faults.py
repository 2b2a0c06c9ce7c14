"""B4 at a box: its disk is a real one whose power is cut. What came there and had not reached the disk is sent, or
built, again in the next boot; what had is not. And what came home from there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from blake3 import blake3
from crash import power
from lab.ssh_daemon import Daemon, ended, job, log, well

from mlpiped.backends.base import JobOutput, Part
from mlpiped.backends.ssh.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from lab.ssh_rig import Box, Lab

    from mlpiped.backends.base import Job

pytestmark = [pytest.mark.anyio, pytest.mark.lab]
SIZES = {"small": 3 << 20, "large": 12 << 20}  # by a channel, by a child
MANY = 11_000
SYNC = """#!/bin/sh
[ ! -e "${0%/*}/held" ] || { rm -f "${0%/*}/held"; exec sleep 600; }
exec /bin/sync "$@"
"""


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


class Powered:
    """A box whose work folder is a disk of its own."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.tools = folder / "tools"
        self.tools.mkdir()
        (self.tools / "sync").write_text(SYNC)
        (self.tools / "sync").chmod(0o755)
        self.box: Box = lab.box(path=[self.tools, "/usr/local/bin", "/usr/bin", "/bin"])
        self.disk = power.Disk(self.box.home / "work", folder / "disk.img")
        self.boots = 0

    def hold_sync(self) -> None:
        """The next one does not end before the power is cut."""
        (self.tools / "held").touch()

    def reboot(self) -> None:
        """What has a name has it afterwards, as the journal says; what was not synced has no bytes."""
        reaches_the_disk(self.disk.place / "other")
        self.disk.cut()
        self.box.stop()
        switch_off(self.disk.place)
        self.disk.unmount()
        self.disk.mount()
        self.boots += 1
        self.box.boot_id.write_text(f"{self.boots:08d}-2222-3333-4444-555555555555\n")
        self.box.start()

    def close(self) -> None:
        self.box.stop()
        switch_off(self.disk.place)
        self.disk.close()


def reaches_the_disk(path: Path) -> None:
    """Somebody's file, and the journal of all names with it."""
    with path.open("w") as file:
        file.write("somebody's")
        file.flush()
        os.fsync(file.fileno())


def switch_off(place: Path) -> None:
    """Whoever is on that disk: it is this test's alone."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(str(place)):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def powered(ssh_lab: Lab, tmp_path: Path) -> Iterator[Powered]:
    if (why := power.missing()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    powered = Powered(ssh_lab, tmp_path)
    yield powered
    powered.close()


class Input:
    def __init__(self, path: Path, size: int) -> None:
        data = os.urandom(size)
        path.write_bytes(data)
        self.path, self.sum = path, hashlib.sha256(data).hexdigest()
        self.digest = f"b3:{blake3(data).hexdigest()}"

    def summed(self) -> Job:
        given, contents = {"x": (str(self.path),)}, {str(self.path): self.digest}
        return job("sha256sum", Part("input", "x"), inputs=given, contents=contents)

    def on(self, daemon: Daemon) -> Path:
        return daemon.root / ".cas" / self.digest.replace(":", "-")


def is_marked(place: Path) -> bool:
    return place.is_dir() and bool(place.stat().st_mode & 0o1000)


async def until_marked(*places: Path) -> None:
    with anyio.fail_after(60):
        while not all(is_marked(place) for place in places):
            await anyio.sleep(0.02)


@pytest.mark.parametrize("size", SIZES)
async def test_B4_what_came_home_before_a_power_cut_here_is_what_was_made(
    ssh_box: Box, tmp_path: Path, size: str
) -> None:
    if (why := power.missing()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    disk = power.Disk(tmp_path / "state", tmp_path / "disk.img")
    try:
        daemon, output = Daemon(ssh_box, disk.place), JobOutput("made", "made", "file")
        script = f'head -c {SIZES[size]} /dev/urandom >"$0"'
        async with AsyncExitStack() as first:
            backend = await daemon.life(first)
            handle, _ = await ended(backend, job("sh", "-c", script, Part("output", "made"), outputs=(output,)))
            await backend.fetch(handle, tmp_path)
        reaches_the_disk(disk.place / "other")
        disk.cut()
        disk.unmount()
        disk.mount()
        daemon.trust()
        async with AsyncExitStack() as later:
            home = await (await daemon.life(later)).fetch(handle, tmp_path)
            there = daemon.root / handle["token"] / "out/made/made"
            assert (home / "out/made/made").read_bytes() == there.read_bytes()
    finally:
        disk.close()


@pytest.mark.parametrize("size", SIZES)
async def test_B4_an_input_that_had_not_reached_the_box_s_disk_is_sent_again(
    powered: Powered, tmp_path: Path, stack: AsyncExitStack, size: str
) -> None:
    daemon, data = Daemon(powered.box, tmp_path / "state"), Input(tmp_path / "data", SIZES[size])
    backend = await daemon.life(stack)
    await ended(backend, job("true"))
    await until_marked(*(daemon.root / ".cas").iterdir())
    powered.hold_sync()
    assert (await ended(backend, data.summed()))[1].code == 0
    assert not is_marked(data.on(daemon))
    powered.reboot()
    assert next(data.on(daemon).iterdir()).stat().st_size < SIZES[size], "the disk has its name and not its bytes"
    for later in (backend, await daemon.life(stack, "later")):
        await well(later)
        handle, found = await ended(later, data.summed())
        assert found.code == 0 and (await log(later, handle)).split()[0].decode() == data.sum
    assert backend.carrier.sent > SIZES[size] * 2


async def test_B4_what_had_reached_the_box_s_disk_is_not_sent_again(
    powered: Powered, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon, data = Daemon(powered.box, tmp_path / "state"), Input(tmp_path / "data", SIZES["small"])
    handle, _ = await ended(await daemon.life(stack), data.summed())
    await until_marked(*(daemon.root / ".cas").iterdir())
    for _ in range(2):
        powered.reboot()
        backend = await daemon.life(stack)
        handle, found = await ended(backend, data.summed())
        assert found.code == 0 and (await log(backend, handle)).split()[0].decode() == data.sum
        assert backend.carrier.sent == 0


@pytest.mark.parametrize("synced", [False, True])
async def test_B4_an_environment_is_built_again_if_it_had_not_reached_the_box_s_disk(
    powered: Powered, tmp_path: Path, stack: AsyncExitStack, synced: bool
) -> None:
    daemon = Daemon(powered.box, tmp_path / "state")
    backend = await daemon.life(stack)
    await ended(backend, job("true"))
    await until_marked(*(daemon.root / ".cas").iterdir())

    async def built() -> int:
        """When, and it can be used."""
        handle, found = await ended(backend, job("python", "-c", "import sys, pip; print(sys.prefix)", requirements=""))
        assert found.code == 0
        home = Path((await log(backend, handle)).decode().strip())
        assert home.parent == daemon.root / ".envs"
        if synced:
            await until_marked(home)
        return (home / ".mlpiped-complete").stat().st_mtime_ns

    if not synced:
        powered.hold_sync()
    before = await built()
    powered.reboot()
    await well(backend)
    assert (await built() == before) is synced


async def test_B4_a_witness_that_outlives_a_power_cut_vouches_for_no_bytes_that_did_not(
    powered: Powered, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """More files than one command takes, too."""
    daemon, output = Daemon(powered.box, tmp_path / "state"), JobOutput("made", "made", "folder")
    backend = await daemon.life(stack)
    name = "long" * 50
    script = f'mkdir "$0"; cd "$0"; n=0; while [ $n -lt {MANY} ]; do n=$((n + 1)); echo $n >{name}$n; done'
    handle, found = await ended(backend, job("sh", "-c", script, Part("output", "made"), outputs=(output,)))
    assert found.code == 0
    folder = daemon.root / handle["token"]
    with (folder / "exit.json").open("rb") as file:
        os.fsync(file.fileno())
    powered.reboot()
    assert (folder / "exit.json").read_text().startswith('{"v": 1')
    made = list((folder / "out/made/made").iterdir())
    assert len(made) == MANY and all(path.read_text() == path.name.removeprefix(name) + "\n" for path in made)


async def test_B4_a_script_of_ours_that_a_power_cut_has_cut_is_written_again(
    powered: Powered, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(powered.box, tmp_path / "state")
    await ended(await daemon.life(stack), job("true"))
    [scripts] = (daemon.root / ".bin").iterdir()
    for script in scripts.iterdir():
        script.write_bytes(script.read_bytes()[:4096])
    (daemon.root / ".no-params.json").write_bytes(b"\0\0")
    assert (await ended(await daemon.life(stack), job("sh", "-c", 'grep -q {} "$MLPIPED_PARAMS"')))[1].code == 0


async def test_B4_what_a_cluster_s_jobs_use_stays_when_its_login_node_starts_anew(
    powered: Powered, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """It is synced before it has its name there: a job that waits has counted on it."""
    daemon, data = Daemon(powered.box, tmp_path / "state"), Input(tmp_path / "data", SIZES["small"])
    for _ in range(2):
        link = (await daemon.life(stack)).link
        stage = Stage(link, powered.disk.place, daemon.instance, {})
        stack.push_async_callback(stage.close)
        await stage.place(data.summed())
        there = next(data.on(daemon).iterdir())
        assert hashlib.sha256(there.read_bytes()).hexdigest() == data.sum
        data.on(daemon).chmod(0o755)  # as if it had come from a version that marked nothing
        stamp = there.stat().st_ino
        powered.reboot()
        assert there.stat().st_ino == stamp
