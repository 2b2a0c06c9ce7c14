"""A box that is asked by commands: each on a session of its own, over the one connection, within its limit."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import asyncssh

from mlpiped.backends.ssh.agent import MARK
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.ssh.link import Link

BEGIN = f'echo; echo {MARK}; exec "$@"'


class LoginShell:
    def __init__(self, link: Link) -> None:
        self.link = link

    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """(exit status, stdout, stderr), less what the login shell prints before it does what it is told.

        Raises BackendUnavailable: nobody knows then what the command has done. Cancelled, it leaves the command alone.
        """
        async with self.link.channel() as connection:
            try:
                process = await self.link.process(connection, ["sh", "-c", BEGIN, "sh", *argv])
                try:
                    with suppress(BrokenPipeError):  # it ends without having read all: what it says counts
                        if stdin:
                            process.stdin.write(stdin)
                        process.stdin.write_eof()
                    said, stderr = await process.communicate()
                finally:
                    process.channel.abort()
            except (OSError, asyncssh.Error) as fault:
                raise BackendUnavailable(f"the connection to `{self.link.name}` was lost") from fault
        if process.returncode is None:  # it has not ended as far as we know: that is no answer
            raise BackendUnavailable(f"the connection to `{self.link.name}` was lost")
        _, begun, stdout = bytes(said).partition(f"\n{MARK}\n".encode())
        if not begun:
            words = bytes(stderr).decode("utf-8", "replace").strip().splitlines()
            raise BackendUnavailable(f"the shell of `{self.link.name}` runs no command: {words[-1] if words else ''}")
        return process.returncode, stdout, bytes(stderr)
