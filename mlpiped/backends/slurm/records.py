"""All that is asked of the folders of a cluster's jobs, by token: plain JSON in and out, so that it can be asked from
another machine. It blocks, raises OSError and BackendUnavailable, and may be asked again when an answer was lost.

slurm/arrays/ID     the tokens of an array's elements, one a line, element 0 first. All elements have the array's name,
                    which holds the ID: made for this one submission, it is nobody else's, whatever ids are given out
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Job, JobOutput, NeverRan
from mlpiped.backends.slurm import submission
from mlpiped.backends.slurm.uses import Uses
from mlpiped.backends.supervisor import sync_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

YOUNG = 3600.0  # seconds for which a list is kept, whatever has become of its jobs


class Records:
    def __init__(self, root: str) -> None:
        self.jobs = f"{root}/jobs"
        self.lists = f"{root}/slurm/arrays"
        self.uses = Uses(root)

    def at(self, token: str) -> str:
        return folders.at(self.jobs, token)

    def prepare(self) -> None:
        folders.prepare(Path(self.jobs))
        self._sweep()
        self.uses.sweep(self.jobs)

    # --- submitted --------------------------------------------------------------------------------------------
    def standing(self, tokens: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {token: self._standing(self.at(token)) for token in tokens}

    def _standing(self, folder: str) -> dict[str, Any]:
        record, barred = submission.record_of(folder), folders.fenced(folder)
        return {
            "record": record,
            "built": os.path.exists(folder),
            "fenced": barred if record is None else bool(record.get("fenced")),
            "over": barred or folders.witness(folder) is not None,
            "grace": submission.grace_of(folder),
        }

    def build(
        self, job: dict[str, Any], order: dict[str, Any], needed: Sequence[str] = (), uses: Sequence[str] = ()
    ) -> str | None:
        """The folder, complete, or which of `needed` is not there. `job`: what `folder.build` needs of it. `uses`:
        contents that stay from now on until it has ended."""
        if uses:
            self.uses.add(job["token"], uses)
        absent = next((path for path in needed if not os.path.exists(path)), None)
        if absent is None:
            outputs = tuple(JobOutput(**output) for output in job["outputs"])
            folders.build(self.at(job["token"]), Job(**{**job, "arguments": (), "outputs": outputs}), json.dumps(order))
        return absent

    def settle(self, tokens: Sequence[str], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of each the record that stands, durable."""
        return [submission.settle(self.at(token), record) for token, record in zip(tokens, records, strict=True)]

    def released(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            submission.mark(self.at(token), "released", durable=False)

    def fence(self, token: str) -> dict[str, Any] | None:
        """No submission counts from now on, and nothing starts on a node: None. Or the handle of what came first."""
        folder = self.at(token)
        os.makedirs(folder, exist_ok=True)
        record = submission.settle(folder, submission.FENCED)
        if not record.get("fenced"):
            return submission.handle_of(token, record)
        if isinstance(folders.fence(folder), NeverRan):  # on the node too: somebody may release what we never will
            self.uses.drop(token)
            return None
        return submission.handle_of(token, submission.submitted(0, submission.grace_of(folder)))

    def bar(self, token: str) -> None:
        if isinstance(folders.fence(self.at(token)), NeverRan):
            self.uses.drop(token)

    def drop(self, token: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # of its folder
            submission.mark(self.at(token), "dropped")

    # --- waited for and cancelled -----------------------------------------------------------------------------
    def look(self, token: str) -> dict[str, Any]:
        try:
            return dataclasses.asdict(submission.look(self.at(token)))
        except FileNotFoundError:
            return dataclasses.asdict(submission.Look(complaint="its folder is gone"))

    def cancelling(self, token: str) -> str:
        folder = self.at(token)
        if os.path.exists(folder + "/exit.json"):
            return "over"
        if not os.path.exists(folder):
            return "waits"
        submission.mark(folder, "cancel")
        return "waits" if isinstance(folders.fence(folder), NeverRan) else "started"

    # --- read and removed -------------------------------------------------------------------------------------
    def from_start(self, token: str, stream: str, offset: int) -> int:
        return folders.from_start(self.at(token), stream, offset)

    def read(self, token: str, stream: str, offset: int) -> tuple[bool, str]:
        """(whether nothing comes after this: so it is asked before reading, bytes as Latin-1)"""
        folder = self.at(token)
        over = not os.path.exists(folder) or folders.fenced(folder) or folders.witness(folder) is not None
        return over, folders.read_stream(folder, stream, offset).decode("latin-1")

    def discard(self, token: str, keep_logs: bool) -> str | None:
        """What cannot be removed."""
        self.uses.drop(token)
        errors = folders.discard_all([(self.at(token), keep_logs)])
        return next((f"{error.strerror}: {error.filename}" for error in errors), None)

    def health(self) -> str | None:
        if not os.access(self.jobs, os.W_OK | os.X_OK):
            return f"the folder of its jobs cannot be written: {self.jobs}"
        return None

    # --- arrays -----------------------------------------------------------------------------------------------
    def write_array(self, tokens: Sequence[str]) -> str:
        """The new array's ID. Durable at the return."""
        array = secrets.token_hex(8)
        os.makedirs(self.lists, exist_ok=True)
        fd = os.open(f"{self.lists}/{array}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(fd, "w", encoding="ascii") as file:
            file.writelines(f"{token}\n" for token in tokens)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.lists)
        return array

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
        """Remove the lists of which no job's folder is left."""
        for array in os.listdir(self.lists) if os.path.isdir(self.lists) else ():
            path = f"{self.lists}/{array}"
            if time.time() - os.stat(path).st_mtime > YOUNG:
                tokens = self.arrays([array]).get(array, [])
                if not any(os.path.exists(f"{self.jobs}/{token}") for token in tokens):
                    os.unlink(path)
