from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from files_rig import Table, byte_path, fingerprinter, names, settle, settle_all, until, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpiped.artifacts import OutputFault, Store, places
from mlpiped.backends.base import JobOutput
from mlpiped.errors import Conflict, UnknownName
from mlpiped.files.walking import PathRefused
from mlpiped.ledger.rows import ArtifactRow
from mlpiped.model import OutputFact
from mlpiped.retention.plan import gc_plan

pytestmark = pytest.mark.anyio

MODEL = JobOutput("model", "model.bin", "file")
FOLDER = JobOutput("clean", "clean", "folder")
DAY = 86_400_000_000


class Lab:
    """A state folder with its store, and jobs that end."""

    def __init__(self, base: Path) -> None:
        self.state = base / "state"
        self.table = Table()
        self.prints = fingerprinter(self.table)
        self.store = Store(self.state, self.prints)
        self._jobs = 0

    def job(self) -> Path:
        self._jobs += 1
        folder = self.state / "jobs" / f"job{self._jobs}"
        (folder / "out").mkdir(parents=True)
        return folder

    async def keep(self, content: bytes = b"weights", output: JobOutput = MODEL, *, mode: int = 0o644) -> OutputFact:
        folder = self.job()
        write(folder / "out" / output.name / output.file_name, content, mode)
        return (await self.store.collect(folder, [output]))[0]

    async def keep_tree(self, output: JobOutput = FOLDER, **files: str) -> OutputFact:
        folder = self.job()
        for name, content in files.items():
            write(folder / "out" / output.name / output.file_name / name.replace("__", "/"), content)
        return (await self.store.collect(folder, [output]))[0]

    def restarted(self) -> Store:
        return Store(self.state, fingerprinter(self.table))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


# --- into the store ---------------------------------------------------------------------------------------------
async def test_an_output_lies_under_its_digest_read_only_with_its_own_name(lab: Lab) -> None:
    fact = await lab.keep(b"weights")
    path = Path(fact.path)
    hexes = fact.digest.removeprefix("b3:")
    assert path == lab.state / "artifacts" / hexes[:2] / hexes[2:] / "model.bin"
    assert path.read_bytes() == b"weights"
    assert path.stat().st_mode & 0o777 == 0o444
    assert (fact.name, fact.kind, fact.size) == ("model", "file", 7)


async def test_a_tree_keeps_names_exec_bits_empty_folders_and_links(lab: Lab) -> None:
    folder = lab.job()
    top = folder / "out" / "clean" / "clean"
    write(top / "a" / "run", "1", 0o755)
    (top / "empty").mkdir()
    (top / "a" / "link").symlink_to("../a/run")
    with open(byte_path(top, b"\xff\n"), "wb") as file:
        file.write(b"12")
    (fact,) = await lab.store.collect(folder, [FOLDER])
    kept = Path(fact.path)
    assert (fact.kind, fact.size) == ("folder", 3)
    assert fact.digest.startswith("b3t:")
    assert names(kept) == {"a", "a/run", "a/link", "empty", os.fsdecode(b"\xff\n")}
    assert (kept / "a" / "link").read_text() == "1"
    assert {p.lstat().st_mode & 0o777 for p in [kept, kept / "a", kept / "a" / "run"]} == {0o555}
    assert await lab.store.intact([fact]) == set()


async def test_a_tree_in_the_store_has_the_digest_that_it_has_as_an_input(lab: Lab, tmp_path: Path) -> None:
    fact = await lab.keep_tree(a="1", b__c="2")
    write(tmp_path / "in" / "a", "1")
    write(tmp_path / "in" / "b" / "c", "2")
    seen = await lab.prints.files([str(tmp_path / "in"), fact.path])
    assert [found.digest for found in seen.values()] == [fact.digest, fact.digest]


async def test_several_outputs_come_back_in_order(lab: Lab) -> None:
    folder = lab.job()
    write(folder / "out" / "model" / "model.bin", "m")
    write(folder / "out" / "clean" / "clean" / "x", "c")
    facts = await lab.store.collect(folder, [FOLDER, MODEL])
    assert [fact.name for fact in facts] == ["clean", "model"]
    assert await lab.store.collect(lab.job(), []) == []


def no_output(out: Path) -> None: ...


def a_link(out: Path) -> None:
    write(out.parent / "real", "x")
    out.symlink_to("real")


def a_link_on_the_way(out: Path) -> None:
    real = write(out.parent.parent.parent / "elsewhere" / out.name).parent
    out.parent.rmdir()
    out.parent.symlink_to(real)


def a_fifo(out: Path) -> None:
    os.mkfifo(out)


def a_folder(out: Path) -> None:
    write(out / "x")


def a_hard_link(out: Path) -> None:
    os.link(write(out.parent / "other"), out)


def set_user_id(out: Path) -> None:
    write(out, "x", 0o4755)


def a_file(out: Path) -> None:
    write(out)


def empty(out: Path) -> None:
    (out / "sub").mkdir(parents=True)


def link_out(out: Path) -> None:
    write(out / "x")
    (out / "passwd").symlink_to("/etc/passwd")


def link_up(out: Path) -> None:
    write(out / "x")
    (out / "up").symlink_to("../../../..")


def link_by_link(out: Path) -> None:
    write(out / "x" / "y" / "z")
    (out / "x" / "up").symlink_to("..")
    (out / "sly").symlink_to("x/up/../x")


def fifo_within(out: Path) -> None:
    write(out / "x")
    os.mkfifo(out / "fifo")


def hard_link_within(out: Path) -> None:
    os.link(write(out / "x"), out / "y")


@pytest.mark.parametrize(
    ("output", "made", "sentence"),
    [
        (MODEL, no_output, "output `model` is missing"),
        (MODEL, a_link, "should be a file, and is a symbolic link"),
        (MODEL, a_link_on_the_way, "output `model` cannot be read: not a directory"),
        (MODEL, a_fifo, "should be a file, and is neither"),
        (MODEL, a_folder, "should be a file, and is a folder"),
        (MODEL, a_hard_link, "hard link"),
        (MODEL, set_user_id, "set-user-id"),
        (FOLDER, no_output, "output `clean` is missing"),
        (FOLDER, a_file, "should be a folder, and is a file"),
        (FOLDER, a_link, "should be a folder, and is a symbolic link"),
        (FOLDER, empty, "is an empty folder"),
        (FOLDER, link_out, "`passwd` in output `clean` is a link that leads outside"),
        (FOLDER, link_up, "`up` in output `clean` is a link that leads outside"),
        (FOLDER, link_by_link, "`sly` in output `clean` is a link that leads outside"),
        (FOLDER, fifo_within, "`fifo` in output `clean` is neither"),
        (FOLDER, hard_link_within, "hard link"),
    ],
)
async def test_G8_what_cannot_be_kept_is_refused_with_a_sentence_and_nothing_is_kept(
    lab: Lab, output: JobOutput, made: Callable[[Path], None], sentence: str
) -> None:
    folder = lab.job()
    out = folder / "out" / output.name / output.file_name
    out.parent.mkdir(parents=True)
    made(out)
    with pytest.raises(OutputFault) as fault:
        await lab.store.collect(folder, [output])
    assert sentence in fault.value.message
    assert list((lab.state / "artifacts").iterdir()) == []


@pytest.mark.parametrize("name", ["../model.bin", "a/b", "", ".", ".."])
async def test_a_file_name_that_leads_elsewhere_is_refused(lab: Lab, name: str) -> None:
    with pytest.raises(OutputFault):
        await lab.store.collect(lab.job(), [JobOutput("model", name, "file")])
    with pytest.raises(OutputFault):
        await lab.store.collect(lab.job(), [JobOutput(name, "model.bin", "file")])


async def test_one_bad_output_keeps_none(lab: Lab) -> None:
    folder = lab.job()
    write(folder / "out" / "model" / "model.bin", "m")
    with pytest.raises(OutputFault):
        await lab.store.collect(folder, [MODEL, FOLDER])
    assert list((lab.state / "artifacts").iterdir()) == []


async def test_an_empty_file_is_an_output(lab: Lab) -> None:
    assert (await lab.keep(b"")).size == 0


async def test_the_exec_bit_of_a_file_stays(lab: Lab) -> None:
    assert os.access((await lab.keep(b"#!/bin/sh", mode=0o755)).path, os.X_OK)


async def test_collecting_again_after_a_crash_finds_what_was_moved(lab: Lab) -> None:
    """A6, A7: the daemon died between the rename and the ledger's commit."""
    folder = lab.job()
    write(folder / "out" / "model" / "model.bin", "m")
    write(folder / "out" / "clean" / "clean" / "x", "c")
    facts = await lab.store.collect(folder, [MODEL, FOLDER])
    assert not (folder / "out" / "model" / "model.bin").exists()
    assert await lab.restarted().collect(folder, [MODEL, FOLDER]) == facts


@pytest.mark.parametrize("point", ["1", "2"])
async def test_a_daemon_killed_while_collecting_loses_nothing(lab: Lab, point: str) -> None:
    folder = lab.job()
    write(folder / "out" / "model" / "model.bin", "m")
    write(folder / "out" / "clean" / "clean" / "x", "c")
    program = (
        "import sys; from mlpiped.artifacts import collecting; from mlpiped.backends.base import JobOutput as O;"
        "collecting.collect(sys.argv[1], [O('model', 'model.bin', 'file'), O('clean', 'clean', 'folder')], sys.argv[2],"
        "lambda path, stamp: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(lab.state)],
        env={**os.environ, "MLPIPED_CRASH_AT": f"mid_collect:{point}"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    facts = await lab.store.collect(folder, [MODEL, FOLDER])
    assert await lab.store.intact(facts) == set()
    assert Path(facts[0].path).read_text() == "m"


async def test_a_marker_that_the_step_forged_leads_nowhere(lab: Lab) -> None:
    secret = write(lab.state / "jobs" / "secret" / "model.bin")
    for target in ("b3:../../jobs/secret", f"b3:{'0' * 64}", str(secret), "b3:"):
        folder = lab.job()
        (folder / "out" / "model").mkdir()
        (folder / "out" / "model" / places.MARKER).symlink_to(target)
        with pytest.raises(OutputFault):
            await lab.store.collect(folder, [MODEL])


async def test_the_same_content_is_kept_once(lab: Lab) -> None:
    first, second = await lab.keep(b"same"), await lab.keep(b"same")
    assert first == second
    assert len(os.listdir(Path(first.path).parent)) == 1


async def test_the_same_content_under_another_name_has_both_names(lab: Lab) -> None:
    first = await lab.keep(b"same")
    second = await lab.keep(b"same", JobOutput("best", "best.bin", "file"))
    assert second.digest == first.digest
    assert Path(second.path).name == "best.bin"
    assert os.path.samefile(first.path, second.path)
    tree, other = await lab.keep_tree(a="1"), await lab.keep_tree(JobOutput("two", "two", "folder"), a="1")
    assert (Path(other.path) / "a").read_text() == "1"
    assert os.readlink(other.path) == "clean"
    again = await lab.keep_tree(JobOutput("two", "two", "folder"), a="1")
    assert again == other
    assert await lab.store.intact([first, second, tree, other]) == set()


def damage(path: Path, content: bytes) -> None:
    """A same-size edit behind our back, with mtime set back."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_a_damaged_copy_in_the_store_is_replaced_by_the_good_one(lab: Lab) -> None:
    fact = await lab.keep(b"good")
    tree = await lab.keep_tree(a="good")
    damage(Path(fact.path), b"evil")
    damage(Path(tree.path) / "a", b"evil")
    assert await lab.store.intact([fact, tree]) == {0, 1}
    await lab.keep(b"good")
    await lab.keep_tree(a="good")
    assert Path(fact.path).read_bytes() == b"good"
    assert (Path(tree.path) / "a").read_bytes() == b"good"
    assert await lab.store.intact([fact, tree]) == set()


async def test_many_steps_that_make_the_same_bytes_at_once_all_succeed(lab: Lab) -> None:
    facts = []

    async def one() -> None:
        facts.append(await lab.keep(b""))
        facts.append(await lab.keep_tree(a="1"))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(one)
    assert len({fact.digest for fact in facts}) == 2
    assert await lab.store.intact(facts) == set()


async def test_equal_outputs_are_placed_one_after_the_other(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.listdir

    def slow(path: str) -> list[str]:
        found = real(path)
        time.sleep(0.02)  # so that without a lock all of them see an empty place
        return found

    monkeypatch.setattr(places.os, "listdir", slow)
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(lab.keep, b"same")


async def test_an_output_that_something_still_writes_to_is_refused(lab: Lab) -> None:
    folder = lab.job()
    path = write(folder / "out" / "model" / "model.bin", os.urandom(48 << 20))
    writer = subprocess.Popen(["sh", "-c", 'while :; do printf x >> "$0"; done', path], stderr=subprocess.DEVNULL)
    try:
        until(lambda: path.stat().st_size > 48 << 20)
        with pytest.raises(OutputFault, match="still writes"):
            await lab.store.collect(folder, [MODEL])
    finally:
        writer.kill()
        writer.wait()


async def test_jobs_on_another_file_system_are_copied(lab: Lab) -> None:
    elsewhere = Path("/dev/shm") / f"mlpiped-test-{os.getpid()}"
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(lab.state).st_dev:
        pytest.skip("no second file system")
    try:
        write(elsewhere / "out" / "model" / "model.bin", "m")
        write(elsewhere / "out" / "clean" / "clean" / "sub" / "run", "c", 0o755)
        (elsewhere / "out" / "clean" / "clean" / "link").symlink_to("sub")
        facts = await lab.store.collect(elsewhere, [MODEL, FOLDER])
    finally:
        shutil.rmtree(elsewhere)
    assert await lab.store.intact(facts) == set()
    assert Path(facts[0].path).stat().st_mode & 0o777 == 0o444
    assert Path(facts[1].path).stat().st_mode & 0o777 == 0o555
    assert (Path(facts[1].path) / "sub" / "run").stat().st_mode & 0o777 == 0o555
    assert list(lab.store.incoming.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make files of somebody else")
async def test_outputs_of_another_owner_become_ours(lab: Lab) -> None:
    """As a container that runs as another user leaves them."""
    folder = lab.job()
    file = write(folder / "out" / "model" / "model.bin", "m")
    inner = write(folder / "out" / "clean" / "clean" / "x", "c")
    for path in (file, inner, inner.parent):
        os.chown(path, 65534, 65534)
    facts = await lab.store.collect(folder, [MODEL, FOLDER])
    assert await lab.store.intact(facts) == set()
    owners = {Path(path).stat().st_uid for path in (facts[0].path, facts[1].path, f"{facts[1].path}/x")}
    assert owners == {os.geteuid()}


# --- still what they were -----------------------------------------------------------------------------------------
async def test_a_settled_artifact_is_not_read_again_to_know_that_it_is_intact(lab: Lab) -> None:
    folder = lab.job()
    write(folder / "out" / "model" / "model.bin", "m")
    write(folder / "out" / "clean" / "clean" / "x", "c")
    settle_all(folder)
    facts = await lab.store.collect(folder, [MODEL, FOLDER])
    assert await lab.store.intact(facts) == set()
    assert lab.prints.bytes_read == 0
    assert len(lab.table.rows) == 2


async def test_an_output_hashed_within_a_tick_of_its_last_write_is_not_believed_by_its_stamp(lab: Lab) -> None:
    folder = lab.job()
    path = write(folder / "out" / "model" / "model.bin", "m")
    os.utime(path, (time.time() + 60, time.time() + 60))
    facts = await lab.store.collect(folder, [MODEL])
    assert lab.table.rows == {}
    assert await lab.store.intact(facts) == set()
    assert lab.prints.bytes_read == 1


async def test_a_large_output_is_hashed_once_however_fresh_it_is(lab: Lab) -> None:
    fact = await lab.keep(os.urandom(5 << 20))
    assert await lab.store.intact([fact]) == set()
    assert lab.prints.bytes_read == 0


@pytest.mark.parametrize("change", ["gone", "truncated", "edited", "replaced", "a link", "a folder"])
async def test_a_file_that_is_not_what_it_was_is_noticed(lab: Lab, change: str) -> None:
    bystander, fact = await lab.keep(b"other"), await lab.keep(b"weights")
    path = Path(fact.path)
    settle(path)
    assert await lab.store.intact([bystander, fact]) == set()
    match change:
        case "gone":
            path.unlink()
        case "truncated":
            path.chmod(0o644)
            os.truncate(path, 3)
        case "edited":
            damage(path, b"WEIGHTS")
        case "replaced":
            os.replace(write(path.parent / "new", b"WEIGHTS"), path)
        case "a link":
            path.rename(path.parent / "moved")
            path.symlink_to("moved")
        case "a folder":
            path.unlink()
            path.mkdir()
    assert await lab.store.intact([bystander, fact]) == {1}
    assert await lab.restarted().intact([bystander, fact]) == {1}


@pytest.mark.parametrize("change", ["edited", "removed", "added", "renamed", "exec", "link", "empty folder", "gone"])
async def test_a_tree_that_is_not_what_it_was_is_noticed(lab: Lab, change: str) -> None:
    folder = lab.job()
    top = folder / "out" / "clean" / "clean"
    write(top / "a" / "x", "1")
    write(top / "b", "2")
    (top / "l").symlink_to("b")
    settle_all(folder)
    (fact,) = await lab.store.collect(folder, [FOLDER])
    kept = Path(fact.path)
    for path in [kept, kept / "a"]:
        path.chmod(0o755)
    assert await lab.store.intact([fact]) == set()
    match change:
        case "edited":
            damage(kept / "a" / "x", b"3")
        case "removed":
            (kept / "a" / "x").unlink()
        case "added":
            write(kept / "a" / "y")
        case "renamed":
            (kept / "b").rename(kept / "c")
        case "exec":
            (kept / "b").chmod(0o555)
        case "link":
            (kept / "l").unlink()
            (kept / "l").symlink_to("a")
        case "empty folder":
            (kept / "empty").mkdir()
        case "gone":
            shutil.rmtree(kept)
    assert await lab.store.intact([fact]) == {0}


async def test_intact_artifacts_are_not_asked_for_in_the_table_one_by_one(lab: Lab) -> None:
    facts = []
    folder = lab.job()
    outputs = [JobOutput(f"o{n}", "o", "file") for n in range(1000)]
    for output in outputs:
        write(folder / "out" / output.name / "o", output.name)
    settle_all(folder)
    facts = await lab.store.collect(folder, outputs) * 10
    queries = lab.table.queries
    assert await lab.store.intact(facts) == set()
    assert lab.table.queries == queries


# --- out of the store ---------------------------------------------------------------------------------------------
async def test_get_copies_writable_into_a_folder_or_to_a_name(lab: Lab, tmp_path: Path) -> None:
    fact, tree = await lab.keep(b"w", mode=0o755), await lab.keep_tree(a__b="1")
    home = tmp_path / "home"
    home.mkdir()
    assert await lab.store.get(fact, home) == home / "model.bin"
    assert await lab.store.get(fact, home / "mine") == home / "mine"
    assert await lab.store.get(tree, home) == home / "clean"
    assert (home / "mine").read_bytes() == b"w"
    assert (home / "mine").stat().st_mode & 0o700 == 0o700
    assert (home / "clean" / "a" / "b").stat().st_mode & 0o700 == 0o600
    (home / "clean" / "a" / "b").write_text("mine now")
    assert await lab.store.intact([fact, tree]) == set()


async def test_get_never_overwrites_unless_told_to(lab: Lab, tmp_path: Path) -> None:
    fact, tree = await lab.keep(b"new"), await lab.keep_tree(a="new")
    mine = write(tmp_path / "home" / "mine", "old")
    write(tmp_path / "home" / "clean" / "old", "old")
    with pytest.raises(Conflict, match="is there already") as fault:
        await lab.store.get(fact, mine)
    assert "--force" in (fault.value.hint or "")
    with pytest.raises(Conflict):
        await lab.store.get(tree, tmp_path / "home")
    assert mine.read_text() == "old"
    assert (await lab.store.get(fact, mine, force=True)).read_text() == "new"
    await lab.store.get(tree, tmp_path / "home", force=True)
    assert names(tmp_path / "home") == {"mine", "clean", "clean/a"}


async def test_get_of_a_damaged_artifact_or_into_nowhere_is_refused(lab: Lab, tmp_path: Path) -> None:
    fact = await lab.keep(b"good")
    with pytest.raises(UnknownName, match="no folder"):
        await lab.store.get(fact, tmp_path / "no" / "such")
    damage(Path(fact.path), b"evil")
    with pytest.raises(Conflict, match="gone or damaged"):
        await lab.store.get(fact, tmp_path / "x")


async def test_a_second_name_of_a_tree_is_copied_out_as_a_tree(lab: Lab, tmp_path: Path) -> None:
    await lab.keep_tree(a="1")
    other = await lab.keep_tree(JobOutput("two", "two", "folder"), a="1")
    got = await lab.store.get(other, tmp_path)
    assert got == tmp_path / "two"
    assert not got.is_symlink()
    assert (got / "a").read_text() == "1"


async def test_publish_replaces_what_is_there_and_a_reader_never_sees_half(lab: Lab, tmp_path: Path) -> None:
    dest = tmp_path / "lab" / "models" / "best.bin"
    old, new = await lab.keep(b"a" * 3_000_000), await lab.keep(b"b" * 3_000_000)
    assert await lab.store.publish(old, dest, root=tmp_path / "lab") == dest
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(dest.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: bool(seen))
    await lab.store.publish(new, dest)
    until(lambda: len(seen) == 2)
    stop.set()
    reader.join()
    assert seen == {b"a" * 3_000_000, b"b" * 3_000_000}
    assert os.listdir(dest.parent) == ["best.bin"]


async def test_a_published_folder_replaces_the_one_before(lab: Lab, tmp_path: Path) -> None:
    dest = tmp_path / "lab" / "set"
    await lab.store.publish(await lab.keep_tree(a="1", b="1"), dest)
    await lab.store.publish(await lab.keep_tree(c="2"), dest)
    assert names(tmp_path / "lab") == {"set", "set/c"}


async def test_whoever_may_read_the_datastore_may_read_what_is_published_in_it(lab: Lab, tmp_path: Path) -> None:
    fact, tree = await lab.keep(b"1"), await lab.keep_tree(a="1")
    for mode, file_mode in ((0o755, 0o644), (0o750, 0o640), (0o700, 0o600)):
        root = tmp_path / f"{mode:o}"
        root.mkdir()
        root.chmod(mode)
        before = os.umask(0o077)
        try:
            path = await lab.store.publish(fact, root / "sub" / "f", root=root)
            folder = await lab.store.publish(tree, root / "sub" / "t", root=root)
        finally:
            os.umask(before)
        assert (root / "sub").stat().st_mode & 0o777 == mode
        assert path.stat().st_mode & 0o777 == file_mode
        assert (folder / "a").stat().st_mode & 0o777 == file_mode


async def test_publishing_through_a_link_out_of_the_datastore_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "lab" / "models").symlink_to(tmp_path / "outside")
    with pytest.raises(PathRefused, match="leads outside"):
        await lab.store.publish(await lab.keep(), tmp_path / "lab" / "models" / "x", root=tmp_path / "lab")
    assert list((tmp_path / "outside").iterdir()) == []


async def test_a_file_is_not_published_over_a_folder(lab: Lab, tmp_path: Path) -> None:
    write(tmp_path / "lab" / "x" / "precious")
    with pytest.raises(Conflict, match="is a folder"):
        await lab.store.publish(await lab.keep(), tmp_path / "lab" / "x")


# --- room -----------------------------------------------------------------------------------------------------------
def row(digest: str, size: int = 100, days: float = 0, seconds: float = 10) -> ArtifactRow:
    return ArtifactRow(digest, "file", "", size, int(1000 * DAY - days * DAY), int(seconds * 1e6))


def test_nothing_goes_without_a_limit() -> None:
    assert gc_plan([row("a", days=900)], now=1000 * DAY) == []


def test_what_was_not_used_for_long_goes_first_the_oldest_first() -> None:
    rows = [row("new", days=1), row("old", days=40, seconds=7), row("older", days=50)]
    plan = gc_plan(rows, now=1000 * DAY, max_age=30 * 86_400)
    assert plan == [("older", 100, 10, "not used for 50 days"), ("old", 100, 7, "not used for 40 days")]


def test_over_budget_the_cheapest_to_make_again_for_its_size_goes_and_no_more_than_needed() -> None:
    rows = [row("dear", 100, seconds=9000), row("cheap", 100, seconds=1), row("middle", 100, seconds=100)]
    plan = gc_plan(rows, now=1000 * DAY, budget=250)
    assert [(item.digest, item.reason) for item in plan] == [("cheap", "over the budget of 250 B")]
    assert [item.digest for item in gc_plan(rows, now=1000 * DAY, budget=100)] == ["cheap", "middle"]


def test_what_a_run_builds_on_stays_whatever_the_limits() -> None:
    rows = [row("held", days=900), row("free", days=900)]
    plan = gc_plan(rows, now=1000 * DAY, max_age=1, budget=0, keep={"held"})
    assert [item.digest for item in plan] == ["free"]


def test_one_content_of_many_steps_counts_once_by_its_latest_use_and_highest_cost() -> None:
    rows = [row("a", days=90, seconds=5), row("a", days=1, seconds=1)]
    assert gc_plan(rows, now=1000 * DAY, max_age=30 * 86_400) == []
    assert [item.seconds for item in gc_plan(rows, now=1000 * DAY, budget=0)] == [5]
    assert gc_plan(rows, now=1000 * DAY, budget=100) == []


ROWS = st.lists(
    st.builds(
        row, st.text("abcdef", min_size=1, max_size=3), st.integers(0, 1000), st.integers(0, 99), st.floats(0, 1e6)
    ),
    max_size=20,
    unique_by=lambda r: r.digest,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS, budget=st.integers(0, 5000), days=st.integers(0, 99))
def test_after_the_plan_the_rest_fits_and_nothing_is_named_twice(
    rows: list[ArtifactRow], budget: int, days: int
) -> None:
    plan = gc_plan(rows, now=1000 * DAY, budget=budget, max_age=days * 86_400)
    gone = {item.digest for item in plan}
    assert len(gone) == len(plan)
    assert sum(r.size for r in rows if r.digest not in gone) <= budget
    assert all(r.used_at >= (1000 - days) * DAY for r in rows if r.digest not in gone)


async def test_removed_artifacts_are_gone_and_the_rest_is_not(lab: Lab) -> None:
    fact, tree, kept = await lab.keep(b"1234"), await lab.keep_tree(a__b="12"), await lab.keep(b"kept")
    await lab.keep(b"1234", JobOutput("x", "second", "file"))
    assert await lab.store.remove([fact.digest, tree.digest, f"b3:{'0' * 64}"]) == 6
    assert await lab.store.intact([fact, tree, kept]) == {0, 1}
    assert list(lab.store.incoming.iterdir()) == []
    assert await lab.keep(b"1234") == fact


async def test_what_the_store_holds_is_named_but_not_what_is_being_committed(lab: Lab) -> None:
    held = sorted([(await lab.keep(content)).digest.removeprefix("b3:") for content in (b"1", b"2")])
    assert await lab.store.listed(min_age=3600) == []
    assert await lab.store.listed(min_age=-1) == held
    assert await lab.store.remove(held[:1]) == 1
    assert await lab.store.listed(min_age=-1) == held[1:]


async def test_leftovers_of_an_earlier_daemon_are_swept_when_old(lab: Lab) -> None:
    write(lab.store.incoming / "half" / "x").parent.chmod(0o555)
    assert await lab.store.sweep() == 0
    assert await lab.store.sweep(min_age=-1) == 1
    assert list(lab.store.incoming.iterdir()) == []
