"""What stays on a box because of `keep="remote"`; over a real sshd."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.ssh_daemon import Daemon, ended, job, log

from mlpiped.backends.base import JobOutput, Keeps, Part
from mlpiped.errors import BackendUnavailable, InvalidJob
from mlpiped.files.portable import portable_digest

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from lab.ssh_rig import Box, Lab

    from mlpiped.backends.ssh import SshBackend

pytestmark = [pytest.mark.anyio, pytest.mark.lab]

TREE = (
    "mkdir -p $0/a/'b c' $0/empty && echo 1 >$0/a/one && printf x >$0/a/'b c'/run && chmod +x $0/a/'b c'/run"
    " && ln -s ../one $0/a/'b c'/link && : >$0/.hidden && echo u >$0/\"$(printf '\\303\\274\\nx')\""
)
MODEL = JobOutput("model", "model.bin", "file")
TREE_OUT = JobOutput("tree", "tree dir", "folder")


@pytest.fixture(scope="module")
def box(ssh_lab: Lab) -> Box:
    return ssh_lab.box()


async def made(backend: SshBackend, script: str, output: JobOutput) -> dict[str, object]:
    work = job("sh", "-c", script.replace("$0", '"$0"'), Part("output", output.name), outputs=(output,))
    handle, found = await ended(backend, work)
    assert found.code == 0, found
    return handle


async def test_a_file_stays_on_the_box_and_a_step_there_reads_it_without_a_byte_on_the_way(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    assert isinstance(backend, Keeps)
    handle = await made(backend, "head -c 3000000 /dev/urandom >$0", MODEL)
    received = backend.carrier.received
    (kept,) = await backend.keep(handle, [MODEL])
    assert backend.carrier.received == received
    content = daemon.root / ".cas" / kept.digest.replace(":", "-") / "model.bin"
    assert kept.size == 3_000_000
    assert kept.digest == f"s2:{hashlib.sha256(content.read_bytes()).hexdigest()}" == portable_digest(str(content))
    assert not content.stat().st_mode & 0o222
    assert await backend.keep(handle, [MODEL]) == [kept], "a daemon that died before it wrote this down asks again"
    assert backend.missing({kept.digest: kept.size}) == 0
    nowhere = tmp_path / "store" / "model.bin"
    sent, received = backend.carrier.sent, backend.carrier.received
    reads = job("sha256sum", Part("input", "m"), inputs={"m": (str(nowhere),)}, contents={str(nowhere): kept.digest})
    reader, found = await ended(backend, reads)
    assert found.code == 0 and (await log(backend, reader)).split()[0].decode() == kept.digest[3:]
    assert backend.carrier.sent == sent and backend.carrier.received - received < 2000
    again = await daemon.life(stack, "again")
    assert await again.changed() == set() and kept.digest in await again.listed()


async def test_a_tree_has_the_digest_on_the_box_that_it_has_at_home(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    handle = await made(backend, TREE, TREE_OUT)
    (kept,) = await backend.keep(handle, [TREE_OUT])
    assert kept.digest.startswith("s2t:") and kept.size == 5
    came = await backend.bring(kept.digest, tmp_path)
    assert came is not None and portable_digest(str(came)) == kept.digest
    assert os.readlink(came / "a/b c/link") == "../one" and (came / ".hidden").exists()
    assert (came / os.fsdecode(b"\xc3\xbc\nx")).read_text() == "u\n" and (came / "empty").is_dir()
    twin = await made(backend, TREE, TREE_OUT)
    assert await backend.keep(twin, [TREE_OUT]) == [kept], "made again, it is the same content"
    assert await backend.changed([kept.digest]) == set()


async def test_the_same_content_has_several_names_and_is_there_once(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    other = JobOutput("other", "other name", "file")
    (first,) = await backend.keep(await made(backend, "echo same >$0", MODEL), [MODEL])
    handle = await made(backend, "echo same >$0", other)
    (second,) = await backend.keep(handle, [other])
    assert first.digest == second.digest and await backend.keep(handle, [other]) == [second]
    place = daemon.root / ".cas" / first.digest.replace(":", "-")
    assert (place / "other name").read_text() == "same\n" and (place / "other name").is_symlink()
    came = await backend.bring(first.digest, tmp_path)
    assert came is not None and came.read_text() == "same\n"


CHANGES = {
    "bytes": lambda path: (path.chmod(0o644), path.write_text("else\n")),
    "bytes, with the old times": lambda path: _quietly(path),
    "gone": lambda path: path.unlink(),
    "replaced": lambda path: (path.unlink(), path.write_text("same\n")),
}


def _quietly(path: Path) -> None:
    st = path.stat()
    path.chmod(0o644)
    path.write_text("emas\n")
    path.chmod(0o444)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


@pytest.mark.parametrize("what", CHANGES)
async def test_what_is_changed_on_the_box_behind_our_back_is_told(
    box: Box, tmp_path: Path, stack: AsyncExitStack, what: str
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    (kept,) = await backend.keep(await made(backend, "echo same >$0", MODEL), [MODEL])
    (good,) = await backend.keep(await made(backend, "echo good >$0", MODEL), [MODEL])
    CHANGES[what](daemon.root / ".cas" / kept.digest.replace(":", "-") / "model.bin")
    assert await backend.changed([good.digest, kept.digest]) == {kept.digest}
    assert await backend.changed() == {kept.digest}
    (anew,) = await backend.keep(await made(backend, "echo same >$0", MODEL), [MODEL])
    assert anew == kept and await backend.changed() == set(), "made again, it is in its place again"


async def test_a_move_that_was_cut_off_is_found_again(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    """Between the rename and the note of it, which is what the next request finds."""
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    handle = await made(backend, "echo moved >$0", MODEL)
    (kept,) = await backend.keep(handle, [MODEL])
    content = kept.digest.replace(":", "-")
    (daemon.root / ".kept" / content).unlink()
    assert await backend.changed([kept.digest]) == {kept.digest}
    assert await backend.keep(handle, [MODEL]) == [kept]
    assert await backend.changed([kept.digest]) == set()


@pytest.mark.parametrize(
    ("script", "why"),
    {
        ":": "is missing: the step wrote nothing there",
        "mkdir $0": "should be a file, and is a folder",
        "ln -s /etc/passwd $0": "should be a file, and is a symbolic link",
        "echo 1 >$0; ln $0 twin": r"has another name \(a hard link\)",
    }.items(),
)
async def test_what_cannot_be_kept_is_the_fault_of_its_step(
    box: Box, tmp_path: Path, stack: AsyncExitStack, script: str, why: str
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    with pytest.raises(InvalidJob, match=why):
        await backend.keep(await made(backend, script, MODEL), [MODEL])


@pytest.mark.parametrize(
    ("script", "why"),
    {
        "mkdir -p $0/a": "is an empty folder",
        "mkdir $0; mkfifo $0/p": "`p` in output `tree` is neither a file nor a folder",
        "mkdir $0; echo 1 >$0/f; ln -s ../x $0/l": "`l` in output `tree` is a link that leads outside",
        "mkdir -p $0/d/e; echo 1 >$0/f; ln -s ../.. $0/d/e/l; ln -s d/e/l/../.. $0/m": "`m` in output `tree` is a link",
        "mkdir $0; echo 1 >$0/f; ln -s /etc $0/l": "`l` in output `tree` is a link that leads outside",
    }.items(),
)
async def test_a_tree_that_cannot_be_kept_is_the_fault_of_its_step(
    box: Box, tmp_path: Path, stack: AsyncExitStack, script: str, why: str
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    with pytest.raises(InvalidJob, match=why):
        await backend.keep(await made(backend, script, TREE_OUT), [TREE_OUT])


async def test_only_what_was_not_kept_for_so_long_is_dropped(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    (old,) = await backend.keep(await made(backend, TREE, TREE_OUT), [TREE_OUT])
    (young,) = await backend.keep(await made(backend, "echo young >$0", MODEL), [MODEL])
    os.utime(daemon.root / ".kept" / old.digest.replace(":", "-"), (1e9, 1e9))
    await backend.drop([old.digest, young.digest], 3600)
    assert not (daemon.root / ".cas" / old.digest.replace(":", "-")).exists()
    assert await backend.bring(old.digest, tmp_path) is None
    assert await backend.changed() == set() and await backend.listed() == [young.digest]


async def test_a_box_that_is_away_is_no_answer(ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack) -> None:
    box = ssh_lab.box()
    backend = await Daemon(box, tmp_path / "state").life(stack)
    handle = await made(backend, "echo 1 >$0", MODEL)
    (kept,) = await backend.keep(handle, [MODEL])
    box.stop()
    for asked in (backend.changed([kept.digest]), backend.bring(kept.digest, tmp_path), backend.keep(handle, [MODEL])):
        with pytest.raises(BackendUnavailable):
            await asked
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
