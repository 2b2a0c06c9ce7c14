"""The GPUs of this host, for the backends whose jobs run on it: looked at, leased, given back. All of it blocks.

Which job has which cards lies in a file for each under `<state_dir>/gpus/<compute>/`, written before the lease is taken
and removed after it is given back: a daemon that comes back finds the leases that it must keep. It is no truth about
the job; the ledger has that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Any, Literal

from mlpiped.backends import cards
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from mlpiped.backends.base import Card, Job

PATIENCE = 3 * cards.ANSWER + 10  # seconds: a driver that hangs keeps even `timeout` from ending
SMI = "nvidia-smi"
NOT_SEEN = "its GPUs have not been looked at yet"

_one_at_a_time = threading.Lock()  # of all computes of this daemon: they share cards


class HostCards:
    """`gpus`: "auto" for all cards, or at most so many, by index. Several computes of one daemon may be on this host:
    each has an object of its own, with the same `records` folder."""

    def __init__(
        self,
        compute: str,
        gpus: Literal["auto"] | int,
        instance: str,
        records: Path,
        *,
        folder: str = cards.FOLDER,
    ) -> None:
        self.wanted = gpus != 0
        self.seen: tuple[Card, ...] = ()
        self.trouble: str | None = NOT_SEEN if self.wanted and shutil.which(SMI) else None
        self._compute = compute
        self._most = None if gpus == "auto" else int(gpus)
        self._instance = instance
        self._root = records
        self._mine = records / compute
        self._folder = folder
        self._hangs: subprocess.Popen[str] | None = None
        self._tokens = {token for token, _ in self._records(self._mine)} if self.wanted else set[str]()

    # --- looking ----------------------------------------------------------------------------------------------
    def look(self, pids: Collection[int] = ()) -> None:
        """See which cards there are and who is on them; leases of ours that somebody cleaned away are taken again.

        `pids` are known to be processes of our steps.
        """
        if not self.wanted:
            return
        if shutil.which(SMI) is None:
            self.seen, self.trouble = (), f"there is no {SMI} on the daemon's PATH" if self._most else None
            return
        try:
            found = cards.look(self._run(cards.arguments("look", self._instance, folder=self._folder))[1])
        except BackendUnavailable as fault:
            self.trouble = fault.message
            return
        if found.trouble is None:
            self.seen = found.cards(self._instance, pids)[: self._most]
        self.trouble = found.trouble
        leased = {lease.uuid for lease in found.leases}
        with _one_at_a_time:  # what is being given back just now is not taken again
            missing = [(t, record) for t, record in self._records(self._mine) if not leased.issuperset(record["cards"])]
            for token, record in missing:
                try:
                    self._lease(token, record)
                except BackendUnavailable as fault:
                    self.trouble = fault.message

    def environment(self, job: Job) -> dict[str, str]:
        """Nothing where cards are not ours to give; else the leased ones, and none to a job that has leased none."""
        hidden = self.wanted and (self.seen or self.trouble is not None)
        return {"CUDA_VISIBLE_DEVICES": ",".join(job.gpus)} if job.gpus or hidden else {}

    # --- leases -----------------------------------------------------------------------------------------------
    def take(self, job: Job) -> None:
        """Lease the job's cards, all or none. Raises BackendUnavailable with who has one of them, or sits on it."""
        if not job.gpus:
            return
        record = {"cards": list(job.gpus), "shared": job.gpu_memory is not None}
        with _one_at_a_time:
            try:
                self._mine.mkdir(mode=0o700, parents=True, exist_ok=True)
                (self._mine / job.token).write_text(json.dumps(record))
            except OSError as fault:
                raise BackendUnavailable(
                    f"no lease on `{self._compute}`: {fault.strerror}: {fault.filename}"
                ) from fault
            self._tokens.add(job.token)
            held = self._lease(job.token, record)
            if held is not None:
                self._tokens.discard(job.token)
                (self._mine / job.token).unlink(missing_ok=True)
                raise BackendUnavailable(f"`{self._compute}`: {held}")
        self.look()  # the last one is some seconds old, and somebody may have come since
        for card in self.seen:
            if card.uuid in job.gpus and card.foreign is not None:
                self.give(job.token)
                raise BackendUnavailable(f"`{self._compute}`: card {card.index} is {card.foreign}")

    def leased(self, token: str) -> bool:
        """Whether there is anything to give back. From memory: asks nobody."""
        return token in self._tokens

    def give(self, token: str) -> None:
        """The job has ended, or never can start. Said twice, it is heard once."""
        path = self._mine / token
        with _one_at_a_time:
            self._tokens.discard(token)
            try:
                record = json.loads(path.read_text())
            except (OSError, ValueError):
                return
            if record["shared"]:
                path.unlink(missing_ok=True)
                still = {uuid for _, other in self._all() if other["shared"] for uuid in other["cards"]}
                self._give(cards.SHARED, [uuid for uuid in record["cards"] if uuid not in still])
            else:
                self._give(token, record["cards"])
                path.unlink(missing_ok=True)

    def set_right(self, lives: Callable[[str], bool]) -> None:
        """At start: give back what is leased to jobs that have ended meanwhile."""
        for token, _ in self._records(self._mine):
            if not lives(token):
                self.give(token)

    def _lease(self, token: str, record: dict[str, Any]) -> str | None:
        """None, or who has one of the cards."""
        name = cards.SHARED if record["shared"] else token
        status, said = self._run(cards.take(self._instance, name, record["cards"], folder=self._folder))
        if status == 0:
            return None
        return cards.holder(said) or "the card cannot be leased"

    def _give(self, name: str, uuids: Sequence[str]) -> None:
        if uuids:
            self._run(cards.give(self._instance, name, uuids, folder=self._folder))

    def _records(self, folder: Path) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            try:
                found.append((name, json.loads((folder / name).read_text())))
            except (OSError, ValueError):
                continue  # given back just now; or cut short by a power failure, which ended the leases too
        return found

    def _all(self) -> list[tuple[str, dict[str, Any]]]:
        return [each for compute in self._root.iterdir() for each in self._records(compute)]

    def _run(self, arguments: list[str]) -> tuple[int, str]:
        """(exit status, stdout) of the script. Raises BackendUnavailable."""
        if self._hangs is not None and self._hangs.poll() is None:
            raise BackendUnavailable("nvidia-smi hangs and cannot be ended")
        self._hangs = None
        process = subprocess.Popen(
            ["sh", "-c", cards.SCRIPT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            said, words = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            self._hangs = process
            raise BackendUnavailable("nvidia-smi hangs and cannot be ended") from None
        if process.returncode not in (0, cards.HELD):
            last = (words.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise BackendUnavailable(f"the cards of `{self._compute}` cannot be leased: {last}")
        return process.returncode, said
