"""B1, G2: a reload or a start that a plugin holds up, and one whose config has faults."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def own() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


def hangs(daemon: Daemon) -> tuple[Path, Path]:
    """A plugin that has a fault until a file is there, and hangs from then on: (that file, one that says it hangs)."""
    flag, mark = daemon.root / "flag", daemon.root / "mark"
    daemon.plugin(
        "hangs",
        f"import os, time\nif not os.path.exists({str(flag)!r}):\n    raise RuntimeError('not yet')\n"
        f"open({str(mark)!r}, 'w').close()\ntime.sleep(1000)\n",
    )
    until(daemon.broken, "its fault")
    return flag, mark


def test_B1_a_daemon_that_reloads_a_plugin_that_hangs_stops_when_it_is_told_to(own: Daemon) -> None:
    flag, mark = hangs(own)
    flag.touch()
    os.kill(own.pid, signal.SIGHUP)
    until(mark.exists, "the reload is at the plugin")
    assert own.term() == 0
    assert "still loading" not in own.tail(), "it has not waited for the plugin"
    assert not own.processes()


def test_B1_a_daemon_that_starts_with_a_plugin_that_hangs_stops_when_it_is_told_to(own: Daemon) -> None:
    own.install("good", 'p = Pipeline("good", steps=[CommandStep("true", name="a")])\n')
    flag, mark = hangs(own)
    own.term()
    flag.touch()
    with (own.plugins / "hangs.py").open("a") as plugin:
        plugin.write("# another content\n")
    with pytest.raises(AssertionError, match="mlpiped ended with 0"):
        own.start(before=lambda: _stop_once_there(mark))
    own.process = None
    assert "still loading" not in own.tail(), "it has not waited for the plugin"
    flag.unlink()
    own.start()
    assert own.version("good"), "what was known is known"


def _stop_once_there(mark: Path) -> None:
    """In the daemon that is about to be: somebody who tells it to stop as soon as `mark` is there."""
    daemon = os.getpid()
    if os.fork() == 0:
        try:
            until(mark.exists, "the start is at the plugin")
            os.kill(daemon, signal.SIGTERM)
        finally:
            os._exit(0)


def test_a_reload_of_a_config_with_faults_says_each_with_its_line_and_keeps_what_there_is(own: Daemon) -> None:
    own.install("good", 'p = Pipeline("good", steps=[CommandStep("true", name="a")])\n')
    text = own.config.read_text()
    number = text[: text.index("slots = ")].count("\n") + 1
    own.config.write_text(text.replace("slots = 2", 'slots = "many"\nslotz = 3'))
    done = own.ctl("reload")
    assert done.returncode == 1
    assert f"{own.config}:{number}: `slots` in `[compute.local]` must be a whole number" in done.stdout
    assert f"\n{own.config}:{number + 1}: unknown key `slotz`" in done.stdout
    assert "what the daemon has stays in use" in done.stderr
    os.kill(own.pid, signal.SIGHUP)
    until(lambda: '"level":"warning","event":"reloaded"' in own.tail(), "the reload is in the log")
    assert f"{own.config}:{number + 1}: unknown key `slotz`" in own.tail()
    assert own.go("good")["outcome"] == "succeeded"
    own.config.write_text(text)
    assert own.ctl("reload").returncode == 0
    own.config.unlink()
    assert own.ctl("reload").returncode == 1, "a config file that is gone is a fault too"
    own.config.write_text(text)
