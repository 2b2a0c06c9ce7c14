"""What retention does to folders: looks which are old, and removes them. Blocking: for a thread.

Each removal looks once more, under whatever keeps others away, at what made the folder old: it may be in use again.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from mlpiped.artifacts import copying
from mlpiped.backends import folder as jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from pathlib import Path

_ENVIRONMENT = re.compile(r"[0-9a-f]{32}")
_BUILT = ".mlpiped-complete"
NOATIME = 1024  # ST_NOATIME of statvfs


def size_of(path: str) -> int:
    """Bytes of all that lies below; what cannot be read counts nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(f"{folder}/{name}").st_size
    return total


# --- job folders ----------------------------------------------------------------------------------------------------
def listed(jobs_dir: Path) -> list[tuple[str, int]]:
    """(token, µs of its last change) of every job's folder, sorted: of one that is a link to elsewhere, too."""
    try:
        with os.scandir(jobs_dir) as entries:
            return sorted(
                (entry.name, entry.stat().st_mtime_ns // 1000)
                for entry in entries
                if jobs.TOKEN.fullmatch(entry.name) and entry.is_dir()
            )
    except FileNotFoundError:
        return []


def clear_job(
    folder: Path, *, keep_metrics: bool, only_look: bool = False, first: Callable[[], object] = lambda: None
) -> int | None:
    """Remove a job's folder, or all of it but its metrics. Bytes freed; None when there is nothing to remove.

    A job that still runs is left alone. `first` is called before anything is removed.
    """
    path = os.path.realpath(folder)
    try:
        names = os.listdir(path)
        keep = keep_metrics and jobs.measured(path)
        going = [name for name in names if not (keep and name == jobs.METRICS)]
        if (keep and not going) or jobs.held(path):
            return None
        size = sum(_size(f"{path}/{name}") for name in going)
        if only_look:
            return size
        first()
        jobs.discard(path, keep_logs=False, keep_metrics=keep)
        if not keep and folder.is_symlink():
            folder.unlink()
    except FileNotFoundError:
        return None
    return size


def sweep_gone(folder: Path) -> None:
    """What a removal that was cut off left."""
    for name in _names(folder):
        if name.startswith(".") and name.endswith(".gone"):
            copying.erase(os.fspath(folder / name))


def _size(path: str) -> int:
    if os.path.isdir(path) and not os.path.islink(path):
        return size_of(path)
    with suppress(OSError):
        return os.lstat(path).st_size
    return 0


def processes(jobs_dir: Path) -> dict[str, list[int]]:
    """Token -> pids of the processes that were started as a job of this folder and run now."""
    found: dict[str, list[int]] = {}
    mark = re.compile(rb"(?:^|\0)MLPIPED_METRICS=" + re.escape(os.fsencode(jobs_dir)) + rb"/([^/\0]+)/")
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if match := mark.search(file.read()):
                found.setdefault(os.fsdecode(match[1]), []).append(int(name))
    return {token: sorted(pids) for token, pids in found.items()}


# --- code -----------------------------------------------------------------------------------------------------------
def old_code(store: Path, used: Collection[str], horizon: float) -> list[str]:
    """`<hh>/<rest>` of snapshots that are not in `used` and were last run from before `horizon`; drafts too."""
    found = []
    for head in _names(store):
        for name in _names(store / head):
            if head + name in used:
                continue
            with suppress(FileNotFoundError):
                if os.lstat(store / head / name).st_mtime < horizon:
                    found.append(f"{head}/{name}")
    return found


def drop_code(store: Path, name: str, horizon: float, only_look: bool) -> int | None:
    """Bytes freed; None when it is used again, or gone."""
    path = os.fspath(store / name)
    size = size_of(path)
    if only_look:
        return size
    return size if _put_aside(path, path, horizon) else None


def _put_aside(path: str, sign: str, horizon: float) -> bool:
    """Out of the way by one rename, then a last look at `sign`'s mtime, then for good: or back again."""
    aside = f"{os.path.dirname(path)}/.{secrets.token_hex(8)}.gone"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    with suppress(OSError):
        if os.stat(aside + sign[len(path) :]).st_mtime >= horizon:
            os.rename(aside, path)
            return False
    copying.erase(aside)
    return True


# --- environments ---------------------------------------------------------------------------------------------------
def old_environments(envs_dir: Path, horizon: float) -> list[str]:
    """Those in which no step has started since `horizon`. Where the file system does not tell, none."""
    try:
        if os.statvfs(envs_dir).f_flag & NOATIME:
            return []
    except FileNotFoundError:
        return []
    names = [name for name in _names(envs_dir) if _ENVIRONMENT.fullmatch(name) and (envs_dir / name).is_dir()]
    return [name for name in names if (last := _last_use(envs_dir / name)) is not None and last < horizon]


def _last_use(home: Path) -> float | None:
    """Every start of its interpreter reads pyvenv.cfg; a backend may touch the mark of completeness as well."""
    try:
        cfg, top = os.stat(home / "pyvenv.cfg"), os.stat(home)
    except OSError:
        return None
    last = max(cfg.st_atime, cfg.st_mtime, top.st_mtime)
    with suppress(OSError):
        last = max(last, os.stat(home / _BUILT).st_mtime)
    return last


def drop_environment(envs_dir: Path, name: str, horizon: float, only_look: bool) -> int | None:
    """Bytes freed; None when it is in use again, or somebody builds it."""
    home = envs_dir / name
    size = size_of(os.fspath(home))
    if only_look:
        return size
    fd = os.open(envs_dir / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        last = _last_use(home)
        if last is None or last >= horizon or not _put_aside(os.fspath(home), f"{home}/{_BUILT}", horizon):
            return None
    except BlockingIOError:
        return None
    finally:
        os.close(fd)
    for left in (".log", ".requirements.txt"):
        home.with_suffix(left).unlink(missing_ok=True)
    return size


# --- the stat cache -------------------------------------------------------------------------------------------------
def empty_roots(roots: Iterable[str]) -> list[bytes]:
    """Those that cannot be listed or hold nothing: it may be a mount that is away."""
    found = []
    for root in roots:
        try:
            with os.scandir(root) as entries:
                if next(entries, None) is not None:
                    continue
        except OSError:
            pass
        found.append(os.fsencode(root.rstrip("/")) + b"/")
    return found


def missing(rows: Sequence[tuple[bytes, int]], away: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """Those of (path, …) that do not exist any more."""
    found = []
    for path, hashed in rows:
        if any(path.startswith(root) for root in away):
            continue
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            found.append((path, hashed))
        except OSError:
            continue
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
