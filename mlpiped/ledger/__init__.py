"""The ledger: everything that was decided and everything that happened. The only room that knows SQL."""

from __future__ import annotations

from mlpiped.ledger import moves
from mlpiped.ledger.db import sqlite_version
from mlpiped.ledger.opening import restore
from mlpiped.ledger.rows import (
    ArtifactRow,
    AttemptRow,
    AuditRow,
    ComputeRow,
    Counts,
    EventRow,
    FireRow,
    Head,
    Maker,
    Result,
    RunRow,
    ScheduleRow,
    Seen,
    StepRow,
)
from mlpiped.ledger.store import Ledger

__all__ = [
    "ArtifactRow",
    "AttemptRow",
    "AuditRow",
    "ComputeRow",
    "Counts",
    "EventRow",
    "FireRow",
    "Head",
    "Ledger",
    "Maker",
    "Result",
    "RunRow",
    "ScheduleRow",
    "Seen",
    "StepRow",
    "moves",
    "restore",
    "sqlite_version",
]
