"""Cards of this host through the real daemon: leased one by one, told to steps by UUID, shared with nobody unasked.

The one thing that is scripted is `nvidia-smi`: no test machine has a GPU.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon, lines, steps, until
from smi_rig import Smi

Boxes = Callable[..., Daemon]


@pytest.fixture
def smi(tmp_path: Path) -> Smi:
    return Smi.make(tmp_path / "bin", *(f"GPU-{uuid.uuid4()}" for _ in range(2)))


@pytest.fixture
def daemon_on(smi: Smi) -> Iterator[Boxes]:
    """Daemons of one host with these cards: `daemon_on(gpus)`."""
    with ExitStack() as stack:

        def make(gpus: str = '"auto"', slots: int = 4) -> Daemon:
            daemon = Daemon(slots=f"{slots}\ngpus = {gpus}")  # type: ignore[arg-type]
            daemon.env["PATH"] = f"{smi.folder}:{daemon.env['PATH']}"
            return stack.enter_context(daemon)

        yield make


@dataclass
class Steps:
    """A run of so many steps, each of which tells which cards it sees, and goes on at a word."""

    daemon: Daemon
    name: str
    count: int
    run: int = 0

    @property
    def said(self) -> Path:
        return self.daemon.root / f"{self.name}-seen"

    @property
    def word(self) -> Path:
        return self.daemon.root / f"{self.name}-go"

    def install(self, resources: str) -> Steps:
        wait = f"while [ ! -e {self.word} ]; do sleep 0.02; done"
        tell = f"echo {{n}} [$CUDA_VISIBLE_DEVICES] >> {self.said}; {wait}; echo {{n}} end >> {self.said}"
        self.daemon.install(
            self.name,
            f"""
pipeline = Pipeline("{self.name}", steps=[
    CommandStep(f"{tell}", name=f"s{{n}}", resources=Resources({resources}), allow_reuse=False)
    for n in range({self.count})
])
""",
        )
        return self

    def start(self, running: int = 0) -> Steps:
        """Return when so many of them run."""
        self.run = self.daemon.run(self.name)
        until(lambda: len(self.seen()) >= running, f"{running} steps have what they asked for")
        return self

    def seen(self) -> list[str]:
        """What each step that has started sees."""
        return [line.split(" ", 1)[1] for line in lines(self.said) if "[" in line]

    def waits(self) -> str:
        """The sentence, once there is one."""
        return until(self.sentence, "one of them waits")

    def sentence(self) -> str:
        """Of the first step that waits; none when none does."""
        for number in range(self.count):
            said: str | None = self.daemon.json("why", f"{self.run}/s{number}")["waiting"]
            if said and said.startswith(("waits for", "can never")):
                return said
        return ""

    def end(self) -> None:
        """All of them go on, and succeed."""
        self.word.touch()
        assert set(steps(self.daemon.end(self.run)).values()) == {"succeeded"}


def train(daemon: Daemon, count: int, running: int, resources: str = "gpus=1", name: str = "train") -> Steps:
    return Steps(daemon, name, count).install(resources).start(running)


def leases(smi: Smi) -> dict[str, str]:
    """UUID -> target text, of these cards."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = (Path("/tmp/mlpiped-gpus") / boot / uuid for uuid in smi.uuids)
    return {path.name: str(path.readlink()) for path in found if path.is_symlink()}


def cards(daemon: Daemon) -> list[dict[str, Any]]:
    return list(daemon.json("compute")["compute"][0]["cards"])


def all_of(smi: Smi) -> list[str]:
    """What two steps of a card each see together."""
    return sorted(f"[{uuid}]" for uuid in smi.uuids)


def test_two_steps_of_one_card_each_see_one_each_and_a_third_waits_and_says_for_whom(
    smi: Smi, daemon_on: Boxes
) -> None:
    three = train(daemon := daemon_on(), 3, running=2)
    assert sorted(three.seen()) == all_of(smi)
    assert set(leases(smi)) == set(smi.uuids)
    assert three.waits().startswith(f"waits for a GPU: local has 2, both held by run {three.run} (root, ")
    assert {h["run"] for card in cards(daemon) for h in card["holders"]} == {three.run}
    table = daemon.ctl("compute").stdout
    assert f"{three.run}/s" in table and "NVIDIA GeForce RTX 3090" in table and "2/2" in table
    three.end()
    assert len(set(three.seen())) == 2
    assert leases(smi) == {}


def test_a_step_that_asks_for_no_card_sees_none_and_one_that_asks_for_more_than_there_are_never_starts(
    smi: Smi, daemon_on: Boxes
) -> None:
    daemon = daemon_on()
    plain = train(daemon, 1, running=1, resources="", name="plain")
    plain.end()
    assert plain.seen() == ["[]"]
    until(lambda: len(cards(daemon)) == 2, "the cards have been seen")
    wide = train(daemon, 1, running=0, resources="gpus=3", name="wide")
    never = "can never have a place: local has 2 GPUs in all, 3 are asked for"
    assert wide.waits() == never
    assert never in daemon.ctl("plan", "wide").stdout
    assert daemon.ctl("cancel", wide.run).returncode == 0


def test_steps_that_share_a_card_run_together_within_its_memory(smi: Smi, daemon_on: Boxes) -> None:
    three = train(daemon_on("1"), 3, running=2, resources='gpus=1, gpu_memory="10G"', name="shared")
    assert set(three.seen()) == {f"[{smi.uuids[0]}]"}
    assert [text.split()[1] for text in leases(smi).values()] == ["shared"]
    said = three.waits()
    assert said.startswith("waits for a GPU: local has 1, held by run ")
    assert said.endswith("; card 0 has 4G free, 10G are asked for")
    three.end()
    assert leases(smi) == {}


def test_a_card_with_a_process_of_somebody_else_is_left_alone_and_named(smi: Smi, daemon_on: Boxes) -> None:
    with subprocess.Popen(["sleep", "300"]) as other:
        smi.used_by((smi.uuids[0], other.pid, "/usr/bin/python3"))
        daemon = daemon_on()
        until(lambda: len(cards(daemon)) == 2, "the cards have been seen")
        both = train(daemon, 1, running=0, resources="gpus=2", name="both")
        foreign = f"card 0 is in use by python3 (pid {other.pid}), not ours"
        assert both.waits() == f"waits for 2 GPUs: local: {foreign}"
        assert foreign.partition(" is ")[2] in daemon.ctl("compute").stdout
        one = train(daemon, 1, running=1, name="one")
        assert one.seen() == [f"[{smi.uuids[1]}]"]
        one.end()
        assert both.seen() == []
        other.kill()
    smi.used_by()
    both.end()  # seen again within 15 s


def test_two_daemons_on_one_host_never_lease_the_same_card(smi: Smi, daemon_on: Boxes) -> None:
    both = [Steps(daemon_on(), "train", 2).install("gpus=1").start() for _ in range(2)]
    until(lambda: sum(len(each.seen()) for each in both) == 2, "both cards are in use")
    assert sorted(both[0].seen() + both[1].seen()) == all_of(smi)
    assert set(leases(smi)) == set(smi.uuids)
    told = "leased by the mlpiped of"
    until(lambda: any(told in each.sentence() for each in both), "who waits says whose card it is")
    for each in both:
        each.word.touch()
    for each in both:
        each.end()
    assert leases(smi) == {}


def test_the_lease_of_a_step_that_outlives_its_daemon_is_kept_and_given_back_by_the_next(
    smi: Smi, daemon_on: Boxes
) -> None:
    three = train(daemon := daemon_on(), 3, running=2)
    before = leases(smi)
    daemon.kill9()
    daemon.start()
    until(lambda: sum(len(card["holders"]) for card in cards(daemon)) == 2, "both are held as before")
    assert leases(smi) == before and set(before) == set(smi.uuids)
    assert len(three.seen()) == 2
    three.end()
    assert leases(smi) == {}


def test_a_lease_whose_step_ended_while_no_daemon_ran_is_given_back_at_the_next_start(
    smi: Smi, daemon_on: Boxes
) -> None:
    one = train(daemon := daemon_on(), 1, running=1, resources="gpus=2")
    daemon.kill9()
    one.word.touch()
    until(lambda: "0 end" in lines(one.said), "it ends while no daemon runs")
    assert set(leases(smi)) == set(smi.uuids)
    daemon.start()
    one.end()
    assert leases(smi) == {}


def test_a_driver_that_is_ill_is_told_and_stops_no_other_step(smi: Smi, daemon_on: Boxes) -> None:
    smi.broken("Failed to initialize NVML: Driver/library version mismatch", 18)
    daemon = daemon_on()
    train(daemon, 1, running=1, resources="", name="plain").end()
    one = train(daemon, 1, running=0)
    told = "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"
    until(lambda: told in one.sentence(), "it says why")
    assert told in daemon.ctl("compute").stdout
    smi.mended()
    one.end()
