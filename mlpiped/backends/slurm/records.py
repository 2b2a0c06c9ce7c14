"""All that is asked of the folders of a cluster's jobs, by token: plain JSON in and out, so that it can be asked from
another machine. It blocks, raises OSError and BackendUnavailable, and may be asked again when an answer was lost.

slurm/arrays/ID     the tokens of an array's elements, one a line, element 0 first. All elements have the array's name,
                    which holds the ID: made for this one submission, it is nobody else's, whatever ids are given out
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Job, JobOutput, NeverRan
from mlpiped.backends.slurm import submission
from mlpiped.backends.slurm.uses import Uses
from mlpiped.backends.supervisor import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

T = TypeVar("T")
IN_ONE = 250  # records, or orders: each is found by reading all of them
YOUNG = 3600.0  # seconds for which a list is kept, whatever has become of its jobs


class Records:
    def __init__(self, root: str) -> None:
        self.jobs = f"{root}/jobs"
        self.home = f"{root}/slurm"
        self.lists = f"{self.home}/arrays"
        self.uses = Uses(root)

    def at(self, token: str) -> str:
        return folders.at(self.jobs, token)

    def prepare(self) -> None:
        folders.prepare(Path(self.jobs))
        for kind in submission.KINDS:
            os.makedirs(f"{self.home}/{kind}", exist_ok=True)
            folders.sweep_drafts(Path(self.home, kind))
        self._sweep()

    # --- submitted --------------------------------------------------------------------------------------------
    def standing(self, tokens: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {token: self._standing(token) for token in tokens}

    def _standing(self, token: str) -> dict[str, Any]:
        folder = self.at(token)
        record, barred = submission.record_of(self.home, token), folders.fenced(folder)
        return {
            "record": record,
            "built": submission.ordered(self.home, folder) or os.path.exists(folder),
            "fenced": barred if record is None else bool(record.get("fenced")),
            "over": barred or folders.witness(folder) is not None,
        }

    def enlist(self, array: str | None, tokens: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The records of those that have been submitted, or fenced. When there are none, these are the elements of
        the new `array`, durable at the return."""
        found = {token: self._recorded(token) for token in tokens}
        known = {token: record for token, record in found.items() if record is not None}
        if not known and array is not None:
            self._list(array, tokens)
        return known

    def _recorded(self, token: str) -> dict[str, Any] | None:
        """A node alone may have heard of the fence."""
        record = submission.record_of(self.home, token)
        return submission.FENCED if record is None and folders.fenced(self.at(token)) else record

    def build(
        self,
        jobs: Sequence[dict[str, Any]],
        orders: Sequence[dict[str, Any]],
        needed: Sequence[str] = (),
        uses: Sequence[Sequence[str]] = (),
    ) -> list[str]:
        """Their orders, and of their folders what does not come by the supervisor; or those of `needed` that are not
        there. `jobs`: what `folder.build` needs of them. `uses`: of each, contents that stay from now on until it has
        ended."""
        for fields, names in zip(jobs, uses, strict=False):
            if names:
                self.uses.add(fields["token"], names)
        if absent := [path for path in needed if not os.path.exists(path)]:
            return absent
        written: dict[str, dict[str, Any]] = {}
        for fields, order in zip(jobs, orders, strict=True):
            outputs = tuple(JobOutput(**output) for output in fields["outputs"])
            job = Job(**{**fields, "arguments": (), "outputs": outputs})
            if job.code is None:
                make, params = folders.contents(job)
                lacks = {**dict.fromkeys(make), **({} if params is None else {"params.json": params})}
                written[job.token] = {**order, "lacks": lacks}
            else:
                folders.build(self.at(job.token), job, None)
                written[job.token] = order
        for share in _shares(written):
            submission.write_orders(self.home, share)
        return []

    def settle(self, records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Make these, by token, the records, unless there are others: those that stand, durable."""
        found: dict[str, dict[str, Any]] = {}
        for share in _shares(records):
            found |= submission.settle(self.home, share)
        for token, record in found.items():
            if record.get("fenced"):
                submission.forget(self.home, "orders", token)
        return found

    def adopt(self, token: str, job: int | str, array: str | None) -> dict[str, Any] | None:
        """Make that job, which is in the queue, the one that counts: the record that stands. None: there is no use in
        it, for it would find no order to carry out."""
        if self._recorded(token) is None and not submission.ordered(self.home, self.at(token)):
            if folders.read_claim(self.at(token)) is None:
                return None
        record = submission.submitted(job, submission.grace_of(self.home, self.at(token)), array)
        return self.settle({token: record})[token]

    def released(self, tokens: Sequence[str]) -> None:
        submission.release(self.home, tokens)

    def fence(self, token: str) -> dict[str, Any] | None:
        """No submission counts from now on, and nothing starts on a node: None. Or the handle of what came first."""
        record = self.settle({token: submission.FENCED})[token]
        if not record.get("fenced"):
            return submission.handle_of(token, record)
        if self._barred(token):  # on the node too: somebody may release what we never will
            return None
        return submission.handle_of(token, submission.submitted(0, submission.grace_of(self.home, self.at(token))))

    def bar(self, token: str) -> None:
        self._barred(token)

    def _barred(self, token: str) -> bool:
        if not isinstance(folders.fence(self.at(token)), NeverRan):
            return False
        submission.forget(self.home, "orders", token)
        self.uses.drop(token)
        return True

    def drop(self, token: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # of its folder
            submission.mark(self.at(token), "dropped")

    # --- waited for and cancelled -----------------------------------------------------------------------------
    def look(self, token: str) -> dict[str, Any]:
        sync = os.open(self.jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # over NFS: what is there is asked anew
        os.close(sync)
        try:
            return dataclasses.asdict(submission.look(self.home, self.at(token)))
        except FileNotFoundError:
            gone = "" if self._waits(token) else "its folder is gone"
            released = submission.released(self.home, token)
            return dataclasses.asdict(submission.Look(released=released, complaint=gone))

    def _waits(self, token: str) -> bool:
        """Of one without a folder: whether that may still be made."""
        return submission.ordered(self.home, self.at(token))

    def cancelling(self, token: str) -> str:
        folder = self.at(token)
        if os.path.exists(folder + "/exit.json"):
            return "over"
        if not os.path.exists(folder) and not self._waits(token):
            return "waits"
        os.makedirs(folder, exist_ok=True)
        submission.mark(folder, "cancel")
        return "waits" if self._barred(token) else "started"

    # --- read and removed -------------------------------------------------------------------------------------
    def from_start(self, token: str, stream: str, offset: int) -> int:
        return folders.from_start(self.at(token), stream, offset)

    def read(self, token: str, stream: str, offset: int) -> tuple[bool, str]:
        """(whether nothing comes after this: so it is asked before reading, bytes as Latin-1)"""
        folder = self.at(token)
        over = folders.fenced(folder) or folders.witness(folder) is not None
        over = over or not (os.path.exists(folder) or self._waits(token))
        return over, folders.read_stream(folder, stream, offset).decode("latin-1")

    def discard(self, token: str, keep_logs: bool, keep_metrics: bool = False) -> str | None:
        """What cannot be removed."""
        self.uses.drop(token)
        trouble = None
        try:
            folders.discard(self.at(token), keep_logs=keep_logs, keep_metrics=keep_metrics)
        except OSError as error:
            trouble = f"{error.strerror}: {error.filename}"
        for kind in ("orders",) if keep_logs else submission.KINDS:
            submission.forget(self.home, kind, token)
        return trouble

    def health(self) -> str | None:
        if not os.access(self.jobs, os.W_OK | os.X_OK):
            return f"the folder of its jobs cannot be written: {self.jobs}"
        swept = f"{self.home}/.swept"
        if not os.path.exists(swept) or time.time() - os.stat(swept).st_mtime > YOUNG:
            self._sweep()
        return None

    # --- arrays -----------------------------------------------------------------------------------------------
    def _list(self, array: str, tokens: Sequence[str]) -> None:
        os.makedirs(self.lists, exist_ok=True)
        fd = os.open(f"{self.lists}/{array}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(fd, "w", encoding="ascii") as file:
            file.writelines(f"{token}\n" for token in tokens)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.lists)

    def arrays(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """Without those that were submitted from another folder."""
        found = {}
        for array in ids:
            try:
                with open(f"{self.lists}/{array}", encoding="ascii") as file:
                    found[array] = file.read().split()
            except FileNotFoundError:
                continue
        return found

    def _sweep(self) -> None:
        """Remove the lists of which no job is left."""
        with contextlib.suppress(OSError), open(f"{self.home}/.swept", "w", encoding="ascii"):
            pass  # on a disk that takes nothing, it is only looked at more often
        places = (self.jobs, *(f"{self.home}/{kind}" for kind in submission.KINDS))
        for array in os.listdir(self.lists) if os.path.isdir(self.lists) else ():
            path = f"{self.lists}/{array}"
            with contextlib.suppress(FileNotFoundError):  # the next daemon is at it too
                if time.time() - os.stat(path).st_mtime > YOUNG:
                    tokens = self.arrays([array]).get(array, [])
                    if not any(os.path.exists(f"{place}/{token}") for token in tokens for place in places):
                        os.unlink(path)
        self.uses.sweep(self.jobs, f"{self.home}/orders")


def _shares(facts: dict[str, T]) -> Iterator[dict[str, T]]:
    tokens = list(facts)
    for first in range(0, len(tokens), IN_ONE):
        yield {token: facts[token] for token in tokens[first : first + IN_ONE]}
