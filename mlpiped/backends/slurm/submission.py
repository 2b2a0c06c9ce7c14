"""What is kept of submissions, by token, in the folder `slurm` beside that of the jobs. All of it blocks.

orders/TOKEN     what is to be executed (0600: it may hold secrets), a line: TOKEN JSON. The job's script makes it the
                 folder's job.json; "lacks" are folders (null) and texts of files that are made then. The fence removes
                 it
records/TOKEN    which of two came first, submission or fence: {"v": 1, "job": 77, "submitted": s, "grace": s}, or
                 {"v": 1, "fenced": true}; of an element {"v": 1, "job": "77_4", "array": "…", …}. It appears complete,
                 by one link(), which only one can win. A job is released after it is there, so a job that is not named
                 in one never runs
released/TOKEN   … and was released: one that is held after that is held by a person, or by a controller that forgot it

Those of jobs that were submitted together are one file with many names: their lines, or {"v": 1, "of": {TOKEN: …}}.
And in a job's own folder, which is made by whoever comes first, supervisor or fence:

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
    from collections.abc import Iterable, Mapping

    from mlpiped.backends.base import Exited, Handle
    from mlpiped.backends.slurm.commands import Ref

FENCED = folders.FENCED
KINDS = ("orders", "records", "released")


@dataclass(frozen=True, slots=True)
class Look:
    """What is said of a job. `held`: its supervisor lives, as far as locks of this file system tell."""

    witness: Exited | None = None
    claimed: bool = False
    fenced: bool = False
    cancelled: bool = False
    released: bool = False
    held: bool = False
    dropped: bool = False
    complaint: str = ""


# --- orders


def write_orders(home: str, orders: Mapping[str, dict[str, Any]]) -> None:
    """Each complete when it is there. One that is there already is as good. `home`: the folder `slurm`."""
    draft = f"{home}/orders/.{secrets.token_hex(6)}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.writelines(f"{token} {json.dumps(order)}\n" for token, order in orders.items())
        _name(draft, f"{home}/orders", orders)
    finally:
        os.unlink(draft)


def _name(draft: str, folder: str, tokens: Iterable[str]) -> list[str]:
    """Give it these names; the ones that were taken."""
    taken = []
    for token in tokens:
        try:
            os.link(draft, f"{folder}/{token}")
        except FileExistsError:
            taken.append(token)
    return taken


def ordered(home: str, folder: str) -> bool:
    return os.path.exists(f"{home}/orders/{os.path.basename(folder)}") or os.path.exists(folder + "/job.json")


def grace_of(home: str, folder: str) -> float:
    """As the order says that waits there."""
    token = os.path.basename(folder)
    try:
        with open(f"{home}/orders/{token}", encoding="ascii") as file:
            return float(next(json.loads(line[len(token) :])["grace"] for line in file if line.startswith(f"{token} ")))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return 10.0


# --- records


def settle(home: str, records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make these, by token, the records that stand, unless others do; those that stand, durable.

    However many they are, it is one file, and made durable once: a file system that is told to keep a file keeps all
    the names that it was given; over NFS they are on the server before link() returns. (Its content is on the disk
    before: a name that a power cut leaves must not be that of an empty file.)
    """
    draft, place = f"{home}/records/.{secrets.token_hex(6)}", f"{home}/records"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(json.dumps({"v": 1, "of": dict(records)}))
            file.flush()
            os.fsync(file.fileno())
            taken = _name(draft, place, records)
            os.fsync(file.fileno())
    finally:
        os.unlink(draft)
    supervisor.sync_folder(place)
    others: dict[str, dict[str, Any]] = {}
    for token in taken:
        standing = record_of(home, token)
        if standing is None:
            raise BackendUnavailable(f"the record of a submission cannot be read: {place}/{token}")
        others[token] = standing
    return {**records, **others}


def record_of(home: str, token: str) -> dict[str, Any] | None:
    """Of the submission, or of the fence; None: neither came to be."""
    try:
        with open(f"{home}/records/{token}", "rb") as file:
            found = json.load(file)["of"][token]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        raise BackendUnavailable(f"the record of a submission is damaged: {home}/records/{token}") from None
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


def release(home: str, tokens: Iterable[str]) -> None:
    """Remember that they were released."""
    for token in tokens:
        try:
            _name(f"{home}/records/{token}", f"{home}/released", [token])
        except FileNotFoundError:  # a power cut took its record
            os.close(os.open(f"{home}/released/{token}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


def forget(home: str, kind: str, token: str) -> None:
    """`kind`: one of KINDS."""
    try:
        os.unlink(f"{home}/{kind}/{token}")
    except FileNotFoundError:
        pass


# --- in the job's folder


def mark(folder: str, name: str) -> None:
    os.close(os.open(f"{folder}/slurm.{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    supervisor.sync_folder(folder)


def look(home: str, folder: str) -> Look:
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
    marks = [os.path.exists(f"{folder}/slurm.{name}") for name in ("cancel", "dropped")]
    was_released = released(home, os.path.basename(folder))
    return Look(said, claimed, fenced, marks[0], was_released, held, marks[1], complaint)


def released(home: str, token: str) -> bool:
    return os.path.exists(f"{home}/released/{token}")
