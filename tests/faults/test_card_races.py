"""Two daemons on one host race for its cards, in processes of their own: no card is ever leased to both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from smi_rig import Smi

LEASES = 200  # of each daemon

DAEMON = """
import json, os, random, sys
from pathlib import Path
from mlpiped.backends.base import Job
from mlpiped.backends.host_cards import HostCards
from mlpiped.errors import BackendUnavailable

name, place, leases, *cards = sys.argv[1:]
at = random.Random(name)
mine = HostCards("local", "auto", name, Path(place) / name, folder=f"{place}/leases")
mine.look = lambda pids=(): None  # who sits on a card is another matter
had = refused = 0
print("ready", flush=True)
sys.stdin.readline()
while had < int(leases):
    job = Job(f"{name}-{had}-{refused}", (), gpus=tuple(at.sample(cards, at.choice([1, 1, 2]))))
    try:
        mine.take(job)
    except BackendUnavailable as held:
        assert "leased by the mlpiped of" in held.message or "cannot be leased" in held.message, held.message
        refused += 1
        continue
    had += 1
    for card in job.gpus:
        os.mkdir(f"{place}/on-{card}")  # the truth: fails if the other one is on it
    for card in job.gpus:
        os.rmdir(f"{place}/on-{card}")
    mine.give(job.token)
print(json.dumps({"had": had, "refused": refused}))
"""


@pytest.mark.slow
def test_no_card_is_ever_leased_to_two_daemons(tmp_path: Path) -> None:
    smi = Smi.make(tmp_path / "bin", *(f"GPU-{number:08}" for number in range(3)))
    words = [sys.executable, "-c", DAEMON]
    daemons = [
        subprocess.Popen(
            [*words, name, tmp_path, str(LEASES), *smi.uuids],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for each in daemons:
        assert each.stdout is not None and each.stdin is not None
        assert each.stdout.readline() == "ready\n"
    for each in daemons:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    ends = [each.communicate(timeout=100) for each in daemons]
    assert [each.returncode for each in daemons] == [0, 0], ends
    told = [json.loads(said) for said, _ in ends]
    assert [each["had"] for each in told] == [LEASES, LEASES]
    assert sum(each["refused"] for each in told) > 0, "they never met"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert os.listdir(tmp_path / "leases" / boot) == []
