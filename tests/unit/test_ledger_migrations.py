"""Ledgers of every released schema open for ever, and a migration that dies leaves the old schema or the new one."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from ledger_scene import NOW, opened, opening

from mlpiped.ledger import Ledger, moves
from mlpiped.ledger import opening as way
from mlpiped.ledger.db import SQL, connect
from mlpiped.model import Cause, CauseKind, Event, RunOutcome, RunState, StepOutcome

pytestmark = pytest.mark.anyio

RELEASED = sorted((Path(__file__).parents[1] / "fixtures").glob("ledger-v*.sqlite3"))
NEWEST = len(way.migrations())


def copied(released: Path, state_dir: Path) -> Path:
    state_dir.mkdir(exist_ok=True)
    return Path(shutil.copy(released, state_dir / way.NAME))


def schema(path: Path) -> dict[str, str]:
    """Name -> statement, comments and white space out."""
    conn = connect(path, readonly=True)
    try:
        rows = conn.execute(
            "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
    finally:
        conn.close()
    return {name: " ".join(re.sub(r"--.*", "", sql).split()) for name, sql in rows}


def test_every_released_schema_but_the_next_one_has_a_fixture() -> None:
    versions = [int(path.stem.removeprefix("ledger-v")) for path in RELEASED]
    assert versions[0] == 1 and versions in (list(range(1, NEWEST + 1)), list(range(1, NEWEST)))


@pytest.mark.parametrize("released", RELEASED, ids=lambda path: path.stem)
async def test_a_released_ledger_opens_with_all_its_rows_and_becomes_the_newest_schema(
    released: Path, tmp_path: Path
) -> None:
    before = way.contents(released)
    async with opened(tmp_path / "fresh") as fresh:
        path = copied(released, tmp_path / "old")
        async with opened(tmp_path / "old") as ledger:
            async with ledger.survey() as survey:
                assert await survey.schema() == NEWEST
            assert await ledger.faults() == []
            assert len(await ledger.runs(limit=1000)) == before.runs
        assert schema(path) == schema(fresh.path)


@pytest.mark.parametrize("released", RELEASED, ids=lambda path: path.stem)
async def test_every_statement_of_today_can_be_asked_of_a_released_ledger(released: Path, tmp_path: Path) -> None:
    path = copied(released, tmp_path)
    async with opened(tmp_path):
        pass
    conn = connect(path)
    for name, sql in SQL.items():
        if not name.startswith("runs_where_"):
            sql = sql.replace("{conditions}", "true").replace("{slots}", "?")
            values = dict.fromkeys(re.findall(r":(\w+)", sql), None) or [None] * sql.count("?")
            conn.execute(f"EXPLAIN {sql}", values).fetchall()
    conn.close()


async def test_the_ledger_of_schema_1_tells_its_runs_as_they_were_and_goes_on(tmp_path: Path) -> None:
    copied(RELEASED[0], tmp_path)
    async with opened(tmp_path) as ledger:
        runs = {run.id: run for run in await ledger.runs(limit=100)}
        assert [run.pipeline for run in runs.values() if run.outcome is RunOutcome.FAILED] == ["bad"]
        unfinished = await ledger.unfinished_runs()
        assert [(run.pipeline, run.state) for run in unfinished] == [
            ("long", RunState.RUNNING), ("long", RunState.QUEUED),
        ]  # fmt: skip
        of_run = await ledger.attempts_of_run(unfinished[0].id)
        [attempt] = [attempt for attempts in of_run.values() for attempt in attempts if attempt.end is None]
        assert attempt.handle is not None and attempt.handle["v"] == 1
        [tagged] = await ledger.runs(tags={"team": "a"})
        first, second = await ledger.steps(tagged.id)
        assert (first.outcome, second.outcome) == (StepOutcome.SUCCEEDED, StepOutcome.SUCCEEDED)
        assert first.key is not None and first.key in await ledger.results([first.key])
        [fact] = await ledger.outputs(tagged.id, 0)
        assert fact.digest.startswith("b3:") and fact.size == 4
        assert {step.outcome for step in await ledger.steps(tagged.id + 1)} == {StepOutcome.REUSED}
        assert all([await ledger.definition(run.version) for run in runs.values()])
        assert await ledger.paused() == {"other"}
        [seen] = [await ledger.arrivals(row.id) for row in await ledger.schedules() if await ledger.arrivals(row.id)]
        assert [path.rpartition(b"/")[2] for path in seen] == [b"1.csv"]
        [new] = await ledger.write(opening(Event("kept", Cause(CauseKind.MANUAL)), now=NOW))
        assert new == max(runs) + 1


async def test_statistics_of_a_small_ledger_do_not_decide_how_a_large_one_is_asked(tmp_path: Path) -> None:
    """They are there for ever, once a `PRAGMA optimize` has made them after the first ten runs."""
    path = copied(RELEASED[0], tmp_path)
    conn = connect(path)
    conn.execute("ANALYZE")
    assert conn.execute("SELECT count(*) FROM sqlite_stat1").fetchone()[0] > 0
    conn.close()
    async with opened(tmp_path) as ledger:
        await ledger.write(opening(Event("p", Cause(CauseKind.MANUAL)), now=NOW))
    conn = connect(path, readonly=True)
    assert not conn.execute("SELECT * FROM sqlite_schema WHERE name LIKE 'sqlite_stat%'").fetchall()
    conn.close()


async def test_a_ledger_that_came_out_of_a_backup_lets_readers_and_the_writer_work_at_once(tmp_path: Path) -> None:
    """A backup is one file without a write-ahead log; the ledger that it becomes must have one again."""
    copied(RELEASED[0], tmp_path)
    async with opened(tmp_path) as ledger:
        async with ledger.survey() as survey:
            await survey._reader.call(lambda c: c.execute("BEGIN").execute("SELECT * FROM runs").fetchone())
            assert await ledger.write(opening(Event("p", Cause(CauseKind.MANUAL)), now=NOW))
            await survey._reader.call(lambda c: c.execute("ROLLBACK"))


# --- migrations that die ------------------------------------------------------------------------------------
MADE_UP = [
    """
    CREATE TABLE extra (a INTEGER) STRICT;
    INSERT INTO extra SELECT id FROM runs;
    ALTER TABLE runs ADD COLUMN note TEXT;
    UPDATE runs SET note = 'second';
    CREATE INDEX runs_by_note ON runs (note);
    """,
    "ALTER TABLE extra RENAME TO further; UPDATE runs SET note = 'third'; DROP INDEX runs_by_note;",
]

CHILD = """
import os, signal, sys
from pathlib import Path
from mlpiped.ledger import opening
from mlpiped.ledger.db import connect

state, scripts = Path(sys.argv[1]), [*opening.migrations(), *sys.argv[2:]]

def attempt(folder, at):
    left = [at]
    def count(statement):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def traced(path, *, readonly=False):
        conn = connect(path, readonly=readonly)
        if not readonly:
            conn.set_trace_callback(count)
        return conn
    opening.connect = traced
    opening.prepare(folder / opening.NAME, scripts)

at = 0
while True:
    at += 1
    folder = state / str(at)
    folder.mkdir()
    (folder / opening.NAME).write_bytes((state / "old").read_bytes())
    if not (pid := os.fork()):
        attempt(folder, at)
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
print(at)
"""


async def test_C6_a_migration_killed_at_any_statement_leaves_one_schema_whole_and_is_taken_up_again(
    tmp_path: Path,
) -> None:
    copied(RELEASED[0], tmp_path).rename(tmp_path / "old")
    scripts = [*way.migrations(), *MADE_UP]
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path, *MADE_UP], capture_output=True, text=True, check=True)
    tries = int(done.stdout)
    assert tries > 15  # two migrations of 5 and 3 statements, with BEGIN, version and COMMIT, and the copy before
    notes = {**dict.fromkeys(range(1, NEWEST + 1)), NEWEST + 1: "second", NEWEST + 2: "third"}
    reached = set()
    for at in range(1, tries + 1):
        path = tmp_path / str(at) / way.NAME
        version = way.check(path, NEWEST + 2)
        reached.add(version)
        conn = connect(path)
        has_note = "note" in {row[1] for row in conn.execute("PRAGMA table_info(runs)")}
        found = {row[0] for row in conn.execute("SELECT note FROM runs")} if has_note else {None}
        assert found == {notes[version]}, f"killed at statement {at}"
        tables = {row[0] for row in conn.execute("SELECT name FROM sqlite_schema WHERE name IN ('extra', 'further')")}
        assert tables == {NEWEST + 1: {"extra"}, NEWEST + 2: {"further"}}.get(version, set())
        conn.close()
        way.prepare(path, scripts)  # the next start
        assert way.check(path, NEWEST + 2) == NEWEST + 2
        rows = sqlite3.connect(path)
        assert rows.execute("SELECT count(DISTINCT id), min(note) FROM runs").fetchone() == (10, "third")
        rows.close()
    assert reached == set(range(1, NEWEST + 3))


async def test_what_retention_forgets_of_an_old_ledger_leaves_its_results(tmp_path: Path) -> None:
    copied(RELEASED[0], tmp_path)
    async with opened(tmp_path) as ledger:
        [tagged] = await ledger.runs(tags={"team": "a"})
        keys = [step.key for step in await ledger.steps(tagged.id) if step.key]
        while not (await ledger.write(moves.forget_run(tagged.id)))[0].done:
            pass
        assert await ledger.run(tagged.id) is None and await ledger.runs(tags={"team": "a"}) == []
        assert await ledger.steps(tagged.id) == [] and await ledger.events(run=tagged.id) == []
        assert set(await ledger.results(keys)) == set(keys)
        assert isinstance(ledger, Ledger) and await ledger.faults() == []
