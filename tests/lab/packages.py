"""What the lab takes from Debian: installed when a test first needs it and root runs it, and said aloud."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOCK = Path(tempfile.gettempdir()) / "mlpiped-lab-packages.lock"


def say(text: str) -> None:
    """To the terminal, whatever pytest captures: what is installed or takes minutes must not look like a hang."""
    print(f"lab: {text}", file=sys.__stderr__, flush=True)


def not_here(reason: str) -> NoReturn:
    """A skip says why; where CI means to have run everything, it is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"the lab must work in CI: {reason}")
    pytest.skip(reason)


def missing(tools: Mapping[str, str]) -> list[str]:
    """The packages of those of `tools` (program -> package) that are not on this machine."""
    return sorted({package for tool, package in tools.items() if shutil.which(tool, path=PATH) is None})


def why_not(what: str, tools: Mapping[str, str]) -> str | None:
    """Why `what` cannot be done here, as a sentence; None when nothing is known to stand in the way."""
    if sys.platform != "linux":
        return f"{what} works on Linux only"
    if os.geteuid() != 0:
        return f"{what} needs root"
    if missing(tools) and shutil.which("apt-get", path=PATH) is None:
        return f"{what} needs {' and '.join(missing(tools))}, and there is no apt-get to install them"
    return None


def install(tools: Mapping[str, str]) -> None:
    """Two test runs at once do it one after the other. Raises RuntimeError with the words of apt-get."""
    if not missing(tools):
        return
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = missing(tools)
        if not wanted:
            return
        say(f"installing Debian packages: {' '.join(wanted)}")
        # RUNLEVEL: no server of the packages' own is started
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        for command in ([*get, "update"], [*get, "install", "-y", "--no-install-recommends", *wanted]):
            done = subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=900
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
