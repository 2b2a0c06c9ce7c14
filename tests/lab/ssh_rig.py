"""Boxes for the tests: real OpenSSH servers on addresses of the loopback, each with its own keys, home and work folder.

A box can be frozen, killed, restarted, given another host key or another boot id; a `Cable` in front of it can be cut.
Everything is private to the test run and ends with it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from . import packages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SSHD = "/usr/sbin/sshd"
STARTS = 20.0  # seconds
CONFIG = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/sshd.pid
MaxSessions {max_sessions}
MaxStartups 10:30:100
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UseDNS no
PrintMotd no
LogLevel VERBOSE
SetEnv {environment}
Subsystem sftp internal-sftp
"""


PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}


def why_not() -> str | None:
    return packages.why_not("starting an sshd of one's own, whose users log in,", PACKAGES)


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Box:
    """One sshd with all that belongs to it. Its user is the one who runs the tests."""

    def __init__(
        self, folder: Path, key: Path, number: int = 1, *, max_sessions: int = 10, path: Sequence[Path | str] = (),
        force: str = "", within: Sequence[str] = (), **environment: str,
    ) -> None:  # fmt: skip
        self.folder = folder
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        self.address = f"127.0.0.{10 + number}"
        self.port = free_port(self.address)
        self.key = key
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.home = folder / "home"
        self.home.mkdir()
        self.boot_id = folder / "boot_id"
        self.boot_id.write_text(Path("/proc/sys/kernel/random/boot_id").read_text())
        self.environment = {"HOME": str(self.home), "MLPIPED_LAB_BOOT_ID": str(self.boot_id), **environment}
        if path:
            self.environment["PATH"] = ":".join(str(one) for one in path)
        self.max_sessions = max_sessions
        self.force = force
        """What is executed in the place of a command, which it has in $SSH_ORIGINAL_COMMAND."""
        self.within = list(within)
        """Words before the server's command."""
        self.process: subprocess.Popen[bytes] | None = None
        shutil.copy(f"{key}.pub", folder / "authorized_keys")
        self.new_host_key()

    # --- what a known_hosts says of it
    def new_host_key(self) -> None:
        for path in (self.folder / "host_key", self.folder / "host_key.pub"):
            path.unlink(missing_ok=True)
        keygen(self.folder / "host_key")

    def known(self, port: int | None = None) -> str:
        kind, key, *_ = (self.folder / "host_key.pub").read_text().split()
        return f"[{self.address}]:{port or self.port} {kind} {key}\n"

    # --- its life
    def start(self) -> None:
        assert self.process is None
        environment = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        config = self.folder / "sshd_config"
        config.write_text(
            CONFIG.format(
                port=self.port, address=self.address, folder=self.folder, max_sessions=self.max_sessions,
                environment=environment,
            )
            + (f"ForceCommand {self.force}\n" if self.force else "")
        )  # fmt: skip
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [*self.within, SSHD, "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()
        until = time.monotonic() + STARTS
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), 1):
                return
            assert self.process.poll() is None and time.monotonic() < until, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.02)

    def sessions(self) -> list[int]:
        """The server's processes for connections, not the listener: what a step runs is below none of them for long."""
        found: list[int] = []
        ask = [self.process.pid] if self.process is not None else []
        while ask:
            below = [pid for pid in children(ask.pop()) if name_of(pid).startswith("sshd")]
            found += below
            ask += below
        return found

    def connections(self) -> int:
        """How often somebody was let in, since the box was made."""
        return (self.folder / "log").read_text(errors="replace").count("Accepted publickey")

    def knocks(self) -> int:
        """How often somebody connected since the last start, less the rig's own look."""
        text = (self.folder / "log").read_text(errors="replace")
        return text[text.rfind("Server listening") :].count("Connection from") - 1

    def freeze(self) -> None:
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def drop(self) -> None:
        """Kill the sessions; the listener goes on."""
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)  # who is dropped would be let in again at once
            self.drop()
            self.process.kill()
            self.process.wait()
            self.process = None

    def settings(self, **changes: Any) -> dict[str, Any]:
        """For SshCompute."""
        return {
            "kind": "ssh", "host": self.address, "user": self.user, "port": self.port, "key_file": self.key,
            "slots": 2, "work_dir": "~/work", "python": sys.executable, **changes,
        }  # fmt: skip


class Cable:
    """A TCP proxy in front of a box: its connections can be cut, frozen, and counted in bytes."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.up = self.down = 0
        self._flows = threading.Event()
        self._flows.set()
        self._answers = threading.Event()
        self._answers.set()
        self._ends: list[socket.socket] = []
        self._server = socket.create_server((box.address, 0))
        self.port: int = self._server.getsockname()[1]
        self._thread(self._accept)

    def _thread(self, target: Any, *facts: Any) -> None:
        threading.Thread(target=target, args=facts, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._server.accept()
                try:
                    there = socket.create_connection((self.box.address, self.box.port), 5)
                except OSError:
                    here.close()
                    continue
                there.settimeout(None)
                self._ends += [here, there]
                self._thread(self._pump, here, there, True)
                self._thread(self._pump, there, here, False)

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                if not up:
                    self._answers.wait()
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Every connection of now; new ones work. What was held up is lost."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()
        self.thaw()

    def freeze(self) -> None:
        self._flows.clear()

    def freeze_down(self) -> None:
        """What the box says does not arrive; what it is told does."""
        self._answers.clear()

    def thaw(self) -> None:
        self._flows.set()
        self._answers.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()


class Lab:
    """All boxes of a test run."""

    def __init__(self) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it goes there to check passwords, and misses it else
        self.folder = Path(tempfile.mkdtemp(prefix="mlpd-ssh-"))
        self.folder.chmod(0o755)
        self.key = self.folder / "key"
        keygen(self.key)
        self.boxes: list[Box] = []

    def box(self, **facts: Any) -> Box:
        number = len(self.boxes) + 1
        box = Box(self.folder / f"box{number}", self.key, number % 200, **facts)
        self.boxes.append(box)
        box.start()
        return box

    def close(self) -> None:
        for box in self.boxes:
            box.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    if (reason := why_not()) is not None:
        packages.not_here(reason)
    packages.install(PACKAGES)
    made = Lab()
    try:
        yield made
    finally:
        made.close()


def keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, stdin=subprocess.DEVNULL)


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return found


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.fixture(scope="session")
def ssh_lab() -> Iterator[Lab]:
    with lab() as made:
        yield made


@pytest.fixture(scope="session")
def ssh_box(ssh_lab: Lab) -> Box:
    """One that nothing harms."""
    return ssh_lab.box()
