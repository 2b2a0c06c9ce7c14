"""Group commit: all writes that wait share one transaction, one fsync and one hop to the thread.

No task owns this. A write is queued with a future; when nothing is under way the queue is handed to the thread, and the
thread's answer settles the futures and hands over what was queued meanwhile. So no cancelled caller can leave anything
half done: a write that was queued is carried out, whoever still waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlpiped import crash
from mlpiped.errors import IllegalMove, LedgerError
from mlpiped.ledger.db import APPLICATION_ID, SQL, DatabaseError, in_our_words, is_busy, is_full, is_of_the_file, one
from mlpiped.ledger.rows import EventRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlpiped.ledger.ballast import Ballast
    from mlpiped.ledger.db import Connection, Db, Op

POST_DELAY = 0.05  # seconds that a posted write waits for company
RETRY_DELAY = 1.0  # seconds before a posted write that failed is tried again
POST_TRIES = 60
LOCKED_TRIES = 12  # times SQLite's own 5 s of patience with another program's lock
SPACE_PAUSE = 5.0  # seconds between two looks for space on a full disk

_log = logging.getLogger("mlpiped.ledger")


@dataclass(eq=False, slots=True)
class _Entry:
    """One caller's operations: all of them or none."""

    ops: tuple[Op[Any], ...]
    done: asyncio.Future[list[Any]] | None  # None: posted
    results: list[Any] = field(default_factory=list)
    error: Exception | None = None
    tries: int = 0


@dataclass(frozen=True, slots=True)
class _Committed:
    first: int  # number of the first event row
    events: list[tuple[int | None, int | None, str, int, str | None]]
    dropped_ballast: bool


def nothing(c: Connection) -> None:
    """The smallest write that reaches the disk: a page, and no row."""
    c.execute(f"PRAGMA application_id = {APPLICATION_ID}")


class Writer:
    """The one writing connection. `announce` is called on the loop with the event rows of each commit, after it."""

    def __init__(self, db: Db, ballast: Ballast, announce: Callable[[list[EventRow]], None]) -> None:
        self.commits = 0
        self.full = False
        self.on_full: Callable[[bool], None] | None = None
        self.broken: LedgerError | None = None  # why the file takes no writes, while it takes none
        self.on_broken: Callable[[LedgerError | None], None] | None = None
        self._answers = self._proved = 0  # commits that the thread has come back from, however they went
        self._answered = asyncio.Event()
        self.listening: Callable[[], bool] = lambda: True
        self._db, self._ballast, self._announce = db, ballast, announce
        self._queue: list[_Entry] = []
        self._under_way: list[_Entry] | None = None
        self._scheduled = False
        self._last_event = 0
        self._locked = 0
        self._timers: set[asyncio.TimerHandle] = set()
        self._company: asyncio.TimerHandle | None = None  # ends the wait of those that are queued now
        self._failed: list[_Entry] = []  # posted, to be tried again
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        self._last_event = await self._db.call(lambda c: int(one(c, "last_event")[0]))
        if not await self._db.call(lambda c: self._ballast.hold()):
            self._set_full(True)

    # --- on the loop ------------------------------------------------------------------------------------------
    def put(self, ops: tuple[Op[Any], ...], within: float = 0) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._queue.append(_Entry(ops, future))
        if within:
            self._within(within)
        else:
            self._soon()
        return future

    def post(self, ops: tuple[Op[Any], ...]) -> None:
        self._queue.append(_Entry(ops, None))
        self._within(POST_DELAY)

    async def drain(self) -> None:
        """Until everything queued is committed or has failed. Nothing may be queued meanwhile."""
        self._draining = True
        self.stop()
        self._try_again()
        if self._queue:
            self._soon()
        await self._idle.wait()

    def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._company = None

    def _later(self, delay: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        def run() -> None:
            self._timers.discard(timer)
            call()

        timer = asyncio.get_running_loop().call_later(delay, run)
        self._timers.add(timer)
        return timer

    def _within(self, delay: float) -> None:
        """The queue goes by then, and sooner with others that do: what it waits for is company."""
        self._idle.clear()
        if self._scheduled or self._under_way is not None:
            return
        loop = asyncio.get_running_loop()
        if self._company is not None and self._company.when() <= loop.time() + delay:
            return
        self._no_company()
        self._company = self._later(delay, self._alone)

    def _no_company(self) -> None:
        if self._company is not None:
            self._company.cancel()
            self._timers.discard(self._company)
            self._company = None

    def _alone(self) -> None:
        self._company = None
        self._soon()

    def _soon(self) -> None:
        # Not at once: what else this turn of the loop writes shall be in the same commit.
        self._idle.clear()
        if not self._scheduled and self._under_way is None:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._scheduled = False
        if self._under_way is not None:
            return
        self._no_company()  # else it would cut short the wait of those that are posted after this
        batch, self._queue = self._queue, []
        if not batch:
            self._idle.set()
            return
        self._under_way = batch
        try:
            self._db.submit(lambda c: self._commit(c, batch)).add_done_callback(self._settle)
        except LedgerError as error:  # closed
            self._under_way = None
            self._fail(batch, error)
            self._idle.set()

    def _settle(self, answer: asyncio.Future[_Committed]) -> None:
        batch, self._under_way = self._under_way or [], None
        self._answers += 1
        self._answered.set()
        error = answer.exception()
        if error is None:
            self._locked = 0
            self._set_broken(None)
            self._deliver(batch, answer.result())
        elif is_busy(error) and self._locked < LOCKED_TRIES:
            self._locked += 1
            _log.warning("another program keeps the ledger locked; trying again (%d)", self._locked)
            self._queue[:0] = batch
        else:
            self._locked = 0
            if is_full(error, self._db.path):
                self._set_full(True)
            elif is_of_the_file(error):
                self._set_broken(error)
            self._fail(batch, error if isinstance(error, Exception) else LedgerError(str(error)))
        if any(entry.done is not None for entry in self._queue) or (self._queue and self._draining):
            self._soon()
        elif self._queue:
            self._within(POST_DELAY)
        else:
            self._idle.set()

    def _deliver(self, batch: list[_Entry], committed: _Committed) -> None:
        self.commits += 1
        if committed.dropped_ballast:
            self._set_full(True)
        for entry in batch:
            if entry.error is not None:
                self._fail([entry], entry.error)
            elif entry.done is not None and not entry.done.done():
                entry.done.set_result(entry.results)
        if committed.events and self.listening():
            self._announce([EventRow(n, *event) for n, event in enumerate(committed.events, committed.first)])

    def _fail(self, batch: list[_Entry], error: Exception) -> None:
        for entry in batch:
            mine = in_our_words(error, self._db.path)  # one each: a traceback grows where an error is raised
            if entry.done is None:
                self._fail_posted(entry, mine)
            elif not entry.done.done():
                entry.done.set_exception(mine)
            else:
                _log.error("a write whose caller has gone has failed: %s", mine)

    def _fail_posted(self, entry: _Entry, error: Exception) -> None:
        if self.broken is None or self._draining:  # that has been told, and lasts for as long as it lasts
            entry.tries += 1
            _log.error("a write that nobody waits for has failed (try %d): %s", entry.tries, error)
        lasting = not isinstance(error, LedgerError) or isinstance(error, IllegalMove)
        if lasting or self._draining or entry.tries >= POST_TRIES:
            return
        self._failed.append(entry)
        if len(self._failed) == 1:
            self._later(RETRY_DELAY, self._try_again)

    def _try_again(self) -> None:
        self._queue[:0], self._failed = self._failed, []
        if self._queue:
            self._soon()

    # --- is it well? ------------------------------------------------------------------------------------------
    async def prove(self) -> None:
        """Until the thread has come back from a commit: one since the last call, or one that is made now.

        How that went is told by `full` and `broken`; a thread that hangs keeps the caller waiting.
        """
        if self._answers == self._proved:
            self._answered.clear()
            self._knock()
            await self._answered.wait()
        self._proved = self._answers

    def _knock(self) -> None:
        self.put((nothing,)).add_done_callback(lambda told: told.cancelled() or told.exception())

    def _set_broken(self, error: BaseException | None) -> None:
        before, self.broken = self.broken, None
        if error is not None:
            said = in_our_words(error, self._db.path) if isinstance(error, Exception) else error
            self.broken = before or (said if isinstance(said, LedgerError) else LedgerError(str(said)))
        if (before is None) == (self.broken is None):
            return
        if self.broken is None:
            _log.info("the ledger can be written again")
        else:
            _log.error("nothing new is dispatched: %s", self.broken)
            self._later(SPACE_PAUSE, self._look_for_health)
        if self.on_broken is not None:
            self.on_broken(self.broken)

    def _look_for_health(self) -> None:
        if self.broken is not None:
            self._knock()
            self._later(SPACE_PAUSE, self._look_for_health)

    # --- a full disk ------------------------------------------------------------------------------------------
    def _set_full(self, full: bool) -> None:
        if full == self.full:
            return
        self.full = full
        _log.log(
            logging.ERROR if full else logging.INFO,
            "the disk of the ledger is full: nothing new is dispatched"
            if full
            else "the disk of the ledger has space again",
        )
        if full:
            self._later(SPACE_PAUSE, self._look_for_space)
        if self.on_full is not None:
            self.on_full(full)

    def _look_for_space(self) -> None:
        def found(answer: asyncio.Future[bool]) -> None:
            if not answer.cancelled() and answer.exception() is None and answer.result():
                self._set_full(False)
            else:
                self._later(SPACE_PAUSE, self._look_for_space)

        try:
            self._db.submit(lambda c: self._ballast.hold()).add_done_callback(found)
        except LedgerError:  # closed
            return

    # --- on the thread ----------------------------------------------------------------------------------------
    def _commit(self, c: Connection, batch: list[_Entry]) -> _Committed:
        try:
            return self._transaction(c, batch, dropped_ballast=False)
        except DatabaseError as error:
            if not is_full(error, self._db.path) or not self._ballast.drop():
                raise
        return self._transaction(c, batch, dropped_ballast=True)

    def _transaction(self, c: Connection, batch: list[_Entry], *, dropped_ballast: bool) -> _Committed:
        """At first in good faith: only when an operation fails is each caller's work marked, to be undone by itself."""
        if len(batch) > 1:
            try:
                return self._all(c, batch, dropped_ballast, marked=False)
            except Exception as error:
                if is_of_the_file(error) or is_busy(error):
                    raise
        return self._all(c, batch, dropped_ballast, marked=len(batch) > 1)

    def _all(self, c: Connection, batch: list[_Entry], dropped_ballast: bool, *, marked: bool) -> _Committed:
        c.events = []
        first = self._last_event + 1
        c.execute("BEGIN IMMEDIATE")
        try:
            for entry in batch:
                self._run(c, entry, marked)
            c.executemany(SQL["insert_event"], [(n, *event) for n, event in enumerate(c.events, first)])
            crash.point("in_commit")
            c.execute("COMMIT")
            crash.point("committed")
        except BaseException:
            if c.in_transaction:  # SQLite may have rolled back by itself, as on a full disk
                c.execute("ROLLBACK")
            raise
        self._last_event += len(c.events)
        return _Committed(first, c.events, dropped_ballast)

    @staticmethod
    def _run(c: Connection, entry: _Entry, marked: bool) -> None:
        """A caller's own error undoes that caller's operations; an error of the file or the disk undoes the batch."""
        entry.error, mark = None, len(c.events)
        if marked:
            c.execute("SAVEPOINT caller")
        try:
            entry.results = [op(c) for op in entry.ops]
        except Exception as error:
            if not marked or not c.in_transaction or is_of_the_file(error) or is_busy(error):
                raise
            c.execute("ROLLBACK TO caller")
            del c.events[mark:]
            entry.error = error
        if marked:
            c.execute("RELEASE caller")
