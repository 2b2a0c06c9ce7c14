"""The verdict. The steps' own marks are the truth; the ledger is what is accused of saying something else.

1. Each step that had to run has exactly one committed token, and has started no more often than its author wanted.
2. Each token starts at most once, only after its intent was durable, and when no other of its step lives.
3. What is recorded as never_ran has left no mark.
4. A token that has reached its end is not recorded as lost (a step is then run again that need not be).
5. Each due time of a clock has a run, or a word in the ledger why it has none.
6. The bytes of each committed output hash to what the ledger says, and are those that its own token wrote: where it is
   kept, and here too once it has come home.
7. No process of ours is left, and no run is unfinished.

After a harsh death (a power cut, or supervisors and steps killed too) 1 allows further starts and 4 allows `lost`;
what the daemon has told anybody (a run's number, an event) must be in the ledger all the same. Where steps may be cut
off by what they run on, a token that has started and not ended may be lost, and the step start once more; and one that
has ended, if its supervisor was cut off before it could say so: there is no witness in its folder then.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from crash.scenario import ARRIVING, ASKED, FLAKY, PERIOD, STEPS, TICKING, Mark
from mlpiped.execution.tries import LOST_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_MISSED = re.compile(r"(\d+) fires? from .* missed")


def _missed(detail: str) -> int:
    """So many due times a fire says it stands for besides its own."""
    told = _MISSED.search(detail)
    return int(told[1]) if told else 0


@dataclass(slots=True)
class Evidence:
    """What the trial itself has seen. Times are µs since the epoch."""

    asked: dict[str, str] = field(default_factory=dict)  # seed -> pipeline
    told: dict[str, int] = field(default_factory=dict)  # seed -> the run that the daemon said it is
    arrived: list[str] = field(default_factory=list)  # names of files
    events: dict[int, tuple[str, int | None]] = field(default_factory=dict)  # streamed: id -> (kind, run)
    deaths: list[tuple[int, str]] = field(default_factory=list)  # (when, where)
    clocks_from: int = 0  # the clocks were known at this time …
    clocks_until: int = 0  # … and had fired for it by then
    harsh: int = 0  # deaths that took steps with them
    kept: dict[str, Path] = field(default_factory=dict)  # compute -> below which it keeps outputs that stay there
    cuts: Callable[[str], Path] | None = None  # steps may be ended by what they run on: the folder there of a token


@dataclass(slots=True)
class Verdict:
    violations: list[str]
    runs: int = 0
    injected: int = 0  # runs that were alive at one death or more
    tokens: int = 0
    deaths: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.violations + other.violations,
            self.runs + other.runs,
            self.injected + other.injected,
            self.tokens + other.tokens,
            self.deaths + other.deaths,
        )

    def __str__(self) -> str:
        where = ", ".join(f"{name} {count}" for name, count in sorted(self.deaths.items()))
        words = (
            f"{self.injected} crash-injected runs of {self.runs}, {self.tokens} tokens started,"
            f" {self.deaths.total()} deaths ({where}): {len(self.violations)} violations"
        )
        return "\n  ".join([words, *self.violations[:40]])


def judge(ledger: Path, marks: Iterable[Mark], evidence: Evidence, processes: Iterable[int]) -> Verdict:
    """The ledger must be at rest: its daemon has ended."""
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        case = _Case(connection, list(marks), evidence)
        for check in (case.tokens, case.ends, case.runs, case.required, case.clocks, case.outputs, case.told):
            case.violations += check()
        left = [f"process {pid} is left: {_name(pid)}" for pid in processes]
        return Verdict(
            case.violations + left,
            len(case.run_rows),
            case.injected(),
            sum(mark.word == "start" for mark in case.marks),
            Counter(where for _, where in evidence.deaths),
        )


class _Case:
    def __init__(self, connection: sqlite3.Connection, marks: list[Mark], evidence: Evidence) -> None:
        self.marks, self.evidence = marks, evidence
        self.violations: list[str] = []
        self.connection = connection
        self.run_rows = {row["id"]: row for row in connection.execute("SELECT * FROM runs")}
        self.attempts = {row["token"]: row for row in connection.execute("SELECT * FROM attempts")}
        self.said: dict[str, list[str]] = defaultdict(list)  # token -> its words in order
        for mark in marks:
            self.said[mark.token].append(mark.word)
        lost = Counter((row["run_id"], row["idx"]) for row in self.attempts.values() if row["end"] == "lost")
        may = evidence.harsh or evidence.cuts is not None
        self.given_up = {run for (run, _), count in lost.items() if may and count > LOST_LIMIT}

    # --- 2, 3, 4 ---------------------------------------------------------------------------------------------------
    def tokens(self) -> Iterator[str]:
        whole = (["start", "end"], ["start", "fail"])
        for token, words in self.said.items():
            if words.count("start") != 1:
                yield f"`{token}` has started {words.count('start')} times: {words}"
            elif words not in whole and not (self.evidence.harsh and words == ["start"]) and not self._cut(token):
                yield f"`{token}` has started and left {words}"
            if token not in self.attempts:
                yield f"`{token}` has started, and the ledger has no intent of it"

    def ends(self) -> Iterator[str]:
        for token, row in self.attempts.items():
            words, end = self.said.get(token, []), row["end"]
            if end == "never_ran" and words:
                yield f"`{token}` is recorded as never_ran and has left {words}"
            elif end == "committed" and words != ["start", "end"]:
                yield f"`{token}` is committed and has left {words}"
            elif end == "failed" and words != ["start", "fail"]:
                yield f"`{token}` is recorded as failed and has left {words}: {row['reason']}"
            elif end == "lost" and not (self.evidence.harsh or self._cut(token)):
                yield f"`{token}` is recorded as lost and has left {words}: {row['reason']}"
            elif end not in ("never_ran", "committed", "failed", "lost"):
                yield f"`{token}` ended as {end} and has left {words}: {row['reason']}"

    def _cut(self, token: str) -> bool:
        """Whether it may have been ended by what it ran on."""
        if self.evidence.cuts is None:
            return False
        if self.said.get(token, []) in (["start"], []):
            return True
        lost = token in self.attempts and self.attempts[token]["end"] == "lost"
        return lost and not (self.evidence.cuts(token) / "exit.json").exists()

    # --- 7, and the ledger in itself -------------------------------------------------------------------------------
    def runs(self) -> Iterator[str]:
        for row in self.run_rows.values():
            if row["state"] != "finished":
                yield f"run {row['id']} of `{row['pipeline']}` is stuck: {row['state']}"
            elif row["outcome"] != "succeeded" and row["id"] not in self.given_up:
                yield f"run {row['id']} of `{row['pipeline']}` ended as {row['outcome']}: {self._whys(row['id'])}"
        for (problem,) in self.connection.execute("PRAGMA integrity_check"):
            if problem != "ok":
                yield f"the ledger is damaged: {problem}"

    def _whys(self, run: int) -> str:
        rows = self.connection.execute("SELECT name, outcome, why FROM steps WHERE run_id = ?", (run,))
        return "; ".join(f"{row['name']} {row['outcome']} ({row['why']})" for row in rows)

    # --- 1 ---------------------------------------------------------------------------------------------------------
    def required(self) -> Iterator[str]:
        wanted = [(pipeline, seed) for seed, pipeline in self.evidence.asked.items()]
        wanted += [(pipeline, name) for pipeline in ARRIVING for name in self.evidence.arrived]
        runs_of: dict[tuple[str, str], set[str]] = defaultdict(set)
        by_step: dict[tuple[str, str, str], list[Mark]] = defaultdict(list)
        for mark in self.marks:
            seed = f"run {mark.run}" if mark.pipeline in TICKING else mark.seed
            runs_of[mark.pipeline, seed].add(mark.run)
            by_step[mark.pipeline, seed, mark.step].append(mark)
        wanted += [(row["pipeline"], f"run {row['id']}") for row in self._opened()]
        for pipeline, seed in wanted:
            if {int(run) for run in runs_of[pipeline, seed]} & self.given_up:
                continue  # lost in one power cut after the other, and reported so
            if len(runs_of[pipeline, seed]) != 1:
                yield f"`{pipeline}` {seed} was run by {len(runs_of[pipeline, seed])} runs"
            for step in STEPS[pipeline]:
                yield from self._step(pipeline, seed, step, by_step[pipeline, seed, step])
        for pipeline, seed in runs_of.keys() - set(wanted):
            yield f"`{pipeline}` {seed} was run and nobody asked for it"

    def _step(self, pipeline: str, seed: str, step: str, marks: list[Mark]) -> Iterator[str]:
        tokens = {mark.token for mark in marks}
        committed = [t for t in tokens if t in self.attempts and self.attempts[t]["end"] == "committed"]
        what = f"`{pipeline}/{step}` {seed}"
        if not tokens:
            yield f"{what} is lost: it has never started"
        elif len(committed) != 1:
            yield f"{what} has {len(committed)} committed tokens of {len(tokens)}"
        latest = ""
        for mark in marks:
            if mark.word != "start" and mark.token != latest:
                yield f"{what}: `{mark.token}` was alive when `{latest}` had started"
            latest = mark.token if mark.word == "start" else latest
        expected = 2 if (pipeline, step) == FLAKY else 1
        whole = [token for token in tokens if not self._cut(token)]
        if len(whole) > expected and not self.evidence.harsh:
            yield f"{what} is duplicated: {len(whole)} tokens have started, of {expected}"

    # --- 5 ---------------------------------------------------------------------------------------------------------
    def _opened(self) -> list[sqlite3.Row]:
        return [row for row in self.run_rows.values() if row["pipeline"] in TICKING]

    def clocks(self) -> Iterator[str]:
        if not self.evidence.clocks_until:
            return
        period = round(PERIOD * 1e6)
        for pipeline in TICKING:
            rows = self.connection.execute(
                "SELECT * FROM fires WHERE pipeline = ? AND dedupe LIKE 'cron:%'", (pipeline,)
            )
            fires = {int(row["dedupe"].rpartition(":")[2]): row for row in rows}
            times = sorted(fires)
            if not times:
                yield f"`{pipeline}` has never fired"
                continue
            began = self.evidence.clocks_from
            if times[0] - period * _missed(fires[times[0]]["detail"]) > began + period:
                yield f"`{pipeline}` was known and fired first {(times[0] - began) / 1e6:.1f} s later"
            if times[-1] + period < self.evidence.clocks_until:
                yield f"`{pipeline}` has no fire for the last {(self.evidence.clocks_until - times[-1]) / 1e6:.1f} s"
            for before, at in pairwise(times):
                missed = round((at - before) / period) - 1
                if (at - before) % period or missed != _missed(fires[at]["detail"]):
                    yield f"`{pipeline}`: {missed} times before {at} are not accounted for: {fires[at]['detail']}"
            opened = [row["run_id"] for row in fires.values() if row["verdict"] == "opened"]
            if len(set(opened)) != len(opened) or not set(opened) <= self.run_rows.keys():
                yield f"`{pipeline}`: the runs of its fires are not one each"

    # --- 6 ---------------------------------------------------------------------------------------------------------
    def outputs(self) -> Iterator[str]:
        rows = self.connection.execute(
            'SELECT o.*, a.token, a."end", r.pipeline FROM outputs o JOIN attempts a ON a.id = o.attempt'
            " JOIN runs r ON r.id = a.run_id"
        ).fetchall()
        for row in rows:
            for path in self._places(row):
                yield from self._output(row, path)
            if row["end"] != "committed":
                yield f"output `{row['name']}` belongs to `{row['token']}`, which ended as {row['end']}"

    def _places(self, row: sqlite3.Row) -> list[str]:
        """Where its bytes have to be; of what came home from another machine, here as well."""
        path = os.fsdecode(row["path"])
        if row["compute"] is None:
            return [path]
        content = f"{row['digest'].replace(':', '-')}/{os.path.basename(path)}"
        below = self.evidence.kept[row["compute"]]
        there = [str(found) for found in below.glob(f"*/.cas/{content}")] or [f"{below}/*/.cas/{content}"]
        return [*there, path] if os.path.exists(path) else there

    def _output(self, row: sqlite3.Row, path: str) -> Iterator[str]:
        scheme = row["digest"].partition(":")[0].removesuffix("t")
        try:
            digest = tree_digest(path, scheme) if row["kind"] == "folder" else file_digest(path, scheme)
            own = row["pipeline"] != "fan" or all(row["token"].encode() in text for text in _contents(path))
        except OSError as fault:
            yield f"output `{row['name']}` of `{row['token']}` cannot be read: {fault.strerror}: {path}"
            return
        if digest != row["digest"]:
            yield f"output `{row['name']}` of `{row['token']}` is not what the ledger says: {path}"
        elif not own:
            yield f"output `{row['name']}` of `{row['token']}` was not written by it: {list(_contents(path))}"

    # --- what others were told -------------------------------------------------------------------------------------
    def told(self) -> Iterator[str]:
        for seed, run in self.evidence.told.items():
            row = self.run_rows.get(run)
            if row is None or seed not in row["parameters"]:
                yield f"the run of {seed} was said to be {run}, and the ledger has no such run"
        for number, said in self.evidence.events.items():
            found = self.connection.execute("SELECT kind, run_id FROM events WHERE id = ?", (number,)).fetchone()
            if found is None or tuple(found) != said:
                yield f"event {number} ({said[0]} of run {said[1]}) was streamed and is not in the ledger"

    def injected(self) -> int:
        def hit(row: Mapping[str, Any] | sqlite3.Row) -> bool:
            end = row["finished_at"] or 1 << 62
            return any(row["created_at"] <= at < end for at, _ in self.evidence.deaths)

        return sum(hit(row) for row in self.run_rows.values())


# --- digests, written anew from their definition: the product's own code is not asked -----------------------------
HASHERS: dict[str, Any] = {"b3": blake3, "s2": hashlib.sha256}


def file_digest(path: str, scheme: str) -> str:
    return f"{scheme}:{HASHERS[scheme](Path(path).read_bytes()).hexdigest()}"


def tree_digest(root: str, scheme: str) -> str:
    lines = []
    for folder, folders, files in os.walk(os.path.realpath(root)):
        rel = os.path.relpath(folder, os.path.realpath(root))
        prefix = "" if rel == "." else f"{rel}/"
        for name in files:
            path = f"{folder}/{name}"
            kind = "x" if os.stat(path).st_mode & 0o100 else "f"
            lines.append((f"{prefix}{name}".encode(), kind, file_digest(path, scheme)))
        lines += [(f"{prefix}{name}".encode(), "d", "") for name in folders]
    text = b"".join(b"%b\0%b%b\0" % (name, kind.encode(), payload.encode()) for name, kind, payload in sorted(lines))
    return f"{scheme}t:" + HASHERS[scheme](b"mlpiped tree 1\0" + text).hexdigest()


def _contents(path: str) -> Iterator[bytes]:
    if os.path.isfile(path):
        yield Path(path).read_bytes()
        return
    for folder, _, files in os.walk(os.path.realpath(path)):
        for name in files:
            yield Path(folder, name).read_bytes()


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "?"


ALL_ASKED = tuple(ASKED)
