"""C2, F3: a datastore that is full, or away, while steps need it. It passes, and what was done by then is not lost."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, lines, step, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """A folder with a small disk of its own."""
    place = tmp_path / "other"
    place.mkdir()
    mount(place)
    yield place
    subprocess.run(["umount", "-l", place], capture_output=True, check=False)


def mount(place: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")


@pytest.fixture
def own(other: Path) -> Iterator[Daemon]:
    with Daemon(extra=f'[datastores.other]\npath = "{other}"\n') as daemon:
        yield daemon


def why(daemon: Daemon, run: int) -> str:
    return daemon.ctl("why", f"{run}/a").stdout


def held(daemon: Daemon, run: int, words: str) -> str:
    return until(lambda: said if words in (said := why(daemon, run)) else "", f"it is held: {words}")


def publishes(daemon: Daemon, size: int) -> Path:
    effects = daemon.root / "effects"
    daemon.install(
        "p",
        f"""
out = PipelineData("out", datastore=Datastore("other"))
a = CommandStep(f"echo $MLPIPED_TOKEN >> {effects}; head -c {size} /dev/zero > {{out}}",
                name="a", outputs=[out.publish("made/out")])
p = Pipeline("p", steps=[a])
""",
    )
    return effects


def test_C2_a_datastore_that_is_full_when_a_step_publishes_costs_no_work_and_no_restart_matters(
    own: Daemon, other: Path
) -> None:
    effects = publishes(own, 300_000)
    (other / "fill").write_bytes(b"x" * 900_000)
    run = own.run("p")
    assert "no space left on device" in held(own, run, "held: output `out` cannot be published")
    own.kill9()
    own.start()
    held(own, run, "no space left on device")
    assert "held: output `out`" in own.ctl("status").stdout
    (other / "fill").unlink()
    assert step(own.end(run), "a")["outcome"] == "succeeded"
    assert (other / "made/out").stat().st_size == 300_000
    assert len(lines(effects)) == 1, "it ran once"


def test_C2_who_waits_for_space_in_a_datastore_can_be_cancelled(own: Daemon, other: Path) -> None:
    publishes(own, 300_000)
    (other / "fill").write_bytes(b"x" * 900_000)
    run = own.run("p")
    held(own, run, "no space left on device")
    assert own.ctl("cancel", run).returncode == 0
    assert own.end(run)["outcome"] == "cancelled"


def test_F3_a_step_whose_datastore_is_unmounted_while_it_runs_has_not_run_in_vain(own: Daemon, other: Path) -> None:
    effects, go = own.root / "effects", own.root / "go"
    (other / "in.txt").write_text("what it reads")
    own.install(
        "p",
        f"""
out = PipelineData("out")
a = CommandStep(["sh", "-c", "echo x >> {effects}; until [ -e {go} ]; do sleep 0.02; done; echo done > $1", "sh", out,
                 DataReference(Datastore("other"), "in.txt")], name="a", outputs=[out])
p = Pipeline("p", steps=[a])
""",
    )
    run = own.run("p")
    until(lambda: lines(effects), "it runs")
    subprocess.run(["umount", "-l", other], check=True)
    go.touch()
    assert f"the datastore `{other}` is not mounted" in held(own, run, "held: input in.txt")
    own.kill9()
    own.start()
    held(own, run, f"the datastore `{other}` is not mounted")
    mount(other)
    (other / "in.txt").write_text("what it reads")
    assert step(own.end(run), "a")["attempts"] == 1
    assert lines(effects) == ["x"]


def test_F3_nothing_is_published_to_where_a_datastore_should_be(own: Daemon, other: Path) -> None:
    effects = publishes(own, 10)
    subprocess.run(["umount", "-l", other], check=True)
    other.rmdir()
    run = own.run("p")
    held(own, run, f"the datastore's folder `{other}` is not there")
    assert not other.exists()
    other.mkdir()
    assert step(own.end(run), "a")["outcome"] == "succeeded"
    assert (other / "made/out").exists()
    assert len(lines(effects)) == 1
