from __future__ import annotations

import os
import subprocess
from pathlib import Path

import anyio
import pytest
from blake3 import blake3
from files_rig import Table, byte_path, fingerprinter, settle, settle_all, until, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpiped.clock import SystemClock
from mlpiped.files import hashing
from mlpiped.files.fingerprint import Fingerprinter, Missing, RefFact
from mlpiped.files.hashing import printable, tree_digest, vouches
from mlpiped.files.walking import walk
from mlpiped.ledger import moves
from mlpiped.ledger.store import Ledger
from mlpiped.spec import Reference

pytestmark = pytest.mark.anyio

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.binary(min_size=1, max_size=20).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b".."))


def ref(path: str, glob: bool | None = None) -> Reference:
    return Reference(datastore="lab", path=path, glob=any(c in path for c in "*?[") if glob is None else glob)


async def look(prints: Fingerprinter, root: Path, path: str) -> RefFact:
    fact = await prints.reference(root, ref(path))
    assert isinstance(fact, RefFact), fact
    return fact


async def refusal(root: Path, path: str, glob: bool = False) -> str:
    fact = await fingerprinter().reference(root, ref(path, glob))
    assert isinstance(fact, Missing), fact
    return fact.sentence


# --- the stat cache ---------------------------------------------------------------------------------------------
async def test_a_digest_is_blake3_of_the_bytes(tmp_path: Path) -> None:
    for size in (0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20):
        path = write(tmp_path / str(size), os.urandom(size))
        fact = (await fingerprinter().files([str(path)]))[str(path)]
        assert fact.digest == "b3:" + blake3(path.read_bytes()).hexdigest()
        assert (fact.size, fact.kind) == (size, "file")


async def test_a_settled_file_is_read_once_and_never_again_also_by_a_later_daemon(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"content")
    settle(path)
    table = Table()
    first = fingerprinter(table)
    assert await first.files([str(path)]) == await first.files([str(path)])
    assert first.bytes_read == 7
    later = fingerprinter(table)
    await later.files([str(path)])
    assert later.bytes_read == 0


async def test_many_files_cost_one_query_and_none_when_memory_has_them(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{n}", str(n))) for n in range(300)]
    settle_all(tmp_path)
    table = Table()
    prints = fingerprinter(table)
    await prints.files(paths)
    await prints.files(paths)
    assert table.queries == 1


async def test_a_same_size_edit_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """As in git's racy rule: the stamp is the same before and after, so it may not vouch."""
    path = tmp_path / "a"
    prints = fingerprinter()
    same_stamps = 0
    for n in range(200):
        write(path, f"{n:08}-old")
        before = (await prints.files([str(path)]))[str(path)].digest
        stamp = hashing.stamp_of(path.stat())
        path.write_bytes(f"{n:08}-new".encode())
        same_stamps += hashing.stamp_of(path.stat()) == stamp
        assert (await prints.files([str(path)]))[str(path)].digest != before


def test_a_stamp_vouches_only_when_hashing_began_a_tick_after_it(tmp_path: Path) -> None:
    stamp = hashing.stamp_of(write(tmp_path / "a").stat())
    tick = hashing.granule(stamp)
    assert not vouches(stamp, stamp[4])
    assert not vouches(stamp, stamp[4] + tick)
    assert vouches(stamp, stamp[4] + tick + 1)
    whole = (*stamp[:4], 1_700_000_000_000_000_000)
    assert hashing.granule(whole) == 2_000_000_000  # a file system that counts in seconds


async def test_an_edit_whose_mtime_was_set_back_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"old")
    settle(path)
    prints = fingerprinter()
    before, stat = await prints.files([str(path)]), path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert await prints.files([str(path)]) != before


async def test_a_file_replaced_by_rename_is_seen(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a", b"old"), write(tmp_path / "b", b"new")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    settle(path, other)
    prints = fingerprinter()
    before = (await prints.files([str(path)]))[str(path)]
    old, new = hashing.stamp_of(path.stat()), hashing.stamp_of(other.stat())
    assert (old[0], *old[2:4]) == (new[0], *new[2:4])
    assert old[1] != new[1]
    other.rename(path)
    after = (await prints.files([str(path)]))[str(path)]
    assert (after.size, after.mtime_ns) == (before.size, before.mtime_ns)
    assert after.digest != before.digest


@pytest.mark.parametrize("field", ["dev", "ino", "size", "mtime_ns", "ctime_ns"])
async def test_a_digest_kept_under_another_stamp_is_not_believed(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "a")
    settle(path)
    table = Table()
    right = (await fingerprinter(table).files([str(path)]))[str(path)].digest
    (row,) = table.rows.values()
    table.post([row._replace(digest="b3:wrong", **{field: getattr(row, field) + 1})])
    assert (await fingerprinter(table).files([str(path)]))[str(path)].digest == right
    table.post([row._replace(digest="b3:wrong", hashed_ns=row.ctime_ns)])
    assert (await fingerprinter(table).files([str(path)]))[str(path)].digest == right


async def test_a_touch_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    prints = fingerprinter()
    before = (await prints.files([str(path)]))[str(path)].digest
    os.utime(path, (1, 1))
    assert (await prints.files([str(path)]))[str(path)].digest == before


async def test_a_file_that_grows_while_it_is_read_has_no_digest_and_harms_no_other(tmp_path: Path) -> None:
    busy, calm = write(tmp_path / "busy", os.urandom(64 << 20)), write(tmp_path / "calm")
    writer = subprocess.Popen(["sh", "-c", 'while :; do printf x >> "$0"; done', busy])
    try:
        until(lambda: busy.stat().st_size > 64 << 20)
        facts = await fingerprinter().files([str(busy), str(calm)])
    finally:
        writer.kill()
        writer.wait()
    assert set(facts) == {str(calm)}


async def test_a_file_truncated_while_it_is_read_does_not_end_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a", os.urandom(8 << 20))
    job = hashing.FileHash(str(path))
    assert job.advance(0, bytearray(1 << 20)) is None
    os.truncate(path, 10)
    done = None
    while done is None:
        done = job.advance(0, bytearray(1 << 20))
    job.close()
    assert done.digest == "b3:" + blake3(path.read_bytes()).hexdigest()


async def test_what_is_not_a_file_or_folder_is_absent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").symlink_to("nowhere")
    asked = [str(tmp_path / name) for name in ("fifo", "broken", "missing")] + ["/dev/null", "with\0nul"]
    assert await fingerprinter().files(asked) == {}


async def test_names_that_are_no_text_are_taken_as_bytes(tmp_path: Path) -> None:
    paths = [byte_path(tmp_path, n) for n in (b"\xff\xfe", b"new\nline", b"x" * 255, "\u202eevil".encode(), b" ")]
    for path in paths:
        with open(path, "wb") as file:
            file.write(path[-3:])
    settle_all(tmp_path)
    table = Table()
    assert set(await fingerprinter(table).files(paths)) == set(paths)
    assert set(table.rows) == set(paths)


async def test_two_who_want_the_same_large_file_read_it_once(tmp_path: Path) -> None:
    path = write(tmp_path / "large", os.urandom(24 << 20))
    settle(path)
    prints = fingerprinter()
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(prints.files, [str(path)])
    assert prints.bytes_read == 24 << 20


async def test_a_huge_file_does_not_keep_a_small_one_waiting(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 64 << 30)  # sparse: a minute's reading
    small = write(tmp_path / "small")
    prints = fingerprinter(limiter=anyio.CapacityLimiter(1))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(prints.files, [str(huge)])
            await anyio.wait_all_tasks_blocked()
            assert await prints.files([str(small)])
            tasks.cancel_scope.cancel()


async def test_cancelling_leaves_no_descriptor_open(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 64 << 30)
    prints = fingerprinter()
    await prints.hop(lambda: None)
    before = len(os.listdir("/proc/self/fd"))
    with anyio.move_on_after(0.3):
        await prints.files([str(huge)])
    assert len(os.listdir("/proc/self/fd")) == before


async def test_memory_is_bounded(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / str(n))) for n in range(100)]
    settle_all(tmp_path)
    table = Table()
    prints = fingerprinter(table, memory=40)
    await prints.files(paths)
    assert len(prints._memory) <= 40
    await prints.files(paths)
    assert prints.bytes_read == 100  # the table has the rest


async def test_the_ledger_keeps_digests_over_a_restart(tmp_path: Path) -> None:
    data, state = tmp_path / "data", tmp_path / "state"
    state.mkdir()
    paths = [os.fsencode(write(data / str(n), str(n))) for n in range(50)]
    paths.append(byte_path(data, b"\xff"))
    with open(paths[-1], "wb") as file:
        file.write(b"0123456789")
    settle_all(data)
    ledger = await Ledger.open(state, SystemClock())
    facts = await Fingerprinter(ledger, moves.put_stat_cache).files(paths)
    await ledger.close()
    ledger = await Ledger.open(state, SystemClock())
    later = Fingerprinter(ledger, moves.put_stat_cache)
    assert await later.files(paths) == facts
    assert later.bytes_read == 0
    await ledger.close()


# --- trees ------------------------------------------------------------------------------------------------------
TREES = st.dictionaries(NAMES, st.tuples(st.binary(max_size=10), st.booleans()), min_size=1, max_size=6)


def plant(folder: Path, tree: dict[bytes, tuple[bytes, bool]], order: list[bytes]) -> None:
    folder.mkdir(parents=True)
    for name in order:
        content, executable = tree[name]
        path = byte_path(folder, name)
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o755 if executable else 0o644)


async def tree_of(folder: Path) -> str:
    return (await fingerprinter().files([str(folder)]))[str(folder)].digest


@FUZZ
@given(tree=TREES, data=st.data())
def test_a_tree_digest_does_not_depend_on_place_time_or_order(
    tree: dict[bytes, tuple[bytes, bool]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp = tmp_path_factory.mktemp("t")
    plant(tmp / "a", tree, list(tree))
    plant(tmp / "deep" / "b", tree, data.draw(st.permutations(list(tree))))
    for entry in os.scandir(os.fsencode(tmp / "deep" / "b")):
        os.utime(entry.path, (1, 1))
    assert anyio.run(tree_of, tmp / "a") == anyio.run(tree_of, tmp / "deep" / "b")


@FUZZ
@given(tree=TREES, other=TREES)
def test_different_trees_have_different_digests(
    tree: dict[bytes, tuple[bytes, bool]],
    other: dict[bytes, tuple[bytes, bool]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp = tmp_path_factory.mktemp("t")
    plant(tmp / "a", tree, list(tree))
    plant(tmp / "b", other, list(other))
    assert (anyio.run(tree_of, tmp / "a") == anyio.run(tree_of, tmp / "b")) == (tree == other)


LINES = st.lists(
    st.tuples(NAMES, st.sampled_from("fxld"), st.text(st.characters(codec="ascii", exclude_characters="\0"))),
    max_size=5,
    unique_by=lambda line: line[0],
)


@FUZZ
@given(a=LINES, b=LINES)
def test_no_two_lists_of_members_are_written_alike(
    a: list[tuple[bytes, str, str]], b: list[tuple[bytes, str, str]]
) -> None:
    assert (tree_digest(a) == tree_digest(b)) == (sorted(a) == sorted(b))


@pytest.mark.parametrize("change", ["byte", "rename", "exec", "add", "remove", "empty folder", "link"])
async def test_every_change_of_a_tree_changes_its_digest(tmp_path: Path, change: str) -> None:
    tree = tmp_path / "tree"
    write(tree / "sub" / "a", b"a")
    write(tree / "b", b"b")
    (tree / "link").symlink_to("b")
    before = await look(fingerprinter(), tmp_path, "tree")
    match change:
        case "byte":
            (tree / "sub" / "a").write_bytes(b"c")
        case "rename":
            (tree / "b").rename(tree / "c")
        case "exec":
            (tree / "b").chmod(0o755)
        case "add":
            write(tree / "c")
        case "remove":
            (tree / "b").unlink()
        case "empty folder":
            (tree / "empty").mkdir()
        case "link":
            (tree / "link").unlink()
            (tree / "link").symlink_to("sub/a")
    assert (await look(fingerprinter(), tmp_path, "tree")).digest != before.digest


# --- references -------------------------------------------------------------------------------------------------
async def test_a_reference_to_one_file_is_its_content_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", b"same")
    write(tmp_path / "sub" / "b.csv", b"same")
    a, b = await fingerprinter().references([(tmp_path, ref("a.csv")), (tmp_path, ref("sub/b.csv"))])
    assert isinstance(a, RefFact)
    assert isinstance(b, RefFact)
    assert a.digest == b.digest == "b3:" + blake3(b"same").hexdigest()
    assert a.paths == (str(tmp_path / "a.csv"),)
    assert (b.entries, b.size) == ({"sub/b.csv": b.digest}, 4)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*.csv", ["a.csv", "b.csv"]),
        ("*", ["a.csv", "b.csv", "note.txt", "sub"]),
        (".*", [".hidden.csv", ".secret"]),
        (".h*", [".hidden.csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "sub/c.csv", "sub/deep/d.csv"]),
        ("sub/**", ["sub/c.csv", "sub/deep/d.csv"]),
        ("**/deep/*.csv", ["sub/deep/d.csv"]),
        ("**/**/d.csv", ["sub/deep/d.csv"]),
        ("*/c.csv", ["sub/c.csv"]),
        ("[ab].csv", ["a.csv", "b.csv"]),
        ("[!a].csv", ["b.csv"]),
        ("?.csv", ["a.csv", "b.csv"]),
        ("./sub//*.csv", ["sub/c.csv"]),
        (".secret/*", [".secret/e.csv"]),
    ],
)
async def test_a_glob_matches_as_the_shell_does(tmp_path: Path, pattern: str, matches: list[str]) -> None:
    for name in ("a.csv", "b.csv", ".hidden.csv", "note.txt", "sub/c.csv", "sub/deep/d.csv", ".secret/e.csv"):
        write(tmp_path / name)
    fact = await look(fingerprinter(), tmp_path, pattern)
    assert fact.paths == tuple(str(tmp_path / name) for name in matches)
    assert list(fact.entries) == matches


async def test_paths_of_a_glob_are_sorted_by_their_bytes(tmp_path: Path) -> None:
    for name in ("Z", "a", "é", "b0", "b"):
        write(tmp_path / name)
    with open(byte_path(tmp_path, b"\xff"), "wb"):
        pass
    paths = (await look(fingerprinter(), tmp_path, "*")).paths
    assert [os.fsencode(p) for p in paths] == sorted(os.fsencode(p) for p in paths)
    assert len(paths) == 6


async def test_a_glob_elsewhere_with_the_same_names_and_bytes_is_the_same_input(tmp_path: Path) -> None:
    for folder in ("in", "deeper/in2"):
        write(tmp_path / folder / "a.csv", b"1")
        write(tmp_path / folder / "b.csv", b"2")
    prints = fingerprinter()
    first, second = await look(prints, tmp_path, "in/*.csv"), await look(prints, tmp_path, "deeper/in2/*.csv")
    assert first.digest == second.digest
    (tmp_path / "in" / "b.csv").rename(tmp_path / "in" / "c.csv")
    assert (await look(prints, tmp_path, "in/*.csv")).digest != first.digest


async def test_what_is_in_a_folder_that_a_glob_matches_counts(tmp_path: Path) -> None:
    write(tmp_path / "cats" / "1.png")
    before = await look(fingerprinter(), tmp_path, "*")
    write(tmp_path / "cats" / "2.png")
    assert (await look(fingerprinter(), tmp_path, "*")).digest != before.digest


async def test_entries_are_text_that_any_database_takes(tmp_path: Path) -> None:
    with open(byte_path(tmp_path, b"a\xff\n\x1b[31m"), "wb"):
        pass
    fact = await look(fingerprinter(), tmp_path, "*")
    assert list(fact.entries) == [r"a\xff\n\x1b[31m"]
    assert os.path.exists(fact.paths[0])


async def test_what_is_not_there_is_missing_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a.csv")
    assert await refusal(tmp_path, "*.png", glob=True) == f"nothing matches `*.png` in `{tmp_path}`"
    assert await refusal(tmp_path, "b.csv") == f"there is no `b.csv` in `{tmp_path}`"
    assert await refusal(tmp_path, "a.csv/b") == f"there is no `a.csv/b` in `{tmp_path}`"
    assert "is not there" in await refusal(tmp_path / "gone", "b.csv")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\0b", ".."])
@pytest.mark.parametrize("glob", [False, True])
async def test_a_path_that_could_leave_the_root_is_refused(tmp_path: Path, path: str, glob: bool) -> None:
    sentence = await refusal(tmp_path, path, glob)
    assert "`..`" in sentence or "absolute" in sentence or "NUL" in sentence


@pytest.mark.parametrize("path", ["link.csv", "*.csv", "folder/x.csv", "folder/*", "f*/x.csv", "tree"])
async def test_a_link_that_leads_outside_the_root_is_refused(tmp_path: Path, path: str) -> None:
    write(tmp_path / "outside" / "x.csv", b"secret")
    root = tmp_path / "root"
    (root / "tree").mkdir(parents=True)
    (root / "link.csv").symlink_to("../outside/x.csv")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "tree" / "in").symlink_to(tmp_path / "outside" / "x.csv")
    assert "leads outside" in await refusal(root, path, "*" in path)


async def test_a_link_that_stays_inside_the_root_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "v1" / "a.csv", b"1")
    write(tmp_path / "v2" / "a.csv", b"2")
    (tmp_path / "current").symlink_to("v1")
    (tmp_path / "latest.csv").symlink_to("v1/a.csv")
    prints = fingerprinter()
    before = [await look(prints, tmp_path, p) for p in ("current/*.csv", "latest.csv", "current")]
    assert before[0].paths == (str(tmp_path / "current" / "a.csv"),)
    for name in ("current", "latest.csv"):
        (tmp_path / name).unlink()
    (tmp_path / "current").symlink_to("v2")
    (tmp_path / "latest.csv").symlink_to("v2/a.csv")
    after = [await look(prints, tmp_path, p) for p in ("current/*.csv", "latest.csv", "current")]
    assert all(a.digest != b.digest for a, b in zip(before, after, strict=True))


async def test_a_link_in_a_folder_to_a_file_elsewhere_in_the_root_counts_by_its_bytes(tmp_path: Path) -> None:
    shared = write(tmp_path / "shared" / "vocab", b"1")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "vocab").symlink_to("../shared/vocab")
    before = await look(fingerprinter(), tmp_path, "tree")
    shared.write_bytes(b"2")
    assert (await look(fingerprinter(), tmp_path, "tree")).digest != before.digest


async def test_the_recursive_glob_survives_a_link_to_its_own_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.csv")
    (tmp_path / "loop").symlink_to(".")
    assert len((await look(fingerprinter(), tmp_path, "**/*.csv")).paths) == 1


async def test_while_a_step_runs_only_the_paths_that_it_was_given_are_looked_at(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", b"1")
    prints = fingerprinter()
    fact = await look(prints, tmp_path, "*.csv")
    write(tmp_path / "later.csv")
    assert await prints.again(tmp_path, ref("*.csv"), fact) == fact
    first.write_bytes(b"2")
    now = await prints.again(tmp_path, ref("*.csv"), fact)
    assert isinstance(now, RefFact)
    assert now.digest != fact.digest
    first.unlink()
    assert await prints.again(tmp_path, ref("*.csv"), fact) == Missing("`a.csv` is gone")


async def test_a_fault_of_one_reference_is_not_a_fault_of_the_others(tmp_path: Path) -> None:
    write(tmp_path / "a")
    bad, good = await fingerprinter().references([(tmp_path, ref("../x")), (tmp_path, ref("a"))])
    assert isinstance(bad, Missing)
    assert isinstance(good, RefFact)


async def test_ten_thousand_unchanged_files_are_neither_read_nor_asked_for_again(tmp_path: Path) -> None:
    for n in range(10_000):
        (tmp_path / f"{n:05}.csv").write_bytes(b"%d" % n)
    settle_all(tmp_path)
    table = Table()
    prints = fingerprinter(table)
    first = await look(prints, tmp_path, "*.csv")
    queries, read = table.queries, prints.bytes_read
    assert await look(prints, tmp_path, "*.csv") == first
    assert (table.queries, prints.bytes_read) == (queries, read)


def test_printable_text_is_left_alone_and_nothing_else() -> None:
    assert printable("données 2026.csv") == "données 2026.csv"
    assert printable("a\u202eb\x1b") == "a\\u202eb\\x1b"
    assert printable(os.fsdecode(b"\xff")) == "\\xff"


def test_a_walk_names_every_member_once(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", mode=0o755)
    (tmp_path / "l").symlink_to("a")
    assert sorted((m.rel, m.kind) for m in walk(str(tmp_path))) == [("a", "d"), ("a/b", "x"), ("l", "l")]
