"""A Docker engine of our own: a dockerd on a private folder, in a network and mount namespace that a process holds.

That process ends when we do, whatever ends us, and tells dockerd to stop; containers that outlive a dockerd which was
killed are ended by `close`. What it stores is in memory, in that namespace. Its images are made here, of the lab's
Debian root folder: nothing is pulled.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import until
from lab import packages, rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-init": "tini",
    "iptables": "iptables",
    "busybox": "busybox-static",
    "docker-registry": "docker-registry",
}
PYTHON = "lab-python:latest"  # a Debian with python, sh and coreutils
BARE = "lab-bare:latest"  # one static program, /busybox: `/busybox sleep 1`; no shell
READY = 60.0  # seconds
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
LEFT_OUT = ("usr/share", "usr/lib/systemd", "usr/lib/x86_64-linux-gnu/perl*", "usr/lib/x86_64-linux-gnu/gconv", "var/*")
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"}
HOLD = 'ip link set lo up; mkdir "$1/data"; mount -t tmpfs -o mode=711 lab "$1/data"; echo; cat; kill $(cat "$1/pid")'
GROUPS = Path("/sys/fs/cgroup")


def why_not() -> str | None:
    return packages.why_not("starting a dockerd", PACKAGES)


class Engine:
    """One dockerd; `start` after `kill` or `stop` is the engine's next life on the same folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mlpd-docker-"))
        self.socket, self.log = self.folder / "sock", self.folder / "log"
        self.group = f"/{self.folder.name}"
        self.process: subprocess.Popen[bytes] | None = None
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "slave", "sh", "-ec", HOLD, "hold", self.folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV, start_new_session=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        self._holder.stdout.readline()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    # --- its life ---------------------------------------------------------------------------------------------------
    def start(self, *, live_restore: bool = False) -> Engine:
        assert self.process is None
        options = [f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec", f"--pidfile={self.folder}/pid"]
        options += [f"--host={self.url}", f"--cgroup-parent={self.group}", "--iptables=false", "--ip6tables=false"]
        options += ["--ip-masq=false", "--userland-proxy=false", *(["--live-restore"] if live_restore else [])]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.enter("dockerd", *options), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=ENV, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + READY
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"dockerd does not answer:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        return self

    def answers(self) -> bool:
        return self.docker("version", check=False).returncode == 0

    def kill(self) -> None:
        """SIGKILL: no time for anything. Its containerd dies with it, what runs in containers does not.

        A dockerd mistakes a dead containerd that nobody has reaped for one that lives, and waits for it in vain.
        """
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None
        own = self.folder / "exec/containerd"
        pid = int((own / "containerd.pid").read_text())
        until(lambda: _gone(pid), "containerd dies with dockerd")
        for path in (self.folder / "pid", own / "containerd.pid", *own.glob("*.sock*")):
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        """SIGTERM, as `systemctl stop docker` does."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(READY)
        self.process = None

    def close(self) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                with contextlib.suppress(AssertionError, subprocess.SubprocessError):
                    if ids := self.docker("ps", "--all", "--quiet", check=False).stdout.split():
                        self.docker("rm", "--force", "--volumes", *ids, check=False)
                    self.stop()
            if self.process is not None:
                self.kill()
            self._end_the_rest()
        finally:
            self._holder.kill()
            self._holder.communicate()
            shutil.rmtree(self.folder, ignore_errors=True)
            self._remove_groups()

    def _end_the_rest(self) -> None:
        """containerd, shims and what they run: all that is in our namespaces or names our folder."""
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                groups = Path(f"/proc/{pid}/cgroup").read_text()
                if (os.fsencode(self.folder) in words and b"shim" in words) or f"{self.group}/" in groups:
                    os.kill(pid, signal.SIGKILL)

    def _remove_groups(self) -> None:
        for top in GROUPS.glob(f"*{self.group}"):
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    @contextlib.contextmanager
    def short_of_space(self, free: int) -> Iterator[None]:
        """So many KiB are left on its disk."""
        data = f"{self.folder}/data"
        told = subprocess.run(self.enter("df", "-k", "--output=used", data), capture_output=True, text=True, check=True)
        resize = self.enter("mount", "-o", f"remount,size={int(told.stdout.split()[-1]) + free}k", data)
        subprocess.run(resize, check=True)
        try:
            yield
        finally:
            subprocess.run(self.enter("mount", "-o", "remount,size=100%", data), check=True)

    # --- what is done with it ---------------------------------------------------------------------------------------
    def enter(self, *argv: object) -> list[str]:
        """The command that runs `argv` where dockerd runs: its loopback and its mounts are not the host's."""
        return ["nsenter", f"--target={self._holder.pid}", "--net", "--mount", "--", *(str(word) for word in argv)]

    def docker(self, *argv: object, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        env = {**ENV, "DOCKER_HOST": self.url, "DOCKER_BUILDKIT": "0"}
        done = subprocess.run(
            ["docker", *(str(word) for word in argv)],
            env=env, input=stdin or "", capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"docker {' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stderr}")
        return done

    def inspect(self, container: str) -> dict[str, Any] | None:
        done = self.docker("inspect", "--type=container", container, check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
        return found[0] if found else None

    def containers(self, instance: str | None = None) -> set[str]:
        """Names of all containers of this daemon, or of any."""
        label = "label=mlpiped.instance" if instance is None else f"label=mlpiped.instance={instance}"
        told = self.docker("ps", "--all", "--filter", label, "--format", "{{.Names}}")
        return set(told.stdout.split())

    def holds(self) -> dict[str, set[str]]:
        """All that there is on it, by id: `images` (layers that builds left, too), `ps`, `volume`, `network`."""
        kinds = (("images", "--all", "--no-trunc"), ("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        cached = self.docker("system", "df", "--format", "{{.Type}} {{.TotalCount}}").stdout
        assert "Build Cache 0" in cached, cached
        return {words[0]: set(self.docker(*words, "--quiet").stdout.split()) for words in kinds}

    def image(self, name: str) -> str:
        """Its id."""
        return self.docker("image", "inspect", "--format", "{{.Id}}", name).stdout.strip()

    def make_images(self) -> None:
        root = rootfs.root()
        out = [f"--exclude=./{path}" for path in LEFT_OUT]
        self._import("lab-base", ["tar", "-C", root, *out, "-c", "."])
        self.docker("build", "--tag", PYTHON, "-", stdin="FROM lab-base\nRUN ln -s python3 /usr/bin/python\n")
        with tempfile.TemporaryDirectory() as place:
            busybox = shutil.which("busybox", path=ENV["PATH"])
            assert busybox is not None
            shutil.copy(busybox, place)
            self._import("lab-bare", ["tar", "-C", place, "-c", "."])

    def _import(self, name: str, command: list[Any]) -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
            subprocess.run(
                ["docker", "import", "-", name], stdin=tar.stdout, env={**ENV, "DOCKER_HOST": self.url},
                check=True, capture_output=True,
            )  # fmt: skip
        assert tar.returncode == 0


class Registry:
    """A real one on 127.0.0.1:5000, where only this engine sees it: its namespace is the engine's."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        config = engine.folder / "registry.yml"
        config.write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {engine.folder}/registry}}}}\n"
            "log: {level: error}\nhttp: {addr: 127.0.0.1:5000}\n"
        )
        with (engine.folder / "registry.log").open("ab") as log:
            self.process = subprocess.Popen(
                engine.enter("docker-registry", "serve", config),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENV, preexec_fn=_die_with_us,
            )  # fmt: skip

    def push(self, image: str, name: str) -> str:
        """Into it and out of the engine; how it is called there."""
        full = f"127.0.0.1:5000/{name}"
        self.engine.docker("tag", image, full)
        until(lambda: self.engine.docker("push", full, check=False).returncode == 0, "the registry takes an image")
        self.engine.docker("rmi", full)
        return full

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _die_with_us() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def engine() -> Iterator[Engine]:
    """One with the images made; skips by name where none can be started."""
    if (reason := why_not()) is not None:
        packages.not_here(reason)
    packages.install(PACKAGES)
    made = Engine()
    try:
        made.start().make_images()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Engine]:
    """For all tests that leave it running as they found it."""
    yield from engine()


@pytest.fixture(scope="module")
def own_engine() -> Iterator[Engine]:
    """For a module's tests that stop and kill it."""
    yield from engine()


@pytest.fixture(scope="session")
def registry(docker_engine: Engine) -> Iterator[Registry]:
    made = Registry(docker_engine)
    try:
        yield made
    finally:
        made.close()


__all__ = ["BARE", "PYTHON", "Engine", "Registry", "docker_engine", "own_engine", "registry"]
