"""F1–F8 of the fault matrix: what file systems and inotify do to arrivals. Real files, real inotify, real mounts."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import packages
from trigger_rig import Folder, arrival, landing, rig

from mlpiped.files import mounts

BINDFS = {"bindfs": "bindfs"}
pytestmark = pytest.mark.anyio


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    (tmp_path / "lab" / "in").mkdir(parents=True)
    return tmp_path / "lab"


# --- F1: the kernel's word is not to be relied on -------------------------------------------------------------
async def test_F1_what_the_kernel_did_not_tell_is_found_by_the_next_reconcile(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.1), reconcile=0.5) as place:
        place.arrivals._watcher._hint = lambda _: None  # an overflowing queue: every event is dropped
        place.drop("a.csv")
        await world.fired(1, 3)


async def test_F1_a_tree_that_appears_faster_than_watches_can_be_added_is_found(tmp_path: Path, lab: Path) -> None:
    async with (
        rig(tmp_path / "state") as world,
        landing(world, lab, arrival("in/**", settle=0.1, batch="file")) as place,
    ):
        for n in range(50):
            place.drop("f.csv", f"content {n}", folder=f"in/{n}/m")
        await world.fired(50, 5)
        staged = lab / "staged" / "x"
        staged.mkdir(parents=True)
        (staged / "late.csv").write_text("late")
        staged.rename(lab / "in" / "x")  # moved in as a whole
        await world.fired(51, 5)


# --- F2: limits ---------------------------------------------------------------------------------------------
LIMITED = """
import logging, sys
from pathlib import Path
import anyio
sys.path.insert(0, {tests!r})
from trigger_rig import arrival, landing, rig
Path("/proc/sys/user/{limit}").write_text("0")
async def main():
    root = Path({root!r})
    specs = (arrival(settle=0.1), arrival("in/*.txt"))
    async with rig(root / "state") as world, landing(world, root / "lab", *specs) as place:
        await world.until(lambda: place.mode != "inotify")
        place.drop("a.csv")
        print(await world.fired(1), place.mode)
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
anyio.run(main)
"""


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("max_inotify_watches", "inotify's limit of watches is reached"),
        ("max_inotify_instances", "inotify's limit of instances is reached"),
    ],
)
async def test_F2_an_exhausted_limit_means_polling_one_warning_and_says_so(
    tmp_path: Path, lab: Path, limit: str, says: str
) -> None:
    if not os.path.exists(f"/proc/sys/user/{limit}") or shutil.which("unshare") is None:
        pytest.skip("no user namespaces here")
    script = LIMITED.format(tests=str(Path(__file__).parents[1]), limit=limit, root=str(tmp_path))
    done = await anyio.run_process(["unshare", "-Ur", sys.executable, "-c", script], check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    if "unshare" in err:
        pytest.skip(f"no user namespaces here: {err}")
    assert out.strip() == f"['in/a.csv is new'] poll ({says})", err
    assert err.count("WARNING") == 1 and says in err


async def test_F2_a_folder_that_cannot_be_watched_does_not_blind_the_others(
    tmp_path: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpiped.triggers import watching

    real = watching._notify

    def notify(paths: frozenset[bytes] | list[bytes], deep: bool) -> object:
        if any(path.endswith(b"/bad") for path in paths):
            raise OSError("OS file watch limit reached")
        return real(paths, deep)

    monkeypatch.setattr(watching, "_notify", notify)
    (lab / "bad").mkdir()
    specs = (arrival("in/*.csv", settle=0.1), arrival("bad/*.csv", settle=0.1))
    async with (
        rig(tmp_path / "state") as world,
        landing(world, lab, *specs, store=Folder(lab, poll_interval=0.2)) as place,
    ):
        modes = {view.describe: view.mode for view in place.arrivals.status()}
        assert modes["lab: in/*.csv"] == "inotify"
        assert modes["lab: bad/*.csv"] == "poll (inotify's limit of watches is reached)"
        place.drop("a.csv")
        place.drop("b.csv", folder="bad")
        await world.fired(2, 3)


# --- F3: folders that go and come ---------------------------------------------------------------------------
async def test_F3_a_watched_folder_that_is_deleted_and_made_again_is_picked_up(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        place.drop("a.csv")
        await world.fired(1)
        shutil.rmtree(lab / "in")
        await world.until(lambda: place.waits == "`in`: it does not exist")
        place.drop("b.csv")
        assert (await world.fired(2))[1] == "in/b.csv is new"
        place.drop("c.csv")
        await world.fired(3, 3)


async def test_F3_a_folder_that_is_emptied_is_no_fault(
    tmp_path: Path, lab: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(tmp_path / "state") as world:
        async with landing(world, lab / "in", arrival("*.csv", settle=0.1)) as place:
            path = place.drop("b.csv", folder=".")
            await world.fired(1)
            path.unlink()
            await place.looked()
            assert place.waits == "new files"
        async with landing(world, lab / "in", arrival("*.csv", settle=0.1)) as place:
            assert place.waits == "new files"
        assert not caplog.records


async def test_F3_a_watched_folder_that_is_replaced_by_another_is_picked_up(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        (lab / "next").mkdir()
        (lab / "in").rename(lab / "old")
        (lab / "next").rename(lab / "in")
        (old,) = place.followers
        inode = os.stat(lab / "in").st_ino
        await world.until(lambda: old.point is not None and old.point.ino == inode)
        place.drop("a.csv")
        await world.fired(1, 3)
        place.drop("ghost.csv", folder="old")
        await place.still(1)


async def test_F3_a_root_that_goes_is_reported_and_picked_up_when_it_returns(
    tmp_path: Path, lab: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.1)) as place:
        place.drop("a.csv")
        await world.fired(1)
        lab.rename(tmp_path / "away")
        await world.until(lambda: "unavailable" in place.waits)
        assert place.waits == f"datastore `lab` unavailable: `{lab}` is missing"
        (follower,) = place.followers
        await world.until(lambda: follower._scan_at > world.clock.monotonic() + 5)  # nobody means to look soon
        (tmp_path / "away" / "in" / "b.csv").write_text("b")
        (tmp_path / "away").rename(lab)
        assert (await world.fired(2))[1] == "in/b.csv is new"
        assert sum("unavailable" in record.getMessage() for record in caplog.records) == 1


@pytest.fixture
def mounted(lab: Path) -> Iterator[Path]:
    """`lab` as a file system of its own; umount and mount again with `subprocess`."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "lab", str(lab)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    (lab / "in").mkdir()
    yield lab
    while os.path.ismount(lab):
        subprocess.run(["umount", "-l", str(lab)], check=True)


@pytest.mark.parametrize("left_behind", ["an empty mount point", "another folder"])
async def test_F3_an_unmounted_root_is_unavailable_and_not_a_folder_without_files(
    tmp_path: Path, mounted: Path, left_behind: str
) -> None:
    async with rig(tmp_path / "state") as world:
        async with landing(world, mounted, arrival(settle=0.1)) as place:
            place.drop("a.csv")
            await world.fired(1)
            subprocess.run(["umount", "-l", str(mounted)], check=True)
            if left_behind == "an empty mount point":
                (mounted / "in").rmdir()
            await world.until(lambda: "unavailable" in place.waits)
            if left_behind == "another folder":
                place.drop("wrong.csv")  # somebody writes beneath the mount point
            await place.looked()
            assert "unavailable" in place.waits and len(world.events) == 1
            subprocess.run(["mount", "-t", "tmpfs", "lab", str(mounted)], check=True)
            place.drop("a.csv")
            place.drop("b.csv")
            assert (await world.fired(2))[1] == "in/b.csv is new"
        if left_behind == "an empty mount point":
            subprocess.run(["umount", "-l", str(mounted)], check=True)
            async with landing(world, mounted, arrival(settle=0.1)) as place:  # a restart before the mount
                assert "is not mounted" in place.waits


@pytest.fixture
def bound(lab: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder that is bound to `lab/in`: the datastore's root stays when it goes."""
    away = tmp_path / "away"
    away.mkdir()
    words = ["mount", "--bind", str(away), str(lab / "in")]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield away
    while mounts.mount_of(os.fsencode(lab / "in")).point == os.fsencode(lab / "in"):  # ismount() sees no bind mount
        subprocess.run(["umount", "-l", str(lab / "in")], check=True)


async def test_F3_a_mount_below_the_root_that_goes_is_unavailable_and_picked_up_when_it_is_bound_again(
    tmp_path: Path, lab: Path, bound: Path
) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.1)) as place:
        place.drop("a.csv")
        await world.fired(1)
        subprocess.run(["umount", "-l", str(lab / "in")], check=True)
        place.drop("wrong.csv")  # on the mount point, not on what was mounted there
        await world.until(lambda: "unavailable" in place.waits)
        assert f"what was at `{lab}/in` is gone" in place.waits
        await place.looked()
        assert "unavailable" in place.waits and len(world.events) == 1
        (bound / "b.csv").write_text("came meanwhile")
        subprocess.run(["mount", "--bind", str(bound), str(lab / "in")], check=True)
        assert (await world.fired(2))[1] == "in/b.csv is new"
        place.drop("c.csv")
        await world.fired(3, 3)  # by the kernel's word again: nobody means to look so soon


# --- F4: file systems that others write to --------------------------------------------------------------------
@pytest.mark.parametrize("at", ["the root", "a folder below it"])
async def test_F4_what_is_written_beneath_a_fuse_mount_is_found_by_polling(tmp_path: Path, lab: Path, at: str) -> None:
    mount, beneath = (lab if at == "the root" else lab / "in"), tmp_path / "beneath"
    folder = beneath / "in" if at == "the root" else beneath
    folder.mkdir(parents=True)
    if mount == lab:
        (lab / "in").rmdir()
    if (reason := packages.why_not("a FUSE mount", BINDFS)) or not os.access("/dev/fuse", os.W_OK):
        packages.not_here(reason or "a FUSE mount needs /dev/fuse")
    packages.install(BINDFS)
    server = subprocess.Popen(["bindfs", "-f", str(beneath), str(mount)], stderr=subprocess.PIPE)
    try:
        async with rig(tmp_path / "state") as world:
            await world.until(lambda: os.path.ismount(mount) or server.poll() is not None)
            assert server.poll() is None, server.stderr and server.stderr.read()
            async with landing(world, lab, arrival(settle=0.1), store=Folder(lab, poll_interval=0.2)) as place:
                assert place.mode == "poll (fuse)"
                (folder / "a.csv").write_text("from another machine")  # no event of inotify comes of this
                assert await world.fired(1, 5) == ["in/a.csv is new"]
    finally:
        if os.path.ismount(mount):
            subprocess.run(["umount", "-l", str(mount)], check=True)
        server.terminate()
        server.wait(10)


# --- F5: half-written files ---------------------------------------------------------------------------------
async def test_F5_a_slow_writer_fires_once_with_all_it_wrote(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.4)) as place:
        with open(lab / "in" / "a.csv", "wb", buffering=0) as file:
            for _ in range(12):
                file.write(b"x")
                await anyio.sleep(0.1)  # the writer's pace
                assert world.events == []
        await world.fired(1)
        assert world.events[0].arrivals[0].size == 12
        await place.still(1)


async def test_F5_a_writer_that_pauses_too_long_fires_again_with_the_rest(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.1)):
        with open(lab / "in" / "a.csv", "wb", buffering=0) as file:
            file.write(b"first")
            await world.fired(1)
            file.write(b" second")
            assert (await world.fired(2))[1] == "in/a.csv changed"
        assert [event.arrivals[0].size for event in world.events] == [5, 12]


async def test_F5_a_file_that_keeps_its_old_mtime_and_size_is_seen_by_its_inode(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.1)) as place:
        place.drop("a.csv", "old")
        os.utime(lab / "in" / "a.csv", (1, 1))
        await world.fired(1)
        (lab / "b").write_text("new")
        os.utime(lab / "b", (1, 1))
        os.rename(lab / "b", lab / "in" / "a.csv")  # rsync -t of a file of equal size
        await world.fired(2)


# --- F6: very many ------------------------------------------------------------------------------------------
async def test_F6_a_flood_of_files_is_one_run_and_leaves_the_loop_free(tmp_path: Path, lab: Path) -> None:
    slowest = 0.0

    async def lag() -> None:
        nonlocal slowest
        while True:
            began = time.perf_counter()
            await anyio.sleep(0.005)
            slowest = max(slowest, time.perf_counter() - began)

    def flood() -> None:
        for n in range(5000):
            (lab / "in" / f"{n}.csv").write_text(str(n))

    async with (
        rig(tmp_path / "state") as world,
        landing(world, lab, arrival(settle=0.5)),
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(lag)
        await anyio.to_thread.run_sync(flood)
        assert await world.fired(1, 20) == ["5000 files new"]
        tasks.cancel_scope.cancel()
    assert slowest < 0.5


# --- F8: names ----------------------------------------------------------------------------------------------
NAMES = [
    b"\xff\xfe.csv",
    b"new\nline.csv",
    b"x" * 251 + b".csv",
    "\u202egnp.csv".encode(),
    b"[a]*?.csv",
    b"\x1b[31m.csv",
    "zażółć 日本.csv".encode(),
]


async def test_F8_every_name_that_a_file_system_allows_arrives(tmp_path: Path, lab: Path) -> None:
    spec = arrival(settle=0.1, batch="file", parameter="sample")
    async with rig(tmp_path / "state") as world, landing(world, lab, spec) as place:
        for n, name in enumerate(NAMES):
            with open(os.path.join(os.fsencode(lab), b"in", name), "w") as file:
                file.write(str(n))
        await world.fired(len(NAMES))
        assert {os.path.basename(event.arrivals[0].path) for event in world.events} == set(NAMES)
        assert all(detail.isprintable() for detail in world.details)
        assert {os.fsencode(event.parameters["sample"]) for event in world.events} == {
            os.path.join(os.fsencode(lab), b"in", name) for name in NAMES
        }
        await place.still(len(NAMES))
        place.drop("after.csv")  # the watcher hears on after a name that it cannot read
        await world.fired(len(NAMES) + 1, 3)


BYTES = st.binary(min_size=1, max_size=251).filter(lambda name: not {0, ord("/")} & {*name})
DATA = BYTES.filter(lambda name: name[:1] != b".").map(lambda name: name + b".csv")


async def test_F8_any_bytes_that_make_a_file_name_arrive_once_and_are_shown_printable(
    tmp_path: Path, lab: Path
) -> None:
    dropped: set[bytes] = set()

    @settings(
        max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(DATA)
    def drop(name: bytes) -> None:
        with open(os.path.join(os.fsencode(lab), b"in", name), "wb") as file:
            file.write(name)
        dropped.add(name)

    async with (
        rig(tmp_path / "state") as world,
        landing(world, lab, arrival(settle=0.2, batch="file", parameter="sample")) as place,
    ):
        await anyio.to_thread.run_sync(drop)
        await world.fired(len(dropped), 30)
        assert {os.path.basename(event.arrivals[0].path) for event in world.events} == dropped
        assert {os.path.basename(os.fsencode(event.parameters["sample"])) for event in world.events} == dropped
        assert all(detail.isprintable() for detail in world.details)
        place.drop("after.csv")  # the watcher hears on after names that it cannot read
        await world.fired(len(dropped) + 1, 3)
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.2, batch="file")) as place:
        await place.still(0)  # the ledger knows each of them by its bytes


async def test_a_follower_that_fails_is_heard_of_and_goes_on(
    tmp_path: Path, lab: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpiped.triggers.follower.AGAIN", 0.2)
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(settle=0.1)) as place:
        real, place.arrivals._world.hasher.files = place.arrivals._world.hasher.files, None  # type: ignore[method-assign, assignment]
        with caplog.at_level(logging.ERROR):
            place.drop("a.csv")
            await world.until(lambda: bool(caplog.records))
        place.arrivals._world.hasher.files = real  # type: ignore[method-assign]
        await world.fired(1)
