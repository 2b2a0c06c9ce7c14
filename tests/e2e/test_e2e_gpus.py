"""Cards of this host through the real daemon: leased one by one, told to steps by UUID, shared with nobody unasked.

The one thing that is scripted is `nvidia-smi`: no test machine has a GPU.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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


def holding(daemon: Daemon, name: str, count: int, resources: str) -> tuple[Path, Path]:
    """A pipeline of `count` steps; each tells which cards it sees, and goes on when the second file exists."""
    seen, go = daemon.root / f"{name}-seen", daemon.root / f"{name}-go"
    wait = f"while [ ! -e {go} ]; do sleep 0.02; done"
    daemon.install(
        name,
        f"""
pipeline = Pipeline("{name}", steps=[
    CommandStep(f"echo {{n}} [$CUDA_VISIBLE_DEVICES] >> {seen}; {wait}; echo {{n}} end >> {seen}", name=f"s{{n}}",
                resources=Resources({resources}), allow_reuse=False)
    for n in range({count})
])
""",
    )
    return seen, go


def leases(smi: Smi) -> dict[str, str]:
    """UUID -> target text, of these cards."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = (Path("/tmp/mlpiped-gpus") / boot / uuid for uuid in smi.uuids)
    return {path.name: str(path.readlink()) for path in found if path.is_symlink()}


def waiting(daemon: Daemon, run: int, *names: str) -> str:
    """The sentence of the first of these steps that waits."""
    for name in names:
        said: str | None = daemon.json("why", f"{run}/{name}")["waiting"]
        if said and said.startswith(("waits for", "can never")):
            return said
    return ""


def cards(daemon: Daemon) -> list[dict[str, Any]]:
    return list(daemon.json("compute")["compute"][0]["cards"])


def seen_by(path: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in lines(path) if "[" in line]


def test_two_steps_of_one_card_each_see_one_each_and_a_third_waits_and_says_for_whom(
    smi: Smi, daemon_on: Boxes
) -> None:
    daemon = daemon_on()
    seen, go = holding(daemon, "train", 3, "gpus=1")
    run = daemon.run("train")
    until(lambda: len(lines(seen)) == 2, "two steps have a card")
    assert sorted(seen_by(seen)) == sorted(f"[{uuid}]" for uuid in smi.uuids)
    assert set(leases(smi)) == set(smi.uuids)
    said = until(lambda: waiting(daemon, run, "s0", "s1", "s2"), "the third waits")
    assert said.startswith(f"waits for a GPU: local has 2, both held by run {run} (root, ")
    assert {h["run"] for card in cards(daemon) for h in card["holders"]} == {run}
    table = daemon.ctl("compute").stdout
    assert f"{run}/s" in table and "NVIDIA GeForce RTX 3090" in table and "2/2" in table
    go.touch()
    assert set(steps(daemon.end(run)).values()) == {"succeeded"}
    assert len(set(seen_by(seen))) == 2
    assert leases(smi) == {}


def test_a_step_that_asks_for_no_card_sees_none_and_one_that_asks_for_more_than_there_are_never_starts(
    smi: Smi, daemon_on: Boxes
) -> None:
    daemon = daemon_on()
    seen, go = holding(daemon, "plain", 1, "")
    go.touch()
    daemon.go("plain")
    assert seen_by(seen) == ["[]"]
    holding(daemon, "wide", 1, "gpus=3")
    until(lambda: len(cards(daemon)) == 2, "the cards have been seen")
    run = daemon.run("wide")
    never = "can never have a place: local has 2 GPUs in all, 3 are asked for"
    assert until(lambda: waiting(daemon, run, "s0"), "it waits") == never
    assert never in daemon.ctl("plan", "wide").stdout
    assert daemon.ctl("cancel", run).returncode == 0


def test_steps_that_share_a_card_run_together_within_its_memory(smi: Smi, daemon_on: Boxes) -> None:
    daemon = daemon_on("1")
    seen, go = holding(daemon, "shared", 3, 'gpus=1, gpu_memory="10G"')
    run = daemon.run("shared")
    until(lambda: len(lines(seen)) == 2, "two of 10G are on the card of 24G")
    assert set(seen_by(seen)) == {f"[{smi.uuids[0]}]"}
    assert [text.split()[1] for text in leases(smi).values()] == ["shared"]
    assert until(lambda: waiting(daemon, run, "s0", "s1", "s2"), "the third waits").startswith("waits for a GPU")
    go.touch()
    assert daemon.end(run)["outcome"] == "succeeded"
    assert leases(smi) == {}


def test_a_card_with_a_process_of_somebody_else_is_left_alone_and_named(smi: Smi, daemon_on: Boxes) -> None:
    with subprocess.Popen(["sleep", "300"]) as other:
        smi.used_by((smi.uuids[0], other.pid, "/usr/bin/python3"))
        daemon = daemon_on()
        seen, go = holding(daemon, "both", 1, "gpus=2")
        until(lambda: len(cards(daemon)) == 2, "the cards have been seen")
        run = daemon.run("both")
        said = until(lambda: waiting(daemon, run, "s0"), "it waits")
        assert said == f"waits for 2 GPUs: local: card 0 is in use by python3 (pid {other.pid}), not ours"
        assert f"in use by python3 (pid {other.pid}), not ours" in daemon.ctl("compute").stdout
        go.touch()
        one, _ = holding(daemon, "one", 1, "gpus=1")
        (daemon.root / "one-go").touch()
        daemon.go("one")
        assert seen_by(one) == [f"[{smi.uuids[1]}]"]
        assert lines(seen) == []
        other.kill()
    smi.used_by()
    assert daemon.end(run)["outcome"] == "succeeded"  # seen again within 15 s


def test_two_daemons_on_one_host_never_lease_the_same_card(smi: Smi, daemon_on: Boxes) -> None:
    one, two = daemon_on(), daemon_on()
    first, go_one = holding(one, "train", 2, "gpus=1")
    second, go_two = holding(two, "train", 2, "gpus=1")
    runs = one.run("train"), two.run("train")
    until(lambda: len(lines(first)) + len(lines(second)) == 2, "both cards are in use")
    assert sorted(seen_by(first) + seen_by(second)) == sorted(f"[{uuid}]" for uuid in smi.uuids)
    assert set(leases(smi)) == set(smi.uuids)
    until(
        lambda: any(
            "leased by the mlpiped of" in waiting(d, n, "s0", "s1") for d, n in zip((one, two), runs, strict=True)
        ),
        "who waits says whose card it is",
    )
    go_one.touch()
    go_two.touch()
    assert one.end(runs[0])["outcome"] == two.end(runs[1])["outcome"] == "succeeded"
    assert leases(smi) == {}


def test_the_lease_of_a_step_that_outlives_its_daemon_is_kept_and_given_back_by_the_next(
    smi: Smi, daemon_on: Boxes
) -> None:
    daemon = daemon_on()
    seen, go = holding(daemon, "train", 3, "gpus=1")
    run = daemon.run("train")
    until(lambda: len(lines(seen)) == 2, "two steps have a card")
    before = leases(smi)
    daemon.kill9()
    daemon.start()
    until(lambda: sum(len(card["holders"]) for card in cards(daemon)) == 2, "both are held as before")
    assert leases(smi) == before and set(before) == set(smi.uuids)
    assert len(lines(seen)) == 2
    go.touch()
    assert set(steps(daemon.end(run)).values()) == {"succeeded"}
    assert leases(smi) == {}


def test_a_lease_whose_step_ended_while_no_daemon_ran_is_given_back_at_the_next_start(
    smi: Smi, daemon_on: Boxes
) -> None:
    daemon = daemon_on()
    seen, go = holding(daemon, "train", 1, "gpus=2")
    run = daemon.run("train")
    until(lambda: lines(seen), "it runs")
    daemon.kill9()
    go.touch()
    until(lambda: "0 end" in lines(seen), "it ends while no daemon runs")
    assert set(leases(smi)) == set(smi.uuids)
    daemon.start()
    assert daemon.end(run)["outcome"] == "succeeded"
    assert leases(smi) == {}


def test_a_driver_that_is_ill_is_told_and_stops_no_other_step(smi: Smi, daemon_on: Boxes) -> None:
    smi.broken("Failed to initialize NVML: Driver/library version mismatch", 18)
    daemon = daemon_on()
    _, go = holding(daemon, "plain", 1, "")
    go.touch()
    assert daemon.go("plain")["outcome"] == "succeeded"
    _, go = holding(daemon, "train", 1, "gpus=1")
    go.touch()
    run = daemon.run("train")
    told = "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"
    until(lambda: told in waiting(daemon, run, "s0"), "it says why")
    assert told in daemon.ctl("compute").stdout
    smi.mended()
    assert daemon.end(run)["outcome"] == "succeeded"
