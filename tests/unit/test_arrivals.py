from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from trigger_rig import Folder, arrival, landing, rig

from mlpiped.files import mounts
from mlpiped.model import Arrival
from mlpiped.triggers.crowd import key_of
from mlpiped.triggers.packed import NEVER, Batch, Known, Pending, Stamp, Waiting
from mlpiped.triggers.scan import Target, scan
from mlpiped.triggers.settling import Sum, due_at, marked_due, ready, summed

pytestmark = pytest.mark.anyio


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    (tmp_path / "lab" / "in").mkdir(parents=True)
    return tmp_path / "lab"


# --- firing -------------------------------------------------------------------------------------------------
async def test_a_file_fires_once_and_not_before_its_settle_time(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        path = place.drop("a.csv", "1,2")
        assert await world.fired(1) == ["in/a.csv is new"]
        assert time.time() - path.stat().st_ctime >= 0.3
        (event,) = world.events
        (taken,) = event.arrivals
        assert (taken.path, taken.size) == (os.fsencode(path), 3)
        assert event.dedupe and event.dedupe.startswith(f"arrival:{taken.schedule}:")
        await place.still(1)
        assert await world.ledger.arrival_digests(taken.schedule, [taken.digest, "b3:other"]) == {taken.digest}


async def test_files_that_come_together_make_one_run(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        for name in "abc":
            place.drop(f"{name}.csv")
        assert await world.fired(1) == ["3 files new"]
        place.drop("a.csv", "other")
        place.drop("d.csv")
        assert (await world.fired(2))[1] == "1 file new, 1 changed"
        place.drop("d.csv", "other d")
        assert (await world.fired(3))[2] == "in/d.csv changed"


async def test_each_file_has_its_run_with_its_path_as_parameter(tmp_path: Path, lab: Path) -> None:
    spec = arrival(batch="file", parameter="sample")
    async with rig(tmp_path / "state") as world, landing(world, lab, spec) as place:
        paths = {str(place.drop(f"{name}.csv")) for name in "abc"}
        await world.fired(3)
        assert {event.parameters["sample"] for event in world.events} == paths


async def test_a_rename_into_place_counts_after_the_settle_time(tmp_path: Path, lab: Path) -> None:
    old = lab / "a.part"
    old.write_text("1")
    os.utime(old, (1, 1))
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        os.rename(old, lab / "in" / "a.csv")
        began = time.time()
        await world.fired(1)
        assert time.time() - began > 0.28
        await place.still(1)


async def test_the_same_content_never_fires_twice(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world:
        async with landing(world, lab, arrival()) as place:
            path = place.drop("a.csv", "1")
            await world.fired(1)
            os.utime(path)  # a touch
            await place.still(1)
            shutil.copy(path, lab / "in" / "copy.csv")
            path.rename(lab / "in" / "moved.csv")
            place.drop("a.csv", "1")  # a re-copy
            await place.still(1)
        async with landing(world, lab, arrival()) as place:  # a restart
            await place.still(1)
            place.drop("a.csv", "2")
            await world.fired(2)
            place.drop("a.csv", "1")  # and back
            await place.still(2)


async def test_equal_files_of_one_delivery_fire_once(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(batch="file")) as place:
        place.drop("a.csv", "1")
        place.drop("b.csv", "1")
        await world.fired(1)
        await place.still(1)
        (follower,) = place.followers
        assert len(await world.ledger.arrivals(follower.id)) == 2  # neither is looked at again


async def test_what_came_while_the_daemon_was_down_is_found_at_start(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world:
        async with landing(world, lab, arrival()) as place:
            place.drop("a.csv")
            await world.fired(1)
        (lab / "in" / "b.csv").write_text("b")
        async with landing(world, lab, arrival()):
            assert await world.fired(2) == ["in/a.csv is new", "in/b.csv is new"]


async def test_what_lies_there_when_a_trigger_is_new_counts_as_arrived(tmp_path: Path, lab: Path) -> None:
    for name in "ab":
        (lab / "in" / f"{name}.csv").write_text(name)
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        assert await world.fired(1) == ["2 files new"]
        await place.still(1)


async def test_skip_passes_over_what_lay_there_and_records_it(tmp_path: Path, lab: Path) -> None:
    (lab / "in" / "a.csv").write_text("a")
    async with rig(tmp_path / "state") as world:
        async with landing(world, lab, arrival(catch_up="skip")) as place:
            await place.still(0)
            kinds = [event.kind for event in await world.ledger.events()]
            assert any(kind.startswith("fire.skipped") for kind in kinds)
            place.drop("b.csv")
            assert await world.fired(1) == ["in/b.csv is new"]
        async with landing(world, lab, arrival()) as place:
            await place.still(1)


async def test_fewer_than_min_files_wait_for_more(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(min_files=3)) as place:
        place.drop("a.csv")
        place.drop("b.csv")
        await place.still(0)
        assert place.waits == "3 files: 2 so far"
        place.drop("c.csv")
        assert await world.fired(1) == ["3 files new"]


async def test_a_marker_beside_the_file_makes_it_complete_at_once(tmp_path: Path, lab: Path) -> None:
    spec = arrival("in/*", marker="{name}.done", settle=60)
    async with rig(tmp_path / "state") as world, landing(world, lab, spec) as place:
        place.drop("a.csv")
        place.drop("b.csv")
        await place.still(0)
        assert place.waits == "`{name}.done`: 2 files without it"
        place.drop("a.csv.done")
        assert await world.fired(1, 2) == ["in/a.csv is new"]
        place.drop("b.csv.done")
        assert (await world.fired(2, 2))[1] == "in/b.csv is new"
        await place.still(2)


async def test_a_marker_in_the_folder_completes_all_of_it_and_is_no_data(tmp_path: Path, lab: Path) -> None:
    spec = arrival("in/*", marker="_SUCCESS", settle=60)
    async with rig(tmp_path / "state") as world, landing(world, lab, spec) as place:
        place.drop("part-0", folder="in/monday/x=1")
        place.drop("part-1", folder="in/monday/x=2")
        place.drop("part-0", "tuesday", folder="in/tuesday")
        await place.still(0)
        place.drop("_SUCCESS", folder="in/monday")
        assert await world.fired(1, 3) == ["2 files new"]
        await place.still(1)


async def test_drafts_and_hidden_files_are_no_data_unless_the_pattern_names_them(tmp_path: Path, lab: Path) -> None:
    names = [".hidden.csv", "a.csv~", ".a.csv.swp", "a.csv.part", "a.tmp", "a.crdownload"]
    async with rig(tmp_path / "state") as world:
        async with landing(world, lab, arrival("in/*")) as place:
            for name in names:
                place.drop(name)
            await place.still(0)
        async with landing(world, lab, arrival("in/*.tmp"), arrival("in/.h*"), arrival("in/a.csv.part")):
            await world.fired(3)


async def test_links_out_of_the_datastore_are_not_followed(tmp_path: Path, lab: Path) -> None:
    (tmp_path / "secret.csv").write_text("s")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.csv").write_text("x")
    (lab / "other.csv").write_text("inside")
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival("in/**/*.csv")) as place:
        (lab / "in" / "a.csv").symlink_to(tmp_path / "secret.csv")
        (lab / "in" / "b").symlink_to(tmp_path / "outside")
        (lab / "in" / "loop").symlink_to(lab / "in")
        await place.still(0)
        (lab / "in" / "c.csv").symlink_to(lab / "other.csv")
        assert await world.fired(1) == ["in/c.csv is new"]


async def test_a_folder_that_comes_later_is_watched(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival("new/deep/*.csv")) as place:
        assert place.waits == "`new`: it does not exist"
        place.drop("a.csv", folder="new/deep")
        assert await world.fired(1, 5) == ["new/deep/a.csv is new"]
        place.drop("b.csv", folder="new/deep")
        await world.fired(2, 5)


async def test_a_plain_path_is_a_file_or_a_whole_folder(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival("in/a.csv"), arrival("set")) as place:
        place.drop("b.csv")
        place.drop("a.csv")
        assert await world.fired(1) == ["in/a.csv is new"]
        for n in range(3):
            place.drop(f"{n}.bin", folder=f"set/{n}")
        assert (await world.fired(2))[1] == "3 files new"


async def test_polling_finds_the_same_without_the_kernel(tmp_path: Path, lab: Path) -> None:
    store = Folder(lab, watch="poll", poll_interval=0.1)
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival(), store=store) as place:
        assert place.mode == "poll (as configured)"
        place.drop("a.csv")
        await world.fired(1)


async def test_a_remote_file_system_is_polled(tmp_path: Path, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpiped.triggers.scan.mount_of", lambda _: mounts.Mount(b"/", "nfs4"))
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        assert place.mode == "poll (nfs4)"
        place.drop("a.csv")
        await world.fired(1)


async def test_what_a_paused_pipeline_does_not_take_is_offered_again(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        world.paused = True
        place.drop("a.csv")
        await world.until(lambda: place.waits == "the pipeline to take 1 file")
        world.paused = False
        place.arrivals.look("p")
        assert await world.fired(1, 2) == ["in/a.csv is new"]


async def test_a_batch_that_cannot_be_recorded_is_kept(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        world.broken = OSError("disk full")
        place.drop("a.csv")
        await world.until(lambda: "to take 1 file" in place.waits)
        world.broken = None
        place.arrivals.look()
        await world.fired(1, 2)


async def test_what_is_no_file_holds_up_nobody(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        os.mkfifo(lab / "in" / "pipe.csv")
        (lab / "in" / "dangling.csv").symlink_to("nowhere")
        place.drop("a.csv")
        assert await world.fired(1) == ["in/a.csv is new"]


async def test_set_takes_triggers_out_and_puts_them_in(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        place.arrivals.set({})
        assert place.arrivals.status() == []
        place.drop("a.csv")
        place.arrivals.set({"q": [arrival()]})
        await world.fired(1)
        assert world.events[0].pipeline == "q"


async def test_an_unknown_datastore_is_shown(tmp_path: Path, lab: Path) -> None:
    async with rig(tmp_path / "state") as world, landing(world, lab, arrival()) as place:
        spec = arrival()
        other = replace(spec, source=replace(spec.source, datastore="nolab"))
        place.arrivals.set({"p": [other]})
        assert place.waits == "datastore `nolab`: the config has none of that name"


async def test_a_quiet_folder_costs_nothing(tmp_path: Path, lab: Path) -> None:
    for n in range(500):
        (lab / "in" / f"{n}.csv").write_text(str(n))
    async with rig(tmp_path / "state") as world:
        async with landing(world, lab, arrival()) as place:
            await world.fired(1)
            await place.still(1)
        async with landing(world, lab, arrival()) as place:
            commits, hasher = world.ledger.commits, place.arrivals._world.hasher
            await place.still(1)
            assert world.ledger.commits == commits
            assert hasher.bytes_read == 0  # type: ignore[attr-defined]
            (follower,) = place.followers
            await world.until(lambda: follower._scan_at > world.clock.monotonic() + 5)  # the echoes have died away
            look = follower.look
            (lab / "in" / "1.csv").read_text()  # reading is no news
            with anyio.move_on_after(0.3):
                await world.changed.wait()
            assert follower.look is look


# --- the parts ----------------------------------------------------------------------------------------------
def test_a_scan_of_many_known_files_keeps_nothing(tmp_path: Path) -> None:
    for n in range(3000):
        (tmp_path / f"{n}.csv").touch()
    target = Target.of(os.fsencode(tmp_path), arrival("*.csv"))
    known, waiting = Known(), Waiting()
    found = scan(target, known, waiting)
    assert found.seen == len(found.changed) == 3000

    for path, stamp in found.changed.drain():
        waiting[path] = Pending(stamp, 1.0)
    again = scan(target, known, waiting)
    assert (again.seen, again.waiting, len(again.changed), again.gone) == (3000, 3000, 0, [])
    for path, (stamp, *_) in waiting.items():
        known.put(path, stamp.size, stamp.mtime_ns, stamp.ino)
    again = scan(target, known, Waiting())
    assert (again.seen, len(again.changed)) == (3000, 0)


def test_a_scan_tells_what_is_no_longer_to_be_waited_for(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.csv"):
        (tmp_path / name).write_text(name)
    target, known, waiting = Target.of(os.fsencode(tmp_path), arrival("*.csv")), Known(), Waiting()
    for path, stamp in scan(target, known, waiting).changed.drain():
        waiting[path] = Pending(stamp, 1.0)
    (tmp_path / "a.csv").unlink()
    b = waiting[os.fsencode(tmp_path / "b.csv")].stamp
    known.put(os.fsencode(tmp_path / "b.csv"), b.size, b.mtime_ns, b.ino)
    found = scan(target, known, waiting)
    assert sorted(found.gone) == [os.fsencode(tmp_path / "a.csv"), os.fsencode(tmp_path / "b.csv")]
    assert len(found.changed) == 0


def test_what_is_packed_comes_out_as_it_went_in() -> None:
    waiting, most = Waiting(), 2**63 - 1
    entries = {
        b"a": Pending(Stamp(0, -1, 2**64 - 1, most), NEVER, True, False, True),
        b"b": Pending(Stamp(most, most, 0, -most), 0.1, False, True, False),
    }
    for path, p in entries.items():
        waiting[path] = p
    assert dict(waiting) == entries
    assert waiting.waits(b"b", entries[b"b"].stamp) and not waiting.waits(b"b", Stamp(1, 2, 3, 4))
    assert not waiting.waits(b"a", entries[b"a"].stamp)  # its marker may have come
    batch = Batch("s")
    batch.append(b"x", "b3:" + "0f" * 32, 1, -2, 2**64 - 1)
    batch.append(b"y", "b3:" + "0a" * 32, 3, 4, 5)
    batch.append(b"z", "b3:" + "0a" * 32, 6, 7, 8)
    assert batch[0] == Arrival("s", b"x", "b3:" + "0f" * 32, 1, -2, 2**64 - 1)
    assert [a.path for a in batch] == [b"x", b"y", b"z"] == list(batch.paths) and batch[-1].ino == 8
    assert list(batch.digests()) == ["b3:" + "0a" * 32, "b3:" + "0f" * 32]
    assert key_of(batch) == key_of(list(batch))


@pytest.mark.parametrize(
    ("age", "local", "left"),
    [(0, True, 5), (3, True, 2), (60, True, 0), (-0.5, True, 5), (-60, True, 5), (60, False, 5)],
)
def test_the_settle_time_counts_from_the_last_change_where_the_kernel_can_be_believed(
    age: float, local: bool, left: float
) -> None:
    stamp = Stamp(1, 0, 1, round((1000 - age) * 1e9))
    assert due_at(stamp, 5, wall=1000, mono=50, local=local) == pytest.approx(50 + left)


def test_a_marker_that_is_older_than_the_file_is_no_proof() -> None:
    stamp = Stamp(1, 0, 1, 500)
    assert marked_due(stamp, None, 9, 5) == NEVER
    assert marked_due(stamp, 500, 9, 5) == 5
    assert marked_due(stamp, 499, 9, 5) == 9


def test_one_moving_file_holds_back_a_batch_but_not_single_files() -> None:
    stamp = Stamp(1, 0, 1, 0)
    pending = {b"b": Pending(stamp, 1), b"a": Pending(stamp, 1), b"c": Pending(stamp, 9), b"d": Pending(stamp, NEVER)}
    assert ready(pending.items(), 5, each=False) == []
    assert ready(pending.items(), 9, each=False) == [b"a", b"b", b"c"]
    assert ready(pending.items(), 5, each=True) == [b"a", b"b"]
    found = summed(pending.values(), Sum())
    assert (found.next_due(each=False), found.next_due(each=True), found.moving) == (9, 1, 3)
    held = Pending(stamp, 20, held=True)
    assert summed([held, Pending(stamp, 12, offered=True)], found) == Sum(3, 1, 1, 1, 12, 9)
    assert summed([held], Sum()).next_due(each=False) == NEVER


MOUNTS = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:50 / /data rw shared:1 - nfs4 server:/x rw
41 40 0:51 / /data/with\040space rw - xfs /dev/b rw
42 40 0:52 / /data/twice rw - ext4 /dev/c rw
43 42 0:53 / /data/twice rw - fuse.sshfs host: rw
broken line
44 27 0:54 / /win rw - fuseblk /dev/d rw
"""


@pytest.mark.parametrize(
    ("path", "fstype", "remote"),
    [
        (b"/home/x", "ext4", False),
        (b"/data/x", "nfs4", True),
        (b"/database", "ext4", False),
        (b"/data/with space/y", "xfs", False),
        (b"/data/twice", "fuse.sshfs", True),
        (b"/win/x", "fuseblk", False),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_mount(path: bytes, fstype: str, remote: bool) -> None:
    assert mounts.mount_of(path, MOUNTS).fstype == fstype
    assert mounts.is_remote(fstype) is remote
