"""A machine with a real systemd: a throw-away overlay of the root folder, booted by systemd-nspawn, without a network.

All of it hangs on one process: its mounts are in a mount namespace of its own, so whatever ends us leaves no mount and
no process behind; `close` also removes the folder with what the machine had written, and its control groups.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

BOOT, HALT = 90.0, 45.0  # seconds
REBOOTED = 133  # nspawn's exit status when the machine inside asked for a reboot, and --keep-unit is given
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
MOUNT = """
mount -t overlay overlay -o lowerdir="$1",upperdir="$2/upper",workdir="$2/work" "$2/root" || exit 200
shift; cd /
exec systemd-nspawn --directory="$1/root" "${@:2}"
"""
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
GROUPS = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup")


class CannotBoot(Exception):
    """Why systemd-nspawn cannot work here."""


class Machine:
    """`base` is never written to. `binds`: path inside -> folder of the host, read-only."""

    def __init__(self, base: Path, binds: Mapping[str, Path]) -> None:
        self.base = base
        self.binds = binds
        self.name = f"mlpd-lab-{os.urandom(6).hex()}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir()
        self.console = self.folder / "console"
        self.process: subprocess.Popen[bytes] | None = None
        self.leader = 0

    # --- its life ---------------------------------------------------------------------------------------------------
    def boot(self) -> None:
        """Return when systemd inside has reached its default target. Raises CannotBoot."""
        assert self.process is None
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
            ear.bind(f"\0{self.name}-{time.monotonic_ns()}")
            self._start("@" + ear.getsockname()[1:].decode())
            try:
                self._hear(ear)
            except BaseException:
                self._kill()
                raise

    def _start(self, notify: str) -> None:
        options = ["--boot", "--keep-unit", "--register=no", "--notify-ready=yes", "--private-network", "--quiet"]
        options += [f"--machine={self.name}", "--settings=no", "--link-journal=no", "--console=pipe"]
        options += ["--resolv-conf=off", "--timezone=off", "--kill-signal=SIGRTMIN+4"]
        options += [f"--bind-ro={outside}:{inside}" for inside, outside in self.binds.items()]
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", MOUNT, "lab"]

        def prepare() -> None:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for group in self._groups(make=True):
                (group / "cgroup.procs").write_text("0")

        with self.console.open("ab") as console:
            self.process = subprocess.Popen(
                [*command, self.base, self.folder, *options],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": notify},
                preexec_fn=prepare,
                start_new_session=True,
            )

    def _hear(self, ear: socket.socket) -> None:
        """nspawn tells first which process is the machine's first one, then that its systemd is ready."""
        assert self.process is not None
        until = time.monotonic() + BOOT
        ear.settimeout(0.5)
        while True:
            with contextlib.suppress(TimeoutError):
                for line in ear.recv(4096).decode().splitlines():
                    name, _, value = line.partition("=")
                    if name == "X_NSPAWN_LEADER_PID":
                        self.leader = int(value)
                    if (name, value) == ("READY", "1") and self.leader:
                        return
            if self.process.poll() is not None or time.monotonic() > until:
                raise CannotBoot(f"the machine does not boot: {self.tail().strip() or self.process.poll()}")

    def tail(self, size: int = 3000) -> str:
        return self.console.read_text(errors="replace")[-size:]

    def reboot(self) -> None:
        """As a person does it: `systemctl reboot`, with all that systemd does on the way down."""
        assert self.process is not None
        self.run("systemctl", "--no-block", "reboot")
        code = self.process.wait(HALT)
        assert code == REBOOTED, f"nspawn ended with {code}, not for a reboot:\n{self.tail()}"
        self.process, self.leader = None, 0
        self.boot()

    def close(self) -> None:
        try:
            if self.process is not None:
                self.process.terminate()  # nspawn passes it on as --kill-signal: power off
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(HALT)
            self._kill()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._remove_groups()

    def _kill(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            if self.leader:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.leader, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        self.process, self.leader = None, 0

    # --- control groups: nspawn makes its own below the one that it was started in
    def _groups(self, make: bool = False) -> list[Path]:
        found = []
        for mount in GROUPS:
            group = Path(mount) / self.name
            if (group.parent / "cgroup.procs").exists():
                if make:
                    group.mkdir(exist_ok=True)
                if group.is_dir():
                    found.append(group)
        return found

    def _remove_groups(self) -> None:
        for top in self._groups():
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    # --- what is done inside ----------------------------------------------------------------------------------------
    @property
    def root(self) -> Path:
        """The machine's files, while it is up."""
        return Path(f"/proc/{self.leader}/root")

    def enter(self, *argv: object) -> list[str]:
        """The command that runs `argv` inside, as root."""
        return ["nsenter", f"--target={self.leader}", "--all", "--", *(str(word) for word in argv)]

    def run(self, *argv: object, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.enter(*argv),
            env=ENV,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def show(self, unit: str, what: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={what}", unit).stdout.strip()
