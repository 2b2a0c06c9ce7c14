"""The ledger: one SQLite file, one connection that writes, another that reads, and those who listen."""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread

from mlpiped.errors import Conflict, LedgerError
from mlpiped.ledger import opening
from mlpiped.ledger.ballast import Ballast
from mlpiped.ledger.db import DatabaseError, Db, in_our_words
from mlpiped.ledger.queries import Queries
from mlpiped.ledger.survey import Survey
from mlpiped.ledger.writer import Writer, nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator
    from pathlib import Path

    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from mlpiped.clock import Clock
    from mlpiped.ledger.db import Connection, Op
    from mlpiped.ledger.rows import ArtifactRow, EventRow

_log = logging.getLogger("mlpiped.ledger")

BEHIND = 1000  # commits that a subscriber may be behind before it is closed


class Ledger(Queries):
    """Reads are the methods of `Queries`; writes are operations made by `moves`."""

    def __init__(self, state_dir: Path, clock: Clock, lock: int, writer_db: Db, reader: Db) -> None:
        super().__init__(reader)
        self.path = state_dir / opening.NAME
        self._clock = clock
        self._lock = lock
        self._db = writer_db
        self._writer = Writer(writer_db, Ballast(state_dir / opening.BALLAST), self._announce)
        self._writer.listening = lambda: bool(self._subscribers)
        self._subscribers: dict[MemoryObjectSendStream[list[EventRow]], tuple[set[int] | None, Collection[str]]] = {}
        self._closed = False

    @classmethod
    async def open(cls, state_dir: Path, clock: Clock) -> Ledger:
        """The ledger of this state folder, made when there never was one. The caller closes it.

        Raises LedgerBusy (naming the pid), LedgerUnreadable, LedgerTooNew; then the file is as it was.
        """
        opened: list[Db] = []
        with anyio.CancelScope(shield=True):
            lock = await to_thread.run_sync(_prepare, state_dir)
            try:
                path = state_dir / opening.NAME
                opened.append(await Db(path, readonly=False).open())
                opened.append(await Db(path, readonly=True).open())
                ledger = cls(state_dir, clock, lock, *opened)
                await ledger._writer.start()
                await ledger._mark()
            except BaseException:
                for db in opened:
                    await db.close()
                os.close(lock)
                raise
        return ledger

    async def close(self) -> None:
        """Commit what is queued, then close. Nothing can be written or read afterwards."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            try:
                await self._writer.drain()
                self._writer.stop()
                await self._db.call(_tidy)
                await to_thread.run_sync(_unmark, self.path.parent)
            finally:
                for send in list(self._subscribers):
                    self._unsubscribe(send)
                await self._reader.close()
                await self._db.close()
                os.close(self._lock)

    async def _mark(self) -> None:
        """Leave word that the write-ahead log is needed from now on. A disk that has no room for that is told of."""
        try:
            await self.write(nothing)
            await to_thread.run_sync(opening.mark, self.path.parent)
        except (LedgerError, OSError) as error:
            _log.warning("a loss of the ledger's write-ahead log would not be noticed: %s", error)

    # --- writing ----------------------------------------------------------------------------------------------
    @property
    def commits(self) -> int:
        """Group commits done."""
        return self._writer.commits

    @property
    def full(self) -> bool:
        """The disk is (nearly) full: what runs can be recorded, nothing new should be dispatched. Ends by itself."""
        return self._writer.full

    @property
    def on_full(self) -> Callable[[bool], None] | None:
        """Called on the loop when `full` changes."""
        return self._writer.on_full

    @on_full.setter
    def on_full(self, call: Callable[[bool], None] | None) -> None:
        self._writer.on_full = call

    @property
    def broken(self) -> LedgerError | None:
        """Why the file takes no writes, while it takes none. Ends by itself when the disk does."""
        return self._writer.broken

    def on_broken(self, call: Callable[[LedgerError | None], None]) -> None:
        """Have `call` called on the loop when `broken` comes and goes."""
        self._writer.on_broken = call

    async def prove(self) -> None:
        """Until the writing thread has shown that it does not hang: by a commit since the last call, or by one of a
        page without a row. What the disk thinks of it is told by `full` and `broken`."""
        await self._writer.prove()

    async def write(self, *ops: Op[Any], within: float = 0) -> list[Any]:
        """Run `ops` in one transaction, shared with whoever writes now, and give their results after the fsync.

        They are carried out all or not at all; what one of them raises comes to this caller only. A caller that is
        cancelled has written nevertheless. An operation may be run twice (a full or locked disk): it must have no
        effect but on the connection. `within`: seconds that it may wait for company, to save a commit. Raises
        LedgerFull, LedgerError.
        """
        if self._closed:
            raise LedgerError("the ledger is closed")
        return await self._writer.put(ops, within)

    def post(self, *ops: Op[Any]) -> None:
        """Write with the next commit, at the latest after 50 ms. Failures are logged, and those of the disk retried."""
        if self._closed:
            raise LedgerError("the ledger is closed")
        self._writer.post(ops)

    # --- listening --------------------------------------------------------------------------------------------
    @contextmanager
    def subscribe(
        self, *, runs: set[int] | None = None, kinds: Collection[str] = ()
    ) -> Iterator[MemoryObjectReceiveStream[list[EventRow]]]:
        """Event rows, one list a commit, after it; of all runs or of `runs` (the set may be changed meanwhile), and
        of all kinds or of `kinds`: who waits for the end of a run is not woken by each of its steps.

        Who falls too far behind finds the end of the stream, and reads on with `events(after)`.
        """
        send, receive = anyio.create_memory_object_stream[list["EventRow"]](BEHIND)
        self._subscribers[send] = (runs, kinds)
        try:
            yield receive
        finally:
            self._unsubscribe(send)
            receive.close()

    def _unsubscribe(self, send: MemoryObjectSendStream[list[EventRow]]) -> None:
        self._subscribers.pop(send, None)
        send.close()

    def _announce(self, events: list[EventRow]) -> None:
        for send, (runs, kinds) in list(self._subscribers.items()):
            wanted = events if runs is None else [event for event in events if event.run_id in runs]
            wanted = [event for event in wanted if event.kind in kinds] if kinds else wanted
            if not wanted:
                continue
            try:
                send.send_nowait(wanted)
            except (anyio.WouldBlock, anyio.BrokenResourceError):
                self._unsubscribe(send)

    # --- copies -----------------------------------------------------------------------------------------------
    async def backup(self, dest: Path) -> None:
        """A consistent copy, checked and durable, while writing goes on. Replaces `dest` only when it is complete."""

        def work() -> None:
            if dest.exists() and dest.samefile(self.path):
                raise Conflict(f"the ledger cannot be its own backup: `{dest}`")
            try:
                opening.copy(self.path, dest)
            except DatabaseError as error:
                raise in_our_words(error, dest) from error
            except OSError as error:
                raise LedgerError(f"the backup cannot be written: `{dest}`: {error.strerror}") from error

        await to_thread.run_sync(work)

    @asynccontextmanager
    async def survey(self) -> AsyncIterator[Survey]:
        """Long reads, which keep nobody waiting."""
        with anyio.CancelScope(shield=True):
            db = await Db(self.path, readonly=True).open()
        try:
            yield Survey(db)
        finally:
            with anyio.CancelScope(shield=True):
                await db.close()

    async def artifacts(self) -> list[ArtifactRow]:
        """Everything that has bytes. Reads all outputs."""
        async with self.survey() as survey:
            return await survey.artifacts()

    async def faults(self) -> list[str]:
        """What SQLite finds wrong in the file, its indexes too; empty when it is well. Reads the whole file."""
        async with self.survey() as survey:
            return await survey.faults()

    async def checkpoint(self) -> None:
        """Fold the write-ahead log into the file; hourly is often enough."""
        await self._db.call(lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())


def _prepare(state_dir: Path) -> int:
    lock = opening.lock(state_dir)
    try:
        opening.warn_of_network(state_dir)
        opening.prepare(state_dir / opening.NAME, opening.migrations())
    except BaseException:
        os.close(lock)
        raise
    return lock


def _unmark(state_dir: Path) -> None:
    try:
        opening.unmark(state_dir)
    except OSError as error:
        _log.warning("the ledger cannot be marked as closed: %s", error)


def _tidy(c: Connection) -> None:
    try:
        c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except DatabaseError:
        return  # a full disk: the log is played back at the next start
