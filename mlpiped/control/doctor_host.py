"""What `doctor` looks at on the daemon's own host: disks, permissions, folders, the kernel's limits, tools."""

from __future__ import annotations

import os
import stat
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread

from mlpiped.control.service import Finding
from mlpiped.files import mounts

if TYPE_CHECKING:
    from pathlib import Path

    from mlpiped.control.service import Service

FREE_WARN, FREE_FAIL = 0.10, 0.02  # of the disk
WATCHES_WARN = 16_384
TOOL_TIME = 10.0  # seconds


async def disk(service: Service) -> list[Finding]:
    found = []
    for name, path in {"state": service.about.state_dir, **service.about.datastores}.items():
        try:
            use = await anyio.to_thread.run_sync(os.statvfs, path, abandon_on_cancel=True)
        except OSError:
            continue  # `datastores` says so
        free = use.f_bavail / use.f_blocks if use.f_blocks else 1.0
        inodes = use.f_favail / use.f_files if use.f_files else 1.0
        least = min(free, inodes)
        what = f"`{name}` has {free:.0%} of its space and {inodes:.0%} of its inodes free"
        if least < FREE_WARN:
            level: Literal["warn", "fail"] = "fail" if least < FREE_FAIL else "warn"
            hint = "`mlpipectl gc --plan` shows what could go" if name == "state" else f"free space below {path}"
            found.append(Finding("disk", level, what, hint))
        else:
            found.append(Finding("disk", "ok", what))
    return found


async def socket(service: Service) -> list[Finding]:
    path = service.about.socket
    if path is None:
        return []
    try:
        found, folder = os.lstat(path), os.lstat(path.parent)
    except OSError as error:
        hint = "restart the daemon: its socket was removed"
        return [Finding("socket", "fail", f"`{path}` is gone: {(error.strerror or '').lower()}", hint)]
    if not stat.S_ISSOCK(found.st_mode):
        return [Finding("socket", "fail", f"`{path}` is no socket any more", "restart the daemon")]
    if found.st_mode & 0o007:
        return [Finding("socket", "warn", f"`{path}` is open to everybody", f"`chmod o-rwx {path}`")]
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        hint = f"`chmod o-w {path.parent}`"
        return [Finding("socket", "warn", f"everybody may write in `{path.parent}`, and replace the socket", hint)]
    if found.st_gid != os.getegid() and not _lets_in(folder, found.st_gid):
        hint = f"`chgrp {found.st_gid} {path.parent} && chmod g+x {path.parent}`"
        return [Finding("socket", "warn", f"`{path.parent}` keeps the group out that may use the socket", hint)]
    return [Finding("socket", "ok", f"`{path}`, mode {stat.S_IMODE(found.st_mode):04o}")]


def _lets_in(folder: os.stat_result, gid: int) -> bool:
    return bool(folder.st_mode & (0o010 if folder.st_gid == gid else 0o001))


async def datastores(service: Service) -> list[Finding]:
    found = []
    for name, path in service.about.datastores.items():
        listed = partial(_listed, path)
        try:
            with anyio.fail_after(5):
                await anyio.to_thread.run_sync(listed, abandon_on_cancel=True)
        except TimeoutError:
            hint = "its server may be away: `findmnt -T` names it"
            found.append(Finding("datastores", "fail", f"`{name}`: `{path}` does not answer", hint))
        except OSError as error:
            hint = "mount or make it, or correct the path in the config"
            reason = (error.strerror or str(error)).lower()
            found.append(Finding("datastores", "fail", f"`{name}`: `{path}` cannot be read: {reason}", hint))
        else:
            found.append(await _watched(name, path, service.about.watch.get(name, "auto")))
    return found


async def _watched(name: str, path: Path, watch: str) -> Finding:
    mount = await anyio.to_thread.run_sync(mounts.mount_of, os.fsencode(path))
    if watch == "inotify" and mounts.is_remote(mount.fstype):
        what = f"`{name}`: `{path}` is on {mount.fstype}: what other machines write there is not seen by inotify"
        return Finding("datastores", "warn", what, f'set `watch = "poll"` or `"auto"` in `[datastores.{name}]`')
    return Finding("datastores", "ok", f"`{name}`: `{path}`")


def _listed(path: Path) -> None:
    with os.scandir(path) as entries:
        next(entries, None)


async def inotify(service: Service) -> list[Finding]:
    found = []
    for name, least in (("max_user_watches", WATCHES_WARN), ("max_user_instances", 128)):
        try:
            with open(f"/proc/sys/fs/inotify/{name}") as file:  # noqa: ASYNC230  (it is /proc)
                limit = int(file.read())
        except (OSError, ValueError):
            continue
        if limit < least:
            hint = f"`sysctl fs.inotify.{name}={least * 4}`; until then folders are polled"
            found.append(Finding("inotify", "warn", f"{name} is {limit}", hint))
    return found or [Finding("inotify", "ok", "its limits are high enough")]


async def state(service: Service) -> list[Finding]:
    """The folder with everything in it: whose it is, who else may write, what lies below it."""
    folder = service.about.state_dir
    at = os.stat(folder)
    found = []
    if at.st_uid != os.geteuid():
        hint = f"`chown -R {os.geteuid()} {folder}`, with the daemon stopped"
        found.append(Finding("state", "warn", f"`{folder}` belongs to user {at.st_uid}, not to the daemon's", hint))
    if at.st_mode & 0o022:
        hint = f"`chmod go-w {folder}`"
        found.append(Finding("state", "fail", f"others may write in `{folder}`, and replace the ledger", hint))
    elif at.st_mode & 0o005:
        found.append(Finding("state", "warn", f"everybody may read `{folder}`", f"`chmod o-rx {folder}`"))
    if not (folder / "ballast").exists():
        hint = "free space on that disk: the ballast comes back by itself"
        found.append(Finding("state", "warn", "the space kept back for a full disk is used up or was removed", hint))
    mount = await anyio.to_thread.run_sync(mounts.mount_of, os.fsencode(folder))
    if mounts.is_remote(mount.fstype):
        hint = "stop the daemon and move the folder to a local disk; then correct `state_dir`"
        found.append(Finding("state", "warn", f"`{folder}` is on {mount.fstype}, which can damage the ledger", hint))
    return found or [Finding("state", "ok", f"`{folder}`, mode {stat.S_IMODE(at.st_mode):04o}")]


async def tools(service: Service) -> list[Finding]:
    """The interpreter of steps, and whether it can make the environments that some of them ask for."""
    python = service.about.python
    code = "import sys; print('.'.join(map(str, sys.version_info[:3]))); import venv, ensurepip"
    try:
        with anyio.fail_after(TOOL_TIME):
            done = await anyio.run_process(
                [python, "-I", "-c", code], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = "correct `python` in `[daemon]`, and restart the daemon"
        return [Finding("tools", "fail", f"the interpreter of steps cannot be run: `{python}`: {reason}", hint)]
    except TimeoutError:
        return [Finding("tools", "fail", f"the interpreter of steps does not answer: `{python}`", "is its disk away?")]
    version = done.stdout.decode(errors="replace").strip()
    if not version:
        return [Finding("tools", "fail", f"the interpreter of steps does not work: `{python}`", f"run `{python} -V`")]
    if done.returncode != 0:
        hint = "Debian: `apt install python3-venv`"
        what = f"`{python}` ({version}) cannot make a virtual environment: steps with requirements will wait"
        return [Finding("tools", "warn", what, hint)]
    return [Finding("tools", "ok", f"`{python}` is Python {version}, with venv")]
