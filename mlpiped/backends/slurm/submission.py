"""What a job's folder holds beside the format of `base.py`. All of it blocks.

slurm.json       which of two came first, submission or fence: {"v": 1, "job": 77, "submitted": s, "grace": s}, or
                 {"v": 1, "fenced": true}; of an element {"v": 1, "job": "77_4", "array": "…", …}. It appears complete,
                 by one link(), which only one can win. A job is released after it is there, so a job that is not named
                 in it never runs.
slurm.released   … and was released: one that is held after that is held by a person, or by a controller that forgot it
slurm.cancel     we have been asked to cancel it: what Slurm then calls CANCELLED was not done by somebody else
slurm.dropped    we took it out of the queue after it was over for us: nor was that done by somebody else
slurm.out        what the script itself has to say: nothing, when all is well

Standard library only, here and in all that it imports: it runs on login nodes too.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlpiped.backends import folder as folders
from mlpiped.backends import supervisor
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from mlpiped.backends.base import Exited, Handle
    from mlpiped.backends.slurm.commands import Ref

FENCED = folders.FENCED


@dataclass(frozen=True, slots=True)
class Look:
    """What a job's folder says. `held`: its supervisor lives, as far as locks of this file system tell."""

    witness: Exited | None = None
    claimed: bool = False
    fenced: bool = False
    cancelled: bool = False
    released: bool = False
    held: bool = False
    dropped: bool = False
    complaint: str = ""


def settle(folder: str, record: dict[str, Any]) -> dict[str, Any]:
    """Make `record` the one that stands, unless another does; the one that stands, durable."""
    draft = f"{folder}/.slurm.{secrets.token_hex(6)}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="ascii") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, folder + "/slurm.json")
        except FileExistsError:
            pass
    finally:
        os.unlink(draft)
    supervisor.sync_folder(folder)
    standing = record_of(folder)
    if standing is None:
        raise BackendUnavailable(f"the record of a submission cannot be read: {folder}/slurm.json")
    return standing


def record_of(folder: str) -> dict[str, Any] | None:
    """Of the submission, or of the fence; None: neither came to be."""
    try:
        with open(folder + "/slurm.json", "rb") as file:
            found = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise BackendUnavailable(f"the record of a submission is damaged: {folder}/slurm.json") from None
    return found if isinstance(found, dict) else None


def handle_of(token: str, record: dict[str, Any]) -> Handle:
    return {**record, "token": token}


def submitted(job: Ref, grace: float, array: str | None = None) -> dict[str, Any]:
    """`array`: the name of the one of which it is an element."""
    record = {"v": 1, "job": job, "submitted": round(time.time(), 3), "grace": grace}
    return record if array is None else {**record, "array": array}


def name_of(handle: Handle) -> str:
    """By which Slurm's answers know it (`commands.Listed`)."""
    array, job, token = handle.get("array"), handle["job"], handle["token"]
    return str(token) if array is None else f"{array}/{str(job).partition('_')[2]}"


def grace_of(folder: str) -> float:
    """As the order says that waits there."""
    try:
        with open(folder + "/job.json", "rb") as file:
            return float(json.load(file)["grace"])
    except (OSError, ValueError, KeyError, TypeError):
        return 10.0


def mark(folder: str, name: str, *, durable: bool = True) -> None:
    os.close(os.open(f"{folder}/slurm.{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    if durable:
        supervisor.sync_folder(folder)


def marked(folder: str, name: str) -> bool:
    return os.path.exists(f"{folder}/slurm.{name}")


def look(folder: str) -> Look:
    """Liveness first: it may end between the two."""
    held = folders.held(folder)
    os.listdir(folder)  # over NFS, what is not there is remembered too: this asks the server. Raises OSError
    said = folders.witness(folder)
    fenced = folders.fenced(folder)
    claimed = not fenced and folders.read_claim(folder) is not None
    words = ""
    if said is None:
        words = folders.read_stream(folder, "slurm.out", 0).decode("utf-8", "replace").strip()
    complaint = words.splitlines()[-1][:300] if words else ""
    marks = [marked(folder, name) for name in ("cancel", "released", "dropped")]
    return Look(said, claimed, fenced, marks[0], marks[1], held, marks[2], complaint)
