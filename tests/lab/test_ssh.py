"""What a box is given, what it keeps, and what comes home of it; over a real sshd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from blake3 import blake3
from harness import processes_below
from lab import ssh_rig
from lab.ssh_daemon import Daemon, ended, job, log, make_wheel, said, shell, well

from mlpiped.backends.base import JobOutput, Part
from mlpiped.errors import BackendUnavailable, InvalidJob
from mlpiped.files.hashing import tree_digest

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from lab.ssh_rig import Box, Lab

    from mlpiped.backends.base import Handle

pytestmark = [pytest.mark.anyio, pytest.mark.lab]

COREUTILS = """cat chmod cp cut date dd df du env head kill ln ls mkdir mkfifo mv nohup od printf pwd readlink rm rmdir
sha256sum sleep sort stat sync tail test touch tr true false uniq wc""".split()


@pytest.fixture(scope="module")
def box(ssh_lab: Lab) -> Box:
    return ssh_lab.box()


def digest(path: Path) -> str:
    return f"b3:{blake3(path.read_bytes()).hexdigest()}"


async def test_a_content_that_is_there_is_not_sent_again(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    path, twin = tmp_path / "a b.bin", tmp_path / "twin.bin"
    path.write_bytes(os.urandom(300_000))
    shutil.copy(path, twin)
    contents = {str(path): digest(path), str(twin): digest(path)}

    def reading(*paths: Path) -> object:
        return job("cat", Part("input", "data"), inputs={"data": tuple(map(str, paths))}, contents=contents)

    await ended(backend, job("true"))
    assert backend.missing({digest(path): 300_000}) == 300_000
    before = backend.carrier.sent
    handle, found = await ended(backend, reading(path))  # type: ignore[arg-type]
    assert found.code == 0 and await log(backend, handle) == path.read_bytes()
    assert 300_000 <= backend.carrier.sent - before < 301_000
    assert backend.missing({digest(path): 300_000}) == 0
    before = backend.carrier.sent
    handle, found = await ended(backend, reading(path, twin))  # type: ignore[arg-type]
    assert found.code == 0 and await log(backend, handle) == 2 * path.read_bytes()
    later = await daemon.life(stack)
    await well(later)
    assert later.missing({digest(path): 300_000}) == 0  # the next daemon asks the box, and knows
    await ended(later, reading(twin, path))  # type: ignore[arg-type]
    assert (backend.carrier.sent, later.carrier.sent) == (before, 0)


async def test_many_steps_that_need_one_content_send_it_once(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    await ended(backend, job("true"))
    path = tmp_path / "data"
    path.write_bytes(os.urandom(200_000))
    before = backend.carrier.sent

    async def one() -> None:
        wanted = job("cat", Part("input", "x"), inputs={"x": (str(path),)}, contents={str(path): digest(path)})
        assert (await ended(backend, wanted))[1].code == 0

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(one)
    assert backend.carrier.sent - before < 201_000


async def test_a_content_that_was_removed_on_the_box_is_sent_again(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    path = tmp_path / "data"
    path.write_text("here")
    wanted = {"inputs": {"x": (str(path),)}, "contents": {str(path): digest(path)}}
    await ended(backend, job("cat", Part("input", "x"), **wanted))
    shutil.rmtree(daemon.root / ".cas")
    (daemon.root / ".cas").mkdir()
    handle, found = await ended(backend, job("cat", Part("input", "x"), **wanted))
    assert found.code == 0 and await log(backend, handle) == b"here"


async def test_a_file_that_changed_is_never_kept_under_the_digest_of_what_it_was(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    path = tmp_path / "data"
    path.write_text("before")
    contents = {str(path): digest(path)}
    path.write_text("after")
    handle, found = await ended(backend, job("cat", Part("input", "x"), inputs={"x": (str(path),)}, contents=contents))
    assert found.code == 0 and await log(backend, handle) == b"after"  # what it was given is judged by the daemon
    assert not [entry for entry in (daemon.root / ".cas").iterdir() if entry.name.startswith("b3")]


async def test_a_folder_arrives_with_its_names_links_and_modes(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    top = tmp_path / "tree"
    (top / "in ner/empty").mkdir(parents=True)
    weird = os.fsdecode(b"caf\xe9 \n'\"\\0")
    (top / "in ner" / weird).write_text("odd")
    (top / "run").write_text("#!/bin/sh\necho ran\n")
    (top / "run").chmod(0o755)
    (top / ".hidden").write_text("h")
    (top / "link").symlink_to("run")
    odd = (os.fsencode(f"in ner/{weird}"), "f", digest(top / "in ner" / weird))
    lines = [
        (b"in ner", "d", ""), (b"in ner/empty", "d", ""), odd,
        (b"run", "x", digest(top / "run")), (b".hidden", "f", digest(top / ".hidden")), (b"link", "l", "run"),
    ]  # fmt: skip
    for contents in ({}, {str(top): tree_digest(lines)}):
        output = JobOutput("copy", "copy", "folder")
        script = 'cp -R "$1" "$2"; "$1/link"; test ! -e "$1/absent"'
        wanted = job(
            "sh", "-c", script, "sh", Part("input", "t"), Part("output", "copy"),
            inputs={"t": (str(top),)}, contents=contents, outputs=(output,),
        )  # fmt: skip
        handle, found = await ended(backend, wanted)
        assert found.code == 0 and await log(backend, handle) == b"ran\n"
        copy = (await backend.fetch(handle, tmp_path)) / "out/copy/copy"
        assert (copy / "in ner" / weird).read_text() == "odd" and (copy / "in ner/empty").is_dir()
        assert os.access(copy / "run", os.X_OK) and os.readlink(copy / "link") == "run"
        assert (copy / ".hidden").read_text() == "h"
    assert backend.missing({tree_digest(lines): 1}) == 0


async def test_a_datastore_that_is_mounted_there_is_not_copied(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    lab, there = tmp_path / "lab", tmp_path / "mnt"
    (lab / "digits").mkdir(parents=True)
    (there / "digits").mkdir(parents=True)
    (lab / "digits/a.csv").write_text("here")
    (there / "digits/a.csv").write_text("there")
    daemon = Daemon(box, tmp_path / "state", mounts={"lab": str(there)})
    daemon.datastores = {"lab": lab}
    backend = await daemon.life(stack)
    await ended(backend, job("true"))
    before = backend.carrier.sent
    handle, found = await ended(backend, job("cat", Part("input", "x"), inputs={"x": (str(lab / "digits/a.csv"),)}))
    assert found.code == 0 and await log(backend, handle) == b"there"
    assert backend.carrier.sent == before


async def test_large_contents_and_outputs_travel_by_a_child_with_the_same_trust(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 12)
    output = JobOutput("copy", "copy", "file")
    wanted = job(
        "sh", "-c", 'cat "$1" > "$2"', "sh", Part("input", "x"), Part("output", "copy"),
        inputs={"x": (str(path),)}, contents={str(path): digest(path)}, outputs=(output,),
    )  # fmt: skip
    before = box.connections()
    handle, found = await ended(backend, wanted)
    home = await backend.fetch(handle, tmp_path)
    assert found.code == 0 and digest(home / "out/copy/copy") == digest(path)
    assert box.connections() - before == 3  # ours, one there, one back
    assert backend.link.connects == 1
    backend.carrier.client = None  # and on our own connection where there is no client
    path.write_bytes(os.urandom(1 << 20) * 11)
    wanted = job("wc", "-c", Part("input", "x"), inputs={"x": (str(path),)}, contents={str(path): digest(path)})
    handle, found = await ended(backend, wanted)
    assert (await log(backend, handle)).split()[0] == b"%d" % (11 << 20) and box.connections() - before == 3


async def test_an_output_that_changes_under_way_does_not_come_home(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    output = JobOutput("model", "model", "file")
    wanted = job("sh", "-c", 'echo good > "$1"', "sh", Part("output", "model"), outputs=(output,))
    handle, _ = await ended(backend, wanted)
    tools = next((daemon.root / ".bin").iterdir()) / "tree.sh"
    text = tools.read_text()
    tools.write_text(text.replace('0) cat -- "$@" ;;', '0) cat -- "$@" | tr o 0 ;;'))
    with pytest.raises(BackendUnavailable, match="is not whole"):
        await backend.fetch(handle, tmp_path)
    assert not (daemon.state / "jobs" / handle["token"] / "out").exists()
    tools.write_text(text)
    home = await backend.fetch(handle, tmp_path)
    assert (home / "out/model/model").read_text() == "good\n"


async def test_logs_are_followed_live_and_are_at_home_when_the_step_is_over(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    script = "echo one; while ! test -e go; do sleep 0.05; done; echo two; echo err >&2; echo '{}' >> $MLPIPED_METRICS"
    handle = await backend.submit(shell(script))
    seen = b""
    with anyio.fail_after(30):
        async for chunk in backend.logs(handle, "stdout", 0, follow=True):
            seen += chunk
            if seen == b"one\n":
                daemon.let_go(handle)
    assert seen == b"one\ntwo\n"
    await backend.wait(handle)
    home = daemon.state / "jobs" / handle["token"]
    assert (home / "stdout").read_bytes() == seen and (home / "stderr").read_bytes() == b"err\n"
    assert (home / "metrics.jsonl").read_text() == "{}\n"
    assert json.loads((home / "exit.json").read_text())["code"] == 0
    tail = b"".join([chunk async for chunk in backend.logs(handle, "stdout", -4, follow=False)])
    assert tail == b"two\n"


async def test_cancel_ends_everything_of_a_step_that_forks_hides_and_ignores_sigterm(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    loop = "trap '' TERM HUP INT; while :; do sleep 1; done"
    script = f'for i in 1 2 3; do setsid sh -c "{loop}" & done; (sh -c "{loop}" &); echo began; {loop}'
    handle = await backend.submit(shell(script, grace=0.3))
    await said(backend, handle, b"began")
    assert len(daemon.processes(handle["token"])) >= 5
    await backend.cancel(handle)
    found = await backend.wait(handle)
    assert found.cancelled and found.signal == 9  # type: ignore[union-attr]
    assert daemon.processes(handle["token"]) == []


async def test_cancel_ends_what_has_left_its_group_and_its_environment_and_nobody_who_looks_at_the_folder(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    hidden = "trap '' TERM HUP INT; echo \\$\\$ >> pids; while :; do /bin/sleep 0.1; done"
    handle = await backend.submit(shell(f'env -i setsid /bin/sh -c "{hidden}" & echo began; sleep 300', grace=0.3))
    await said(backend, handle, b"began")
    work = daemon.root / handle["token"] / "work"
    with anyio.fail_after(20):
        while not (work / "pids").exists() or not (work / "pids").read_text():
            await anyio.sleep(0.01)
    [pid] = (work / "pids").read_text().split()
    with subprocess.Popen(["sleep", "300"], cwd=work) as looks:
        try:
            await backend.cancel(handle)
            await backend.wait(handle)
            assert looks.poll() is None
        finally:
            looks.kill()
    assert not Path(f"/proc/{pid}/exe").exists()


async def test_a_script_on_the_box_imports_the_sdk_and_logs_a_metric(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    script = "import mlpiped; mlpiped.Run.get_context().log('accuracy', 0.97, step=3); print(mlpiped.__file__)"
    handle, found = await ended(backend, job("python", "-c", script))
    assert found.code == 0
    assert (await log(backend, handle)).decode().startswith(str(daemon.root / ".cas/sdk-"))
    (line,) = (daemon.state / "jobs" / handle["token"] / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "accuracy"


async def test_requirements_are_built_there_once_per_content(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    package = tmp_path / "tiny"
    package.mkdir()
    (package / "tiny.py").write_text("WORD = 'tiny'")
    wheel = make_wheel(tmp_path)
    wanted = {"requirements": f"{wheel}\n"}

    async def one() -> None:
        handle, found = await ended(backend, job("python", "-c", "import tiny, mlpiped; print(tiny.WORD)", **wanted))
        assert found.code == 0 and await log(backend, handle) == b"tiny\n"

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(one)
    await one()
    (log_file,) = (daemon.root / ".envs").glob("*.log")
    assert log_file.read_text().count("Successfully installed tiny") == 1
    with pytest.raises(InvalidJob, match="requirements"):
        await backend.submit(job("true", requirements="/no/such.whl\n"))


@pytest.mark.parametrize("shell_name", ["dash", "bash", "busybox"])
async def test_a_box_with_nothing_but_sh_and_coreutils_is_enough(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack, shell_name: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in COREUTILS:
        (tools / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    (tools / "sh").symlink_to(shutil.which(shell_name) or "")
    box = ssh_lab.box(path=[tools])
    try:
        daemon = Daemon(box, tmp_path / "state")
        backend = await daemon.life(stack)
        code, path = tmp_path / "code", tmp_path / "in put"
        code.mkdir()
        (code / "go.sh").write_text('#!/bin/sh\ncat "$1"; echo made > "$2"; echo oops >&2; kill -9 $$\n')
        (code / "go.sh").chmod(0o755)
        path.write_text("input\n")
        wanted = job(
            "./go.sh", Part("input", "x"), Part("output", "y"), code=str(code), inputs={"x": (str(path),)},
            contents={str(path): digest(path)}, outputs=(JobOutput("y", "y.txt", "file"),), timeout=30,
        )  # fmt: skip
        handle, found = await ended(backend, wanted)
        assert (found.code, found.signal, found.error) == (None, 9, None)
        assert await log(backend, handle) == b"input\n"
        home = await backend.fetch(handle, tmp_path)
        assert (home / "out/y/y.txt").read_text() == "made\n" and (home / "stderr").read_text() == "oops\n"
        _, found = await ended(backend, job("no-such"))
        assert found.error == "command not found: `no-such`"
        _, found = await ended(backend, shell("while :; do sleep 0.1; done", timeout=0.2, grace=0.1))
        assert found.timed_out and found.signal in (9, 15)
        loop = "trap '' TERM; while :; do sleep 0.1; done"
        handle = await backend.submit(shell(f'(sh -c "{loop}" &); echo began; {loop}', grace=0.2))
        await said(backend, handle, b"began")
        await backend.cancel(handle)
        found = await backend.wait(handle)  # type: ignore[assignment]
        assert found.cancelled and found.signal == 9
        assert daemon.processes(handle["token"]) == []
        assert await backend.health() is None
        await backend.discard(handle["token"], keep_logs=False)
        await backend.removed()
        assert not (daemon.root / handle["token"]).exists()
    finally:
        box.stop()


async def test_nothing_of_the_daemon_is_left_on_the_box_when_it_ends(ssh_lab: Lab, tmp_path: Path) -> None:
    from contextlib import AsyncExitStack

    box = ssh_lab.box()
    daemon = Daemon(box, tmp_path)
    async with AsyncExitStack() as stack:
        backend = await daemon.life(stack)
        await ended(backend, job("true"))
        assert len(list((daemon.root / ".events").iterdir())) == 1
    with anyio.fail_after(20):
        while list((daemon.root / ".events").iterdir()) or box.sessions():
            await anyio.sleep(0.05)
    box.stop()
    with anyio.fail_after(20):
        while processes_below(box.folder):
            await anyio.sleep(0.05)


async def test_those_who_ask_the_box_at_the_same_time_do_not_mix_up_their_answers(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    backend = await Daemon(box, tmp_path).life(stack)
    handles = [(await ended(backend, job("true")))[0] for _ in range(2)]
    found: list[dict[str, Handle]] = []

    async def find(handle: Handle) -> None:
        found.append(await backend.find([handle["token"]]))

    async def health() -> None:
        assert await backend.health() is None

    async with anyio.create_task_group() as group:
        group.start_soon(health)
        for handle in handles:
            group.start_soon(find, handle)
    assert sorted(found, key=str) == sorted(({handle["token"]: handle} for handle in handles), key=str)


async def test_a_secret_of_a_job_is_in_no_file_and_no_command_line_there(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    backend = await daemon.life(stack)
    secret = "canary" + os.urandom(8).hex()
    for padding in ("", "x" * 20_000):  # a short order, and one that travels as a file
        handle = await backend.submit(shell("echo began; sleep 300", env={"KEY": secret, "PAD": padding}))
        await said(backend, handle, b"began")
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    with open(f"{entry.path}/cmdline", "rb") as file:
                        assert secret.encode() not in file.read()
                except OSError:
                    pass
        for folder in (daemon.root, daemon.state):
            for path in folder.rglob("*"):
                if path.is_file():
                    assert secret.encode() not in path.read_bytes(), path
        await backend.cancel(handle)
        await backend.wait(handle)


def test_the_rig_says_why_it_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in (ssh_rig.why_not() or "")
