"""A daemon of one submission (several tokens: an array), killed by SIGKILL where it is told: `before` or `after` one of
the commands.

python slurm_submitter.py STATE_DIR TOKEN[,TOKEN…] EFFECTS before|after sbatch|release
"""

from __future__ import annotations

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


class Killed(HostRunner):
    def __init__(self, when: str, what: str) -> None:
        super().__init__(os.environ)
        self.when, self.what = when, what

    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, str, str]:
        there = self.what in argv
        if there and self.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = await super().run(argv, stdin)
        if there:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


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
