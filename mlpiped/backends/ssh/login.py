"""A box that is asked by commands: each on a session of its own, over the one connection, within its limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncssh

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.ssh.link import Link


class LoginShell:
    def __init__(self, link: Link) -> None:
        self.link = link

    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """(exit status, stdout, stderr). Raises BackendUnavailable: nobody knows then what the command has done.

        Cancelled, it leaves the command alone.
        """
        async with self.link.channel() as connection:
            try:
                process = await self.link.process(connection, argv)
                try:
                    process.stdin.write(stdin)
                    process.stdin.write_eof()
                    stdout = await process.stdout.read()
                    stderr = await process.stderr.read()
                    await process.wait_closed()
                finally:
                    process.channel.abort()
            except (OSError, asyncssh.Error) as fault:
                raise BackendUnavailable(f"the connection to `{self.link.name}` was lost") from fault
        if process.returncode is None:  # it has not ended as far as we know: that is no answer
            raise BackendUnavailable(f"the connection to `{self.link.name}` was lost")
        return process.returncode, bytes(stdout), bytes(stderr)
