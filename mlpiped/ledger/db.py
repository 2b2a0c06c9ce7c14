"""The one door to SQLite: which build of it, its errors in our words, named SQL, and one thread a connection.

`pysqlite3` brings a newer SQLite than most systems (older ones can corrupt a WAL that two connections checkpoint), but
raises its own exception classes: nothing outside this module imports either of them.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import aiosqlite

from mlpiped.errors import LedgerError, LedgerFull, LedgerUnreadable, LedgerUnwritable
from mlpiped.model import ATTEMPT_MOVES, RUN_MOVES, STEP_MOVES

if TYPE_CHECKING:
    import sqlite3 as driver
    from collections.abc import Mapping, Sequence
    from enum import StrEnum
    from pathlib import Path
else:
    try:
        import pysqlite3 as driver
    except ImportError:  # no wheel for this machine
        import sqlite3 as driver

T = TypeVar("T")
NO_SPACE = 1 << 18  # bytes
APPLICATION_ID = 0x6D6C7064  # "mlpd"
DatabaseError = driver.DatabaseError
IntegrityError = driver.IntegrityError
sqlite_version: tuple[int, ...] = driver.sqlite_version_info

# Without an adapter of its own, each None that is bound costs a failing search for one: most of a bulk write's time.
driver.register_adapter(type(None), lambda _: None)


class Connection(driver.Connection):
    """A connection that gathers the event rows of the transaction at hand; the writer stores them at its end."""

    events: list[tuple[int | None, int | None, str, int, str | None]]

    def emit(self, run_id: int | None, idx: int | None, kind: str, at: int, data: str | None = None) -> None:
        """An event row, stored in this transaction. `data` is a JSON object."""
        self.events.append((run_id, idx, kind, at, data))


Op = Callable[[Connection], T]
"""A write: runs inside a transaction on the writer's thread, maybe twice; it touches nothing but the connection."""


def connect(path: Path, *, readonly: bool = False) -> Connection:
    """A connection without implicit transactions, to be used and closed on the calling thread."""
    uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rwc'}"
    conn = driver.connect(uri, timeout=5, isolation_level=None, factory=Connection, uri=True, cached_statements=256)
    conn.events = []
    # FULL: a lost `submitting` row is a GPU-day run twice.
    conn.execute("PRAGMA synchronous = FULL")
    conn.execute("PRAGMA foreign_keys = ON")
    conn.execute("PRAGMA temp_store = MEMORY")
    conn.execute("PRAGMA cache_size = -32768")
    conn.execute("PRAGMA journal_size_limit = 67108864")
    conn.execute("PRAGMA wal_autocheckpoint = 4000")  # pages; most are written again and again
    if readonly:
        conn.execute("PRAGMA query_only = ON")
    return conn


def one(conn: Connection, name: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> Any:
    """The first row of the named statement or None. The statement is drained: an open one would hold the commit."""
    rows = conn.execute(SQL[name], parameters).fetchall()
    return rows[0] if rows else None


def every(conn: Connection, name: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[Any]:
    return conn.execute(SQL[name], parameters).fetchall()


# --- errors ---------------------------------------------------------------------------------------------------
_DISK = (driver.SQLITE_IOERR, driver.SQLITE_READONLY, driver.SQLITE_CANTOPEN)
_CORRUPT = (driver.SQLITE_CORRUPT, driver.SQLITE_NOTADB)


def _code(error: BaseException) -> int:
    return int(getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def is_busy(error: BaseException) -> bool:
    return isinstance(error, DatabaseError) and _code(error) in (driver.SQLITE_BUSY, driver.SQLITE_LOCKED)


def is_full(error: BaseException, path: Path) -> bool:
    """Where it cannot make the index of the log for want of space, SQLite speaks of an I/O error."""
    if not isinstance(error, DatabaseError) or _code(error) not in (driver.SQLITE_FULL, *_DISK):
        return False
    return _code(error) == driver.SQLITE_FULL or _no_space(path)


def _no_space(path: Path) -> bool:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < NO_SPACE


def is_of_the_file(error: BaseException) -> bool:
    """No statement is at fault: the disk is full or takes no writes, or what the file holds is no ledger any more."""
    return isinstance(error, DatabaseError) and _code(error) in (driver.SQLITE_FULL, *_DISK, *_CORRUPT)


def in_our_words(error: Exception, path: Path) -> Exception:
    """SQLite's error as one of ours; any other error as it is."""
    if not isinstance(error, driver.Error):
        return error
    if is_full(error, path):
        mine: LedgerError = LedgerFull(
            f"no space left for the ledger: `{path}`", hint="free space on that disk; work goes on by itself"
        )
    elif _code(error) in _CORRUPT and _can_be_read(path):
        mine = unreadable(path, str(error))
    elif is_busy(error):
        mine = LedgerError(
            f"another program keeps the ledger locked: `{path}`", hint="close the program that has it open"
        )
    elif is_of_the_file(error):
        mine = LedgerUnwritable(
            f"the disk of the ledger fails: `{path}`: {error}", hint="look at that disk and its mount, then start again"
        )
    else:
        mine = LedgerError(f"the ledger refused a statement: {error}")
    mine.__cause__ = error
    return mine


def _can_be_read(path: Path) -> bool:
    """SQLite calls a disk that has died a malformed ledger."""
    try:
        for file in (path, path.with_name(f"{path.name}-wal")):
            if file.exists():
                with file.open("rb", buffering=0) as bytes_:
                    bytes_.read(1 << 16)
    except OSError:
        return False
    return True


def unreadable(path: Path, what: str) -> LedgerUnreadable:
    return LedgerUnreadable(
        f"the ledger cannot be read: `{path}`: {what}",
        hint="stop, keep a copy of the state folder, and bring back a backup with `mlpiped restore FILE`",
    )


# --- named SQL ------------------------------------------------------------------------------------------------
_MOVES: dict[str, Mapping[Any, frozenset[Any]]] = {"run": RUN_MOVES, "step": STEP_MOVES, "attempt": ATTEMPT_MOVES}


def guard(kind: str, to: str) -> str:
    """The condition that a row may go to state `to`, from the table of legal moves in `model`."""
    sources: list[StrEnum] = [state for state, targets in _MOVES[kind].items() if to in targets]
    if not sources:
        raise ValueError(f"no {kind} ever comes to {to}")
    # not IN: SQLite builds its list anew for each row of a bulk write
    terms = " OR ".join(f"state = '{state.value}'" for state in sources)
    return f"({terms})"


def _load() -> dict[str, str]:
    """`-- name: x` and a line of purpose before each statement; `{step -> finished}` stands for the guard."""
    text = files("mlpiped.ledger").joinpath("queries.sql").read_text()
    found: dict[str, str] = {}
    for part in re.split(r"^-- name: ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        sql = "\n".join(line for line in body.splitlines() if not line.startswith("--")).strip().rstrip(";")
        found[name.strip()] = re.sub(r"\{(\w+) -> (\w+)\}", lambda m: guard(m[1], m[2]), sql)
    return found


SQL: dict[str, str] = _load()


# --- one thread a connection ----------------------------------------------------------------------------------
class Db:
    """An aiosqlite connection on which whole functions run, each in one hop to its thread.

    aiosqlite's own calls are one hop a statement, and leave a transaction open when their caller is cancelled.
    A function that was handed to the thread here is run to its end whatever becomes of the caller.
    """

    def __init__(self, path: Path, *, readonly: bool) -> None:
        self.path = path
        self._readonly = readonly

    async def open(self) -> Db:
        self._db = aiosqlite.Connection(lambda: connect(self.path, readonly=self._readonly), 64)
        # A ledger that nobody closed must not keep a dying process alive; whatever is committed is safe.
        self._db._thread.daemon = True
        try:
            await self._db
        except driver.Error as error:
            raise in_our_words(error, self.path) from error
        return self

    def submit(self, work: Callable[[Connection], T]) -> asyncio.Future[T]:
        """Queue `work` for the thread. Cancelling the future does not stop it."""
        conn = self._db._connection
        if conn is None or not self._db._running:
            raise LedgerError("the ledger is closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._db._tx.put_nowait((future, lambda: work(conn)))  # type: ignore[arg-type]
        return future

    async def call(self, work: Callable[[Connection], T]) -> T:
        try:
            return await self.submit(work)
        except driver.Error as error:
            raise in_our_words(error, self.path) from error

    async def close(self) -> None:
        await self._db.close()


class Reads:
    """Named statements on a connection that cannot write: parameters in, rows out."""

    def __init__(self, reader: Db) -> None:
        self._reader = reader

    async def _every(self, statement: str, /, **parameters: Any) -> list[Any]:
        return await self._reader.call(lambda c: every(c, statement, parameters))

    async def _one(self, statement: str, /, **parameters: Any) -> Any:
        return await self._reader.call(lambda c: one(c, statement, parameters))
