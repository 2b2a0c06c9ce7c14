"""A daemon of one submission (several tokens: an array), killed by SIGKILL where it is told: `before` or `after` one of
the commands.

python slurm_submitter.py STATE_DIR TOKEN[,TOKEN…] EFFECTS before|after sbatch|release
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlpiped.backends.base import Job, Part
from mlpiped.backends.slurm import SlurmBackend
from mlpiped.backends.slurm.runner import HostRunner
from mlpiped.config.computes import SlurmCompute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.slurm.runner import Answer, Stdin


class Watched(HostRunner):
    """`words`: of a command, and what a scontrol is told. `before` is called when it has been started, if it is told
    later what to do, and has not been told."""

    async def before(self, words: Sequence[str]) -> None: ...

    async def after(self, words: Sequence[str]) -> None: ...

    async def run(self, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
        words = list(argv)
        if isinstance(stdin, bytes):
            await self.before(words)
            answer = await super().run(argv, stdin, within)
        else:
            told: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

            async def tell() -> None:
                text = await stdin
                words.extend((text or b"").decode().split() if argv[0] == "scontrol" else ())
                if text is not None:
                    await self.before(words)
                told.set_result(text)

            answer, _ = await asyncio.gather(super().run(argv, told, within), tell())
        await self.after(words)
        return answer


class Killed(Watched):
    def __init__(self, when: str, what: str) -> None:
        super().__init__(os.environ)
        self.when, self.what = when, what

    async def before(self, words: Sequence[str]) -> None:
        if self.what in words and self.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)

    async def after(self, words: Sequence[str]) -> None:
        if self.what in words:
            os.kill(os.getpid(), signal.SIGKILL)


def effect(token: str, effects: str) -> Job:
    """A job that says, outside of all that is ours, that it has started."""
    script = f"echo {token} >> {effects}"
    return Job(token=token, arguments=((Part("text", script),),), shell=True)


async def main() -> None:
    state, tokens, effects, when, what = sys.argv[1:]
    settings = SlurmCompute(kind="slurm", poll_interval="200ms")
    backend = SlurmBackend("cluster", Path(state), settings, instance="0" * 32, runner=Killed(when, what))
    async with AsyncExitStack() as stack:
        await backend.start(stack)
        async with anyio.create_task_group() as group:
            for token in tokens.split(","):
                group.start_soon(backend.submit, effect(token, effects))


if __name__ == "__main__":
    anyio.run(main)
