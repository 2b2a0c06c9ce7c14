"""The ways to a box: `ssh_config`, jump hosts, agents, and what is said when one of them is missing. Real servers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from blake3 import blake3
from lab.ssh_daemon import Daemon, ended, job, log, well

from mlpiped.backends.base import JobOutput, Part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AsyncExitStack

    from lab.ssh_rig import Box, Lab

    from mlpiped.backends.ssh import SshBackend

pytestmark = [pytest.mark.anyio, pytest.mark.lab]


@pytest.fixture
def box(ssh_lab: Lab) -> Iterator[Box]:
    box = ssh_lab.box()
    yield box
    box.stop()


@pytest.fixture
def gate(ssh_lab: Lab) -> Iterator[Box]:
    gate = ssh_lab.box()
    yield gate
    gate.stop()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An ssh-agent of the test, without keys."""
    socket = f"{tmp_path}/agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    monkeypatch.setenv("SSH_AUTH_SOCK", socket)
    yield socket
    process.terminate()
    process.wait()


def config(daemon: Daemon, *lines: str) -> dict[str, Any]:
    """Settings that leave all of it to an ssh_config."""
    path = daemon.state / "ssh_config"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return {"host": "gpu", "port": 22, "user": None, "key_file": None, "ssh_config": path}


def host(name: str, box: Box, *lines: str) -> list[str]:
    return [f"Host {name}", f"HostName {box.address}", f"Port {box.port}", f"User {box.user}", *lines]


async def carries(backend: SshBackend, tmp_path: Path) -> None:
    """Small and large things, there and home: on our connection and by the child."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 9)
    contents = {str(path): f"b3:{blake3(path.read_bytes()).hexdigest()}"}
    wanted = job(
        "sh", "-c", 'cat "$1" > "$2"; echo done', "sh", Part("input", "x"), Part("output", "y"),
        inputs={"x": (str(path),)}, contents=contents, outputs=(JobOutput("y", "y", "file"),),
    )  # fmt: skip
    handle, found = await ended(backend, wanted)
    assert found.code == 0 and await log(backend, handle) == b"done\n"
    home = await backend.fetch(handle, tmp_path)
    assert (home / "out/y/y").read_bytes() == path.read_bytes()


async def test_an_ssh_config_says_all_of_a_box(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path / "state")
    daemon.settings = config(daemon, *host("gpu", box, f"IdentityFile {box.key}", "HostKeyAlias the-gpu-box"))
    kind, key, *_ = (box.folder / "host_key.pub").read_text().split()
    (daemon.state / "known_hosts").write_text(f"[the-gpu-box]:{box.port} {kind} {key}\nthe-gpu-box {kind} {key}\n")
    backend = await daemon.life(stack)
    await carries(backend, tmp_path)
    assert backend.link.connects == 1


async def test_a_box_behind_a_jump_host_is_reached_through_it_alone(
    box: Box, gate: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    lines = host("gpu", box, "ProxyJump gate") + host("gate", gate, f"IdentityFile {gate.key}")
    daemon.settings = {**config(daemon, *lines), "key_file": box.key}
    (daemon.state / "known_hosts").write_text(box.known() + gate.known())
    backend = await daemon.life(stack)
    before = gate.connections(), box.connections()
    await carries(backend, tmp_path)
    through = gate.connections() - before[0], box.connections() - before[1]
    assert through == (3, 3)  # ours, one there, one back
    gate.stop()
    with anyio.fail_after(30):
        while "the jump host `gate` of `box` cannot be reached: connection refused" != await backend.health():
            await anyio.sleep(0.05)  # the first one finds out that the connection is gone
    gate.start()
    await well(backend)
    assert (await ended(backend, job("true")))[1].code == 0


async def test_a_chain_of_jump_hosts_with_the_boxs_own_key(
    ssh_lab: Lab, box: Box, gate: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    inner = ssh_lab.box()
    try:
        daemon = Daemon(box, tmp_path / "state")
        jumps = f"{gate.user}@{gate.address}:{gate.port},inner"
        daemon.settings = {
            **config(daemon, *host("gpu", box, f"ProxyJump {jumps}"), *host("inner", inner)), "key_file": box.key,
        }  # fmt: skip
        (daemon.state / "known_hosts").write_text(box.known() + gate.known() + inner.known())
        await carries(await daemon.life(stack), tmp_path)
        assert gate.connections() == inner.connections() == 3
    finally:
        inner.stop()


async def test_H4_a_jump_host_with_another_key_is_not_passed(
    box: Box, gate: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    daemon.settings = {**config(daemon, *host("gpu", box, "ProxyJump gate"), *host("gate", gate)), "key_file": box.key}
    (daemon.state / "known_hosts").write_text(box.known())
    unknown = await (await daemon.life(stack)).health() or ""
    assert unknown.startswith("the host key of the jump host `gate` of `box` is not known; `ssh-keyscan -p ")
    (daemon.state / "known_hosts").write_text(box.known() + gate.known())
    gate.stop()
    gate.new_host_key()
    gate.start()
    backend = await daemon.life(stack)
    health = await backend.health()
    assert health is not None and health.startswith("the host key of the jump host `gate` of `box` has changed")
    assert box.connections() == gate.connections() == 0


async def test_an_agent_has_the_key(box: Box, tmp_path: Path, stack: AsyncExitStack, agent: str) -> None:
    daemon = Daemon(box, tmp_path / "state", key_file=None, agent=True)
    backend = await daemon.life(stack)
    with pytest.raises(Exception, match="does not let us in") as caught:
        await backend.submit(job("true"))
    assert getattr(caught.value, "hint", "") == "the agent has no key: `ssh-add`, as the daemon's user"
    subprocess.run(["ssh-add", "-q", box.key], check=True)
    await well(backend)
    await carries(backend, tmp_path)


async def test_an_agent_has_the_key_whose_file_has_a_passphrase(
    box: Box, tmp_path: Path, stack: AsyncExitStack, agent: str
) -> None:
    locked = tmp_path / "locked"
    locked.write_bytes(box.key.read_bytes())
    locked.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", locked], check=True, stdin=subprocess.DEVNULL)
    daemon = Daemon(box, tmp_path / "state", key_file=locked, agent=True)
    subprocess.run(["ssh-add", "-q", box.key], check=True)
    assert (await ended(await daemon.life(stack), job("true")))[1].code == 0
    without = await Daemon(box, tmp_path / "other", key_file=locked).life(stack)
    health = await without.health()
    assert health is not None and health.startswith(
        f"`box` ({box.address}) cannot be reached: the key {locked} cannot be"
    )


async def test_an_agent_is_asked_only_where_it_is_told(
    box: Box, tmp_path: Path, stack: AsyncExitStack, agent: str
) -> None:
    subprocess.run(["ssh-add", "-q", box.key], check=True)
    backend = await Daemon(box, tmp_path / "state", key_file=None).life(stack)
    health = await backend.health()
    assert health is not None and "does not let us in" in health and box.connections() == 0


async def test_an_agent_that_is_not_there_is_named(
    box: Box, tmp_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    backend = await Daemon(box, tmp_path / "state", key_file=None, agent=True).life(stack)
    with pytest.raises(Exception, match="does not let us in") as caught:
        await backend.submit(job("true"))
    assert "there is no agent at `$SSH_AUTH_SOCK`" in getattr(caught.value, "hint", "")


@pytest.mark.parametrize("text", [None, "Port none\n", "Host gpu\nProxyJump a:b:c\n"])
async def test_an_ssh_config_that_leads_nowhere_is_a_sentence(
    box: Box, tmp_path: Path, stack: AsyncExitStack, text: str | None
) -> None:
    daemon = Daemon(box, tmp_path / "state", key_file=box.key)
    path = Path(f"{tmp_path}/config")
    daemon.settings |= {"host": "gpu", "port": 22, "ssh_config": path}
    if text is not None:
        path.write_text(text)
    health = await (await daemon.life(stack)).health()
    assert health is not None and health.startswith("`box` (gpu) cannot be reached: ")
    assert box.connections() == 0
