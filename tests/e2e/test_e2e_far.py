"""Steps on a box, as people see them: their output live, over a kill of the daemon and while the box is away."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, lines, steps, until
from lab import ssh_rig

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.lab
LARGE = 96 << 20  # bytes: more than fits into what lies between the two ends


@pytest.fixture
def box(ssh_lab: ssh_rig.Lab) -> Iterator[ssh_rig.Box]:
    found = ssh_lab.box()
    yield found
    found.stop()


@pytest.fixture
def cable(box: ssh_rig.Box) -> Iterator[ssh_rig.Cable]:
    found = ssh_rig.Cable(box)
    yield found
    found.close()


def attached(box: ssh_rig.Box, port: int) -> Iterator[Daemon]:
    """A daemon that reaches the box by this port."""
    extra = f"""
[compute.gpu1]
kind = "ssh"
host = "{box.address}"
port = {port}
key_file = "{box.key}"
python = "{sys.executable}"
slots = 2
"""
    found = Daemon(extra=extra)
    found.state.mkdir(mode=0o700)
    (found.state / "known_hosts").write_text(box.known(port))
    yield found.start()
    found.close()


@pytest.fixture
def daemon(box: ssh_rig.Box) -> Iterator[Daemon]:
    yield from attached(box, box.port)


@pytest.fixture
def wired(box: ssh_rig.Box, cable: ssh_rig.Cable) -> Iterator[Daemon]:
    yield from attached(box, cable.port)


def talker(daemon: Daemon) -> Path:
    """A pipeline whose step prints `one`, and `two` and `three` as soon as there are files of these names, which lie in
    the folder that is returned; then it makes an output."""
    gates = daemon.root / "gates"
    gates.mkdir()
    (gates / "began").touch()
    daemon.install(
        "talk",
        f"""
out = PipelineData("made")
words = "; ".join(f"while [ ! -e {gates}/{{w}} ]; do sleep 0.05; done; echo {{w}}" for w in ("two", "three"))
command = f"echo begin >> {gates}/began; echo one; {{words}}; echo made > {{out}}"
pipeline = Pipeline("talk", steps=[CommandStep(command, name="say", outputs=[out], compute_target="gpu1")])
""",
    )
    return gates


def why(daemon: Daemon, what: str) -> str:
    return daemon.ctl("why", what).stdout


def logs(daemon: Daemon, what: str) -> str:
    done = daemon.ctl("logs", what)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_a_step_on_a_box_prints_is_seen_while_it_runs(daemon: Daemon) -> None:
    gates = talker(daemon)
    number = daemon.run("talk")
    until(lambda: lines(gates / "began"), "the step has begun", 60)
    with daemon.following("logs", f"{number}/say", "-f") as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "one\n"
        (gates / "two").touch()
        assert reader.stdout.readline() == "two\n"
        assert logs(daemon, f"{number}/say") == "one\ntwo\n"  # for one who comes later too
        (gates / "three").touch()
        assert reader.stdout.read() == "three\n"
        assert reader.wait(20) == 0
    assert daemon.end(number)["outcome"] == "succeeded"
    assert logs(daemon, f"{number}/say") == "one\ntwo\nthree\n"


def test_what_a_step_on_a_box_measures_is_seen_while_it_runs(daemon: Daemon, box: ssh_rig.Box) -> None:
    gate, script = daemon.root / "gate", daemon.root / "fit.sh"
    loss = """printf '{"name": "loss", "value": %d}\\n' $1 >> "$MLPIPED_METRICS"\n"""
    script.write_text(f"loss() {{\n{loss}}}\nloss 3; loss 2\nwhile [ ! -e {gate} ]; do sleep 0.05; done\nloss 1\n")
    fit = f'CommandStep(["sh", "{script}"], name="fit", compute_target="gpu1")'
    daemon.install("learn", f'pipeline = Pipeline("learn", steps=[{fit}])')
    number = daemon.run("learn")

    def losses() -> list[int]:
        return [line["value"] for step in daemon.json("metrics", str(number))["steps"] for line in step["metrics"]]

    until(lambda: losses() == [3, 2], "what it has measured", 60)
    assert steps(daemon.show(number)) == {"fit": "running"}
    box.stop()
    until(lambda: daemon.json("metrics", str(number))["steps"][0]["note"], "why there is no more")
    assert losses() == [3, 2]
    box.start()
    gate.touch()
    assert daemon.end(number)["outcome"] == "succeeded"
    assert losses() == [3, 2, 1]


def test_H1_a_step_on_a_box_outlives_the_daemon_and_its_log_is_whole(daemon: Daemon) -> None:
    gates = talker(daemon)
    number = daemon.run("talk")
    until(lambda: lines(gates / "began"), "the step has begun", 60)
    until(lambda: logs(daemon, f"{number}/say") == "one\n", "its first line")
    daemon.kill9()
    (gates / "two").touch()
    daemon.start()
    until(lambda: logs(daemon, f"{number}/say") == "one\ntwo\n", "what it printed meanwhile", 60)
    (gates / "three").touch()
    found = daemon.end(number)
    assert steps(found) == {"say": "succeeded"}
    assert found["steps"][0]["attempts"] == 1
    assert lines(gates / "began") == ["begin"]
    assert logs(daemon, f"{number}/say") == "one\ntwo\nthree\n"


def test_H2_while_a_box_is_away_its_step_is_unknown_and_then_goes_on(daemon: Daemon, box: ssh_rig.Box) -> None:
    gates = talker(daemon)
    number = daemon.run("talk")
    until(lambda: lines(gates / "began"), "the step has begun", 60)
    with daemon.following("logs", f"{number}/say", "-f") as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "one\n"
        box.stop()
        until(lambda: "held: `gpu1`" in why(daemon, f"{number}/say"), "the reason why nothing is known")
        until(lambda: "cannot be reached" in why(daemon, f"{number}/say"), "the reason why nothing is known")
        done = daemon.ctl("logs", f"{number}/say")
        assert (done.returncode, done.stdout) == (0, "one\n")
        assert "`gpu1` " in done.stderr and "this is what came so far" in done.stderr
        (gates / "two").touch()
        (gates / "three").touch()
        assert daemon.show(number)["state"] == "running"
        box.start()
        assert reader.stdout.read() == "two\nthree\n"
    found = daemon.end(number)
    assert steps(found) == {"say": "succeeded"}
    assert found["steps"][0]["attempts"] == 1
    assert lines(gates / "began") == ["begin"]


def test_cancel_ends_all_that_a_step_on_a_box_has_started(daemon: Daemon) -> None:
    pids = daemon.root / "pids"
    daemon.install(
        "tree",
        f"""
stubborn = "sh -c 'trap : TERM; echo $$ >> {pids}; while :; do sleep 0.1; done'"
command = f"{{stubborn}} & setsid {{stubborn}} & echo $$ >> {pids}; wait; sleep 600"
pipeline = Pipeline("tree", steps=[CommandStep(command, name="fork", compute_target="gpu1", grace="1s")])
""",
    )
    number = daemon.run("tree")
    until(lambda: len(lines(pids)) == 3, "the step and its children", 60)
    assert daemon.ctl("cancel", number).returncode == 0
    assert daemon.end(number)["outcome"] == "cancelled"
    until(lambda: not [pid for pid in lines(pids) if runs(pid)], "the end of all of them")


def runs(pid: str) -> bool:
    """Not a zombie either: whoever is its parent here is no init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_H2_a_cancel_reaches_a_box_that_was_away(daemon: Daemon, box: ssh_rig.Box) -> None:
    gates = talker(daemon)
    number = daemon.run("talk")
    until(lambda: lines(gates / "began"), "the step has begun", 60)
    box.stop()
    assert daemon.ctl("cancel", number).returncode == 0
    until(lambda: "it is cancelled as soon as" in why(daemon, f"{number}/say"), "that it will be cancelled")
    box.start()
    assert daemon.end(number)["outcome"] == "cancelled"


def test_what_was_cancelled_while_the_config_did_not_have_its_box_is_ended_when_it_has_it_again(
    daemon: Daemon,
) -> None:
    pids = daemon.root / "pids"
    daemon.install(
        "long",
        f"""
command = "echo $$ >> {pids}; while :; do sleep 0.1; done"
pipeline = Pipeline("long", steps=[CommandStep(command, name="s", compute_target="gpu1", grace="1s")])
""",
    )
    number = daemon.run("long")
    until(lambda: lines(pids), "the step", 60)
    with_box = daemon.config.read_text()
    daemon.term()
    daemon.config.write_text(with_box.replace("[compute.gpu1]", "[compute.gpu9]"))
    daemon.start()
    gone = "held: its attempt is on compute `gpu1`, which the config no longer has"
    until(lambda: gone in why(daemon, f"{number}/s"), "why nothing is known of it")
    assert daemon.ctl("cancel", number).returncode == 0
    assert daemon.end(number)["outcome"] == "cancelled"
    assert "what it began on `gpu1` is ended when the config has that again" in why(daemon, f"{number}/s")
    assert runs(lines(pids)[0])
    daemon.term()
    daemon.config.write_text(with_box)
    daemon.start()
    until(lambda: not runs(lines(pids)[0]), "its end", 60)
    until(lambda: "cancelled" in attempt_line(daemon, f"{number}/s"), "its attempt's end", 60)


def attempt_line(daemon: Daemon, what: str) -> str:
    """Of the first attempt."""
    return next((line for line in why(daemon, what).splitlines() if line.strip().startswith("1 ")), "")


def test_H2_transfers_say_how_far_they_are_and_outputs_come_home_after_an_outage(
    wired: Daemon, box: ssh_rig.Box, cable: ssh_rig.Cable
) -> None:
    (wired.lab / "big.bin").write_bytes(b"x" * LARGE)
    wired.install(
        "copy",
        """
out = PipelineData("made")
big = DataReference(lab, "big.bin", name="big")
pipeline = Pipeline("copy", steps=[CommandStep(["cp", big, out], name="cp", outputs=[out], compute_target="gpu1")])
""",
    )
    number = wired.run("copy")
    until(lambda: cable.up > LARGE / 20, "some of the input on its way", 60, pause=0.001)
    cable.freeze()
    until(lambda: "sends input big to gpu1: " in why(wired, f"{number}/cp"), "how far the input is")
    assert f" of {LARGE / 1e6:.1f} MB" in why(wired, f"{number}/cp")
    assert "sends input big to gpu1: " in wired.ctl("status").stdout
    cable.thaw()
    until(lambda: cable.down > LARGE / 20, "some of the output on its way", 60, pause=0.001)
    cable.freeze()
    until(lambda: "brings its outputs home from gpu1: " in why(wired, f"{number}/cp"), "how far the output is")
    box.stop()
    cable.cut()
    until(lambda: "held: `gpu1`" in why(wired, f"{number}/cp"), "that the box is away")
    assert wired.show(number)["state"] == "running"
    box.start()
    found = wired.end(number, 90)
    assert steps(found) == {"cp": "succeeded"}
    assert found["steps"][0]["attempts"] == 1
