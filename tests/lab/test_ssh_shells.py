"""Boxes that are not as we would have them: other login shells, few sessions, nowhere to write. Real servers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest
from blake3 import blake3
from lab import packages
from lab.ssh_daemon import UNTIL_GO, Daemon, ended, job, log, said, shell

from mlpiped.backends.base import JobOutput, Part
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from contextlib import AsyncExitStack
    from pathlib import Path

    from lab.ssh_rig import Lab

pytestmark = [pytest.mark.anyio, pytest.mark.lab]

SHELLS = {"tcsh": "tcsh", "fish": "fish", "bash": "bash"}  # program -> package
GREETING = "printf 'h root /nowhere\\nx marks\\nend\\nok\\nno newline'; "


@pytest.mark.parametrize("greets", [False, True])
@pytest.mark.parametrize("login", SHELLS)
async def test_the_login_shell_of_a_box_does_not_matter_nor_what_it_prints(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack, login: str, greets: bool
) -> None:
    packages.install(SHELLS)
    force = f'{GREETING if greets else ""}exec {login} -c "$SSH_ORIGINAL_COMMAND"'
    box = ssh_lab.box(force=force)
    try:
        daemon = Daemon(box, tmp_path / "sta te", work_dir="~/it's a $HOME!/work")
        backend = await daemon.life(stack)
        root = box.home / "it's a $HOME!/work" / daemon.instance
        path = tmp_path / "what is; this? \\ it's!\n%"
        path.write_bytes(os.urandom(9 << 20))
        contents = {str(path): f"b3:{blake3(path.read_bytes()).hexdigest()}"}
        outputs = JobOutput("y", "y", "file"), JobOutput("kept", "k\n!", "file")
        wanted = job(
            "sh", "-c", 'cat "$1" > "$2"; echo kept > "$3"; echo done', "sh",
            Part("input", "x"), Part("output", "y"), Part("output", "kept"),
            inputs={"x": (str(path),)}, contents=contents, outputs=outputs,
        )  # fmt: skip
        handle, found = await ended(backend, wanted)
        assert found.code == 0 and await log(backend, handle) == b"done\n"
        [kept] = await backend.keep(handle, outputs[1:])
        assert (root / ".cas" / kept.digest.replace(":", "-")).is_dir()
        assert await backend.changed([kept.digest]) == set()
        home = await backend.fetch(handle, tmp_path)
        assert (home / "out/y/y").read_bytes() == path.read_bytes()
        assert await backend.health() is None
        handle = await backend.submit(shell(UNTIL_GO))
        await said(backend, handle, b"began")
        await backend.cancel(handle)
        assert getattr(await backend.wait(handle), "cancelled", False)
    finally:
        box.stop()


@pytest.mark.parametrize("size", [6, 9 << 20])
async def test_a_box_whose_shells_complain_of_its_locale_takes_what_is_sent_and_gives_back_what_was_made(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack, size: int
) -> None:
    box = ssh_lab.box(LC_ALL="de_DE.UTF-8", LANG="tr_TR.UTF-8", CDPATH="/tmp:/usr", POSIXLY_CORRECT="1")
    try:
        backend = await Daemon(box, tmp_path).life(stack)
        path = tmp_path / "input"
        path.write_bytes(os.urandom(size))
        wanted = job(
            "sh", "-c", 'cat "$1" > "$2"', "sh", Part("input", "x"), Part("output", "y"),
            inputs={"x": (str(path),)}, outputs=(JobOutput("y", "y", "file"),),
        )  # fmt: skip
        handle, found = await ended(backend, wanted)
        assert found.code == 0
        assert ((await backend.fetch(handle, tmp_path)) / "out/y/y").read_bytes() == path.read_bytes()
    finally:
        box.stop()


@pytest.mark.parametrize("ignored", ["", "trap '' INT QUIT; "])
async def test_signals_are_as_a_program_expects_whatever_the_box_s_login_ignores(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack, ignored: str
) -> None:
    box = ssh_lab.box(force=f'{ignored}exec sh -c "$SSH_ORIGINAL_COMMAND"')
    try:
        backend = await Daemon(box, tmp_path / "state").life(stack)
        for _ in range(2):
            handle, _ = await ended(backend, job("grep", "-E", "SigIgn|SigBlk", "/proc/self/status"))
            assert {int(line.split()[1], 16) & 6 for line in (await log(backend, handle)).splitlines()} == {0}
    finally:
        box.stop()


async def test_a_variable_of_a_step_may_have_the_name_of_one_of_ours(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack
) -> None:
    box = ssh_lab.box()
    try:
        backend = await Daemon(box, tmp_path / "state").life(stack)
        names = ("T", "N", "root", "self", "number", "leader", "why", "stat", "IFS", "shown")
        handle, found = await ended(backend, job("env", env={name: f"its {name}" for name in names}))
        assert found.code == 0, found
        lines = (await log(backend, handle)).decode().splitlines()
        assert [name for name in names if f"{name}=its {name}" not in lines] == []
    finally:
        box.stop()


async def test_H7_a_server_with_one_session_says_so(ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack) -> None:
    box = ssh_lab.box(max_sessions=1)
    try:
        backend = await Daemon(box, tmp_path / "state").life(stack)
        with (
            anyio.fail_after(30),
            pytest.raises(BackendUnavailable, match="opens no session") as caught,
        ):
            await backend.submit(job("true"))
        assert caught.value.hint is not None and "MaxSessions" in caught.value.hint
    finally:
        box.stop()


async def test_a_work_folder_that_cannot_be_made_is_named(ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack) -> None:
    box = ssh_lab.box()
    try:
        (box.home / "work").touch()
        daemon = Daemon(box, tmp_path / "state")
        health = await (await daemon.life(stack)).health()
        assert health == f"`box` let us in, but cannot be used: the folder cannot be made: {daemon.root}"
    finally:
        box.stop()
