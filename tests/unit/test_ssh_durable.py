"""What a box takes for whole after it was started anew, by its scripts alone: no connection, no root, no power cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import mlpiped.backends.ssh
from mlpiped.backends.ssh.parcels import Piece, outgoing

SCRIPTS = Path(mlpiped.backends.ssh.__file__).parent
SHELLS = [words for words in (["dash"], ["bash"], ["busybox", "sh"]) if shutil.which(words[0])]
RENEW = (
    'set -f; cd "$2" && . "$1/step.sh" && . "$1/durable.sh" && boot_id && born $$ && mine=$born && renew; echo $? $-'
)
MARKED = 0o1755


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tmp_path = tmp_path / "root"
    tmp_path.mkdir()
    for name in (".cas", ".envs", ".new", ".boot", ".used"):
        (tmp_path / name).mkdir()
    return tmp_path


def folder(path: Path, mode: int = 0o755) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text("content")
    path.chmod(mode)
    return path


def renew(root: Path, shell: list[str], boot: str) -> None:
    (root.parent / "boot_id").write_text(f"{boot}\n")
    env = {**os.environ, "MLPIPED_LAB_BOOT_ID": str(root.parent / "boot_id")}
    command = [*shell, "-c", RENEW, "sh", str(SCRIPTS), str(root)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    code, flags = done.stdout.split()
    assert code == "0" and "f" in flags, done.stderr


def names(root: Path) -> set[str]:
    found = (*(root / ".cas").iterdir(), *(root / ".envs").iterdir(), *root.glob("[!.]*"))
    return {str(path.relative_to(root)) for path in found}


@pytest.mark.parametrize("shell", SHELLS)
def test_in_another_boot_only_what_is_synced_stays(root: Path, shell: list[str]) -> None:
    renew(root, shell, "first")
    for place in (".cas/b3-synced", ".cas/b3t-synced", ".envs/synced"):
        folder(root / place, MARKED)
    for place in (".cas/code-new", ".cas/b3t-new", ".envs/new", ".envs/new.lock"):
        folder(root / place)
    (root / ".cas/b3t-new/file").chmod(0o444)
    folder(root / ".cas/s2-kept")
    (root / ".envs/new.log").touch()
    folder(root / "to-launch/in")
    folder(root / "launched/in")
    folder(root / "launched/claim")
    before = names(root)
    renew(root, shell, "first")
    assert names(root) == before, "the boot is the same"
    renew(root, shell, "second")
    gone = {".cas/code-new", ".cas/b3t-new", ".envs/new", ".envs/new.lock", "to-launch"}
    assert before - names(root) == gone
    assert [path.name for path in (root / ".boot").iterdir()] == ["second"]
    folder(root / ".cas/b3-later")
    renew(root, shell, "second")
    assert ".cas/b3-later" in names(root)


def test_many_go_at_once(root: Path) -> None:
    for number in range(1001):
        (root / f".cas/b3-{number:064}").mkdir()
    renew(root, ["sh"], "first")
    assert names(root) == set()


def test_where_a_job_of_this_boot_lives_nothing_goes(root: Path) -> None:
    """As where a version ran that has marked nothing."""
    folder(root / ".cas/b3-used")
    with subprocess.Popen(["sleep", "60"]) as job:
        born = Path(f"/proc/{job.pid}/stat").read_text().rpartition(") ")[2].split()[19]
        folder(root / "job/claim")
        (root / "job/claim/who").write_text(f"{job.pid} {born} first 500\nb3-used\n")
        renew(root, ["sh"], "first")
        assert ".cas/b3-used" in names(root)
        renew(root, ["sh"], "second")
        assert ".cas/b3-used" not in names(root), "another boot's job is none"
        job.kill()


@pytest.mark.parametrize("steady", [False, True])
def test_where_others_use_it_too_what_comes_is_synced_before_it_has_its_name(root: Path, steady: bool) -> None:
    if steady:
        (root / ".boot/steady").touch()
    tools = root.parent / "tools"
    tools.mkdir()
    tool = f"#!/bin/sh\n[ -e {root}/.cas/x ] && echo after >>{tools}/said || echo before >>{tools}/said\nexit 0\n"
    (tools / "sync").write_text(tool)
    (tools / "sync").chmod(0o755)
    source = folder(root.parent / "source")
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["sh", str(SCRIPTS / "tree.sh"), "put", str(root), ".cas/x"]
    stream = b"".join(outgoing([Piece(str(source), "name")]))
    done = subprocess.run(command, env=env, input=stream, capture_output=True, check=True)
    assert done.stdout == b"ok\n"
    while not (root / ".cas/x").stat().st_mode & 0o1000:
        pass
    assert (tools / "said").read_text().split() == ["before", "after"][not steady :]


def test_who_waits_for_what_was_sent_does_not_wait_for_the_disk(root: Path) -> None:
    tools = root.parent / "tools"
    tools.mkdir()
    os.mkfifo(tools / "go")
    (tools / "sync").write_text(f"#!/bin/sh\nread -r line <{tools}/go\n")
    (tools / "sync").chmod(0o755)
    source = folder(root.parent / "source")
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["sh", str(SCRIPTS / "tree.sh"), "put", str(root), ".cas/x", "key"]
    stream = b"".join(outgoing([Piece(str(source), "name")]))
    done = subprocess.run(command, env=env, input=stream, capture_output=True, check=True, timeout=60)
    assert done.stdout.endswith(b"ok\n") and not (root / ".cas/x").stat().st_mode & 0o1000
    (tools / "go").write_text("now\n")
    while not (root / ".cas/x").stat().st_mode & 0o1000:
        pass


@pytest.mark.parametrize(("kind", "ours"), [("ef53", True), ("58465342", True), ("6969", False), ("bd00bd0", False)])
def test_a_network_s_file_system_is_not_the_box_s_own(root: Path, kind: str, ours: bool) -> None:
    """ext4 and xfs; NFS and Lustre."""
    (root / "stat").write_text(f"#!/bin/sh\n[ $1 = -f ] && echo {kind}\n")
    (root / "stat").chmod(0o755)
    env = {**os.environ, "PATH": f"{root}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", f". {SCRIPTS}/durable.sh; ours"], env=env, check=False)
    assert (done.returncode == 0) is ours
