"""A ledger with a long past: one real run, copied until there are many. Done while no daemon has the ledger open."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NUMBERED = "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < :count)"


def grow(ledger: Path, count: int, source: int | None = None, days: float = 0.0) -> str:
    """Copy a run (the newest, or `source`), its steps, attempts and events `count` times; says what lies there then.

    The copies are spread over the last `days`, the oldest first.
    """
    connection = sqlite3.connect(ledger)
    with connection:
        connection.execute("PRAGMA foreign_keys = ON")
        (last,) = connection.execute("SELECT max(id) FROM runs").fetchone()
        names = {"last": last, "count": count, "source": last if source is None else source, "age": days * 86_400e6}
        back = "CAST(:age * (:count - n.n) / :count AS INTEGER)"
        for table, key, fresh in (
            (
                "runs",
                "id",
                {
                    "id": ":last + n.n",
                    **{at: f"t.{at} - {back}" for at in ("created_at", "started_at", "finished_at")},
                },
            ),
            ("steps", "run_id", {"run_id": ":last + n.n"}),
            ("attempts", "run_id", {"id": "NULL", "run_id": ":last + n.n", "token": "t.token || '-' || n.n"}),
            ("events", "run_id", {"id": "NULL", "run_id": ":last + n.n"}),
        ):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            listed = ", ".join(f'"{column}"' for column in columns)
            values = ", ".join(fresh.get(column, f't."{column}"') for column in columns)
            connection.execute(
                f"{NUMBERED} INSERT INTO {table} ({listed}) SELECT {values} FROM n, {table} t WHERE t.{key} = :source",
                names,
            )
    sizes = [
        f"{connection.execute(f'SELECT count(*) FROM {table}').fetchone()[0]:,} {table}"
        for table in ("runs", "steps", "events")
    ]
    connection.close()
    return ", ".join(sizes)
