"""What was called lost because its box stayed away: when the box is back nothing of it runs on beside its successor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from lab.ssh_daemon import Daemon, outcome, said, shell, well

from mlpiped.backends.base import Lost
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AsyncExitStack
    from pathlib import Path

    from lab.ssh_rig import Box, Lab

    from mlpiped.backends.base import Handle
    from mlpiped.backends.ssh import SshBackend

pytestmark = [pytest.mark.anyio, pytest.mark.lab]
DEAF = "trap '' TERM; echo began; setsid sleep 300 & sleep 300; wait"


@pytest.fixture
def box(ssh_lab: Lab) -> Iterator[Box]:
    box = ssh_lab.box()
    yield box
    box.stop()


async def lost(daemon: Daemon, box: Box, backend: SshBackend) -> Handle:
    """A step that runs on a box which has gone for too long."""
    handle = await backend.submit(shell(DEAF, grace=0.1))
    await said(backend, handle, b"began")
    box.stop()
    found = await outcome(backend, handle)
    assert isinstance(found, Lost) and "has not been reached for" in found.reason
    assert daemon.processes(handle["token"])
    return handle


async def over(daemon: Daemon, backend: SshBackend, handle: Handle) -> None:
    await well(backend)
    with anyio.fail_after(30):
        while daemon.processes(handle["token"]):
            await anyio.sleep(0.05)


async def nothing_given_up(daemon: Daemon, backend: SshBackend) -> None:
    with anyio.fail_after(30):
        while any((daemon.state / "given-up/box").iterdir()):
            await well(backend)


async def test_a_step_that_was_called_lost_is_ended_when_its_box_is_back(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path, unreachable_timeout="1.0s")
    backend = await daemon.life(stack)
    handle = await lost(daemon, box, backend)
    box.start()
    await over(daemon, backend, handle)
    assert isinstance(await backend.wait(handle), Lost)  # what was said once holds


async def test_the_folder_of_a_step_that_was_called_lost_stays_until_the_step_has_been_ended(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """Without it, nobody there would know whom to end."""
    daemon = Daemon(box, tmp_path, unreachable_timeout="1.0s")
    handle = await lost(daemon, box, await daemon.life(stack))
    later = await daemon.life(stack)
    box.start()
    with pytest.raises(BackendUnavailable, match="has not been ended"):
        await later.discard(handle["token"], keep_logs=False)
    await over(daemon, later, handle)
    await nothing_given_up(daemon, later)
    await later.discard(handle["token"], keep_logs=False)
    assert not (daemon.root / handle["token"]).exists()


async def test_a_step_that_was_called_lost_is_ended_by_the_next_daemon_too(
    box: Box, tmp_path: Path, stack: AsyncExitStack
) -> None:
    daemon = Daemon(box, tmp_path, unreachable_timeout="1.0s")
    handle = await lost(daemon, box, await daemon.life(stack))
    later = await daemon.life(stack)
    box.start()
    assert isinstance(await later.wait(handle), Lost)  # the daemon may have died over the word
    await over(daemon, later, handle)
    await nothing_given_up(daemon, later)
