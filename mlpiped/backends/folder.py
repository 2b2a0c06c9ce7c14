"""The job folder (its format: `base.py`) from the daemon's side: built, claimed, fenced, read. All of it blocks.

A folder appears by one rename and is complete then; who loses that rename finds it there. So a token's folder can be
built by several at once, before and after a crash, and is built once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from typing import TYPE_CHECKING, Any

from mlpiped.backends.base import Exited, Handle, Job, NeverRan
from mlpiped.backends.supervisor import claim, sync_folder
from mlpiped.errors import InvalidJob

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path, PurePath

TOKEN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
KEPT = frozenset(
    {"claim", "exit.json", "metrics.jsonl", "params.json", "stderr", "stdout"}
)  # of a job that is discarded
DRAFT_LIFE = 600.0  # seconds; a builder needs less
FENCED = {"v": 1, "fenced": True}


def at(jobs_dir: Path, token: str) -> Path:
    """The folder of `token`."""
    if not TOKEN.fullmatch(token):
        raise InvalidJob(f"no token that can name a folder: {token!r:.200}")
    return jobs_dir / token


# --- what is executed, for a machine on which the folder lies at `root`


def output_paths(root: PurePath, job: Job) -> dict[str, str]:
    return {output.name: str(root / "out" / output.name / output.file_name) for output in job.outputs}


def variables(root: PurePath, job: Job, input_paths: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """What every step finds in its environment, besides its machine's base environment."""
    paths = job.inputs if input_paths is None else input_paths
    return {
        **job.env,
        **{name: "\n".join(paths[port]) for name, port in job.input_env.items()},
        "MLPIPED_TOKEN": job.token,
        "MLPIPED_METRICS": str(root / "metrics.jsonl"),
        "MLPIPED_PARAMS": str(root / "params.json"),
        "MLPIPED_SCRATCH": str(root / "scratch"),
    }


def order(argv: list[str], env: Mapping[str, str], job: Job) -> dict[str, Any]:
    """The contents of job.json. Raises InvalidJob for what no machine can execute."""
    if not argv or not argv[0]:
        raise InvalidJob("the step has no command")
    if any("\0" in text for text in argv):
        raise InvalidJob("an argument of the command holds a NUL byte")
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidJob(f"no environment variable can have this name or value: {name!r:.200}")
    facts = {"token": job.token, "memory": job.memory, "timeout": job.timeout, "grace": job.grace}
    return {"v": 1, "argv": ["/bin/sh", "-c", argv[0]] if job.shell else argv, "env": dict(env), **facts}


# --- made


def build(folder: Path, job: Job, orders: Mapping[str, Any]) -> None:
    """Make the folder, unless it is there. Raises OSError, and leaves nothing behind then."""
    if folder.exists():
        return
    draft = folder.with_name(f".{job.token}.{secrets.token_hex(6)}")
    os.mkdir(draft, 0o755)
    try:
        for name in ("out", "scratch", *(f"out/{output.name}" for output in job.outputs)):
            os.mkdir(draft / name)
        if job.code is None:
            os.mkdir(draft / "work")
        else:
            _copy_tree(job.code, os.fspath(draft / "work"))
        _write(draft / "params.json", dict(job.parameters), 0o644)
        _write(draft / "job.json", orders, 0o600)
        _settle(draft, folder)
    except BaseException:
        _remove(draft)
        raise


def _settle(draft: Path, folder: Path) -> bool:
    """Rename into place; False (and the draft is gone) when somebody was first."""
    try:
        os.rename(draft, folder)
        return True
    except OSError:
        if not folder.exists():
            raise
        _remove(draft)
        return False


def _write(path: Path, content: Any, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "w", encoding="ascii") as file:
        json.dump(content, file)


def _copy_tree(source: str, target: str) -> None:
    """A writable copy: the snapshot is read-only and shared, `work/` belongs to the step. Times are not kept."""
    os.mkdir(target)
    with os.scandir(source) as entries:
        for entry in entries:
            to = f"{target}/{entry.name}"
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), to)
            elif entry.is_dir():
                _copy_tree(entry.path, to)
            elif entry.is_file():
                shutil.copyfile(entry.path, to)
                os.chmod(to, stat.S_IMODE(entry.stat().st_mode) | stat.S_IWUSR | stat.S_IRUSR)


# --- claimed, fenced, held


def read_claim(folder: Path) -> Handle | None:
    """Who claimed the token, as a handle; None: nobody yet, or the fence (see `fenced`)."""
    record = _claim_record(folder)
    return None if record is None or record.get("fenced") else {**record, "token": folder.name}


def fenced(folder: Path) -> bool:
    record = _claim_record(folder)
    return record is not None and bool(record.get("fenced"))


def _claim_record(folder: Path) -> dict[str, Any] | None:
    record = _read_json(folder / "claim" / "handle.json")
    if record is not None:
        return record
    # a claim whose handle a power cut took: somebody began, and is gone
    return {"v": 1, "pid": 0, "start": 0, "boot": ""} if (folder / "claim").exists() else None


def fence(folder: Path) -> NeverRan | Handle:
    """Make the claim ourselves, so that no supervisor can; or the handle of the one that was first."""
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
        os.mkdir(draft, 0o755)
        lock = claim(os.fspath(draft), FENCED)
        if lock is not None:
            os.close(lock)
        _settle(draft, folder)
        sync_folder(os.fspath(folder.parent))
    lock = claim(os.fspath(folder), FENCED)
    if lock is not None:
        os.close(lock)
    handle = read_claim(folder)
    if handle is not None:
        return handle
    (folder / "job.json").unlink(missing_ok=True)  # it may hold secrets, and nobody will read it
    return NeverRan("its token was fenced before it started")


def held(folder: Path) -> bool:
    """Whether the claim's lock is held: the supervisor lives, whatever its pid is in our eyes."""
    try:
        fd = os.open(folder / "claim" / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask do not mistake each other for it
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


# --- read


def _read_json(path: Path) -> dict[str, Any] | None:
    """None: not there, empty or garbled (a power cut leaves such files), which is the same: no statement."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def exited(record: Mapping[str, Any]) -> Exited | None:
    """The outcome that an exit.json tells; None when it tells none."""
    if record.get("v") != 1 or not {"code", "signal", "error"} <= record.keys():
        return None
    names = ("code", "signal", "timed_out", "cancelled", "error", "started", "ended", "cpu", "max_rss")
    return Exited(**{name: record[name] for name in names if name in record})


def witness(folder: Path) -> Exited | None:
    record = _read_json(folder / "exit.json")
    return None if record is None else exited(record)


def over(folder: Path) -> bool:
    """Whether the job has ended, so that its files do not change any more."""
    return not held(folder) and (witness(folder) is not None or read_claim(folder) is not None or fenced(folder))


def read_stream(folder: Path, stream: str, offset: int, limit: int = 1 << 16) -> bytes:
    """At most `limit` bytes from `offset`; b"" at the end, and when there is no such file."""
    try:
        with open(folder / stream, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(limit) or b""
    except FileNotFoundError:
        return b""


# --- removed


def discard(folder: Path, *, keep_logs: bool) -> None:
    if not keep_logs:
        _remove(folder)
        return
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        if name not in KEPT:
            _remove(folder / name)


def _remove(path: Path) -> None:
    def unlock(function: Callable[..., Any], name: str, _: Any) -> None:
        """A step may have taken away its own right to write in a folder."""
        try:
            os.chmod(os.path.dirname(name), 0o700)
            if os.path.isdir(name) and not os.path.islink(name):
                os.chmod(name, 0o700)
                shutil.rmtree(name, ignore_errors=True)
            else:
                function(name)
        except FileNotFoundError:
            pass

    try:
        os.rmdir(path)  # most of them are empty
    except NotADirectoryError:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError:
        shutil.rmtree(path, onerror=unlock)


def sweep_drafts(jobs_dir: Path) -> None:
    """Remove what builders that crashed left behind (it may hold secrets), and nothing that is being built."""
    for draft in jobs_dir.glob(".*"):
        try:
            if time.time() - draft.stat().st_mtime > DRAFT_LIFE:
                _remove(draft)
        except FileNotFoundError:
            pass
