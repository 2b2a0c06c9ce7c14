"""500 crash-injected runs: 0 lost, 0 duplicated, 0 stuck. And the harness that says so is not blind.

A crash-injected run is a run that was durable and not finished at the moment of at least one death of its daemon, by
SIGKILL at a named crash point or from outside. One death injects every run that is alive at it (a dozen or two), and
each run counts once, however many deaths it saw. The loop stops by the runs of several steps that it asked for itself;
those of arrivals and clocks come on top. What is required of every run, crash-injected or not, is in `crash/judge.py`.

MLPIPED_CRASH_RUNS, MLPIPED_CRASH_HITS (deaths at each point), MLPIPED_POWER_CUTS and MLPIPED_DOUBLE_FAULTS say how
many. In CI (`CI` is set) a machine that cannot have a power cut fails
the test instead of skipping it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from crash import mutants, power
from crash.judge import Verdict
from crash.trial import OUTSIDE, Trial

from mlpiped.crash import POINTS

RUNS = int(os.environ.get("MLPIPED_CRASH_RUNS", "500"))
CUTS = int(os.environ.get("MLPIPED_POWER_CUTS", "20"))
HITS = int(os.environ.get("MLPIPED_CRASH_HITS", "12"))
LANES = 2  # daemons at a time
DOUBLE = int(os.environ.get("MLPIPED_DOUBLE_FAULTS", "50"))
TRIALS = 3  # a mutant's race is lost in the first one, or nearly always
HERE = Path(__file__).parent


@pytest.fixture
def disk() -> None:
    if (why := power.missing()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def soak(seed: int, runs: int) -> subprocess.Popen[str]:
    """A process of its own for each lane: a daemon's end must not wait for another's start."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "crash.soak", "--runs", str(runs), "--seed", str(seed), "--no-power", "--json"]
    words += ["--hits", str(HITS // LANES if RUNS >= 200 else 0), "--alive", "8"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.slow
@pytest.mark.timeout(60 + 3 * RUNS + 20 * HITS)
def test_no_run_is_lost_duplicated_or_stuck_however_often_the_daemon_dies(capsys: pytest.CaptureFixture[str]) -> None:
    total = Verdict([])
    for lane in [soak(seed, -(-RUNS // LANES)) for seed in range(1000, 1000 + LANES)]:
        answer, _ = lane.communicate()
        found = json.loads(answer)
        total += Verdict(**{**found, "deaths": Counter(found["deaths"])})
    with capsys.disabled():
        print(f"\n{total}")
    assert not total.violations, str(total)
    assert total.injected >= RUNS
    if RUNS >= 200:
        seldom = {point: total.deaths[point] for point in (*POINTS, OUTSIDE) if total.deaths[point] < HITS}
        assert not seldom, f"a crash point that was hit less than {HITS} times proves little"


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * CUTS)
@pytest.mark.usefixtures("disk")
def test_B4_what_was_acknowledged_survives_a_power_cut_and_all_work_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Trial(2000, power=True) as trial:
        verdict = trial.go(deaths=CUTS)
        with capsys.disabled():
            facts = len(trial.evidence.events) + len(trial.evidence.told)
            print(f"\n{trial.evidence.harsh} power cuts, {facts} acknowledged facts; {verdict}")
        assert not verdict.violations, f"{verdict}\n{trial.daemon.tail()}"
        assert trial.evidence.harsh >= CUTS


@pytest.mark.slow
@pytest.mark.timeout(120 + 10 * DOUBLE)
def test_a_step_whose_supervisor_dies_with_the_daemon_is_run_again_once_it_is_dead(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Trial(2500, murder=True) as trial:
        verdict = trial.go(deaths=DOUBLE)
        with capsys.disabled():
            print(f"\nsupervisors killed too: {verdict}")
        assert not verdict.violations, f"{verdict}\n{trial.daemon.tail()}"


WEAK = {
    "fence_removed": (("after_submit", "after_handle"), "duplicated|never_ran and has left"),
    "liveness_after_exit": (
        (OUTSIDE, "after_fire", "before_outcome"),
        r"recorded as lost and has left \['start', 'end'\]",
    ),
    "synchronous_normal": (
        (OUTSIDE, "after_intent", "after_commit"),
        "no intent of it|no such run|is not in the ledger",
    ),
    "commit_before_rename": (("after_commit",), "cannot be read|changed in the store"),
    "witness_before_outputs": (
        (OUTSIDE, "before_outcome"),
        "was not written by it|is recorded as failed and has left|cannot be read",
    ),
    "intent_after_submit": (("in_commit",), "no intent of it"),
}
"""Mutant -> where it is weak (so that it is found in seconds, and not in minutes), and what it must be accused of.

Those whose weakness is on another machine are found out in the tests with such machines."""

POWERLESS = {"synchronous_normal", "witness_before_outputs"}
"""These are weak where the power is cut."""


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mutant", WEAK)
def test_a_daemon_with_one_promise_broken_is_found_out(mutant: str, request: pytest.FixtureRequest) -> None:
    points, accused = WEAK[mutant]
    cut = mutant in POWERLESS
    if cut:
        request.getfixturevalue("disk")
    program = (sys.executable, mutants.__file__, mutant)
    for seed in range(3000, 3000 + TRIALS):
        with Trial(seed, program=program, power=cut, points=points, finished=15) as trial:
            verdict = trial.go(deaths=5)
        if any(re.search(accused, each) for each in verdict.violations):
            return
    pytest.fail(f"`{mutant}` was not found out: {verdict}")
