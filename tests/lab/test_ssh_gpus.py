"""The cards of a box, told by a scripted `nvidia-smi`; the leases and the sshd are real."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.ssh_daemon import Daemon, ended, job, log, said, shell, well
from smi_rig import Smi

from mlpiped.backends import cards
from mlpiped.backends.base import Exited
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
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


def leases(smi: Smi) -> list[str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [uuid for uuid in smi.uuids if (Path(cards.FOLDER) / boot / uuid).is_symlink()]


def test_the_machine_has_the_tools_that_the_script_needs() -> None:
    assert all(shutil.which(name) for name in ("timeout", "readlink", "stat", "ln"))
