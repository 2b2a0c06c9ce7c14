"""Faults on the daemon's own host, by their ids in the fault matrix. The daemon that is killed is a real process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

from mlpiped.backends import folder as folders
from mlpiped.backends import launcher, processes, supervisor
from mlpiped.backends.base import Exited, Handle, Job, JobOutput, Lost, NeverRan, Part
from mlpiped.backends.local import LocalBackend
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

DAEMON = """
import json, sys, anyio
from contextlib import AsyncExitStack
from pathlib import Path
from mlpiped.backends.base import Job, Part
from mlpiped.backends.local import LocalBackend

async def main():
    place, tokens, script = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
    backend = LocalBackend("local", place / "jobs", place / "envs", slots=2, memory=None, cpus=None)
    async with AsyncExitStack() as stack:
        await backend.start(stack)
        for token in tokens:
            job = Job(token=token, arguments=((Part("text", script),),), shell=True)
            print(json.dumps(await backend.submit(job)), flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""
HUNGRY = "x = b'x' * (80 << 20); sum(range(10 ** 6))"
UNTIL_GO = "echo began; while ! test -e go; do sleep 0.01; done; echo over; exit 3"


def backend_at(place: Path) -> LocalBackend:
    return LocalBackend("local", place / "jobs", place / "envs", slots=2, memory=None, cpus=None)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def backend(tmp_path: Path, stack: AsyncExitStack) -> LocalBackend:
    backend = backend_at(tmp_path)
    await backend.start(stack)
    return backend


def shell(token: str, script: str, **fields: Any) -> Job:
    return Job(token=token, arguments=((Part("text", script),),), shell=True, **fields)


def daemon(place: Path, *tokens: str, script: str = UNTIL_GO) -> tuple[subprocess.Popen[bytes], list[Handle]]:
    """Another daemon that has submitted these; it would serve for ever."""
    command = [sys.executable, "-c", DAEMON, str(place), ",".join(tokens), script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, [json.loads(process.stdout.readline()) for _ in tokens]


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


async def said(backend: LocalBackend, handle: Handle, word: bytes) -> None:
    """Until the step has printed this."""
    seen = b""
    with anyio.fail_after(20):
        async for chunk in backend.logs(handle, "stdout", 0, follow=True):
            seen += chunk
            if word in seen:
                return
    raise AssertionError(f"it ended having said {seen!r}")


def let_go(place: Path, token: str) -> None:
    (place / "jobs" / token / "work/go").touch()


async def gone(pid: int) -> None:
    """Until the process has ended."""
    fd = supervisor.open_process(pid, None)
    if fd is not None:
        assert await anyio.to_thread.run_sync(processes.ended, fd, 20.0)
        os.close(fd)


async def test_A4_steps_survive_the_daemon_that_is_killed_and_the_next_one_has_their_outcome(
    backend: LocalBackend, tmp_path: Path
) -> None:
    tokens = ["one", "two", "three"]
    first, handles = daemon(tmp_path, *tokens)
    for handle in handles:
        await said(backend, handle, b"began")
    kill(first)
    assert await backend.find([*tokens, "other"]) == dict(zip(tokens, handles, strict=True))
    for token in tokens:
        let_go(tmp_path, token)
    for handle in handles:
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.code == 3
        log = b"".join([chunk async for chunk in backend.logs(handle, "stdout", 0, follow=False)])
        assert log == b"began\nover\n"


async def test_A5_an_outcome_that_came_while_no_daemon_lived_is_read_from_the_witness(tmp_path: Path) -> None:
    first, (handle,) = daemon(tmp_path, "one")
    kill(first)
    let_go(tmp_path, "one")
    await gone(handle["pid"])
    backend = backend_at(tmp_path)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 3


async def test_A4_the_timeout_holds_while_no_daemon_lives(tmp_path: Path) -> None:
    place = tmp_path
    async with AsyncExitStack() as stack:
        backend = backend_at(place)
        await backend.start(stack)
        handle = await backend.submit(shell("one", "sleep 300", timeout=0.3))
    await gone(handle["pid"])
    outcome = folders.witness(place / "jobs/one")
    assert outcome is not None and outcome.timed_out


async def test_A4_the_zygote_ends_with_the_daemon_and_its_jobs_do_not(backend: LocalBackend, tmp_path: Path) -> None:
    first, (handle,) = daemon(tmp_path, "one")
    stat = Path(f"/proc/{handle['pid']}/stat").read_text()
    zygote = int(stat.rpartition(")")[2].split()[1])
    kill(first)
    await gone(zygote)
    assert folders.held(tmp_path / "jobs/one")
    await backend.cancel(handle)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.cancelled


async def test_A2_A3_a_crash_around_the_submit_leaves_either_a_fence_or_a_job_to_adopt(
    backend: LocalBackend, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    fenced = adopted = 0
    for number in range(12):
        token = f"crash-{number}"
        command = [sys.executable, "-c", DAEMON, str(tmp_path), token, f"echo {token} >> {ran}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        folder = tmp_path / "jobs" / token
        after_spawn = number % 3 == 0  # killed after the claim; the others at moments around it
        while not (folder / "claim" if after_spawn else folder).exists():
            await anyio.sleep(0.0005)
        await anyio.sleep(0 if after_spawn else number * 0.001)
        kill(process)
        verdict = await backend.fence(token)
        if isinstance(verdict, NeverRan):
            fenced += 1
            assert not after_spawn
        else:
            adopted += 1
            outcome = await backend.wait(verdict)
            assert isinstance(outcome, Exited) and outcome.code == 0
    lines = ran.read_text().split() if ran.exists() else []
    assert len(lines) == len(set(lines)) == adopted
    assert fenced + adopted == 12 and adopted >= 4


async def test_a_killed_supervisor_means_lost_and_nothing_of_the_step_lives_on(
    backend: LocalBackend, tmp_path: Path
) -> None:
    script = "setsid sh -c 'echo hidden; sleep 300' & echo began; sleep 300"
    handle = await backend.submit(shell("one", script))
    await said(backend, handle, b"began")
    await said(backend, handle, b"hidden")
    tree = [pid for pid, _, _ in supervisor.descendants(handle["pid"])]
    assert len(tree) >= 4
    os.kill(handle["pid"], signal.SIGKILL)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Lost) and "supervisor was killed" in outcome.reason
    for pid in tree:
        await gone(pid)
    assert await backend.wait(handle) == outcome


async def test_jobs_share_a_supervisor_one_after_the_other_and_none_has_the_usage_of_another(
    backend: LocalBackend,
) -> None:
    hungry = Job(token="big", arguments=tuple((Part("text", text),) for text in (sys.executable, "-c", HUNGRY)))
    big = await backend.submit(hungry)
    first = await backend.wait(big)
    held = Path(f"/proc/{big['pid']}/fd")
    before = len(list(held.iterdir()))
    small = await backend.submit(shell("small", "true"))
    second = await backend.wait(small)
    assert big["pid"] == small["pid"]
    with anyio.fail_after(10):
        while len(list(held.iterdir())) > before:  # the claim is let go just after its end was told
            await anyio.sleep(0.01)
    assert isinstance(first, Exited) and isinstance(second, Exited)
    assert (first.max_rss or 0) > 64 << 20 > 4 * (second.max_rss or 0)
    assert (first.cpu or 0) > (second.cpu or 0)
    assert await backend.wait(big) == first  # its own witness, though its supervisor has been at another job


async def test_what_was_meant_for_an_ended_job_does_not_reach_the_next_of_its_supervisor(
    backend: LocalBackend, tmp_path: Path
) -> None:
    over = await backend.submit(shell("over", "true"))
    await backend.wait(over)
    os.kill(over["pid"], signal.SIGTERM)  # a cancellation that came as the job ended
    running = await backend.submit(shell("next", UNTIL_GO))
    assert running["pid"] == over["pid"]
    await backend.cancel(over)
    other = backend_at(tmp_path)  # as a later daemon would
    await other.cancel(over)
    let_go(tmp_path, "next")
    outcome = await backend.wait(running)
    assert isinstance(outcome, Exited) and outcome.code == 3


async def test_a_job_that_was_cancelled_ends_its_supervisor_and_one_that_is_idle_ends_by_itself(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await backend.submit(shell("one", "sleep 300"))
    await backend.cancel(handle)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.cancelled
    await gone(handle["pid"])
    monkeypatch.setattr(launcher, "IDLE", 0.2)
    handle = await backend.submit(shell("two", "true"))
    await backend.wait(handle)
    await gone(handle["pid"])


async def test_a_killed_zygote_costs_no_job_and_is_replaced(backend: LocalBackend, tmp_path: Path) -> None:
    running = await backend.submit(shell("one", UNTIL_GO))
    zygote = backend._launcher.pid
    assert zygote is not None
    os.kill(zygote, signal.SIGKILL)
    outcome = await backend.wait(await backend.submit(shell("two", "exit 4")))
    assert isinstance(outcome, Exited) and outcome.code == 4
    assert backend._launcher.pid not in (None, zygote)
    let_go(tmp_path, "one")
    outcome = await backend.wait(running)
    assert isinstance(outcome, Exited) and outcome.code == 3


async def test_zygotes_that_are_killed_under_load_start_every_token_once(backend: LocalBackend, tmp_path: Path) -> None:
    codes: dict[str, int | None] = {}

    async def one(token: str) -> None:
        outcome = await backend.wait(await backend.submit(shell(token, f"echo x >> {tmp_path}/{token}.ran; exit 5")))
        assert isinstance(outcome, Exited)
        codes[token] = outcome.code

    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(one, f"t{number}")
            if number % 6 == 5:
                await anyio.sleep(0.005)
                if (zygote := backend._launcher.pid) is not None:
                    os.kill(zygote, signal.SIGKILL)
    assert codes == {f"t{number}": 5 for number in range(60)}
    assert all((tmp_path / f"t{number}.ran").read_text() == "x\n" for number in range(60))


async def test_what_a_builder_that_was_killed_left_is_removed_at_a_start_and_what_is_being_built_is_not(
    backend: LocalBackend, tmp_path: Path, stack: AsyncExitStack
) -> None:
    old, new = tmp_path / "jobs/.old.1", tmp_path / "jobs/.new.1"
    for draft in (old, new):
        draft.mkdir()
        (draft / "job.json").touch()
    os.utime(old, (0, 0))
    await backend_at(tmp_path).start(stack)
    assert not old.exists() and new.exists()


async def test_B3_after_a_reboot_a_job_without_a_witness_is_lost_and_one_with_a_witness_is_not(
    backend: LocalBackend,
) -> None:
    handle = await backend.submit(shell("one", "exit 2"))
    done = await backend.wait(handle)
    assert await backend.wait({**handle, "boot": "before"}) == done
    (backend.jobs_dir / "one/exit.json").unlink()
    assert await backend.wait({**handle, "boot": "before"}) == Lost("host rebooted")


async def test_B4_after_a_reboot_a_success_counts_if_its_outputs_were_made_durable_before_it(
    backend: LocalBackend, tmp_path: Path
) -> None:
    out = (JobOutput("out", "out", "file"),)
    make = ((Part("text", "echo made > "), Part("output", "out")),)
    handle = await backend.submit(Job(token="heard", arguments=make, outputs=out, shell=True))
    assert isinstance(await backend.wait(handle), Exited)  # a daemon heard it, and makes the outputs durable itself
    assert await backend.wait({**handle, "boot": "before"}) == Lost("host rebooted")
    async with AsyncExitStack() as gone_soon:
        other = backend_at(tmp_path)
        await other.start(gone_soon)
        arguments = ((Part("text", UNTIL_GO.replace("exit 3", "echo made > ")), Part("output", "out")),)
        handle = await other.submit(Job(token="unheard", arguments=arguments, outputs=out, shell=True))
    let_go(tmp_path, "unheard")
    await gone(handle["pid"])
    outcome = await backend.wait({**handle, "boot": "before"})
    assert isinstance(outcome, Exited) and outcome.code == 0


@pytest.mark.parametrize("code", [0, 3])
async def test_B3_a_step_that_traps_the_SIGTERM_of_a_host_that_goes_down_is_lost_and_not_judged_by_its_exit(
    backend: LocalBackend, code: int
) -> None:
    handle = await backend.submit(shell("one", f"trap 'exit {code}' TERM; echo began; while :; do sleep 0.01; done"))
    await said(backend, handle, b"began")
    (step,) = [pid for pid, group, _ in supervisor.descendants(handle["pid"]) if group == pid]
    os.kill(handle["pid"], signal.SIGSTOP)  # systemd stops all, sends SIGTERM to each, and lets all go on
    for pid in (step, handle["pid"]):
        os.kill(pid, signal.SIGTERM)
    with anyio.fail_after(20):
        while (supervisor._stat(step) or [b"Z"])[0] != b"Z":
            await anyio.sleep(0.005)
    os.kill(handle["pid"], signal.SIGCONT)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == code and outcome.cancelled
    assert await backend.wait({**handle, "boot": "before"}) == Lost("host rebooted")


async def test_B4_a_zero_length_witness_counts_as_none(backend: LocalBackend) -> None:
    handle = await backend.submit(shell("one", "exit 2"))
    await backend.wait(handle)
    (backend.jobs_dir / "one/exit.json").write_bytes(b"")
    assert isinstance(await backend.wait(handle), Lost)


async def test_D3_a_stranger_with_the_pid_of_a_supervisor_is_neither_waited_for_nor_signalled(
    backend: LocalBackend,
) -> None:
    handle = await backend.submit(shell("one", "true"))
    await backend.wait(handle)
    (backend.jobs_dir / "one/exit.json").unlink()
    stranger = subprocess.Popen(["sleep", "60"])
    while supervisor.start_time(stranger.pid) == handle["start"]:  # born in the same hundredth of a second
        stranger.kill()
        stranger.wait()
        stranger = subprocess.Popen(["sleep", "60"])
    try:
        claimed = {**handle, "pid": stranger.pid}
        await backend.cancel(claimed)
        with anyio.fail_after(5):
            assert isinstance(await backend.wait(claimed), Lost)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_a_supervisor_whose_pid_says_nothing_here_is_alive_by_its_lock(
    backend: LocalBackend, tmp_path: Path
) -> None:
    # a token of its own: what sweeps `one` in a test beside this one would end its step
    handle = await backend.submit(shell("afar", UNTIL_GO))
    elsewhere = {**handle, "pid": 2**22 - 1}  # as seen from another container
    with anyio.move_on_after(0.5) as scope:
        await backend.wait(elsewhere)
    assert scope.cancelled_caught
    let_go(tmp_path, "afar")
    outcome = await backend.wait(elsewhere)
    assert isinstance(outcome, Exited) and outcome.code == 3


async def test_C2_a_full_disk_refuses_the_job_leaves_nothing_and_takes_it_later(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=True)
    try:
        backend = LocalBackend("local", place / "jobs", tmp_path / "envs", slots=1, memory=None, cpus=None)
        await backend.start(stack)
        with pytest.raises(OSError) as full, open(place / "fill", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        assert full.value.errno == errno.ENOSPC
        with pytest.raises(BackendUnavailable):
            await backend.submit(shell("one", "true"))
        assert "MiB are free" in (await backend.health() or "")
        assert [path.name for path in (place / "jobs").iterdir()] == [folders.NO_PARAMETERS]
        (place / "fill").unlink()
        handle = await backend.submit(shell("one", "true"))
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.code == 0
        await gone(handle["pid"])  # the outcome is told just before the supervisor lets go of the folder
    finally:
        subprocess.run(["umount", str(place)], check=True)


async def test_no_process_to_be_had_is_the_machines_fault(tmp_path: Path) -> None:
    backend = LocalBackend(
        "local", tmp_path / "jobs", tmp_path / "envs", slots=1, memory=None, cpus=None, python="/no/such/python"
    )
    async with AsyncExitStack() as stack:
        with pytest.raises(BackendUnavailable, match="no process can be started on `local`"):
            await backend.start(stack)


async def test_L2_a_secret_is_in_no_file_and_no_command_line_once_the_step_runs(
    backend: LocalBackend, tmp_path: Path
) -> None:
    handle = await backend.submit(shell("one", UNTIL_GO, env={"KEY": "hunter2-canary"}))
    await said(backend, handle, b"began")
    files = [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()]
    assert files and not any(b"hunter2-canary" in path.read_bytes() for path in files)
    for pid, _, _ in [*supervisor.descendants(handle["pid"]), (handle["pid"], 0, 0)]:
        assert b"hunter2-canary" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    let_go(tmp_path, "one")
    await backend.wait(handle)


async def test_an_order_is_on_the_disk_only_when_it_is_too_long_for_a_packet_and_then_until_the_start(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = folders._write

    def seen(path: Any, content: str, mode: int) -> None:
        written.append(content)
        write(path, content, mode)

    monkeypatch.setattr(folders, "_write", seen)
    for token, secret in (("short", "canary"), ("long", "canary" * 20_000)):
        outcome = await backend.wait(await backend.submit(shell(token, 'exit "${#KEY}"', env={"KEY": secret})))
        assert isinstance(outcome, Exited) and outcome.code == len(secret) % 256
        assert any("canary" in content for content in written) == (token == "long")
        assert not (backend.jobs_dir / token / "job.json").exists()


async def test_A2_a_folder_that_was_left_half_built_is_finished_by_the_next_submit_or_fenced(
    backend: LocalBackend,
) -> None:
    for token in ("again", "never"):
        (backend.jobs_dir / token / "work").mkdir(parents=True)
        (backend.jobs_dir / token / "claim.0123").mkdir()
    outcome = await backend.wait(await backend.submit(shell("again", "exit 6", parameters={"a": 1})))
    assert isinstance(outcome, Exited) and outcome.code == 6
    assert json.loads((backend.jobs_dir / "again/params.json").read_text()) == {"a": 1}
    assert isinstance(await backend.fence("never"), NeverRan)
    with pytest.raises(BackendUnavailable):
        await backend.submit(shell("never", "true"))


async def test_an_order_that_lay_too_long_is_not_carried_out(backend: LocalBackend, tmp_path: Path) -> None:
    order = {"argv": ["touch", str(tmp_path / "ran")], "env": {}, "make": ["work"], "params": None}
    for token, until in (("late", 0.0), ("good", 1e12)):
        packet = {"folder": str(backend.jobs_dir / token), "until": until, "order": {**order, "token": token}}
        call = await backend._launcher.ask(token, json.dumps(packet).encode())
        with anyio.fail_after(20):
            while not call.over:
                await call.changed.wait()
        assert (call.exit is None) == (token == "late")
    assert not (backend.jobs_dir / "late").exists()


async def test_a_step_without_parameters_reads_none_and_its_folder_holds_only_what_it_needs(
    backend: LocalBackend,
) -> None:
    handle = await backend.submit(shell("one", 'test "$MLPIPED_SCRATCH" = "$PWD" && cat "$MLPIPED_PARAMS"'))
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    folder = backend.jobs_dir / "one"
    assert (folder / "stdout").read_bytes() == b"{}"
    await gone(handle["pid"])
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {"claim", "claim/handle.json", "exit.json", "stdout", "stderr", "work"}


async def test_what_cannot_be_removed_is_told_by_health_until_a_removal_goes_well(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: str, *, keep_logs: bool) -> None:
        raise OSError(errno.EIO, "Input/output error", folder)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "discard", broken)
        await backend.discard("one", keep_logs=True)
        await backend.removed()
    assert "Input/output error" in (await backend.health() or "")
    await backend.discard("one", keep_logs=True)
    await backend.removed()
    assert await backend.health() is None


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_thousand_waits_cost_one_descriptor_each_at_most_and_no_time(
    backend: LocalBackend, tmp_path: Path, adopted: bool
) -> None:
    if adopted:
        first, (handle,) = daemon(tmp_path, "one")
        kill(first)
    else:
        handle = await backend.submit(shell("one", UNTIL_GO))
    outcomes, begun = [], 0
    before = len(os.listdir("/proc/self/fd"))
    expected = before + 1000 if adopted else before

    async def wait() -> None:
        nonlocal begun
        begun += 1
        outcomes.append(await backend.wait(handle))

    async with anyio.create_task_group() as group:
        for _ in range(1000):
            group.start_soon(wait)
        with anyio.fail_after(20):
            while begun < 1000 or len(os.listdir("/proc/self/fd")) < expected:
                await anyio.sleep(0.02)
        await anyio.sleep(0.5)  # the looks at the folder are over
        began = os.times()
        await anyio.sleep(0.5)
        ended = os.times()
        assert (ended.user + ended.system) - (began.user + began.system) < 0.1  # they wait, and do not ask
        let_go(tmp_path, "one")
    assert len(outcomes) == 1000 and len(set(outcomes)) == 1
    assert len(os.listdir("/proc/self/fd")) <= before
