"""What the lab's machine is made of: a Debian root folder with a real systemd, and wheels of the project and of what
it depends on. Everything that takes long is made once and kept in a folder outside of the project.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lab import packages

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).resolve().parents[2]
SUITE, PYTHON = "bookworm", "3.11"  # Debian 12 and the Python that it brings
PACKAGES = ("dbus", "dbus-user-session", "libpam-systemd", "python3-venv", "systemd", "systemd-sysv")
TOOLS = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container"}
SHIPPED = ("mlpiped", "pyproject.toml", "LICENSE", "README.md")


def cache() -> Path:
    """`$MLPIPED_LAB_CACHE`, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MLPIPED_LAB_CACHE") or Path(home) / "mlpiped-lab")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def why_not() -> str | None:
    return packages.why_not("booting a real systemd", TOOLS)


def root() -> Path:
    """The root folder to boot copies of. Never booted or changed itself."""
    name = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]
    folder = cache() / f"{SUITE}-{name}"
    with _alone():
        packages.install(TOOLS)
        if not folder.is_dir():
            packages.say(f"making {folder} (about a minute, 300 MB, once)")
            draft = folder.with_suffix(".part")
            shutil.rmtree(draft, ignore_errors=True)
            include = "--include=" + ",".join(PACKAGES)
            _do(["debootstrap", "--variant=minbase", include, SUITE, str(draft)])
            shutil.rmtree(draft / "var/cache/apt/archives", ignore_errors=True)
            (draft / "etc/machine-id").write_text("")  # each boot of a copy is another machine
            draft.rename(folder)
    return folder


def wheels() -> Path:
    """A folder with a wheel of everything that the project needs, for the Python in `root()`."""
    needed: list[str] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    name = hashlib.sha256("\n".join(needed).encode()).hexdigest()[:12]
    folder = cache() / f"wheels-{PYTHON}-{name}"
    with _alone():
        if not folder.is_dir():
            packages.say(f"fetching wheels into {folder} (once)")
            draft = folder.with_suffix(".part")
            shutil.rmtree(draft, ignore_errors=True)
            tags = [f"--platform=manylinux_2_{minor}_{platform.machine()}" for minor in (17, 28, 34)]
            tags += [f"--platform=manylinux2014_{platform.machine()}", f"--python-version={PYTHON}"]
            _do([*_pip("download"), "--only-binary=:all:", *tags, "-d", str(draft), *needed])
            draft.rename(folder)
    return folder


def wheel(into: Path, version: str | None = None) -> Path:
    """A wheel of the project as it is now, or said to be of another `version`. The project's folder stays untouched."""
    into.mkdir(parents=True, exist_ok=True)
    tree = into / f".tree-{version or 'now'}"
    tree.mkdir()
    for name in SHIPPED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree / name)
    if version is not None:
        for name, key in (("pyproject.toml", "version"), ("mlpiped/__init__.py", "__version__")):
            text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{version}"', (tree / name).read_text(), flags=re.M)
            assert count == 1, name
            (tree / name).write_text(text)
    made = into / f".made-{version or 'now'}"
    _do([*_pip("wheel"), "--no-deps", "-w", str(made), str(tree)])
    shutil.rmtree(tree)
    (found,) = made.glob("*.whl")
    target = found.rename(into / found.name)
    made.rmdir()
    return target


def _pip(verb: str) -> list[str]:
    return [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-input"]


@contextmanager
def _alone() -> Iterator[None]:
    """Two test runs at once make nothing twice."""
    with (cache() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _do(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-2000:]
        raise RuntimeError(f"{' '.join(command[:4])}… ended with {done.returncode}:\n{said}")
