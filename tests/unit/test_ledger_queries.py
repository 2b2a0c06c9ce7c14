from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from ledger_scene import NOW, committed, event, made, opened, opening, running

from mlpiped.errors import StaleReuse
from mlpiped.files.hashing import StatRow
from mlpiped.ledger import moves
from mlpiped.ledger.db import SQL, connect
from mlpiped.ledger.rows import StepRow
from mlpiped.model import Arrival, RunOutcome, RunState, StepOutcome, StepState

pytestmark = pytest.mark.anyio

BIG = {
    "runs",
    "steps",
    "attempts",
    "events",
    "results",
    "outputs",
    "keys",
    "fires",
    "arrivals",
    "stat_cache",
    "run_tags",
}
WHOLE = {"artifacts", "artifact_bytes", "count_all_runs"}  # for gc and backups, on a connection of their own


def reads() -> list[str]:
    return sorted(name for name, sql in SQL.items() if sql.startswith("SELECT") and name not in WHOLE)


@pytest.mark.parametrize("name", reads())
async def test_no_question_reads_the_whole_history(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path) as ledger:
        pass
    conditions = [c for n, c in SQL.items() if n.startswith("runs_where_")] if name == "runs" else [""]
    for condition in conditions:
        sql = SQL[name].replace("{conditions}", condition).replace("{slots}", "?, ?").replace("{n}", "0")
        values: Any = dict.fromkeys(re.findall(r":(\w+)", sql), None) or [None] * sql.count("?")
        conn = connect(ledger.path, readonly=True)
        plan = [row[3] for row in conn.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        aliases = dict(re.findall(r"(?:FROM|JOIN) (\w+) AS (\w)\b", sql))
        for line in plan:
            scanned = re.match(r"SCAN (\w+)", line)
            table = aliases.get(scanned[1], scanned[1]) if scanned else ""
            # from the newest down to a limit, or over an index of what is unfinished only
            bounded = condition == SQL["runs_where_finished"] or name == "latest_of_all"
            bounded = bounded or line.split(" INDEX ")[-1] in ("steps_active", "attempts_live")
            assert table not in BIG or bounded, (condition, plan)
        conn.close()


async def test_runs_are_found_by_every_condition_newest_first(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        for n in range(6):
            await ledger.write(
                opening(event(f"p{n % 2}"), now=NOW + n, tags={"team": "a" if n < 3 else "b", "n": str(n)})
            )
        for run_id in (1, 2, 3):
            await ledger.write(moves.start_run(run_id, NOW))
        await ledger.write(moves.finish_run(1, RunOutcome.FAILED, NOW), moves.finish_run(2, RunOutcome.SUCCEEDED, NOW))

        async def found(**conditions: Any) -> list[int]:
            return [run.id for run in await ledger.runs(**conditions)]

        assert await found() == [6, 5, 4, 3, 2, 1]
        assert await found(limit=2) == [6, 5]
        assert await found(limit=2, before=5) == [4, 3]
        assert await found(pipeline="p0") == [5, 3, 1]
        assert await found(state=RunState.RUNNING) == [3]
        assert await found(state=RunState.QUEUED) == [6, 5, 4]
        assert await found(state=RunState.FINISHED) == [2, 1]
        assert await found(outcome=RunOutcome.FAILED) == [1]
        assert await found(outcome=RunOutcome.FAILED, pipeline="p1") == []
        assert await found(tags={"team": "a"}) == [3, 2, 1]
        assert await found(tags={"team": "a", "n": "1"}) == [2]
        assert await found(since=NOW + 4) == [6, 5]
        assert await found(since=NOW + 99) == []
        assert [run.id for run in await ledger.unfinished_runs()] == [3, 4, 5, 6]
        assert [run.id for run in await ledger.last_failures()] == [1]
        assert {p: run.id for p, run in (await ledger.last_finished(["p0", "p1", "p2"])).items()} == {"p0": 1, "p1": 2}
        successes = [await ledger.latest_success(p) for p in ("p0", "p1")]
        assert [run and run.id for run in successes] == [None, 2]
        latest = [await ledger.latest(p) for p in (None, "p0", "nobody")]
        assert [run and run.id for run in latest] == [6, 5, None]
        assert await ledger.run(99) is None


async def test_counts_and_progress_say_what_is_going_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        first = await running(ledger, ("a", "b", "c"))
        await ledger.write(opening(event()), moves.queue_step(first, 1, "k", None, NOW))
        await ledger.write(moves.finish_step(first, 0, StepOutcome.SKIPPED, None, NOW))
        counts = await ledger.counts()
        assert counts.runs == {RunState.RUNNING: 1, RunState.QUEUED: 1}
        assert counts.steps == {StepState.QUEUED: 1}
        assert await ledger.progress([first, 2]) == {first: {"skipped": 1, "queued": 1, "waiting": 1}, 2: {}}


async def test_more_keys_than_fit_one_statement_are_all_found(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        names = [f"s{n}" for n in range(1001)]
        run_id = await running(ledger, names)
        ops: list[Any] = []
        for idx in range(1001):
            key, token = f"k{idx}", f"t{idx}"
            outputs = [made("b", f"b3:{idx}"), made("a", f"b3:a{idx}")][: idx % 3]
            ops += [
                moves.queue_step(run_id, idx, key, None, NOW),
                moves.intent(run_id, idx, token, 1, "local", key, "{}", NOW),
                moves.commit_result(token, key, outputs, idx, NOW, True),
            ]
        await ledger.write(*ops)
        results = await ledger.results([f"k{n}" for n in range(1001)] * 2)
        assert len(results) == 1001
        assert [len(results[f"k{n}"].outputs) for n in range(6)] == [0, 1, 2, 0, 1, 2]
        assert [o.name for o in results["k2"].outputs] == ["b", "a"]
        assert len(await ledger.heads("digits", names)) == 1001


async def test_arrivals_keep_the_last_of_each_path_and_all_content_ever(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        big = 2**64 - 5  # inode numbers use all 64 bits on some file systems

        def arrival(path: bytes, digest: str) -> Arrival:
            return Arrival("s1", path, digest, 10, 20, big)

        fire = event(
            dedupe="batch:1", cursor=("s1", {}), arrivals=(arrival(b"/d/\xff.csv", "1"), arrival(b"/d/b", "2"))
        )
        await ledger.write(opening(fire))
        await ledger.write(
            moves.record_fire(event(dedupe="batch:2", arrivals=(arrival(b"/d/b", "3"),)), NOW, "skipped")
        )
        await ledger.write(moves.put_arrivals([arrival(b"/d/c", "4")]))
        arrivals = await ledger.arrivals("s1")
        assert {path: seen.digest for path, seen in arrivals.items()} == {
            b"/d/\xff.csv": "1",
            b"/d/b": "3",
            b"/d/c": "4",
        }
        assert arrivals[b"/d/b"] == ("3", 10, 20, big)
        assert await ledger.arrival_digests("s1", ["1", "2", "3", "4", "5"]) == {"1", "2", "3", "4"}
        assert list(await ledger.arrivals("s1", b"/d/b", 1)) == [b"/d/c"]
        assert await ledger.arrivals("s2") == {}
        assert (await ledger.events())[1].kind == "fire.skipped"


async def test_the_stat_cache_keeps_any_path_and_any_number(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        rows = [StatRow(b"/\xff/%d" % n, 2**64 - 1, 2**63 + n, n, n, n, n, "b3:x") for n in range(2500)]
        await ledger.write(moves.put_stat_cache(rows))
        await ledger.write(moves.put_stat_cache([rows[3]]))
        found = await ledger.stat_cache([row.path for row in rows] + [b"/unknown"])
        assert found == {row.path: row for row in rows}
        assert await ledger.stat_cache([]) == {}


async def test_pauses_definitions_and_the_audit_trail_outlive_the_daemon(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        assert await ledger.write(moves.set_paused("p", True, "alice", NOW), moves.set_paused("q", True, "a", NOW))
        assert await ledger.write(moves.set_paused("p", True, "bob", NOW)) == [False]
        await ledger.write(moves.set_paused("q", False, "a", NOW))
        await ledger.write(moves.save_definition("v1", "p", '{"name":"p"}', NOW))
        await ledger.write(moves.audit("alice", 1000, 77, "pause", {"pipeline": "p"}, NOW))
        await ledger.write(moves.put_cursor("s1", "p", {"at": 5}, NOW))
    async with opened(tmp_path) as ledger:
        assert await ledger.paused() == {"p"}
        assert await ledger.definition("v1") == '{"name":"p"}' and await ledger.definition("v2") is None
        [entry] = await ledger.audit()
        assert (entry.who, entry.uid, entry.pid, entry.verb, entry.args) == (
            "alice",
            1000,
            77,
            "pause",
            {"pipeline": "p"},
        )
        [schedule] = await ledger.schedules()
        assert (schedule.id, schedule.cursor, schedule.fired_at) == ("s1", {"at": 5}, None)


async def test_collected_artifacts_keep_their_digest_and_lose_their_path_until_they_are_made_again(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as ledger:
        first = await running(ledger)
        await committed(ledger, first)
        [artifact] = await ledger.artifacts()
        assert (artifact.digest, artifact.used_at, artifact.cost_us) == ("b3:made", NOW, 7)
        assert await ledger.write(moves.lose_artifacts(["b3:made"], NOW)) == [[]]  # the run builds on it
        await ledger.write(moves.finish_step(first, 1, StepOutcome.SKIPPED, "", NOW))
        await ledger.write(moves.finish_run(first, RunOutcome.SUCCEEDED, NOW))
        assert await ledger.write(moves.lose_artifacts(["b3:made"], NOW, planned=NOW - 1)) == [[]]  # used since
        assert await ledger.write(moves.lose_artifacts(["b3:made", "b3:none"], NOW)) == [["b3:made"]]
        assert await ledger.artifacts() == []
        [fact] = (await ledger.results(["b3:k"]))["b3:k"].outputs
        assert (fact.digest, fact.path) == ("b3:made", "")
        await committed(ledger, await running(ledger), key="b3:else", token="t2")
        assert await ledger.outputs(first, 0) == (made(),)
        assert [m.token for m in await ledger.makers("b3:made")] == ["t2", "t1"]


async def test_reuse_keeps_an_artifact_from_garbage_collection(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await committed(ledger, await running(ledger))
        later = NOW + 2 * 86_400_000_000
        second = await running(ledger)
        row = StepRow(0, "", outcome=StepOutcome.REUSED, key="b3:k")
        await ledger.write(moves.finish_steps(second, [row], later))
        assert [a.used_at for a in await ledger.artifacts()] == [later]


async def test_a_backup_is_a_whole_ledger_though_writing_went_on(tmp_path: Path) -> None:
    async with opened(tmp_path / "a") as ledger:
        await committed(ledger, await running(ledger))
        (tmp_path / "copy").write_bytes(b"an older one")
        ledger.post(opening(event()))
        await ledger.backup(tmp_path / "copy")
        await ledger.write(opening(event()))
    with sqlite3.connect(f"file:{tmp_path}/copy?mode=ro", uri=True) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert conn.execute("SELECT count(*) FROM results").fetchone() == (1,)
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("copy")] == ["copy"]


async def test_what_has_lost_its_bytes_is_reused_by_nobody(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        first = await running(ledger, ["prepare"])
        await committed(ledger, first)
        await ledger.write(moves.finish_run(first, RunOutcome.SUCCEEDED, NOW))
        second = await running(ledger)
        await ledger.write(moves.lose_artifacts(["b3:made"], NOW))
        with pytest.raises(StaleReuse):
            await ledger.write(moves.finish_step(second, 0, StepOutcome.REUSED, "", NOW, key="b3:k"))


async def test_an_index_that_lacks_a_row_is_a_fault_though_the_file_is_well_formed(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.write(opening(event()))
        assert await ledger.faults() == []
        path = ledger.path
    with sqlite3.connect(path, isolation_level=None) as c:
        found = c.execute("SELECT * FROM sqlite_schema WHERE name = 'runs_by_creation'").fetchone()
        c.execute("PRAGMA writable_schema = ON")
        c.execute("DELETE FROM sqlite_schema WHERE name = 'runs_by_creation'")
    with sqlite3.connect(path, isolation_level=None) as c:  # without it for a moment
        c.execute("UPDATE runs SET created_at = created_at + 1")
        c.execute("PRAGMA writable_schema = ON")
        c.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", found)
    with sqlite3.connect(path) as c:
        assert c.execute("PRAGMA quick_check").fetchone() == ("ok",)
    async with opened(tmp_path) as ledger:
        assert any("runs_by_creation" in fault for fault in await ledger.faults())
