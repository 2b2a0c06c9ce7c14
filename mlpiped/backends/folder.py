"""The job folder (its format: `base.py`) from the daemon's side: built, claimed, fenced, read. All of it blocks.

Most folders are made by the supervisor, from the order that it gets. One that needs a copy of the code, or whose order
is too long for a packet, is built here: it appears by one rename and is complete then; who loses that rename finds it
there. Either way a token's folder can be built by several at once, before and after a crash.
"""

from __future__ import annotations

import dataclasses
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
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    Place = str | os.PathLike[str]

TOKEN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
METRICS = "metrics.jsonl"
KEPT = frozenset(
    {"claim", "exit.json", METRICS, "params.json", "slurm.cancel", "stderr", "stdout"}
)  # of a job that is discarded
NO_PARAMETERS = ".no-params.json"  # in the folder of all jobs: `{}`, for the jobs that have none
DRAFT_LIFE = 600.0  # seconds; a builder needs less
FENCED = {"v": 1, "fenced": True}


def at(jobs_dir: Place, token: str) -> str:
    """The folder of `token`."""
    if not TOKEN.fullmatch(token):
        raise InvalidJob(f"no token that can name a folder: {token!r:.200}")
    return f"{jobs_dir}/{token}"


def prepare(jobs_dir: Path) -> None:
    """Make the folder of all jobs, and remove what builders that crashed left in it."""
    jobs_dir.mkdir(parents=True, exist_ok=True)
    empty, draft = jobs_dir / NO_PARAMETERS, jobs_dir / f"{NO_PARAMETERS}.{secrets.token_hex(6)}"
    if _read_json(empty) != {}:
        _write(draft, "{}", 0o444)
        draft.rename(empty)
    sweep_drafts(jobs_dir)


# --- what is executed, for a machine on which the folder lies at `root`


def output_paths(root: Place, job: Job) -> dict[str, str]:
    return {output.name: f"{root}/out/{output.name}/{output.file_name}" for output in job.outputs}


def variables(root: Place, job: Job, input_paths: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """What every step finds in its environment, besides its machine's base environment."""
    paths = job.inputs if input_paths is None else input_paths
    params = f"{root}/params.json" if job.parameters else f"{os.path.dirname(root)}/{NO_PARAMETERS}"
    return {
        **job.env,
        **{name: "\n".join(paths[port]) for name, port in job.input_env.items()},
        "MLPIPED_TOKEN": job.token,
        "MLPIPED_METRICS": f"{root}/{METRICS}",
        "MLPIPED_PARAMS": params,
        "MLPIPED_SCRATCH": f"{root}/{'work' if job.code is None else 'scratch'}",
    }


def contents(job: Job) -> tuple[list[str], str | None]:
    """(the folders in a job's folder, parents first; the text of its params.json): only what the job has use for."""
    make = ["work"] if job.code is None else ["work", "scratch"]
    if job.outputs:
        make += ["out", *(f"out/{output.name}" for output in job.outputs)]
    return make, json.dumps(dict(job.parameters)) if job.parameters else None


def order(argv: list[str], env: Mapping[str, str], job: Job) -> dict[str, Any]:
    """The contents of job.json. Raises InvalidJob for what no machine can execute."""
    if not argv or not argv[0]:
        raise InvalidJob("the step has no command")
    if any("\0" in text for text in argv):
        raise InvalidJob("an argument of the command holds a NUL byte")
    if "\0" in "".join(env.values()) or any(not name or "=" in name or "\0" in name for name in env):
        wrong = next(n for n, value in env.items() if not n or "=" in n or "\0" in n + value)
        raise InvalidJob(f"no environment variable can have this name or value: {wrong!r:.200}")
    facts = {"token": job.token, "memory": job.memory, "timeout": job.timeout, "grace": job.grace}
    return {"v": 1, "argv": ["/bin/sh", "-c", argv[0]] if job.shell else argv, "env": dict(env), **facts}


# --- made


def build(folder: str, job: Job, order: str | None) -> None:
    """Make the folder, unless it is there; with `order` as its job.json. Raises OSError, and leaves nothing then."""
    if os.path.exists(folder):
        return
    draft = f"{os.path.dirname(folder)}/.{job.token}.{secrets.token_hex(6)}"
    make, params = contents(job)
    os.mkdir(draft, 0o755)
    try:
        if job.code is not None:
            make.remove("work")
            _copy_tree(job.code, f"{draft}/work")
        for name in make:
            os.mkdir(f"{draft}/{name}")
        if params is not None:
            _write(f"{draft}/params.json", params, 0o644)
        if order is not None:
            _write(f"{draft}/job.json", order, 0o600)
        _settle(draft, folder)
    except BaseException:
        _remove(draft)
        raise


def _settle(draft: str, folder: str) -> None:
    """Rename into place; the draft is gone when somebody was first."""
    try:
        os.rename(draft, folder)
    except OSError:
        if not os.path.exists(folder):
            raise
        _remove(draft)


def _write(path: Place, content: str, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "w", encoding="ascii") as file:
        file.write(content)


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


def read_claim(folder: Place) -> Handle | None:
    """Who claimed the token, as a handle; None: nobody yet, or the fence (see `fenced`)."""
    record = _claim_record(folder)
    return None if record is None or record.get("fenced") else {**record, "token": os.path.basename(folder)}


def fenced(folder: Place) -> bool:
    record = _claim_record(folder)
    return record is not None and bool(record.get("fenced"))


def _claim_record(folder: Place) -> dict[str, Any] | None:
    path = f"{folder}/claim/handle.json"
    record = _read_json(path)
    if record is not None or not os.path.exists(f"{folder}/claim"):
        return record
    # made since we looked; or a claim whose handle a power cut took: somebody began, and is gone
    return _read_json(path) or {"v": 1, "pid": 0, "start": 0, "boot": ""}


def fence(folder: Place) -> NeverRan | Handle:
    """Make the claim ourselves, so that no supervisor can; or the handle of the one that was first."""
    new = not os.path.exists(folder)
    while True:
        try:
            lock = claim(os.fspath(folder), FENCED, make=())  # makes the folder too
            break
        except FileNotFoundError:  # a builder has put its folder in the place of ours, which was empty
            if not os.path.isdir(folder):
                raise
    if lock is not None:
        os.fsync(lock)  # a claim without its word, as a power cut leaves it, would pass for somebody's who began
        os.close(lock)
        sync_folder(f"{folder}/claim")
    if new:
        sync_folder(os.path.dirname(folder))
    handle = read_claim(folder)
    if handle is not None:
        return handle
    _remove(f"{folder}/job.json")  # it may hold secrets, and nobody will read it
    return NeverRan("its token was fenced before it started")


def held(folder: Place) -> bool:
    """Whether the claim is locked: the supervisor lives, whatever its pid is in our eyes."""
    try:
        fd = os.open(f"{folder}/claim/handle.json", os.O_RDONLY | os.O_CLOEXEC)
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


def _read_json(path: Place) -> dict[str, Any] | None:
    """None: not there, empty or garbled (a power cut leaves such files), which is the same: no statement."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


_TOLD = frozenset(field.name for field in dataclasses.fields(Exited))


def exited(record: Mapping[str, Any]) -> Exited | None:
    """The outcome that an exit.json tells; None when it tells none."""
    if record.get("v") != 1 or not {"code", "signal", "error"} <= record.keys():
        return None
    return Exited(**{name: record[name] for name in _TOLD if name in record})


def witness(folder: Place) -> Exited | None:
    record = _read_json(f"{folder}/exit.json")
    return None if record is None else exited(record)


def outlives(folder: Place, said: Exited) -> bool:
    """Whether the witness counts after a reboot: a success does if its outputs were made durable before it was."""
    return said.code != 0 or bool((_read_json(f"{folder}/exit.json") or {}).get("synced", True))


def over(folder: Place) -> bool:
    """Whether the job has ended, so that its files do not change any more."""
    return not held(folder) and (witness(folder) is not None or read_claim(folder) is not None or fenced(folder))


def from_start(folder: Place, stream: str, offset: int) -> int:
    """A negative offset as one from the start."""
    try:
        return offset if offset >= 0 else max(0, os.stat(f"{folder}/{stream}").st_size + offset)
    except FileNotFoundError:
        return 0


def read_stream(folder: Place, stream: str, offset: int, limit: int = 1 << 16) -> bytes:
    """At most `limit` bytes from `offset`; b"" at the end, and when there is no such file."""
    try:
        with open(f"{folder}/{stream}", "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(limit) or b""
    except FileNotFoundError:
        return b""


# --- removed


def discard_all(wanted: Iterable[tuple[str, bool]]) -> list[OSError]:
    """`discard` of each (folder, keep_logs); what went wrong."""
    errors = []
    for folder, keep_logs in wanted:
        try:
            discard(folder, keep_logs=keep_logs)
        except OSError as error:
            errors.append(error)
    return errors


def discard(folder: Place, *, keep_logs: bool, keep_metrics: bool = False) -> None:
    """`keep_metrics`: a folder that holds any stays with them, even without `keep_logs`."""
    kept = KEPT if keep_logs else {METRICS}
    if not keep_logs and not (keep_metrics and measured(folder)):
        _remove(folder)
        return
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.name not in kept]
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name == "out" and entry.is_dir(follow_symlinks=False):
            _thin(entry.path)
        _remove(entry.path)


def measured(folder: Place) -> bool:
    """Whether its step has measured anything."""
    try:
        return os.stat(f"{folder}/{METRICS}").st_size > 0
    except FileNotFoundError:
        return False


def _thin(out: str) -> None:
    """Of outputs that were collected a mark is left, if anything: so it takes no walk to remove them."""
    try:
        for name in os.listdir(out):
            for left in os.listdir(f"{out}/{name}"):
                if not os.path.islink(f"{out}/{name}/{left}"):
                    return
                os.unlink(f"{out}/{name}/{left}")
            os.rmdir(f"{out}/{name}")
    except OSError:
        pass


def _remove(path: Place) -> None:
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
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        shutil.rmtree(path, onerror=unlock)


def sweep_drafts(jobs_dir: Path) -> None:
    """Remove what builders that crashed left behind (it may hold secrets), and nothing that is being built."""
    for draft in jobs_dir.glob(".*"):
        try:
            if draft.name != NO_PARAMETERS and time.time() - draft.stat().st_mtime > DRAFT_LIFE:
                _remove(draft)
        except FileNotFoundError:
            pass
