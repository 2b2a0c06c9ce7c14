"""`mlpiped backup` and `mlpiped restore`: the ledger, whole and checked, out of the state folder and into it.

Only the process that owns the state folder opens the ledger: a daemon that runs makes the copy and sends it, and
without one we are the owner for as long as it takes. So no second process ever takes part in what SQLite writes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlpiped.cli.client import Client
from mlpiped.cli.front import printable
from mlpiped.cli.render import size
from mlpiped.errors import Conflict, LedgerBusy, MlpipedError, UsageError
from mlpiped.ledger import opening
from mlpiped.ledger.db import DatabaseError, in_our_words
from mlpiped.model import json_time
from mlpiped.protocol import path

if TYPE_CHECKING:
    from pathlib import Path

    from mlpiped.config.settings import Settings

PATIENCE = 600.0  # seconds for a daemon to make the copy


def backup(settings: Settings, file: Path) -> int:
    dest = file.absolute()
    ledger = settings.daemon.state_dir / opening.NAME
    _check_dest(dest, ledger)
    try:
        lock = _own(settings.daemon.state_dir)
        if lock is None:
            _from_daemon(settings, dest)
        else:
            try:
                _from_folder(ledger, dest)
            finally:
                os.close(lock)
        held = opening.contents(dest)
        bytes_ = dest.stat().st_size
    except DatabaseError as error:
        raise in_our_words(error, dest) from error
    except OSError as error:
        raise _failed("the backup cannot be written", error, dest) from None
    until = f", until {json_time(held.until)}" if held.until else ""
    print(printable(f"{dest}: {held.runs} runs{until}, {size(bytes_)}"))
    return 0


def _check_dest(dest: Path, ledger: Path) -> None:
    if dest.is_dir():
        raise UsageError(f"`{dest}` is a folder", hint=f"name a file: `{dest / 'ledger.backup'}`")
    if not dest.parent.is_dir():
        raise UsageError(f"there is no folder `{dest.parent}`")
    try:
        same = dest.exists() and dest.samefile(ledger)
    except OSError:
        same = False
    if same or dest == ledger:
        raise Conflict(f"the ledger cannot be its own backup: `{dest}`")


def _own(state_dir: Path) -> int | None:
    """The lock on the state folder; None when a daemon has it, or the folder is closed to us."""
    try:
        if not state_dir.is_dir():
            raise MlpipedError(
                f"there is no state folder: `{state_dir}`", hint="name the daemon's config file with --config"
            )
        return opening.lock(state_dir)
    except (LedgerBusy, PermissionError):
        return None


def _from_daemon(settings: Settings, dest: Path) -> None:
    with Client(str(settings.control.socket)).open("POST", path("backup"), {}, timeout=PATIENCE) as answer:
        opening.receive(answer.chunks(), dest)


def _from_folder(ledger: Path, dest: Path) -> None:
    if not ledger.exists():
        raise MlpipedError(f"there is no ledger yet: `{ledger}`")
    opening.check(ledger, len(opening.migrations()))
    opening.copy(ledger, dest)


def restore(settings: Settings, file: Path) -> int:
    state_dir, source = settings.daemon.state_dir, file.absolute()
    if not source.is_file():
        raise UsageError(f"there is no file `{source}`")
    try:
        aside = opening.restore(state_dir, source)
        held = opening.contents(source)
    except DatabaseError as error:
        raise in_our_words(error, source) from error
    except OSError as error:
        raise _failed("the backup cannot be restored", error, source) from None
    if aside is not None:
        print(printable(f"the ledger that was there is now `{aside}`"))
    until = f"; what happened after {json_time(held.until)} is not in the ledger" if held.until else ""
    print(printable(f"restored {held.runs} runs{until}"))
    print("what has run since may run again; `mlpipectl doctor` names steps that still run and are not known any more")
    return 0


def _failed(what: str, error: OSError, file: Path) -> MlpipedError:
    return MlpipedError(f"{what}: `{error.filename or file}`: {(error.strerror or str(error)).lower()}")
