"""The GPUs of a box: looked at with its health, leased before a step, given back after it.

Which job has which cards lies in a file for each, written before the lease is taken and removed after it is given
back: a daemon that comes back knows what it holds there.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread
import asyncssh

from mlpiped.backends import cards
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.backends.base import Card, Job
    from mlpiped.backends.ssh.keeper import Keeper

PATIENCE = 3 * cards.ANSWER + 10  # seconds: a driver that hangs keeps even `timeout` from ending
REST = 600.0  # seconds without a look after that: each leaves processes there that nobody can end


class _Hangs(BackendUnavailable):
    """nvidia-smi cannot even be ended; the box is well otherwise."""


class BoxCards:
    """`gpus`: "auto" for all cards, or at most so many, by index. `records` is this compute's own folder."""

    def __init__(self, keeper: Keeper, gpus: Literal["auto"] | int, instance: str, records: Path) -> None:
        self.keeper = keeper
        self.seen: tuple[Card, ...] = ()
        self.trouble: str | None = "its GPUs have not been looked at yet" if gpus else None
        self._wanted = gpus != 0
        self._most = None if gpus == "auto" else int(gpus)
        self._instance = instance
        self._records = records
        self._held = _read(records) if self._wanted else {}
        self._lock = anyio.Lock()
        self._rests_until, self._rests_on = 0.0, keeper.known

    async def look(self) -> None:
        """Raises BackendUnavailable when the box cannot be asked; what is wrong with its cards is `trouble`."""
        if not self._wanted or (time.monotonic() < self._rests_until and self.keeper.known is self._rests_on):
            return
        try:
            await self._look()
        except _Hangs as fault:
            self.trouble = fault.message
            self._rests_until, self._rests_on = time.monotonic() + REST, self.keeper.known

    async def _look(self) -> None:
        _, said = await self._run(cards.arguments("look", self._instance))
        found = cards.look(said)
        if found.trouble is None:
            self.seen = found.cards(self._instance)[: self._most]
        self.trouble = found.trouble
        leased = {lease.uuid for lease in found.leases}
        async with self._lock:  # what is being given back just now is not taken again
            for token, record in list(self._held.items()):
                if not leased.issuperset(record["cards"]):  # somebody cleans /tmp there
                    await self._lease(token, record)

    def environment(self, job: Job) -> dict[str, str]:
        """The leased cards; none to a job that has leased none, where there are any."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(job.gpus)} if job.gpus or self.seen else {}

    async def take(self, job: Job) -> None:
        """Lease the job's cards, all or none. Raises BackendUnavailable with who has one of them, or sits on it."""
        record = {"cards": list(job.gpus), "shared": job.gpu_memory is not None}
        async with self._lock:
            self._held[job.token] = record
            await anyio.to_thread.run_sync(self._write, job.token, record)
            held = await self._lease(job.token, record)
            if held is not None:
                await self._forget(job.token)
                raise BackendUnavailable(f"`{self.keeper.link.name}`: {held}")
        await self.look()  # the last one is some seconds old, and somebody may have come since
        for card in self.seen:
            if card.uuid in job.gpus and card.foreign is not None:
                await self.give(job.token)
                raise BackendUnavailable(f"`{self.keeper.link.name}`: card {card.index} is {card.foreign}")

    def leased(self, token: str) -> bool:
        return token in self._held

    async def give(self, token: str) -> None:
        """The job has ended, or never can start. Said twice, it is heard once. Raises BackendUnavailable."""
        async with self._lock:
            record = self._held.get(token)
            if record is None:
                return
            name, uuids = token, record["cards"]
            if record["shared"]:
                others = await anyio.to_thread.run_sync(self._others, token)
                still = {uuid for other in others if other["shared"] for uuid in other["cards"]}
                name, uuids = cards.SHARED, [uuid for uuid in uuids if uuid not in still]
            if uuids:
                await self._run(cards.give(self._instance, name, uuids))
            await self._forget(token)

    async def _lease(self, token: str, record: dict[str, Any]) -> str | None:
        """None, or who has one of the cards."""
        name = cards.SHARED if record["shared"] else token
        status, said = await self._run(cards.take(self._instance, name, record["cards"]))
        return None if status == 0 else cards.holder(said) or "the card cannot be leased"

    async def _run(self, arguments: Sequence[str]) -> tuple[int, str]:
        """(exit status, stdout) of the script on the box. Raises BackendUnavailable."""
        link = self.keeper.link
        async with link.channel() as connection:
            try:
                with anyio.fail_after(PATIENCE):
                    process = await link.process(connection, ["sh", "-c", cards.SCRIPT, *arguments])
                    try:
                        process.stdin.write_eof()
                        said = await process.stdout.read()
                        words = await process.stderr.read()
                        await process.wait_closed()
                    finally:
                        process.channel.abort()
            except TimeoutError:
                raise _Hangs(f"nvidia-smi hangs on `{link.name}` and cannot be ended") from None
            except (OSError, asyncssh.Error) as fault:
                raise BackendUnavailable(f"the connection to `{link.name}` was lost") from fault
        status = process.exit_status
        if status is None:  # no answer
            raise BackendUnavailable(f"the connection to `{link.name}` was lost")
        if status not in (0, cards.HELD):
            last = (bytes(words).decode("utf-8", "replace").strip().splitlines() or [f"exit status {status}"])[-1]
            raise BackendUnavailable(f"the cards of `{link.name}` cannot be leased: {last}")
        return status, bytes(said).decode("utf-8", "replace")

    def _write(self, token: str, record: dict[str, Any]) -> None:
        try:
            self._records.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._records / token).write_text(json.dumps(record))
        except OSError as fault:
            raise BackendUnavailable(f"no lease can be noted: {fault.strerror}: {fault.filename}") from fault

    def _others(self, token: str) -> list[dict[str, Any]]:
        """Of all computes of this daemon: two of them may be one box."""
        found = [_read(each) for each in self._records.parent.iterdir()] if self._records.parent.is_dir() else []
        return [record for records in found for key, record in records.items() if key != token]

    async def _forget(self, token: str) -> None:
        self._held.pop(token, None)
        await anyio.to_thread.run_sync(lambda: (self._records / token).unlink(missing_ok=True))


def _read(records: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(records.iterdir()) if records.is_dir() else ():
        try:
            found[path.name] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # cut short by a power failure
    return found
