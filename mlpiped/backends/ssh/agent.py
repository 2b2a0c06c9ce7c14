"""The daemon's end of the channel to `agent.sh`: requests go out as lines, answers and news come in as lines.

One channel serves all jobs of a box. What comes in is handled in callbacks: no task waits for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import string
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

import anyio
import asyncssh

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    News = Callable[[str, str], None]

SCRIPTS = ("step.sh", "agent.sh", "tree.sh", "keep.sh", "env.sh", "prune.sh", "durable.sh")
ANSWER = 60.0  # seconds; a request that takes longer means that the box, or the way to it, is stuck
LINE = 8000  # bytes: what a shell reads as one line; longer orders go as a file
HELLO = 30.0
MARK = "--mlpiped--"
PLAIN = (string.ascii_letters + string.digits + "._/,=+@%-~").encode()


def script(name: str) -> bytes:
    return (resources.files("mlpiped.backends.ssh") / name).read_bytes()


def scripts_digest() -> str:
    return hashlib.sha256(b"\0".join(script(name) for name in SCRIPTS)).hexdigest()[:16]


def encoded(text: str) -> bytes:
    """For the shell's `%b`: one word of plain characters."""
    return b"".join(
        b"%c" % byte if byte in PLAIN else b"\\0%03o" % byte for byte in text.encode("utf-8", "surrogateescape")
    )


@dataclass
class Box:
    """What the box said of itself."""

    root: str = ""
    boot: str = ""
    python: str = ""  # path of its interpreter, or nothing
    tar: bool = False
    greets: bool = False
    contents: set[str] = field(default_factory=set)
    scripts: str = ""

    def script(self, name: str, *words: str) -> list[str]:
        return ["sh", f"{self.root}/.bin/{self.scripts}/{name}", *words]


class Agent(asyncssh.SSHClientSession[bytes]):
    def __init__(self, name: str, news: News, ended: Callable[[Agent], None]) -> None:
        self.name = name
        self.box = Box(scripts=scripts_digest())
        self.closed = False
        self.begun = False
        """Whether what comes is from our scripts, and not from a login shell that greets."""
        self._news, self._ended = news, ended
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None
        self._rest = b""
        self._errors = b""
        self._ready: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        """Why not, if it has ended before: it may do so before anybody waits for it."""
        self._asked: dict[str, tuple[asyncio.Future[str], list[str]]] = {}
        self._number = 0
        self._removals: dict[str, asyncio.Future[bool]] = {}

    @classmethod
    async def open(
        cls, connection: asyncssh.SSHClientConnection, name: str, work: str, instance: str, python: str,
        news: News, ended: Callable[[Agent], None], *, steady: bool = False,
    ) -> Agent:  # fmt: skip
        """`steady`: as for agent.sh. Raises BackendUnavailable, and what asyncssh raises."""
        boot = script("boot.sh")
        command = f"sh -c 'eval \"$(dd bs={len(boot)} count=1 iflag=fullblock 2>/dev/null)\"'"
        agent = cls(name, news, ended)
        channel, _ = await connection.create_session(lambda: agent, command, encoding=None)
        agent._channel = channel
        message = [boot, b" ".join([encoded(work), encoded(instance), agent.box.scripts.encode()]), b"\n"]
        for file in SCRIPTS:
            text = script(file)
            message += [b"%s %d\n" % (file.encode(), len(text)), text]
        channel.write(b"".join([*message, b"go\n", b"steady " if steady else b"- ", encoded(python), b"\n"]))
        try:
            with anyio.fail_after(HELLO):
                why_not = await agent._ready
        except TimeoutError:
            agent.close()
            raise BackendUnavailable(f"`{name}` let us in, but its shell says nothing") from None
        if why_not is not None:
            raise BackendUnavailable(f"`{name}` let us in, but cannot be used: {why_not}")
        return agent

    # --- asking -------------------------------------------------------------------------------------------------
    async def ask(self, verb: str, *words: str, payload: bytes = b"") -> tuple[str, list[str]]:
        """(the answer, the lines that came before it). Raises BackendUnavailable; then nobody knows what was done."""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._number += 1
        number = str(self._number)
        lines: list[str] = []
        self._asked[number] = answer, lines
        try:
            line = " ".join([number, verb, *words]).encode()
            self._write(line + (b"" if not payload else b" " + payload) + b"\n")
            with anyio.fail_after(ANSWER):
                said = await answer
        except TimeoutError:
            self.close()
            raise BackendUnavailable(f"`{self.name}` does not answer") from None
        finally:
            del self._asked[number]
        if said.startswith("failed"):
            raise BackendUnavailable(f"`{self.name}`: {said[7:] or 'it did not work'}")
        return said, lines

    async def launch(self, token: str, order: bytes) -> str:
        """`handle JSON`, `fenced` or `missing`."""
        if len(order) <= LINE:
            return (await self.ask("launch", token, payload=order))[0]
        return (await self.ask("launchfile", token, payload=b"%d\n%b" % (len(order) + 1, order)))[0]

    def tell(self, verb: str, *words: str) -> None:
        """A request whose answer nobody waits for; the lines before it are news."""
        self._number += 1
        self._write(" ".join([str(self._number), verb, *words]).encode() + b"\n")

    def discard(self, what: str, token: str) -> asyncio.Future[bool]:
        """Whether it is gone: for whoever waits. It may take any time, and False says that nobody knows."""
        self.tell("discard", what, token)
        gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._removals[str(self._number)] = gone
        return gone

    async def answered(self) -> None:
        """All removals that were told until now are done, or the channel is closed."""
        if self._removals:
            await asyncio.wait(list(self._removals.values()))

    def _write(self, data: bytes) -> None:
        if self.closed or self._channel is None:
            raise BackendUnavailable(f"the connection to `{self.name}` was lost")
        try:
            self._channel.write(data)
        except OSError:
            raise BackendUnavailable(f"the connection to `{self.name}` was lost") from None

    def close(self) -> None:
        if self._channel is not None:
            self._channel.abort()

    # --- what comes in ------------------------------------------------------------------------------------------
    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        if datatype == asyncssh.EXTENDED_DATA_STDERR:
            self._errors = (self._errors + data)[-1000:]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line.decode("utf-8", "surrogateescape"))

    def _take(self, line: str) -> None:
        if not self.begun:
            self.begun = line == MARK
            self.box.greets = self.box.greets or bool(line and not self.begun)
            return
        kind, _, rest = line.partition(" ")
        if kind == "r":
            number, _, answer = rest.partition(" ")
            asked = self._asked.get(number)
            if asked is not None and not asked[0].done():
                asked[0].set_result(answer)
            elif number in self._removals:
                _settle(self._removals.pop(number), answer == "ok")
                self._news("t", "" if answer == "ok" else "files of ended jobs cannot be removed there")
        elif kind in ("f", "d"):
            for _, lines in self._asked.values():  # each of those who asked takes what it knows
                lines.append(line)
        elif kind == "h":
            self._hello(*rest.partition(" ")[::2])
        elif kind == "c":
            self.box.contents.add(rest)
        elif kind == "x":
            self._errors = rest.encode("utf-8", "surrogateescape")
        elif kind in ("e", "n", "l"):
            self._news(kind, rest)

    def _hello(self, name: str, value: str) -> None:
        if name == "ready":
            if not self._ready.done():
                self._ready.set_result(None)
        elif name in ("root", "boot", "python"):
            setattr(self.box, name, value)
        elif name == "tar":
            self.box.tar = value != ""

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        words = self._errors.decode("utf-8", "replace").strip().splitlines()
        if not self._ready.done():
            self._ready.set_result(words[-1][:300] if words else "its shell ended at once")
        for answer, _ in self._asked.values():
            if not answer.done():
                answer.set_exception(BackendUnavailable(f"the connection to `{self.name}` was lost"))
        for gone in self._removals.values():
            _settle(gone, False)
        self._removals.clear()
        self._ended(self)


def _settle(gone: asyncio.Future[bool], said: bool) -> None:
    if not gone.done():  # who waited for it may have been cancelled
        gone.set_result(said)
