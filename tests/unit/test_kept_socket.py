"""The control socket over a restart below systemd: kept by it, taken up by the next daemon; nobody is turned away."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from mlpiped import notify_systemd
from mlpiped.control import listening

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Keeper:
    """What systemd does with FDSTORE, and how it starts the next process."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.kept: dict[str, int] = {}

    def listen_up(self) -> None:
        self.sock.settimeout(0.2)
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(self.sock, 4096, 4)
            except TimeoutError:
                return
            said = dict(line.split("=", 1) for line in text.decode().splitlines())
            if said.get("FDSTORE") == "1":
                self.kept[said["FDNAME"]] = fds[0]
            if said.get("FDSTOREREMOVE") == "1":
                os.close(self.kept.pop(said["FDNAME"]))

    def start(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """The environment of the next process, with the descriptor passed."""
        ((name, fd),) = self.kept.items()
        monkeypatch.setattr(listening, "_FIRST_PASSED", os.dup(fd))
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": name}


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        keeper = Keeper(sock)
        yield keeper
        for fd in keeper.kept.values():
            os.close(fd)


def ask(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(str(path))
    return client


def test_who_asks_between_two_daemons_is_answered_by_the_second(
    systemd: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    first, ours = listening.listen({}, path, None)
    assert not ours  # its file stays when it stops
    systemd.listen_up()
    first.close()
    with ask(path) as client:
        client.sendall(b"anybody there?")
        second, ours = listening.listen(systemd.start(monkeypatch), path, None)
        assert not ours
        second.setblocking(True)
        peer, _ = second.accept()
        assert peer.recv(100) == b"anybody there?"
        peer.close()
        second.close()
    systemd.listen_up()
    assert len(systemd.kept) == 1


def test_a_socket_that_is_made_anew_is_kept_in_place_of_the_one_whose_file_is_gone(
    systemd: Keeper, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    before, _ = listening.listen({}, path, None)
    name = listening.kept_name(path)
    os.link(path, tmp_path / "inode")  # the next file must be another
    path.unlink()
    sock, ours = listening.anew(path, None, name)
    systemd.listen_up()
    assert not ours and list(systemd.kept) == [listening.kept_name(path)] != [name]
    ask(path).close()
    before.close()
    sock.close()


@pytest.mark.parametrize("change", ["removed", "replaced", "moved"])
def test_a_kept_socket_that_nobody_can_reach_any_more_is_given_up_for_a_new_one(
    systemd: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "s"
    listening.listen({}, path, None)[0].close()
    systemd.listen_up()
    environ = systemd.start(monkeypatch)
    if change == "moved":
        path = tmp_path / "elsewhere"
    else:
        path.rename(tmp_path / "old")  # not unlinked: its inode would be given to the next
    if change == "replaced":
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    second, _ = listening.listen(environ, path, None)
    with second, ask(path):
        pass
    systemd.listen_up()
    assert list(systemd.kept) == [listening.kept_name(path)]


def test_a_socket_unit_is_used_as_it_is(systemd: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = listening.bind(tmp_path / "s", None)
    monkeypatch.setattr(listening, "_FIRST_PASSED", os.dup(made.fileno()))
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "mlpiped.socket"}
    taken, ours = listening.listen(environ, tmp_path / "s", None)
    with made, taken, ask(tmp_path / "s"):
        assert not ours
    systemd.listen_up()
    assert not systemd.kept


def test_without_systemd_the_file_is_ours_to_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sock, ours = listening.listen({}, tmp_path / "s", None)
    with sock:
        assert ours
    assert not notify_systemd.keep(0, "x")
