"""What can be wrong with a daemon that seems to run, each with what to do about it. Looks, and changes nothing."""

from __future__ import annotations

import os
import stat
import time
from functools import partial
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread

from mlpiped.control.overview import faults_of
from mlpiped.control.service import Finding

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from mlpiped.control.service import Service

CHECK_TIME = 20.0  # seconds: a folder on a dead server must not hang the doctor
FREE_WARN, FREE_FAIL = 0.10, 0.02  # of the disk
WATCHES_WARN = 16_384
YEAR_2024 = 1_704_067_200_000_000  # microseconds


async def examine(service: Service) -> list[Finding]:
    """Every check, in a fixed order; one that cannot be made is a finding of its own."""
    checks: list[tuple[str, Callable[[Service], Awaitable[list[Finding]]]]] = [
        ("ledger", _ledger),
        ("sqlite", _sqlite),
        ("disk", _disk),
        ("socket", _socket),
        ("plugins", _plugins),
        ("datastores", _datastores),
        ("inotify", _inotify),
        ("clock", _clock),
        ("compute", _compute),
        ("arrivals", _arrivals),
    ]
    found: list[Finding] = []
    for name, check in checks:
        try:
            with anyio.fail_after(CHECK_TIME):
                found += await check(service)
        except TimeoutError:
            found.append(Finding(name, "fail", f"gave no answer within {CHECK_TIME:g} s", "a file system may hang"))
        except Exception as error:
            found.append(Finding(name, "fail", f"could not be looked at: {error}"))
    return found


async def _ledger(service: Service) -> list[Finding]:
    if service.ledger.full:
        return [Finding("ledger", "fail", "its disk is full: nothing is dispatched", "free space on that disk")]
    if service.ledger_faults is None:
        return []
    faults = await service.ledger_faults()
    if faults:
        hint = "stop the daemon, keep a copy of the state folder, and bring back a backup with `mlpiped restore FILE`"
        return [Finding("ledger", "fail", f"is damaged: {faults[0]}", hint)]
    return [Finding("ledger", "ok", "its structure is whole")]


async def _sqlite(service: Service) -> list[Finding]:
    version = service.about.sqlite
    if not version:
        return []
    text = ".".join(map(str, version))
    if has_wal_reset_bug(version):
        hint = "install `pysqlite3` (x86_64), or an SQLite of 3.51.3 or later"
        return [Finding("sqlite", "warn", f"version {text} can damage a ledger under rare circumstances", hint)]
    return [Finding("sqlite", "ok", f"version {text}")]


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """3.7.0 to 3.51.2, mended in 3.51.3 and in the older lines 3.44 (from .6) and 3.50 (from .7)."""
    mended = (3, 44, 6) <= version < (3, 45) or (3, 50, 7) <= version < (3, 51)
    return (3, 7, 0) <= version < (3, 51, 3) and not mended


async def _disk(service: Service) -> list[Finding]:
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


async def _socket(service: Service) -> list[Finding]:
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


async def _plugins(service: Service) -> list[Finding]:
    faults = faults_of(service)
    found = [Finding("plugins", "fail", str(fault).split("\n")[0], fault.hint or "correct it") for fault in faults]
    missing = [folder for folder in service.about.plugins if not folder.is_dir()]
    found += [Finding("plugins", "warn", f"the folder `{f}` is not there", f"`mkdir {f}`") for f in missing]
    return found or [Finding("plugins", "ok", f"{len(list(service.registry.all()))} pipelines, none broken")]


async def _datastores(service: Service) -> list[Finding]:
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
            found.append(Finding("datastores", "ok", f"`{name}`: `{path}`"))
    return found


def _listed(path: Path) -> None:
    with os.scandir(path) as entries:
        next(entries, None)


async def _inotify(service: Service) -> list[Finding]:
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


async def _clock(service: Service) -> list[Finding]:
    now = service.clock.now()
    if now < YEAR_2024:
        hint = "set it, and turn on time synchronisation: `timedatectl set-ntp true`"
        return [Finding("clock", "fail", f"says {time.strftime('%Y-%m-%d', time.gmtime(now / 1e6))}", hint)]
    last = await service.ledger.latest()
    if last is not None and last.created_at > now + 60_000_000:
        ahead = (last.created_at - now) / 60e6
        hint = "was the clock set back? `timedatectl` shows whether it is synchronised"
        return [Finding("clock", "warn", f"is {ahead:.0f} min behind the newest run", hint)]
    return [Finding("clock", "ok", "is not behind the ledger")]


async def _compute(service: Service) -> list[Finding]:
    computes = list(service.actions.compute())
    found = [
        Finding("compute", "fail", f"`{c['name']}`: {c['health']}", "work for it waits, and goes on by itself")
        for c in computes
        if c["health"]
    ]
    return found or [Finding("compute", "ok", ", ".join(f"`{c['name']}`" for c in computes) or "none")]


async def _arrivals(service: Service) -> list[Finding]:
    """Triggers that look at files the slow way, and why."""
    polled = [v for v in service.schedules() if v.kind == "arrival" and v.mode.startswith("poll")]
    return [Finding("arrivals", "ok", f"`{v.pipeline}` looks at `{v.describe}` by {v.mode}") for v in polled]
