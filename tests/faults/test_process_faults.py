"""D1 to D3: memory that runs out, of a step and of the daemon, and pids that are given to somebody else."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, lines, step, until
from lab.packages import not_here

from mlpiped.backends.memory_group import MemoryGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUPS = Path("/sys/fs/cgroup/memory")  # version 1
LIMIT = 400 << 20  # bytes, of a daemon and its steps together
HUNGRY = "x = []\nwhile True: x.append(bytearray(1 << 20))"
FAT = """
import signal, sys
fat = [b"x" * (200 << 20)]
def eat(*_):
    while True:
        fat.append(b"x" * (1 << 20))
signal.signal(signal.SIGUSR1, eat)
from mlpiped.cli.admin import main
sys.exit(main(sys.argv[1:]))
"""
"""A daemon that is larger than its steps, and eats all memory there is when it is told to."""


# --- D1 -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def own() -> Iterator[Daemon]:
    with Daemon(slots=4) as daemon:
        yield daemon


@pytest.fixture
def memory_groups() -> None:
    group = MemoryGroup.make("probe", 64 << 20)
    if group is None:
        not_here("a step's memory limit needs a memory control group that we may make")
    group.remove()


@pytest.mark.usefixtures("memory_groups")
def test_D1_a_step_that_is_killed_for_its_memory_fails_and_says_so_and_its_siblings_live(own: Daemon) -> None:
    go = own.root / "go"
    own.install(
        "oom",
        f"""
hungry = ["{sys.executable}", "-I", "-S", "-c", {HUNGRY!r}]
steps = [
    CommandStep(hungry, name="once", resources=Resources(memory="64M")),
    CommandStep([*hungry, "again"], name="twice", resources=Resources(memory="64M"), retry=Retry(attempts=2, delay=0)),
    CommandStep("kill -9 $$", name="killed", resources=Resources(memory="64M")),
    CommandStep("until [ -e {go} ]; do sleep 0.02; done", name="sibling", resources=Resources(memory="64M")),
]
pipeline = Pipeline("oom", steps=steps)
""",
    )
    number = own.run("oom")

    def ended() -> bool:
        found = {each["name"]: each["outcome"] for each in own.show(number)["steps"]}
        return found == {"once": "failed", "twice": "failed", "killed": "failed", "sibling": None}

    until(ended, "all but the sibling have failed")
    go.touch()
    run = own.end(number)
    assert step(run, "sibling")["outcome"] == "succeeded"
    assert step(run, "once")["why"].startswith("out of memory: it needed more than its limit of 64 MiB")
    assert step(run, "killed")["why"].startswith("was ended by SIGKILL"), "another's SIGKILL is none of ours"
    assert [step(run, name)["attempts"] for name in ("once", "twice", "killed")] == [1, 2, 1], "as the policy says"


# --- D2 -----------------------------------------------------------------------------------------------------------
class Host:
    """A daemon and its steps on a host of so much memory: a control group that all of them are in."""

    def __init__(self) -> None:
        self.group = GROUPS / f"mlpd-host-{os.getpid()}"
        self.group.mkdir()
        self.daemon = Daemon(slots=4)
        self.daemon.program = (sys.executable, "-c", FAT)
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            with contextlib.suppress(FileNotFoundError):  # a kernel that does not count swap
                (self.group / name).write_text(str(LIMIT))

    def start(self) -> None:
        self.daemon.start(before=lambda: (self.group / "cgroup.procs").write_text("0"))

    def killings(self) -> int:
        words = (self.group / "memory.oom_control").read_text().split()
        return int(words[words.index("oom_kill") + 1])

    def close(self) -> None:
        try:
            self.daemon.close()
        finally:
            self.group.rmdir()


@pytest.fixture
def host() -> Iterator[Host]:
    if os.geteuid() != 0 or not (GROUPS / "memory.limit_in_bytes").exists():
        not_here("a host of little memory needs root and the memory controller of cgroup v1")
    host = Host()
    try:
        host.start()
        yield host
    finally:
        host.close()


def waiting(daemon: Daemon, name: str, more: str = "") -> tuple[Path, Path]:
    effects, go = daemon.root / "effects", daemon.root / "go"
    command = f"echo start >> {effects}; until [ -e {go} ]; do sleep 0.02; done; echo end >> {effects}"
    daemon.install(
        name, f'steps = [CommandStep("{command}", name="wait")]\n{more}\npipeline = Pipeline("{name}", steps=steps)\n'
    )
    return effects, go


def test_D2_where_the_host_runs_out_of_memory_the_step_that_took_it_goes_and_not_the_larger_daemon(host: Host) -> None:
    eater = f"{sys.executable} -I -S -c '{HUNGRY}' & wait $!"  # a child that the step starts in its first instant
    more = f"steps.append(CommandStep({eater!r}, name='eat'))"
    effects, go = waiting(host.daemon, "full", more)
    pid = host.daemon.pid
    number = host.daemon.run("full")
    until(lambda: lines(effects), "the sibling has started")
    until(lambda: step(host.daemon.show(number), "eat")["outcome"] is not None, "the eater has ended")
    assert host.killings() == 1
    go.touch()
    run = host.daemon.end(number)
    assert (step(run, "eat")["outcome"], step(run, "eat")["exit_code"]) == ("failed", 128 + signal.SIGKILL)
    assert step(run, "wait")["outcome"] == "succeeded"
    assert host.daemon.pid == pid and host.daemon.process is not None and host.daemon.process.poll() is None


def test_D2_a_daemon_that_is_killed_for_its_memory_finds_its_steps_again_at_the_next_start(host: Host) -> None:
    effects, go = waiting(host.daemon, "fat")
    number = host.daemon.run("fat")
    until(lambda: lines(effects), "the step has started")
    process = host.daemon.process
    assert process is not None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == -signal.SIGKILL
    assert host.killings() == 1, "by the kernel, for its memory"
    host.daemon.process = None
    host.start()
    go.touch()
    run = host.daemon.end(number)
    assert run["outcome"] == "succeeded"
    assert step(run, "wait")["attempts"] == 1
    assert lines(effects) == ["start", "end"]


def test_D2_the_unit_puts_the_daemon_last_in_the_kernel_s_list() -> None:
    unit = (Path(__file__).parents[2] / "systemd/mlpiped.service").read_text().splitlines()
    assert {"OOMPolicy=continue", "OOMScoreAdjust=-500", "Restart=on-failure"} <= set(unit)


# --- D3 -----------------------------------------------------------------------------------------------------------
PIDS, RESERVED = 400, 300
REUSED = f"""
import os, signal, subprocess, sys
from contextlib import AsyncExitStack
from pathlib import Path
import anyio
from mlpiped.backends import processes, supervisor
from mlpiped.backends.base import Job, Lost, Part
from mlpiped.backends.local import LocalBackend

Path("/proc/sys/kernel/pid_max").write_text("{PIDS}")
place = Path(sys.argv[1])

def stranger(pid):
    for _ in range(20 * {PIDS}):
        found = subprocess.Popen(["sleep", "1000"])
        if found.pid == pid:
            return found
        found.kill()
        found.wait()
    raise SystemExit(f"no process got pid {{pid}}")

stranger({RESERVED} + 1).kill()  # those below are never given out again

async def main():
    backend = LocalBackend("local", place / "jobs", place / "envs", slots=2, memory=None, cpus=None)
    async with AsyncExitStack() as stack:
        await backend.start(stack)
        script = "echo $$ > " + str(place / "pid") + "; exec sleep 1000"
        handle = await backend.submit(Job(token="one", arguments=((Part("text", script),),), shell=True))
        while not (place / "pid").exists() or not (place / "pid").read_text().strip():
            await anyio.sleep(0.01)
        step = int((place / "pid").read_text())
        for pid in (handle["pid"], step):  # the supervisor's is not given out again while its session has a member
            os.kill(pid, signal.SIGKILL)
            while supervisor.start_time(pid) is not None:
                await anyio.sleep(0.01)
        other, third = stranger(handle["pid"]), stranger(step)
        print("reused", flush=True)
        await backend.cancel(handle)
        with anyio.fail_after(20):
            outcome = await backend.wait(handle)
        assert isinstance(outcome, Lost), outcome
        assert other.poll() is None and third.poll() is None, "a stranger was signalled"
        for process in (other, third):
            process.kill()
            process.wait()
    print("well", flush=True)

anyio.run(main)
"""


def test_D3_strangers_that_have_got_the_pids_of_a_supervisor_and_its_step_are_left_alone(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        not_here("few pids need root: they are those of a pid namespace")
    if tuple(int(word) for word in os.uname().release.split(".")[:2]) < (6, 14):
        pytest.skip("before Linux 6.14 a pid namespace has no pid_max of its own: it would be the host's")
    inside = f'"{sys.executable}" "$0" "$1"; exit $?'  # a shell as the namespace's first process, which reaps
    script = tmp_path / "script.py"
    script.write_text(REUSED)
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", inside, script, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (0, "reused\nwell\n"), done.stderr
