"""`python -m crash.soak`: daemons that die, and a judge, for as long as asked for. `make soak` calls it.

Every round is a trial of its own, on a fresh folder; every third one cuts the power too, where that can be had. Exit
status 1 when a promise was broken: what was broken, and where the evidence lies, is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from crash import power
from crash.judge import Verdict
from crash.trial import ALIVE, EVERYWHERE, OUTSIDE, Trial
from mlpiped.crash import POINTS

ROUND = 25  # deaths


def main() -> int:
    parser = argparse.ArgumentParser(prog="crash.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0, help="begin no new round after so long")
    parser.add_argument("--runs", type=int, default=0, help="stop after so many crash-injected runs")
    parser.add_argument("--hits", type=int, default=0, help="… and so many deaths at each crash point")
    parser.add_argument("--alive", type=int, default=ALIVE, help="so many runs are kept going at a time")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the next ones count on")
    parser.add_argument("--no-power", action="store_true", help="cut no power")
    parser.add_argument("--json", action="store_true", help="print the sum as one JSON document, and nothing else")
    asked = parser.parse_args()
    if not asked.seconds and not asked.runs:
        parser.error("say how long: --seconds or --runs")
    seed = time.time_ns() % 1_000_000 if asked.seed is None else asked.seed
    without = "not asked for" if asked.no_power else power.missing()
    if without and not asked.json:
        print(f"no power cuts: {without}")
    end = time.monotonic() + asked.seconds
    total, rounds = Verdict([]), 0
    while (asked.runs and total.injected < asked.runs) or (asked.seconds and time.monotonic() < end):
        cut = not without and rounds % 3 == 2
        verdict = one(seed, cut=cut, runs=max(0, asked.runs - total.injected), hits=asked.hits, alive=asked.alive)
        if not asked.json:
            print(f"seed {seed}: {verdict}", flush=True)
        total, rounds, seed = total + verdict, rounds + 1, seed + 1
        if verdict.violations:
            break
    if asked.json:
        print(json.dumps({each.name: getattr(total, each.name) for each in dataclasses.fields(total)}))
    else:
        print(f"in all, {rounds} rounds: {total}")
    return 1 if total.violations else 0


def one(seed: int, *, cut: bool, runs: int, hits: int, alive: int) -> Verdict:
    points = (*POINTS, OUTSIDE) if hits else EVERYWHERE  # what is armed in vain ends from outside
    with Trial(seed, power=cut, alive=alive, points=points) as trial:
        verdict = trial.go(deaths=0 if runs else ROUND, runs=runs, hits=hits)
        if verdict.violations:
            kept = Path(tempfile.mkdtemp(prefix=f"mlpiped-soak-{seed}-"))
            for path in (trial.daemon.state / "ledger.sqlite3", trial.scenario.effects, trial.daemon.log):
                if path.exists():
                    shutil.copy(path, kept)
            verdict.violations.append(f"seed {seed}: the evidence is kept in {kept}")
        return verdict


if __name__ == "__main__":
    sys.exit(main())
