"""What a Docker engine, and people at it, can do to steps: a real dockerd, killed, restarted, and meddled with."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import structlog
from contract.conftest import DockerBench
from lab.docker_rig import BARE, PYTHON
from lab.docker_scene import GATED, bench, finally_, folder, gated, open_gate, said, served, shown
from smi_rig import Smi

from mlpiped.backends.base import Exited, JobOutput, Lost, NeverRan, Part
from mlpiped.backends.docker import watching
from mlpiped.backends.host_cards import HostCards
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lab.docker_rig import Engine, Registry

    from mlpiped.backends.base import Handle, Outcome
    from mlpiped.backends.docker import DockerBackend

__all__ = ["bench"]

pytestmark = [pytest.mark.anyio, pytest.mark.lab]


@pytest.fixture(autouse=True)
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of cards: not the host's own."""
    monkeypatch.setitem(HostCards.__init__.__kwdefaults__, "folder", str(tmp_path / "leases"))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return tmp_path / "leases" / boot


# --- I1, I2: the engine is restarted


@pytest.fixture
async def shaken(own_engine: Engine, tmp_path: Path, anyio_backend: str) -> AsyncIterator[DockerBench]:
    """On an engine that the test may stop and kill."""
    async with AsyncExitStack() as stack:
        yield DockerBench(tmp_path, stack, own_engine)
    if own_engine.process is not None:
        own_engine.stop()
    own_engine.start()
    if left := own_engine.containers():
        own_engine.docker("rm", "--force", *left)


def restarted(engine: Engine, how: str, live_restore: bool) -> None:
    engine.kill() if how == "killed" else engine.stop()
    engine.start(live_restore=live_restore)


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_I1_with_live_restore_a_step_runs_on_through_restarts_of_the_engine(
    shaken: DockerBench, how: str
) -> None:
    restarted(shaken.engine, "stopped", live_restore=True)
    async with served(shaken) as backend:
        handle = await gated(shaken, backend)
        outcomes: list[Outcome] = []

        async def wait() -> None:
            outcomes.append(await finally_(backend, handle))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            for _ in range(3):
                await anyio.to_thread.run_sync(restarted, shaken.engine, how, True)
            assert not outcomes
            open_gate(shaken, handle)
    assert isinstance(outcomes[0], Exited) and outcomes[0].code == 0, outcomes
    assert (folder(shaken, handle) / "stdout").read_text() == "ready\nwent\n"


async def test_I1_a_step_that_ends_while_the_engine_is_down_keeps_its_exit_code(shaken: DockerBench) -> None:
    async with served(shaken) as backend:
        handle = await gated(shaken, backend, "; exit 5")
        shaken.engine.kill()
        open_gate(shaken, handle)
        await shown(folder(shaken, handle) / "ended", b"ended 5 ")
        with pytest.raises(BackendUnavailable, match="does not answer"):
            await backend.find([handle["token"]])  # from the folder: it needs no engine
            await backend._engine.well()
        shaken.engine.start()
        outcome = await finally_(backend, handle)
    assert isinstance(outcome, Exited) and outcome.code == 5


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_I2_without_live_restore_a_step_that_ran_is_lost_and_has_not_failed(
    shaken: DockerBench, how: str
) -> None:
    async with served(shaken) as backend:
        handle = await gated(shaken, backend)
        polite = await gated(shaken, backend, before="trap 'exit 0' TERM; ")  # it would end well if it were told to
        await anyio.to_thread.run_sync(restarted, shaken.engine, how, False)
        for each in (handle, polite):
            assert isinstance(await finally_(backend, each), Lost)
    async with served(shaken) as backend:
        outcome = await finally_(backend, handle)
    assert isinstance(outcome, Lost) and "ended from outside" in outcome.reason
    assert "went" not in (folder(shaken, handle) / "stdout").read_text()


async def test_I2_a_step_of_an_image_without_a_shell_is_lost_with_its_engine_too(shaken: DockerBench) -> None:
    async with served(shaken) as backend:
        script = "trap 'exit 0' TERM; /busybox touch $MLPIPED_SCRATCH/on; while :; do /busybox sleep 0.05; done"
        job = shaken.job("/busybox", "sh", "-c", script, image=shaken.engine.image(BARE))
        handle = await backend.submit(job)
        await shown(folder(shaken, handle) / "work/on", b"")
        await anyio.to_thread.run_sync(restarted, shaken.engine, "stopped", False)
        assert isinstance(await finally_(backend, handle), Lost)


async def test_I1_what_a_container_without_a_shell_prints_comes_on_after_restarts_of_the_engine(
    shaken: DockerBench,
) -> None:
    restarted(shaken.engine, "stopped", live_restore=True)
    async with served(shaken) as backend:
        script = "n=0; while [ $n -lt 40 ]; do echo line $n; n=$((n+1)); /busybox sleep 0.1; done"
        handle = await backend.submit(shaken.job("/busybox", "sh", "-c", script, image=shaken.engine.image(BARE)))
        outcomes: list[Outcome] = []

        async def wait() -> None:
            outcomes.append(await finally_(backend, handle))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await shown(folder(shaken, handle) / "stdout", b"line 3\n")
            await anyio.to_thread.run_sync(restarted, shaken.engine, "killed", True)
    assert isinstance(outcomes[0], Exited) and outcomes[0].code == 0, outcomes
    assert (folder(shaken, handle) / "stdout").read_text() == "".join(f"line {n}\n" for n in range(40))


async def test_an_engine_that_comes_back_is_found_again_by_a_backend_that_began_without_it(
    shaken: DockerBench,
) -> None:
    shaken.engine.stop()
    image = None
    async with served(shaken) as backend:
        health = await backend.health()
        assert health is not None and "does not answer" in health
        with pytest.raises(BackendUnavailable) as fault:
            await backend.submit(shaken.job("true", image="sha256:" + "0" * 64))
        assert "does not answer" in fault.value.message and "systemctl status docker" in str(fault.value.hint)
        shaken.engine.start()
        image = shaken.engine.image(PYTHON)
        outcome = await backend.wait(await backend.submit(shaken.job("true", image=image)))
        assert isinstance(outcome, Exited) and outcome.code == 0
        assert await backend.health() is None


async def test_waiting_for_a_dead_engine_says_so_and_decides_nothing(
    shaken: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpiped.backends.docker.backend.PATIENCE", 0.5)
    async with served(shaken) as backend:
        handle = await gated(shaken, backend)
        shaken.engine.kill()
        with pytest.raises(BackendUnavailable, match="does not answer"), anyio.fail_after(20):
            await backend.wait(handle)
        assert not (folder(shaken, handle) / "exit.json").exists()


# --- I3: told apart


async def test_I3_a_step_that_needs_too_much_memory_fails_and_says_so(bench: DockerBench) -> None:
    outcome, _ = await said(bench, "python", "-c", "x = bytearray(300 << 20)", memory=64 << 20)
    assert isinstance(outcome, Exited) and outcome.out_of_memory and outcome.code != 0
    assert outcome.error == "out of memory: it needed more than its limit of 64 MiB"
    async with served(bench) as backend:  # the witness says the same to the next daemon
        job = bench.job("true", memory=64 << 20)
        assert await backend.wait(await backend.submit(job)) != outcome


async def test_I3_a_killed_child_is_no_failure_of_a_step_that_ends_well(bench: DockerBench) -> None:
    outcome, _ = await said(bench, "python -c 'x = bytearray(300 << 20)'; true", shell=True, memory=64 << 20)
    assert isinstance(outcome, Exited) and (outcome.code, outcome.out_of_memory, outcome.error) == (0, False, None)


async def test_I3_a_step_that_kills_itself_has_failed_and_is_not_lost(bench: DockerBench) -> None:
    outcome, _ = await said(bench, "sh", "-c", "kill -9 $$")
    assert isinstance(outcome, Exited) and (outcome.code, outcome.signal) == (None, 9)


async def test_I3_an_image_that_is_gone_is_refused_for_good(bench: DockerBench) -> None:
    async with served(bench) as backend:
        with pytest.raises(InvalidJob, match="no image"):
            await backend.submit(bench.job("true", image="sha256:" + "0" * 64))
        with pytest.raises(InvalidJob, match="names no image"):
            await backend.submit(bench.job("true", image=None))


async def test_I3_what_the_engine_cannot_grant_is_refused_in_its_words(bench: DockerBench) -> None:
    async with served(bench) as backend:
        with pytest.raises(InvalidJob, match="Range of CPUs"):
            await backend.submit(bench.job("true", cpus=1000))


async def test_I3_a_card_that_the_engine_cannot_give_is_a_sentence(bench: DockerBench) -> None:
    outcome, _ = await said(bench, "true", gpus=("GPU-00000000-0000-0000-0000-000000000000",))
    assert isinstance(outcome, Exited) and outcome.code != 0
    assert outcome.error is not None and "could not be started" in outcome.error and "device driver" in outcome.error


async def test_cards_are_asked_for_by_uuid_and_told_to_the_step(bench: DockerBench) -> None:
    async with served(bench) as backend:
        job = bench.job("true", gpus=("GPU-a", "GPU-b"))
        handle = await backend.submit(job)
        facts = bench.engine.inspect(handle["id"])
        assert facts is not None
        (request,) = facts["HostConfig"]["DeviceRequests"]
        assert (request["DeviceIDs"], request["Capabilities"]) == (["GPU-a", "GPU-b"], [["gpu"]])
        env = backend._folders.environment(job, "/jobs/x")
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


async def test_a_card_is_leased_for_as_long_as_its_step_lasts_and_to_nobody_else(
    bench: DockerBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leases: Path
) -> None:
    """The engine has no driver to give it, so the step ends at its start; till then the card is taken."""
    smi = Smi.make(tmp_path / "smi", "GPU-00000000-aaaa", "GPU-00000000-bbbb")
    monkeypatch.setenv("PATH", str(smi.folder), prepend=":")
    one, two = (
        DockerBench(tmp_path / name, bench.stack, bench.engine, gpus="auto", instance=name) for name in ("one", "two")
    )
    async with served(one) as backend, served(two) as other:
        assert await backend.health() is None
        assert [card.uuid for card in backend.capacity().cards] == list(smi.uuids)
        handle = await backend.submit(bench.job("true", gpus=smi.uuids[:1]))
        assert os.readlink(leases / smi.uuids[0]).startswith(f"one {handle['token']} ")
        with pytest.raises(BackendUnavailable, match="leased by the mlpiped of"):
            await other.submit(bench.job("true", gpus=smi.uuids[:1]))
        await other.health()
        assert [card.foreign is None for card in other.capacity().cards] == [False, True]
        assert isinstance(await backend.wait(handle), Exited)
        assert os.listdir(leases) == []
        refused = bench.job("true", gpus=smi.uuids[:1], cpus=1000)
        with pytest.raises(InvalidJob):
            await backend.submit(refused)
        assert os.listdir(leases) == []


async def test_a_limit_of_processors_and_memory_holds_in_the_container(bench: DockerBench) -> None:
    read = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; df -m /dev/shm"
    outcome, text = await said(bench, read, shell=True, memory=96 << 20, cpus=0.5, shm_size=32 << 20)
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert text.split()[0] == str(96 << 20)
    assert text.splitlines()[-1].split()[1] == "32"


# --- I4, I5: people at the engine


async def test_I4_a_stranger_with_the_tokens_name_is_told_and_left_alone(bench: DockerBench) -> None:
    job = bench.job("true")
    bench.engine.docker("create", "--name", job.token, PYTHON, "true")
    async with served(bench) as backend:
        with pytest.raises(BackendUnavailable) as fault:
            await backend.submit(job)
        assert fault.value.message == f"a container that is not ours has the name `{job.token}`"
        assert isinstance(await backend.fence(job.token), NeverRan)  # the step goes on by another token
        await backend.discard(job.token, keep_logs=False)
        await backend.removed()
    assert bench.engine.inspect(job.token) is not None
    other = DockerBench(bench.place, bench.stack, bench.engine)  # another daemon, with the same token
    async with served(other) as backend:
        with pytest.raises(BackendUnavailable, match="not ours"):
            await backend.submit(other.job("true", token=job.token))


async def test_I4_a_container_of_our_own_that_was_made_before_a_crash_is_taken_over(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job("true")
    async with served(bench) as backend:

        def crash(folder: str, record: Handle) -> bool:
            raise BackendUnavailable("crashed before the claim")

        monkeypatch.setattr(backend._folders, "claim", crash)
        with pytest.raises(BackendUnavailable, match="crashed"):
            await backend.submit(job)
    made = bench.engine.inspect(job.token)
    async with served(bench) as backend:
        handle = await backend.submit(job)
        assert made is not None and handle["id"] == made["Id"]
        outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0


async def test_A3_who_loses_the_claim_leaves_the_winners_container_alone(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(bench) as backend:
        claim = backend._folders.claim

        def another_was_first(folder: str, record: Handle) -> bool:
            assert claim(folder, record)
            return False

        monkeypatch.setattr(backend._folders, "claim", another_was_first)
        handle = await backend.submit(bench.job("true"))
        await backend.removed()
        facts = bench.engine.inspect(handle["id"])
        assert facts is not None and facts["State"]["Status"] == "created"  # the winner starts it, nobody else


async def test_A2_a_container_that_was_claimed_and_not_started_never_starts(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job("true", env={"SECRET": "hush"})
    async with served(bench) as backend:

        async def crash(container: str) -> None:
            raise BackendUnavailable("crashed before the start")

        monkeypatch.setattr(backend._engine, "start", crash)
        with pytest.raises(BackendUnavailable, match="crashed"):
            await backend.submit(job)
    async with served(bench) as backend:
        handle = await backend.fence(job.token)
        assert not isinstance(handle, NeverRan)  # it is claimed: whether it started has to be found out
        assert isinstance(await backend.wait(handle), NeverRan)
        assert bench.engine.inspect(job.token) is None
        assert isinstance(await backend.wait(handle), NeverRan)
    async with served(bench) as backend:
        assert isinstance(await backend.wait(handle), NeverRan)
    assert "hush" not in "".join(p.read_text() for p in folder(bench, job).rglob("*") if p.is_file())


async def test_I1_a_container_that_a_killed_engine_forgot_to_have_started_is_no_step_that_never_ran(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an engine says `created`, and removes it; what the step has done is done. Here it is as if it had run."""
    job = bench.job("true")
    async with served(bench) as backend:

        async def crash(container: str) -> None:
            raise BackendUnavailable("crashed during the start")

        monkeypatch.setattr(backend._engine, "start", crash)
        with pytest.raises(BackendUnavailable):
            await backend.submit(job)
        subprocess.run(["sh", folder(bench, job) / "start.sh"], check=True)
        handle = await backend.fence(job.token)
        assert isinstance(handle, dict)
        outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0


async def test_A3_a_container_whose_start_was_under_way_at_the_crash_is_adopted_and_starts_once(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job(GATED, shell=True)
    async with served(bench) as backend:
        start = backend._engine.start

        async def crash(container: str) -> None:
            await start(container)
            raise BackendUnavailable("crashed during the start")

        monkeypatch.setattr(backend._engine, "start", crash)
        with pytest.raises(BackendUnavailable, match="crashed"):
            await backend.submit(job)
    async with served(bench) as backend:
        handle = await backend.fence(job.token)
        assert not isinstance(handle, NeverRan)
        open_gate(bench, handle)
        outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert (folder(bench, job) / "stdout").read_text() == "ready\nwent\n"


async def test_A3_a_start_that_comes_while_the_container_is_withdrawn_wins_or_loses_whole(bench: DockerBench) -> None:
    """The engine decides between a removal without force and a start: never both."""
    for turn in range(10):
        async with served(bench) as backend:
            job = bench.job("true")
            start, answers = backend._engine.start, []

            async def late(container: str, start: Any = start, answers: list[Any] = answers) -> None:
                answers.append(container)
                raise BackendUnavailable("it is not known whether it started")

            backend._engine.start = late  # type: ignore[method-assign]
            with pytest.raises(BackendUnavailable):
                await backend.submit(job)
            handle = await backend.fence(job.token)
            outcomes: list[Outcome] = []

            async def starts(start: Any = start, answers: list[Any] = answers, turn: int = turn) -> None:
                await anyio.sleep(0.001 * turn)
                try:
                    await start(answers[0])
                except Exception as no:
                    answers.append(no)

            async with anyio.create_task_group() as group:
                group.start_soon(starts)
                outcomes.append(await backend.wait(handle))
            ran = (folder(bench, job) / "stdout").exists()
            assert isinstance(outcomes[0], Exited if ran else NeverRan), (turn, outcomes, answers)


@pytest.mark.parametrize("state", ["claimed", "running", "exited"])
async def test_I5_a_container_removed_by_hand_is_lost_unless_its_step_had_ended_or_never_began(
    bench: DockerBench, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(bench) as backend:
        if state == "claimed":

            async def crash(container: str) -> None:
                raise BackendUnavailable("crashed before the start")

            monkeypatch.setattr(backend._engine, "start", crash)
            job = bench.job("true")
            with pytest.raises(BackendUnavailable):
                await backend.submit(job)
            found = await backend.fence(job.token)
            assert isinstance(found, dict)
            handle = found
        else:
            handle = await gated(bench, backend, "; exit 3")
            if state == "exited":
                open_gate(bench, handle)
                await shown(folder(bench, handle) / "ended", b"ended 3 ")
        bench.engine.docker("rm", "--force", handle["id"])
        outcome = await backend.wait(handle)
        if state == "exited":
            assert isinstance(outcome, Exited) and outcome.code == 3
        elif state == "claimed":
            assert isinstance(outcome, NeverRan), "its script is as it was laid there"
        else:
            assert isinstance(outcome, Lost) and "somebody removed it" in outcome.reason
        assert bench.engine.containers(bench.instance) == set()  # never made again


async def test_I5_a_wait_that_goes_on_hears_of_a_removal(bench: DockerBench) -> None:
    async with served(bench) as backend:
        handle = await gated(bench, backend)
        outcomes: list[Outcome] = []

        async def wait() -> None:
            outcomes.append(await backend.wait(handle))

        with anyio.fail_after(watching.POLL - 1):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await anyio.sleep(0.2)
                await anyio.to_thread.run_sync(bench.engine.docker, "rm", "--force", handle["id"])
    assert isinstance(outcomes[0], Lost)


async def test_a_container_stopped_by_hand_is_lost_and_a_paused_one_is_waited_for(bench: DockerBench) -> None:
    async with served(bench) as backend:
        handle = await gated(bench, backend)
        bench.engine.docker("stop", handle["id"])
        assert isinstance(await backend.wait(handle), Lost)
        handle = await gated(bench, backend)
        bench.engine.docker("pause", handle["id"])
        with anyio.move_on_after(0.5):
            pytest.fail(str(await backend.wait(handle)))
        bench.engine.docker("unpause", handle["id"])
        open_gate(bench, handle)
        outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0


# --- I6: hints


async def test_I6_a_silent_stream_of_events_costs_no_more_than_the_poll(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "POLL", 0.3)
    async with served(bench) as backend, deaf(bench, backend):
        handle = await gated(bench, backend)
        outcomes: list[Outcome] = []

        async def wait() -> None:
            outcomes.append(await backend.wait(handle))

        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await anyio.sleep(0.1)
                open_gate(bench, handle)
    assert isinstance(outcomes[0], Exited) and outcomes[0].code == 0


@asynccontextmanager
async def deaf(bench: DockerBench, backend: DockerBackend) -> AsyncIterator[None]:
    """The engine behind a proxy that lets no event through."""
    place = bench.place / "deaf"

    async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        silent = False
        while data := await source.read(1 << 16):
            silent = silent or b"/events?" in data.split(b"\r\n")[0]
            if not silent:
                sink.write(data)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ours = await asyncio.open_unix_connection(bench.engine.socket)
        await asyncio.gather(forward(reader, ours[1]), forward(ours[0], writer), return_exceptions=True)

    server = await asyncio.start_unix_server(serve, place)
    await backend._watch.close()
    await backend._engine.close()
    backend._engine.path = str(place)
    backend._engine.open()
    backend._watch.start()
    yield
    server.close()


# --- I7: images


async def test_I7_a_step_runs_the_image_that_was_resolved_though_the_tag_has_moved(bench: DockerBench) -> None:
    name = f"moved-{secrets.token_hex(4)}:v1"
    build = "FROM lab-python\nRUN echo {} > /version\n"
    bench.engine.docker("build", "--tag", name, "-", stdin=build.format("old"))
    async with served(bench) as backend:
        old = await backend.image(name, None)
        bench.engine.docker("build", "--tag", name, "-", stdin=build.format("new"))
        new = await backend.image(name, None)
    assert old.identity != new.identity and old.run.startswith("sha256:")
    assert (await said(bench, "cat", "/version", image=old.run))[1] == "old\n"
    assert (await said(bench, "cat", "/version", image=new.run))[1] == "new\n"


async def test_a_dockerfile_is_built_once_per_content_and_base(bench: DockerBench) -> None:
    base = f"base-{secrets.token_hex(4)}:v1"
    bench.engine.docker("tag", PYTHON, base)
    text = (
        f"ARG BASE={base}\nFROM $BASE AS first\nRUN date +%s%N > /made\nFROM ${{BASE}}\nCOPY --from=first /made /made\n"
    )
    async with served(bench) as backend:
        images = [await backend.image(None, text) for _ in range(2)]
        both = []

        async def build() -> None:
            both.append(await backend.image(None, text + "# more\n"))

        async with anyio.create_task_group() as group:
            group.start_soon(build)
            group.start_soon(build)
        bench.engine.docker("build", "--tag", base, "-", stdin="FROM lab-python\nRUN touch /moved\n")
        moved = await backend.image(None, text)
    assert images[0] == images[1] and images[0].identity.startswith("b3:")
    assert both[0] == both[1] and both[0].identity != images[0].identity
    assert moved.identity != images[0].identity
    assert (await said(bench, "cat", "/made", image=images[0].run))[1].strip().isdecimal()


async def test_a_dockerfile_that_does_not_build_fails_with_the_engines_words(bench: DockerBench) -> None:
    async with served(bench) as backend:
        with pytest.raises(InvalidJob) as fault:
            await backend.image(None, "FROM lab-python\nRUN echo what is wrong >&2 && false\n")
    assert "non-zero code: 1" in fault.value.message and "what is wrong" in str(fault.value.hint)


@pytest.mark.parametrize("name", ["../containers/json", "a b", "", "UPPER/case", "x:y:z", "sha256:123"])
async def test_what_is_no_name_of_an_image_is_refused(bench: DockerBench, name: str) -> None:
    async with served(bench) as backend:
        with pytest.raises(InvalidJob):
            await backend.image(name, None)


async def test_an_image_is_pulled_from_a_registry_and_known_by_its_digest_there(
    bench: DockerBench, registry: Registry
) -> None:
    name = registry.push(BARE, f"pulled-{secrets.token_hex(4)}:v1")
    async with served(bench) as backend:
        with structlog.testing.capture_logs() as told:
            image = await backend.image(name, None)
        assert [each["event"] for each in told] == ["pulling an image"]
        digests = bench.engine.docker("image", "inspect", "--format", "{{.RepoDigests}}", name).stdout
        assert f"@{image.identity}" in digests and image.run == bench.engine.image(name)
        assert await backend.image(f"{name.rpartition(':')[0]}@{image.identity}", None) == image
        with pytest.raises(InvalidJob, match="its registry gives none"):
            await backend.image("127.0.0.1:5000/there-is-no:v1", None)
        base = registry.push(BARE, f"base-{secrets.token_hex(4)}:v1")
        made = await backend.image(None, f'FROM {base}\nRUN ["/busybox", "touch", "/made"]\n')
    outcome, _ = await said(bench, "/busybox", "test", "-e", "/made", image=made.run)
    assert isinstance(outcome, Exited) and outcome.code == 0


async def test_an_image_that_may_not_be_pulled_is_a_fault_of_the_step(bench: DockerBench) -> None:
    never = DockerBench(bench.place, bench.stack, bench.engine, pull="never")
    async with served(never) as backend:
        with pytest.raises(InvalidJob) as fault:
            await backend.image("nobody/has-this:v1", None)
    assert "docker pull nobody/has-this:v1" in str(fault.value.hint)


async def test_a_registry_that_cannot_be_reached_is_a_fault_of_the_machine(bench: DockerBench) -> None:
    async with served(bench) as backend:
        with pytest.raises(BackendUnavailable) as fault:
            await backend.image("127.0.0.1:9/nobody/has-this:v1", None)
    assert fault.value.message.startswith(
        "no image `127.0.0.1:9/nobody/has-this:v1` on `box`, and it cannot be pulled: "
    )


# --- what a container sees


async def test_inputs_can_be_read_and_not_written_and_nothing_beside_them_is_there(
    bench: DockerBench, tmp_path: Path
) -> None:
    (tmp_path / "data/in").mkdir(parents=True)
    (tmp_path / "data/in/a").write_text("content")
    (tmp_path / "data/file").write_text("single")
    (tmp_path / "data/other").write_text("not asked for")
    inputs = {"a": (str(tmp_path / "data/in"),), "b": (str(tmp_path / "data/file"),)}
    script = f"""
        cat {tmp_path}/data/in/a {tmp_path}/data/file; echo
        (echo x > {tmp_path}/data/in/a) 2>/dev/null && echo written
        (echo x > {tmp_path}/data/file) 2>/dev/null && echo written
        touch {tmp_path}/data/in/new 2>/dev/null && echo made
        chmod 777 {tmp_path}/data/file 2>/dev/null && echo changed
        test -e {tmp_path}/data/other && echo seen
        ls {bench.place}/state/jobs | grep -v -x "$MLPIPED_TOKEN"
        echo over
    """
    outcome, text = await said(bench, script, shell=True, inputs=inputs)
    assert text == "contentsingle\nover\n", outcome


async def test_what_is_mounted_below_an_input_can_not_be_written_either(bench: DockerBench, tmp_path: Path) -> None:
    inner = tmp_path / "data/inner"
    inner.mkdir(parents=True)
    for enter in ([], bench.engine.enter()):
        subprocess.run([*enter, "mount", "-t", "tmpfs", "lab", inner], check=True)
    try:
        script = f"touch {inner}/new && echo made; grep -q '{inner} ' /proc/self/mountinfo && echo mounted"
        _, text = await said(bench, script, shell=True, inputs={"a": (str(tmp_path / "data"),)})
    finally:
        for enter in ([], bench.engine.enter()):
            subprocess.run([*enter, "umount", inner], check=True)
    assert "Read-only file system" in text and text.startswith("mounted\n")


async def test_a_thousand_inputs_of_a_folder_are_one_mount(bench: DockerBench, tmp_path: Path) -> None:
    (tmp_path / "many/parts").mkdir(parents=True)
    paths = [tmp_path / f"many/parts/{number:04}" for number in range(1000)]
    for path in paths:
        path.write_text("x")
    job = bench.job("cat", Part("input", "data"), inputs={"data": tuple(map(str, paths))})
    async with served(bench) as backend:
        handle = await backend.submit(job)
        outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert (folder(bench, job) / "stdout").read_text() == "x" * 1000


async def test_a_mount_that_the_config_allows_is_there_as_it_says(bench: DockerBench, tmp_path: Path) -> None:
    for name in ("read", "write"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    allowing = DockerBench(
        bench.place, bench.stack, bench.engine, allow_mounts=(str(tmp_path / "read"), f"{tmp_path / 'write'}:rw")
    )
    script = f"cat {tmp_path}/read/a; touch {tmp_path}/write/new; touch {tmp_path}/read/new"
    _, text = await said(allowing, script, shell=True)
    assert text.startswith("read") and "Read-only file system" in text
    assert (tmp_path / "write/new").exists() and not (tmp_path / "read/new").exists()
    gone = DockerBench(bench.place, bench.stack, bench.engine, allow_mounts=("/no/such/folder",))
    async with served(gone) as backend:
        with pytest.raises(BackendUnavailable, match="/no/such/folder"):
            await backend.submit(gone.job("true"))


async def test_a_step_has_no_network_unless_it_asks(bench: DockerBench) -> None:
    listing = "ls /sys/class/net"
    assert (await said(bench, listing, shell=True))[1].split() == ["lo"]
    assert (await said(bench, listing, shell=True, network=True))[1].split() == ["eth0", "lo"]


async def test_a_step_has_no_privilege_and_sees_nothing_of_the_engine(bench: DockerBench) -> None:
    script = "grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; ls /var/run/docker.sock /dev/kmsg /dev/vda 2>&1"
    _, text = await said(bench, script, shell=True)
    facts = dict(line.split(":\t") for line in text.splitlines() if ":\t" in line)
    assert facts == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1"}
    assert text.count("No such file") == 3


async def test_a_step_runs_as_the_user_that_the_config_says(bench: DockerBench, tmp_path: Path) -> None:
    somebody = DockerBench(bench.place, bench.stack, bench.engine, user="1234:2345")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/tool").write_text("#!/bin/sh\nid -u; id -g; touch made $1; ls $HOME\n")
    (tmp_path / "code/tool").chmod(0o555)
    job: dict[str, Any] = {"code": str(tmp_path / "code"), "outputs": (JobOutput("model", "m.bin", "file"),)}
    outcome, text = await said(somebody, "./tool", Part("output", "model"), **job)
    assert isinstance(outcome, Exited) and outcome.code == 0, text
    assert text == "1234\n2345\n"


async def test_secrets_of_a_step_are_in_no_file_and_in_no_answer_of_the_engine(bench: DockerBench) -> None:
    async with served(bench) as backend:
        handle = await gated(bench, backend, env={"PASSWORD": "hush-hush"})
        facts = bench.engine.inspect(handle["id"])
        assert facts is not None and "hush-hush" not in json.dumps(facts)
        files = [path for path in folder(bench, handle).rglob("*") if path.is_file()]
        assert not [path for path in files if b"hush-hush" in path.read_bytes()]
        open_gate(bench, handle)
        await backend.wait(handle)


async def test_a_script_logs_metrics_by_the_sdk_in_a_container(bench: DockerBench) -> None:
    script = "from mlpiped import Run; Run.get_context().log('accuracy', 0.5, step=3)"
    async with served(bench) as backend:
        job = bench.job("python", "-c", script)
        outcome = await backend.wait(await backend.submit(job))
    assert isinstance(outcome, Exited) and outcome.code == 0
    assert json.loads((folder(bench, job) / "metrics.jsonl").read_text())["value"] == 0.5


# --- time and cancellation


async def test_a_timeout_is_kept_while_there_is_no_daemon(bench: DockerBench) -> None:
    async with served(bench) as backend:
        handle = await gated(bench, backend, timeout=0.5, grace=0.2)
    with anyio.fail_after(20):
        while (facts := bench.engine.inspect(handle["id"])) is None or facts["State"]["Running"]:
            await anyio.sleep(0.05)
    async with served(bench) as backend:
        outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.timed_out and not outcome.cancelled and outcome.code != 0


async def test_a_timeout_that_the_container_does_not_keep_is_kept_by_the_next_daemon(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpiped.backends.docker.backend.LATE", 0.1)
    monkeypatch.setattr("mlpiped.backends.docker.script.WATCH", ":")  # as in an image without `sleep`
    async with served(bench) as backend:
        handle = await gated(bench, backend, timeout=0.2, grace=0.2)
    async with served(bench) as backend:
        with anyio.fail_after(20):
            outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.timed_out and outcome.signal in (9, 15)


async def test_a_cancellation_is_carried_out_though_the_daemon_dies_over_it(bench: DockerBench) -> None:
    deaf = "trap '' TERM; "
    async with served(bench) as backend:
        handle = await backend.submit(bench.job(deaf + GATED, shell=True, grace=0.5))
        await shown(folder(bench, handle) / "stdout", b"ready")
        await backend.cancel(handle)
    async with served(bench) as backend:
        with anyio.fail_after(20):
            outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited) and outcome.cancelled and outcome.signal == 9


async def test_cancelling_what_was_never_started_ends_it(bench: DockerBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(bench) as backend:

        async def crash(container: str) -> None:
            raise BackendUnavailable("crashed before the start")

        monkeypatch.setattr(backend._engine, "start", crash)
        job = bench.job("true")
        with pytest.raises(BackendUnavailable):
            await backend.submit(job)
        handle = await backend.fence(job.token)
        assert isinstance(handle, dict)
        await backend.cancel(handle)
        assert isinstance(await backend.wait(handle), NeverRan)


async def test_logs_that_are_followed_go_on_where_the_next_daemon_takes_them_up(bench: DockerBench) -> None:
    async with served(bench) as backend:
        handle = await gated(bench, backend)
        seen = b""
        async for chunk in backend.logs(handle, "stdout", 0, follow=True):
            seen += chunk
            break
    open_gate(bench, handle)
    async with served(bench) as backend:
        with anyio.fail_after(20):
            async for chunk in backend.logs(handle, "stdout", len(seen), follow=True):
                seen += chunk
    assert seen == b"ready\nwent\n"


# --- nothing is left behind


async def test_nothing_is_left_of_a_step_that_is_discarded(bench: DockerBench) -> None:
    before = set(bench.engine.docker("volume", "ls", "--quiet").stdout.split())
    bench.engine.docker("build", "--tag", "volumes", "-", stdin="FROM lab-python\nVOLUME /cache\n")
    async with served(bench) as backend:
        jobs = [bench.job("true"), bench.job("false"), bench.job("true", image=bench.engine.image("volumes"))]
        for job in jobs:
            await backend.wait(await backend.submit(job))
        lost = await gated(bench, backend)
        bench.engine.docker("kill", lost["id"])
        assert isinstance(await backend.wait(lost), Lost)
        await backend.fence("fenced")
        for token in (*(job.token for job in jobs), lost["token"], "fenced"):
            await backend.discard(token, keep_logs=False)
        await backend.removed()
        assert [p.name for p in (bench.place / "state/jobs").iterdir() if not p.name.startswith(".")] == []
    assert bench.engine.containers(bench.instance) == set()
    assert set(bench.engine.docker("volume", "ls", "--quiet").stdout.split()) == before


async def test_what_a_crash_left_is_removed_at_the_next_start_and_what_others_have_is_not(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = DockerBench(bench.place / "other", bench.stack, bench.engine)
    async with served(other) as backend:
        theirs = await gated(other, backend)
    async with served(bench) as backend:
        monkeypatch.setattr(backend._remover, "add", lambda container: None)  # it dies before it comes to that
        ended = await backend.submit(bench.job("true"))
        await backend.wait(ended)
        runs = await gated(bench, backend)
        forgotten = await gated(bench, backend)
    subprocess.run(["rm", "-r", folder(bench, forgotten)], check=True)
    async with served(bench) as backend:
        with anyio.fail_after(20):
            while bench.engine.containers(bench.instance) != {runs["token"]}:
                await anyio.sleep(0.05)
    assert other.engine.containers(other.instance) == {theirs["token"]}


async def test_many_who_wait_take_no_connection_each(bench: DockerBench) -> None:
    async with served(bench) as backend:
        files = len(os.listdir("/proc/self/fd"))
        handles = [await gated(bench, backend) for _ in range(3)]
        async with anyio.create_task_group() as group:
            for handle in handles * 50:
                group.start_soon(backend.wait, handle)
            await anyio.sleep(0.5)
            for handle in handles:
                open_gate(bench, handle)
        assert len(os.listdir("/proc/self/fd")) < files + 30
