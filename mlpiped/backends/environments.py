"""What a step on this host finds around it: a clean environment, an interpreter, and the packages that it asked for.

A virtual environment is built once per content of (interpreter, requirements), in its final place, since the scripts in
its bin/ hold that path; it counts when its marker is there. The builder holds a lock that pip inherits: a daemon that
was killed and started again does not build in a folder in which the old one's pip still writes.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

import mlpiped
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from mlpiped.backends.base import Job

SCRUBBED = frozenset(
    "NOTIFY_SOCKET INVOCATION_ID JOURNAL_STREAM MAINPID CREDENTIALS_DIRECTORY RUNTIME_DIRECTORY STATE_DIRECTORY "
    "CACHE_DIRECTORY LOGS_DIRECTORY CONFIGURATION_DIRECTORY SYSTEMD_EXEC_PID MANAGERPID FDSTORE VIRTUAL_ENV".split()
)
SCRUBBED_PREFIXES = ("LISTEN_", "WATCHDOG_", "PYTHON", "MLPIPED_", "MEMORY_PRESSURE_")
PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-r")
NETWORK_SIGNS = ("NewConnectionError", "ConnectTimeout", "ReadTimeout", "name resolution", "ProxyError", "503 Server")
DONE = ".mlpiped-complete"


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """The daemon's environment, less what is meant for the daemon itself."""
    return {
        name: value
        for name, value in environ.items()
        if name not in SCRUBBED and not name.startswith(SCRUBBED_PREFIXES)
    }


class Environments:
    def __init__(
        self, envs_dir: Path, python: str = sys.executable, which: Callable[[str], str | None] = shutil.which
    ) -> None:
        self.envs_dir = envs_dir
        self._sdk = envs_dir / ".sdk"
        self.python = python
        self._which = which
        self._base = clean(os.environ)
        self._found: dict[str, tuple[str, str]] = {}  # what was asked for -> (interpreter, its version)
        self._locks: dict[str, anyio.Lock] = {}

    def prepare(self) -> None:
        """Make the folder, with nothing else in it, from which every step can `import mlpiped`.

        And `python`, where the daemon's own interpreter has no such name (`/usr/bin/python3`).
        """
        (self._sdk / "bin").mkdir(parents=True, exist_ok=True)
        package = os.path.dirname(os.path.abspath(mlpiped.__file__))
        link = self._sdk / "mlpiped"
        if not link.is_symlink() or os.readlink(link) != package:
            draft = self._sdk / f".mlpiped.{os.getpid()}"
            draft.unlink(missing_ok=True)
            draft.symlink_to(package)
            draft.rename(link)
        script = self._sdk / "bin" / "python"
        text = f"#!/bin/sh\nexec '{self.python}' \"$@\"\n"
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
            script.chmod(0o755)

    @staticmethod
    def wanted(job: Job) -> bool:
        """Whether `of` may have to build something, which takes minutes."""
        return job.requirements is not None or job.python is not None

    async def of(self, job: Job) -> dict[str, str]:
        """The base environment for `job`; builds what it needs first. Raises InvalidJob, BackendUnavailable."""
        env = dict(self._base)
        folder = os.path.dirname(self.python)
        if job.requirements is not None or (job.python is not None and not await self._is_ours(job.python)):
            home = await self.build(job.python, job.requirements or "")
            env["VIRTUAL_ENV"] = str(home)
            folder = str(home / "bin")
        env["PATH"] = f"{folder}:{self._sdk}/bin:{env.get('PATH', os.defpath)}"
        env["PYTHONPATH"] = str(self._sdk)
        env["PYTHONUNBUFFERED"] = "1"  # a log that is followed shows a line when it is printed
        return env

    async def _is_ours(self, version: str) -> bool:
        _, ours = await self._interpreter(None)
        return _fits(version, ours)

    async def _interpreter(self, version: str | None) -> tuple[str, str]:
        """(path, full version) of the interpreter that was asked for; None: the daemon's own."""
        key = version or ""
        if key not in self._found:
            name = self.python if version is None else "python" + ".".join(version.split(".")[:2])
            path = self.python if version is None else self._which(name)
            asked = await _ask(path) if path is not None else None
            if asked is None or (version is not None and not _fits(version, asked[1])):
                there = f"; `{name}` is {asked[1]}" if asked else ""
                raise InvalidJob(
                    f"python {version} is not installed on this host{there}",
                    hint=f"install `{name}` so that it is on the daemon's PATH, or ask for another version",
                )
            self._found[key] = asked
        return self._found[key]

    async def build(self, version: str | None, requirements: str) -> Path:
        """The virtual environment for this content; built unless it is there."""
        if version is not None and await self._is_ours(version):
            version = None
        python, full = await self._interpreter(version)
        content = f"{python}\0{'.'.join(full.split('.')[:2])}\0{requirements}"
        digest = hashlib.blake2b(content.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        home = self.envs_dir / digest
        async with self._locks.setdefault(digest, anyio.Lock()):
            if not await anyio.to_thread.run_sync(_usable, home):
                async with _locked(self.envs_dir / f"{digest}.lock") as lock:
                    if not await anyio.to_thread.run_sync(_usable, home):
                        await self._make(home, python, requirements, lock)
        return home

    async def _make(self, home: Path, python: str, requirements: str, lock: int) -> None:
        log = home.with_suffix(".log")
        wanted = home.with_suffix(".requirements.txt")

        def clear() -> None:
            shutil.rmtree(home, ignore_errors=True)
            log.unlink(missing_ok=True)
            wanted.write_text(requirements, encoding="utf-8", errors="surrogateescape")

        await anyio.to_thread.run_sync(clear)
        if await _run([python, "-m", "venv", str(home)], log, lock) != 0:
            raise BackendUnavailable(
                f"cannot make a virtual environment: {_last_lines(log, 2)} (log: {log})",
                hint=f"see whether `{python} -m venv` works (Debian: install `python3-venv`)",
            )
        if requirements.strip():
            if await _run([str(home / "bin" / "python"), *PIP, str(wanted)], log, lock) != 0:
                text = log.read_text(errors="replace")
                kind = BackendUnavailable if any(sign in text for sign in NETWORK_SIGNS) else InvalidJob
                raise kind(f"cannot install the step's requirements: {_last_lines(log, 4)}", hint=f"see {log}")
        (home / DONE).touch()


def _usable(home: Path) -> bool:
    """Finished, and its interpreter has not been uninstalled since."""
    return (home / DONE).exists() and os.access(home / "bin" / "python", os.X_OK)


def _fits(version: str, full: str) -> bool:
    return full.split(".")[: len(version.split("."))] == version.split(".")


async def _ask(path: str) -> tuple[str, str] | None:
    """(real path, version) of an interpreter, by its own words: a name on PATH may be a shim that fails."""
    code = "import sys; print(sys.executable, '.'.join(map(str, sys.version_info[:3])), sep='\\n')"
    try:
        with anyio.fail_after(30):
            done = await anyio.run_process([path, "-I", "-S", "-c", code], check=False, env=clean(os.environ))
    except (OSError, TimeoutError):
        return None
    words = done.stdout.decode(errors="surrogateescape").split("\n")
    return (words[0], words[1]) if done.returncode == 0 and len(words) > 1 else None


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[int]:
    """Hold the lock file; its descriptor may be handed to children, who then hold it too."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # the pip of a daemon that was killed
                await anyio.sleep(0.5)
        yield fd
    finally:
        os.close(fd)


async def _run(command: list[str], log: Path, lock: int) -> int:
    """Exit status; what it says is appended to `log`. Cancelled, it and all that it started are killed."""
    env = {**clean(os.environ), "PIP_REQUIRE_VIRTUALENV": "1"}
    with await anyio.to_thread.run_sync(open, log, "ab", 0) as file:
        process = await anyio.open_process(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env,
            start_new_session=True, pass_fds=(lock,),
        )  # fmt: skip
    try:
        return await process.wait()
    except asyncio.CancelledError:
        os.killpg(process.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            await process.wait()
        raise


def _last_lines(log: Path, count: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]  # pip ends with notices about itself
    return "; ".join((errors or lines)[-count:])[:1000] or "it said nothing"
