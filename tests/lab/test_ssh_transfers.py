"""Large and many things on their way to a box and home, over links that break; with real servers."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from blake3 import blake3
from lab import ssh_rig
from lab.ssh_daemon import Daemon, ended, job, log, outcome, well

from mlpiped.backends.base import JobOutput, Part
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AsyncExitStack
    from pathlib import Path

    from lab.ssh_rig import Box, Cable, Lab

    from mlpiped.backends.ssh import SshBackend

pytestmark = [pytest.mark.anyio, pytest.mark.lab]
MB = 1 << 20
LARGE = 48 * MB


@pytest.fixture
def box(ssh_lab: Lab) -> Iterator[Box]:
    box = ssh_lab.box()
    yield box
    box.stop()


@pytest.fixture
async def cable(box: Box) -> AsyncIterator[Cable]:
    cable = ssh_rig.Cable(box)
    yield cable
    cable.close()


def content(path: Path, data: bytes) -> dict[str, str]:
    path.write_bytes(data)
    return {str(path): f"b3:{blake3(data).hexdigest()}"}


async def broken(backend: SshBackend, cable: Cable, moved: Callable[[], int], act: Callable[[], Any]) -> Any:
    """What `act` brings, whose way is cut after each third of what is LARGE."""
    cuts = 0

    async def cutter() -> None:
        nonlocal cuts
        for share in (1, 2):
            while moved() < share * LARGE // 3:
                await anyio.sleep(0.001)
            cable.cut()
            cuts += 1

    async with anyio.create_task_group() as group:
        group.start_soon(cutter)
        with anyio.fail_after(90):
            while True:
                try:
                    found = await act()
                    break
                except BackendUnavailable:
                    await well(backend)
        group.cancel_scope.cancel()
    assert cuts == 2
    return found


@pytest.mark.parametrize("client", [True, False])
async def test_H1_a_large_input_goes_on_where_its_way_broke(
    box: Box, cable: Cable, tmp_path: Path, stack: AsyncExitStack, client: bool
) -> None:
    daemon = Daemon(box, tmp_path / "state", cable=cable)
    backend = await daemon.life(stack)
    if not client:
        backend.carrier.client = None
    contents = content(tmp_path / "large", os.urandom(LARGE))
    wanted = job("sha256sum", Part("input", "x"), inputs={"x": (str(tmp_path / "large"),)}, contents=contents)
    handle = await broken(backend, cable, lambda: cable.up, lambda: backend.submit(wanted))
    assert getattr(await outcome(backend, handle), "code", None) == 0
    there = next((daemon.root / ".cas" / contents[str(tmp_path / "large")].replace(":", "-")).iterdir())
    assert there.read_bytes() == (tmp_path / "large").read_bytes()
    assert cable.up < LARGE * 4 // 3  # twice what was in the pipes is lost
    assert not [path for path in (daemon.root / ".new").iterdir() if path.name.startswith("part.")]


@pytest.mark.parametrize("client", [True, False])
async def test_H1_a_large_output_comes_home_from_where_its_way_broke(
    box: Box, cable: Cable, tmp_path: Path, stack: AsyncExitStack, client: bool
) -> None:
    daemon = Daemon(box, tmp_path / "state", cable=cable)
    backend = await daemon.life(stack)
    if not client:
        backend.carrier.client = None
    script = f'mkdir "$1"; echo a > "$1/a"; head -c {LARGE} /dev/urandom > "$1/b"; echo c > "$1/c"'
    outputs = (JobOutput("tree", "tree", "folder"),)
    wanted = job("sh", "-c", script, "sh", Part("output", "tree"), outputs=outputs)
    handle, _ = await ended(backend, wanted)
    home = await broken(backend, cable, lambda: cable.down, lambda: backend.fetch(handle, tmp_path))
    there = daemon.root / handle["token"] / "out/tree/tree"
    for name in "abc":
        assert (home / "out/tree/tree" / name).read_bytes() == (there / name).read_bytes()
    assert cable.down < LARGE * 4 // 3
    assert not [path for path in home.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("tar", ["/bin/tar", "busybox", ""])
async def test_many_small_files_travel_in_archives_where_there_is_tar(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack, tar: str
) -> None:
    tools, used = tmp_path / "bin", tmp_path / "used"
    tools.mkdir()
    for name in os.listdir("/usr/bin"):
        if name != "tar":
            (tools / name).symlink_to(f"/usr/bin/{name}")
    if tar:
        if shutil.which(tar) is None:
            pytest.skip(f"{tar} is not installed here")
        (tools / "tar").write_text(f'#!/bin/sh\necho >> {used}\nexec {tar.replace("busybox", "busybox tar")} "$@"\n')
        (tools / "tar").chmod(0o755)
    box = ssh_lab.box(path=[tools])
    try:
        backend = await Daemon(box, tmp_path / "state").life(stack)
        many = tmp_path / "many"
        for number in range(300):
            (many / f"d{number // 50}").mkdir(parents=True, exist_ok=True)
            (many / f"d{number // 50}" / f"{number} {'long' * 40}\u017c").write_text(f"{number}")
        (many / "run").write_text("#!/bin/sh\n")
        (many / "run").chmod(0o755)
        (many / "link").symlink_to("d0/none")
        (many / "-rf\n").touch()
        (many / os.fsdecode(b"\x80\xff")).touch()
        script = 'test -x "$1/run" && test -L "$1/link" && cd "$1" && cat d*/* | wc -c && cp -R . "$2"'
        outputs = (JobOutput("copy", "copy", "folder"),)
        wanted = job(
            "sh", "-c", script, "sh", Part("input", "x"), Part("output", "copy"),
            inputs={"x": (str(many),)}, outputs=outputs,
        )  # fmt: skip
        handle, found = await ended(backend, wanted)
        assert found.code == 0 and await log(backend, handle) == b"790\n"
        assert (len(used.read_text()) if used.exists() else 0) == (2 if tar else 0)  # the SDK is the other one
        home = await backend.fetch(handle, tmp_path) / "out/copy/copy"
        assert looks(home) == looks(many)
    finally:
        box.stop()


def looks(place: Path) -> dict[str, object]:
    return {
        str(path.relative_to(place)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes(), os.access(path, os.X_OK))
        if path.is_file()
        else None
        for path in place.rglob("*")
    }
