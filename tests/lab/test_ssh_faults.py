"""Faults on the way to a box and on the box, by their ids in the fault matrix. The servers are real ones."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import anyio
import pytest
from lab import ssh_daemon as daemons
from lab import ssh_rig
from lab.ssh_daemon import UNTIL_GO, Daemon, ended, job, log, outcome, said, shell, well

from mlpiped.backends.base import Exited, Lost, NeverRan
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AsyncExitStack
    from pathlib import Path

    from lab.ssh_rig import Box, Cable, Lab

pytestmark = [pytest.mark.anyio, pytest.mark.lab]


@pytest.fixture
def box(ssh_lab: Lab) -> Iterator[Box]:
    """One for each test: these break theirs."""
    box = ssh_lab.box()
    yield box
    box.thaw()
    box.stop()


@pytest.fixture
async def cable(box: Box) -> AsyncIterator[Cable]:
    cable = ssh_rig.Cable(box)
    yield cable
    cable.close()


async def test_H1_a_connection_that_drops_is_no_outcome_and_the_step_goes_on(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    backend = await daemon.life(stack)
    handle = await backend.submit(shell(UNTIL_GO))
    await said(backend, handle, b"began")
    errors: list[str] = []

    async def wait() -> None:
        with pytest.raises(BackendUnavailable) as caught:
            await backend.wait(handle)
        errors.append(caught.value.message)

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        box.drop()
    assert errors == ["the connection to `box` was lost"]
    daemon.let_go(handle)
    found = await outcome(backend, handle)
    assert isinstance(found, Exited) and found.code == 3
    assert await log(backend, handle) == b"began\nover\n"
    assert backend.link.connects == 2


async def test_H1_a_step_that_ends_while_its_box_is_away_is_adopted_by_the_next_daemon(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    first = await daemon.life(stack)
    handle = await first.submit(shell(UNTIL_GO))
    await said(first, handle, b"began")
    box.stop()
    with pytest.raises(BackendUnavailable):
        await first.wait(handle)
    daemon.let_go(handle)
    while daemon.processes(handle["token"]):
        await anyio.sleep(0.05)
    later = await daemon.life(stack)
    with pytest.raises(BackendUnavailable, match="cannot be reached: connection refused"):
        await later.find([handle["token"]])
    box.start()
    await well(later)
    assert await later.find([handle["token"]]) == {handle["token"]: handle}
    found = await outcome(later, handle)
    assert isinstance(found, Exited) and found.code == 3


async def test_H1_a_launch_whose_reply_is_lost_is_made_again_and_starts_nothing_twice(
    box: Box, cable: Cable, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path, cable=cable)
    backend = await daemon.life(stack)
    await ended(backend, job("true"))
    wanted = shell(f"echo $MLPIPED_TOKEN >> {tmp_path}/effects; {UNTIL_GO}")
    cable.freeze_down()  # requests arrive, answers do not
    async with anyio.create_task_group() as group:

        async def lost() -> None:
            with pytest.raises(BackendUnavailable):
                await backend.submit(wanted)

        group.start_soon(lost)
        with anyio.fail_after(30):
            while not (daemon.root / wanted.token / "stdout").exists():
                await anyio.sleep(0.02)
        cable.cut()
    await well(backend)
    handle = await backend.submit(wanted)
    assert handle == (await backend.find([wanted.token]))[wanted.token]
    daemon.let_go(handle)
    found = await outcome(backend, handle)
    assert isinstance(found, Exited) and found.code == 3
    assert (tmp_path / "effects").read_text().splitlines() == [wanted.token]


async def test_H1_a_fence_after_a_lost_launch_finds_the_step_or_keeps_it_from_starting(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    backend = await daemon.life(stack)
    for wait in (0.0, 0.005, 0.02, 0.1):
        wanted = shell(f"echo $MLPIPED_TOKEN >> {tmp_path}/effects")
        await well(backend)
        async with anyio.create_task_group() as group:

            async def launch(wanted: daemons.Job = wanted) -> None:
                try:
                    await backend.submit(wanted)
                except BackendUnavailable:
                    pass

            group.start_soon(launch)
            await anyio.sleep(wait)
            box.drop()
        await well(backend)
        found = await backend.fence(wanted.token)
        effects = tmp_path / "effects"
        if isinstance(found, NeverRan):
            with pytest.raises(BackendUnavailable, match="fenced"):
                await backend.submit(wanted)
            assert not effects.exists() or wanted.token not in effects.read_text()
        else:
            assert isinstance(await outcome(backend, found), Exited)
            assert effects.read_text().splitlines().count(wanted.token) == 1


async def test_H2_a_frozen_connection_is_found_out_and_given_up(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path, keepalive="0.3s")
    backend = await daemon.life(stack)
    handle = await backend.submit(shell(UNTIL_GO))
    await said(backend, handle, b"began")
    box.freeze()
    with anyio.fail_after(30), pytest.raises(BackendUnavailable):
        await backend.wait(handle)
    daemon.let_go(handle)
    found = await outcome(backend, handle)  # the listener lives: there is a new connection, the old one stays frozen
    assert isinstance(found, Exited) and found.code == 3
    box.thaw()
    with anyio.fail_after(30):  # its agent finds its channel closed
        while len(list((daemon.root / ".events").iterdir())) > 1:
            await anyio.sleep(0.05)


async def test_H2_jobs_end_though_an_agent_of_a_frozen_connection_reads_nothing(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path, keepalive="0.3s")
    backend = await daemon.life(stack)
    await well(backend)
    box.freeze()
    (fifo,) = (daemon.root / ".events").iterdir()
    fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError):  # as if it had long been full
            while True:
                os.write(fd, b"x" * 4096)
        while backend.keeper.known is not None and not backend.keeper.known.closed:
            await anyio.sleep(0.05)
        _, found = await ended(backend, job("true"))
        assert found.code == 0
    finally:
        os.close(fd)
        box.thaw()


async def test_H3_a_step_of_a_box_that_rebooted_is_lost(box: Box, tmp_path: Path, stack: AsyncExitStack) -> None:
    daemon = Daemon(box, tmp_path)
    backend = await daemon.life(stack)
    running = await backend.submit(shell(UNTIL_GO))
    await said(backend, running, b"began")
    over, _ = await ended(backend, job("sh", "-c", "exit 4"))
    box.stop()
    for pid in [running["pid"], *daemon.processes(running["token"])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    box.boot_id.write_text("11111111-2222-3333-4444-555555555555\n")
    box.start()
    later = await daemon.life(stack)
    assert await outcome(later, running) == Lost("host rebooted")
    (daemon.state / "jobs" / over["token"] / "exit.json").unlink()
    found = await outcome(later, over)  # what had ended before has a witness
    assert isinstance(found, Exited) and found.code == 4


async def test_H4_a_changed_host_key_stops_that_host_alone(
    ssh_lab: Lab, box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    other = ssh_lab.box()
    try:
        daemon, unharmed = Daemon(box, tmp_path / "a"), Daemon(other, tmp_path / "b")
        backend, well_one = await daemon.life(stack), await unharmed.life(stack, "other")
        handle = await backend.submit(shell(UNTIL_GO))
        await said(backend, handle, b"began")
        before = box.connections()
        box.stop()
        box.new_host_key()
        box.start()
        for _ in range(5):
            with pytest.raises(BackendUnavailable) as caught:
                await backend.wait(handle)
            await anyio.sleep(0.05)
        words = f"the host key of `box` ({box.address}) has changed: nothing is sent there until that is explained"
        with pytest.raises(BackendUnavailable) as caught:
            await backend.find([handle["token"]])
        assert caught.value.message == words and str(daemon.state / "known_hosts") in (caught.value.hint or "")
        assert await backend.health() == f"{words}; {caught.value.hint}"
        assert box.connections() == before and box.knocks() == 1  # no storm of attempts
        assert await well_one.health() is None
        assert (await ended(well_one, job("true")))[1].code == 0
        daemon.trust()  # somebody has looked into it
        daemon.let_go(handle)
        found = await outcome(backend, handle)
        assert isinstance(found, Exited) and found.code == 3
    finally:
        other.stop()


async def test_H4_an_unknown_host_is_refused_with_the_way_to_trust_it(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    (tmp_path / "known_hosts").unlink()
    backend = await daemon.life(stack)
    with pytest.raises(BackendUnavailable) as caught:
        await backend.find(["t"])
    assert caught.value.message == f"the host key of `box` ({box.address}) is not known"
    assert caught.value.hint == "`mlpiped trust box`, as the daemon's user"
    assert box.connections() == 0


async def test_H5_a_box_that_refuses_our_key_is_disabled_after_three_times(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    allowed = box.folder / "authorized_keys"
    keys = allowed.read_text()
    allowed.write_text("")
    backend = await daemon.life(stack)
    with anyio.fail_after(30):
        while "is disabled: it refused our key 3 times" not in (await backend.health() or ""):
            await anyio.sleep(0.05)
    knocks = box.knocks()
    allowed.write_text(keys)
    for _ in range(20):
        with pytest.raises(BackendUnavailable, match="is disabled"):
            await backend.submit(job("true"))
    assert box.knocks() == knocks == 3
    os.utime(box.key)  # somebody has put a key there
    await well(backend)


async def test_H5_a_box_that_was_disabled_is_tried_again_when_somebody_says_so(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    allowed = box.folder / "authorized_keys"
    keys = allowed.read_text()
    allowed.write_text("")
    backend = await Daemon(box, tmp_path).life(stack)
    with anyio.fail_after(30):
        while "then `mlpipectl reload`" not in (await backend.health() or ""):
            await anyio.sleep(0.05)
    allowed.write_text(keys)
    assert "is disabled" in (await backend.health() or "")
    backend.try_again()
    assert await backend.health() is None


async def test_H6_a_full_disk_on_the_box_fails_the_step_and_its_exit_is_readable(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack
) -> None:
    box = ssh_lab.box()
    mount = box.home / "work"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], check=True)
    try:
        daemon = Daemon(box, tmp_path)
        backend = await daemon.life(stack)
        script = "echo began; head -c 9000000 /dev/zero > big; code=$?; cat /dev/zero >> more; exit $((code + 5))"
        handle, found = await ended(backend, shell(script))
        assert found.code == 6 and found.error is None
        (daemon.state / "jobs" / handle["token"] / "exit.json").unlink()
        assert await outcome(await daemon.life(stack), handle) == found  # it is in the folder there, not told alone
        assert await log(backend, handle) == b"began\n"
        with pytest.raises(BackendUnavailable, match="is a disk full"):  # and the next one costs no attempt
            await backend.submit(job("true", token="late"))
        await backend.discard(handle["token"], keep_logs=False)
        await backend.removed()
        assert (await ended(backend, job("true", token="late")))[1].code == 0
    finally:
        box.stop()
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.mark.parametrize("sessions", [4, 10])
async def test_H7_a_server_with_few_sessions_makes_nobody_fail(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack, sessions: int
) -> None:
    box = ssh_lab.box(max_sessions=sessions)
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    inputs = []
    for number in range(30):
        path = tmp_path / f"in{number}"
        path.write_text(str(number))
        inputs.append(str(path))
    seen: dict[int, bytes] = {}

    async def one(number: int) -> None:
        wanted = job("cat", daemons.Part("input", "data"), inputs={"data": (inputs[number],)})
        handle, found = await ended(backend, wanted)
        assert found.code == 0
        seen[number] = await log(backend, handle)

    async with anyio.create_task_group() as group:
        for number in range(30):
            group.start_soon(one, number)
    assert seen == {number: str(number).encode() for number in range(30)}
    assert box.connections() == 1
    box.stop()


async def test_H8_a_stranger_with_the_supervisors_pid_is_neither_adopted_nor_killed(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    backend = await daemon.life(stack)
    handle = await backend.submit(shell(UNTIL_GO))
    await said(backend, handle, b"began")
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        for pid in [handle["pid"], *daemon.processes(handle["token"])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        claim = daemon.root / handle["token"] / "claim"
        who = (claim / "who").read_text().split()
        (claim / "who").write_text(" ".join([str(stranger.pid), *who[1:]]) + "\n")
        started = (claim / "pid").read_text().split()[1]
        (claim / "pid").write_text(f"{stranger.pid} {started}\n")
        await backend.cancel(handle)
        found = await outcome(await daemon.life(stack), handle)
        assert isinstance(found, Lost) and "its supervisor was killed" in found.reason
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_H9_durations_do_not_depend_on_anybodys_clock(
    ssh_lab: Lab, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """`date` on this box is a day ahead and goes backwards: a step's times are of one clock that nobody sets."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "date").write_text(
        f"#!/bin/sh\nn=$(cat {tools}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tools}/n\n"
        "echo $(($(/bin/date +%s) + 86400 - n * 5000))\n"
    )
    (tools / "date").chmod(0o755)
    box = ssh_lab.box(path=[tools, "/usr/bin", "/bin"])
    daemon = Daemon(box, tmp_path / "state")
    backend = await daemon.life(stack)
    handle, found = await ended(backend, shell("sleep 0.3; date", timeout=20))
    assert found.code == 0 and not found.timed_out
    assert found.started is not None and found.ended is not None
    assert 0.25 <= found.ended - found.started < 20
    assert json.loads((tmp_path / "state/jobs" / handle["token"] / "exit.json").read_text())["v"] == 1
    box.stop()


async def test_a_step_whose_supervisor_was_killed_is_lost_and_nothing_of_it_is_left(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    backend = await daemon.life(stack)
    handle = await backend.submit(shell(f"setsid sleep 300 & {UNTIL_GO}"))
    await said(backend, handle, b"began")
    os.kill(handle["pid"], signal.SIGKILL)
    found = await outcome(await daemon.life(stack), handle)
    assert isinstance(found, Lost) and "its supervisor was killed" in found.reason
    assert daemon.processes(handle["token"]) == []


async def test_a_step_that_its_box_claimed_and_could_not_begin_never_ran(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path)
    handle = await (await daemon.life(stack)).submit(shell(UNTIL_GO))
    os.kill(handle["pid"], signal.SIGKILL)
    for pid in daemon.processes(handle["token"]):
        os.kill(pid, signal.SIGKILL)
    (daemon.root / handle["token"] / "claim/pid").unlink()  # as if no process could have been made for it
    found = await outcome(await daemon.life(stack), handle)
    assert isinstance(found, NeverRan) and "could not begin it" in found.reason
    assert (daemon.root / handle["token"] / "claim/cancelled").exists()  # who is about to begin it ends there


async def test_a_box_that_stays_away_loses_its_steps_after_its_time(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path, unreachable_timeout="1.0s")
    backend = await daemon.life(stack)
    handle = await backend.submit(shell(UNTIL_GO))
    await said(backend, handle, b"began")
    box.stop()
    found = await outcome(backend, handle)
    assert isinstance(found, Lost) and "has not been reached for" in found.reason
    daemon.let_go(handle)
