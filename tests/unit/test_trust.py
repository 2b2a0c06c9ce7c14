"""Host keys of boxes: shown, compared, kept; and never trusted by themselves."""

from __future__ import annotations

import asyncio
import io
import threading
from typing import TYPE_CHECKING, Any

import asyncssh
import pytest

from mlpiped.cli import admin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Captured = pytest.CaptureFixture[str]
KEYS = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(2)]


class Server:
    """An SSH server of this process. `key` can be changed between two connections."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.port = 0
        self.server: Any = None
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def show(self, key: asyncssh.SSHKey) -> None:
        asyncio.run_coroutine_threadsafe(self._show(key), self.loop).result(30)

    async def _show(self, key: asyncssh.SSHKey) -> None:
        if self.server is not None:
            self.server.close()
            await self.server.wait_closed()
        self.server = await asyncssh.listen("127.0.0.1", self.port, server_host_keys=[key])
        self.port = self.server.get_port()

    def close(self) -> None:
        async def end() -> None:
            self.server.close()
            await self.server.wait_closed()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    found.show(KEYS[0])
    yield found
    found.close()


@pytest.fixture
def lab(tmp_path: Path, server: Server) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "plugins").mkdir()
    write(tmp_path, f'host = "127.0.0.1"\nport = {server.port}')
    return tmp_path


def write(folder: Path, box: str) -> None:
    text = '[daemon]\nstate_dir = "state"\n[compute.local]\nkind = "local"\n[compute.gpu1]\nkind = "ssh"\nslots = 1\n'
    (folder / "mlpiped.toml").write_text(f"{text}{box}\n")


def trust(lab: Path, *words: str) -> int:
    return admin.main(["trust", "--config", str(lab / "mlpiped.toml"), *words])


def said(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)


def connects(lab: Path, server: Server) -> bool:
    """Whether a client that trusts the file alone goes on to the log-in."""

    async def connect() -> None:
        known = str(lab / "state/known_hosts")
        async with asyncssh.connect("127.0.0.1", server.port, known_hosts=known, client_keys=None, config=[]):
            pass

    with pytest.raises((asyncssh.PermissionDenied, asyncssh.HostKeyNotVerifiable)) as caught:
        asyncio.run(connect())
    return isinstance(caught.value, asyncssh.PermissionDenied)


def test_a_key_is_shown_and_kept_after_a_yes(
    lab: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (lab / "state/known_hosts").write_text("")
    assert not connects(lab, server)
    said(monkeypatch, "y\n")
    assert trust(lab, "gpu1") == 0
    out, err = capsys.readouterr()
    assert f"[127.0.0.1]:{server.port} shows ssh-ed25519 {KEYS[0].get_fingerprint()}" in out
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in err
    assert connects(lab, server)
    assert trust(lab, "gpu1") == 0
    assert "is trusted already" in capsys.readouterr().out
    assert len((lab / "state/known_hosts").read_text().splitlines()) == 1


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_without_a_yes_nothing_is_kept(
    lab: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    said(monkeypatch, answer)
    assert trust(lab, "gpu1") == 1
    assert "error: not trusted" in capsys.readouterr().err
    assert not (lab / "state/known_hosts").exists()


def test_where_nobody_can_answer_a_yes_is_given_in_advance(
    lab: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert trust(lab, "gpu1") == 2
    assert "hint: compare it, then give --yes" in capsys.readouterr().err
    assert not (lab / "state/known_hosts").exists()
    assert trust(lab, "gpu1", "--yes") == 0
    assert connects(lab, server)


def test_a_key_that_changed_is_refused_and_the_old_one_stays(lab: Path, server: Server, capsys: Captured) -> None:
    assert trust(lab, "gpu1", "--yes") == 0
    before = (lab / "state/known_hosts").read_text()
    server.show(KEYS[1])
    assert trust(lab, "gpu1", "--yes") == 1
    err = capsys.readouterr().err
    assert f"{KEYS[0].get_fingerprint()} is trusted: the host key of `gpu1` changed" in err
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}' -f {lab}/state/known_hosts" in err
    assert (lab / "state/known_hosts").read_text() == before


def test_a_name_of_ssh_config_is_trusted_under_the_name_that_is_checked(
    lab: Path, server: Server, capsys: Captured
) -> None:
    (lab / "ssh_config").write_text(f"Host gpu1\n  Hostname 127.0.0.1\n  Port {server.port}\n")
    write(lab, 'host = "gpu1"\nssh_config = "ssh_config"')
    assert trust(lab, "gpu1", "--yes") == 0
    assert connects(lab, server)
    (line,) = (lab / "state/known_hosts").read_text().splitlines()
    assert line.startswith(f"[gpu1]:{server.port},[127.0.0.1]:{server.port} ssh-ed25519 ")


def test_a_line_without_an_end_is_not_written_on(lab: Path, server: Server) -> None:
    other = KEYS[1].export_public_key().decode().strip()
    (lab / "known").write_text(f"elsewhere {other}")
    write(lab, f'host = "127.0.0.1"\nport = {server.port}\nknown_hosts = "known"')
    assert trust(lab, "gpu1", "--yes") == 0
    assert [line.split()[0] for line in (lab / "known").read_text().splitlines()] == [
        "elsewhere",
        f"[127.0.0.1]:{server.port}",
    ]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("gpu2", 2, "no box named `gpu2`\nhint: did you mean `gpu1`?"),
        ("local", 2, "compute `local` has no host key: its kind is `local`"),
    ],
)
def test_a_name_that_is_no_box_is_a_sentence(lab: Path, name: str, status: int, message: str, capsys: Captured) -> None:
    assert trust(lab, name) == status
    assert message in capsys.readouterr().err


def test_a_box_that_does_not_answer_is_a_sentence(lab: Path, capsys: Captured) -> None:
    write(lab, 'host = "127.0.0.1"\nport = 1')
    assert trust(lab, "gpu1") == 1
    err = capsys.readouterr().err
    assert "error: `127.0.0.1` cannot be reached: " in err and "Traceback" not in err


# --- check ------------------------------------------------------------------------------------------------------
def checked(lab: Path, capsys: Captured) -> list[str]:
    capsys.readouterr()
    assert admin.main(["check", "--config", str(lab / "mlpiped.toml")]) == 0
    return [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()]


def test_check_says_which_box_is_not_trusted_yet(lab: Path, capsys: Captured) -> None:
    assert checked(lab, capsys) == ["no host key of compute `gpu1` is trusted yet: `mlpiped trust gpu1`"]
    assert trust(lab, "gpu1", "--yes") == 0
    assert checked(lab, capsys) == []
    (lab / "state/known_hosts").write_bytes(b"\xff")
    (found,) = checked(lab, capsys)
    assert found.startswith(f"compute `gpu1`: the host keys in `{lab}/state/known_hosts` cannot be read")


def test_check_names_files_that_are_not_there_and_a_key_that_others_may_read(lab: Path, capsys: Captured) -> None:
    (lab / "id").touch(0o644)
    write(lab, 'host = "gpu1"\nkey_file = "id"\nknown_hosts = "gone"\nssh_config = "absent"')
    found = checked(lab, capsys)
    assert f"the `known_hosts` of compute `gpu1` is not there: `{lab}/gone`" in found
    assert f"the `ssh_config` of compute `gpu1` is not there: `{lab}/absent`" in found
    assert f"others may read the private key of compute `gpu1`: `chmod 600 {lab}/id`" in found


def test_check_says_that_there_is_no_engine(lab: Path, capsys: Captured) -> None:
    text = f'[compute.box]\nkind = "docker"\nurl = "unix://{lab}/docker.sock"\n'
    (lab / "mlpiped.toml").write_text(f'[daemon]\nstate_dir = "state"\n{text}')
    assert checked(lab, capsys) == [f"compute `box`: no Docker engine has its socket at `{lab}/docker.sock`"]
    (lab / "docker.sock").touch()
    assert checked(lab, capsys) == [f"compute `box`: `{lab}/docker.sock` is no socket"]


def test_check_names_the_commands_of_slurm_that_are_not_here(
    lab: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab / "mlpiped.toml").write_text('[daemon]\nstate_dir = "state"\n[compute.cluster]\nkind = "slurm"\n')
    commands = lab / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    for name in ("sbatch", "squeue", "scontrol"):
        (commands / name).touch(0o755)
    assert checked(lab, capsys) == ["compute `cluster`: not on the PATH: `scancel`, `sinfo`"]
    for name in ("scancel", "sinfo"):
        (commands / name).touch(0o755)
    assert checked(lab, capsys) == []
