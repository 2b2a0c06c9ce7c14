"""The cards of a box, told by a scripted `nvidia-smi`; the leases and the sshd are real."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from lab.ssh_daemon import UNTIL_GO, Daemon, ended, job, log, outcome, said, shell, well
from smi_rig import Smi

from mlpiped.backends import cards
from mlpiped.backends.base import Exited, Lost
from mlpiped.backends.ssh import gpus
from mlpiped.backends.ssh.gpus import BoxCards
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AsyncExitStack

    from lab.ssh_rig import Box, Lab

pytestmark = [pytest.mark.anyio, pytest.mark.lab]


@pytest.fixture
def smi(tmp_path: Path) -> Iterator[Smi]:
    uuids = [f"GPU-{secrets.token_hex(8)}" for _ in range(2)]
    yield Smi.make(tmp_path / "smi", *uuids)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for uuid in uuids:
        (Path(cards.FOLDER) / boot / uuid).unlink(missing_ok=True)


@pytest.fixture
def box(ssh_lab: Lab, smi: Smi) -> Iterator[Box]:
    box = ssh_lab.box(path=[smi.folder, "/usr/bin", "/bin"])
    yield box
    box.stop()


async def test_cards_are_found_and_a_step_sees_those_that_it_leased(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    assert backend.capacity().cards == () and backend.capacity().no_cards
    await well(backend)
    assert [card.uuid for card in backend.capacity().cards] == list(smi.uuids)
    assert backend.capacity().no_cards is None
    wanted = shell('echo "$CUDA_VISIBLE_DEVICES"', gpus=(smi.uuids[1],))
    handle, found = await ended(backend, wanted)
    assert found.code == 0 and await log(backend, handle) == smi.uuids[1].encode() + b"\n"
    handle, _ = await ended(backend, shell('echo "[$CUDA_VISIBLE_DEVICES]"'))
    assert await log(backend, handle) == b"[]\n"
    assert not leases(smi)


async def test_two_daemons_do_not_lease_one_card_and_it_is_free_after_the_step(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack
) -> None:
    one, two = Daemon(box, tmp_path / "one"), Daemon(box, tmp_path / "two")
    mine, theirs = await one.life(stack), await two.life(stack)
    handle = await mine.submit(shell("echo began; sleep 300", gpus=smi.uuids[:1]))
    await said(mine, handle, b"began")
    assert leases(smi) == [smi.uuids[0]]
    with pytest.raises(BackendUnavailable, match="is leased by the mlpiped of"):
        await theirs.submit(job("true", gpus=smi.uuids))
    assert leases(smi) == [smi.uuids[0]]  # all or none
    await well(theirs)
    assert [card.foreign is None for card in theirs.capacity().cards] == [False, True]
    later = await one.life(stack)  # the next daemon gives back what the one before has leased
    await later.cancel(handle)
    assert isinstance(await later.wait(handle), Exited)
    assert not leases(smi)
    assert (await ended(theirs, job("true", gpus=smi.uuids)))[1].code == 0


async def test_a_card_with_somebody_elses_process_is_left_alone(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    smi.used_by((smi.uuids[0], os.getpid(), "/usr/bin/python"))
    await well(backend)
    assert backend.capacity().cards[0].foreign == f"in use by python (pid {os.getpid()}), not ours"
    with pytest.raises(BackendUnavailable, match=r"card 0 is in use by python"):
        await backend.submit(job("true", gpus=smi.uuids[:1]))
    assert not leases(smi)


async def test_cards_that_cannot_be_read_say_why_and_steps_without_run_on(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    smi.broken("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver", 9)
    await well(backend)
    assert "couldn't communicate" in (backend.capacity().no_cards or "")
    assert (await ended(backend, job("true")))[1].code == 0


async def test_a_step_that_was_called_lost_gives_its_card_back_when_its_box_is_back(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack
) -> None:
    backend = await Daemon(box, tmp_path / "state", unreachable_timeout="1.0s").life(stack)
    handle = await backend.submit(shell("echo began; sleep 300", gpus=smi.uuids[:1]))
    await said(backend, handle, b"began")
    box.stop()
    assert isinstance(await outcome(backend, handle), Lost)
    box.start()
    with anyio.fail_after(30):
        while leases(smi):
            await well(backend)
            await anyio.sleep(0.05)


async def test_two_computes_of_one_box_give_a_shared_card_back_when_neither_needs_it(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path / "state")
    one, two = await daemon.life(stack, "one"), await daemon.life(stack, "two")
    first, second = [await each.submit(shell(UNTIL_GO, gpus=smi.uuids[:1], gpu_memory=1 << 30)) for each in (one, two)]
    daemon.let_go(first)
    await outcome(one, first)
    assert leases(smi) == [smi.uuids[0]]
    daemon.let_go(second)
    await outcome(two, second)
    assert not leases(smi)


async def test_a_look_that_comes_while_a_card_is_given_back_does_not_lease_it_again(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await Daemon(box, tmp_path / "state").life(stack)
    handle = await backend.submit(shell("echo began; sleep 300", gpus=smi.uuids[:1]))
    await said(backend, handle, b"began")
    looked, run = anyio.Event(), BoxCards._run

    async def slow(self: BoxCards, arguments: Sequence[str]) -> tuple[int, str]:
        done = await run(self, arguments)
        if arguments[1] == "give":  # the lease is gone, and who gives it back does not know it yet
            tasks.start_soon(backend._cards.look)
            await looked.wait()
            await anyio.sleep(0.5)  # as far as it gets
        elif arguments[1] == "look":
            looked.set()
        return done

    await backend.cancel(handle)
    monkeypatch.setattr(BoxCards, "_run", slow)
    async with anyio.create_task_group() as tasks:
        await backend.wait(handle)
    assert not leases(smi)


async def test_a_driver_that_hangs_in_the_kernel_is_the_cards_trouble_and_is_left_in_peace(
    box: Box, smi: Smi, tmp_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    (smi.folder / "timeout").write_text(f"#!/bin/sh\necho >> {asked}\nexec sleep 60\n")  # not to be ended in time
    (smi.folder / "timeout").chmod(0o755)
    monkeypatch.setattr(gpus, "PATIENCE", 1.0)
    backend = await Daemon(box, tmp_path / "state").life(stack)
    assert await backend.health() is None
    assert backend.capacity().no_cards == "nvidia-smi hangs on `box` and cannot be ended"
    assert (await ended(backend, job("true")))[1].code == 0
    assert await backend.health() is None
    assert asked.read_text() == "\n"


def leases(smi: Smi) -> list[str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [uuid for uuid in smi.uuids if (Path(cards.FOLDER) / boot / uuid).is_symlink()]


def test_the_machine_has_the_tools_that_the_script_needs() -> None:
    assert all(shutil.which(name) for name in ("timeout", "readlink", "stat", "ln"))
