"""Keeps an agent on the box, and knows from its news how jobs ended.

The channel's loss is no news of any job: whoever waits is told that the box cannot be asked, and asks again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import anyio
import asyncssh

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Lost, NeverRan
from mlpiped.backends.ssh.agent import Agent
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from mlpiped.backends.base import Outcome
    from mlpiped.backends.ssh.link import Link

LOOK_AGAIN = 20.0  # seconds: news may be lost, the folder is not
RECENT = 4096  # jobs whose end is remembered
AT_ONCE = 40  # tokens in a line
UNBEGUN = "its box could not begin it: may no more processes be made there?"
WHY = {
    "killed": "its supervisor was killed; what was left of the step has been killed too",
    "rebooted": "host rebooted",
    "gone": "its job folder is gone",
}


class End(NamedTuple):
    outcome: Outcome
    files: frozenset[str]
    """Of stdout, stderr and metrics.jsonl those that hold anything."""


class Keeper:
    def __init__(self, link: Link, work_dir: str, instance: str, python: str, *, steady: bool = False) -> None:
        """`steady`: jobs that are none of the box's own use what lies in its `work_dir`."""
        self.link = link
        self.trouble: str | None = None
        """What the box could not do though nobody waited for it."""
        self.silent_since: float | None = None
        """time.monotonic() of the first failure since the box was reached."""
        self.known: Agent | None = None
        """The last agent: what it said of the box holds after it has ended."""
        self._words = work_dir, instance, python
        self._steady = steady
        self._lock = anyio.Lock()
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._ended: OrderedDict[str, End] = OrderedDict()
        self._begun: set[str] = set()  # launched by this agent: their end will be told
        self._to_look: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    async def agent(self) -> Agent:
        """Raises BackendUnavailable."""
        if self.known is not None and not self.known.closed:
            return self.known
        try:
            async with self._lock:
                if self.known is None or self.known.closed:
                    self.known = await self._open()
                    self._begun.clear()
                    self._tick()
                self.silent_since = None
                return self.known
        except BackendUnavailable:
            self.silent_since = self.silent_since or time.monotonic()
            raise

    async def _open(self) -> Agent:
        connection = await self.link.open()
        try:
            agent = await Agent.open(
                connection, self.link.name, *self._words, self._news, self._lost, steady=self._steady
            )
        except (OSError, asyncssh.Error) as fault:
            raise BackendUnavailable(f"the connection to `{self.link.name}` was lost") from fault
        self.link.greets = agent.box.greets
        return agent

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.known is not None:
            self.known.close()

    # --- waiting ------------------------------------------------------------------------------------------------
    def began(self, token: str) -> None:
        self._begun.add(token)

    async def end(self, token: str) -> End:
        """When it has ended. Raises BackendUnavailable as soon as the box cannot be asked."""
        agent = await self.agent()
        if token not in self._ended:
            told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(token, []).append(told)
            if token not in self._begun:
                self._look(token)
            try:
                await told
            finally:
                if token in self._waiting and told in self._waiting[token]:
                    self._waiting[token].remove(told)
                    if not self._waiting[token]:
                        del self._waiting[token]
        found = self._ended.get(token)
        if found is None:
            raise BackendUnavailable(f"the connection to `{agent.name}` was lost")
        return found

    def has_ended(self, token: str) -> bool:
        """As far as the box has told."""
        return token in self._ended

    def forget(self, token: str) -> None:
        self._ended.pop(token, None)
        self._begun.discard(token)

    def _look(self, token: str) -> None:
        if not self._to_look:
            asyncio.get_running_loop().call_soon(self._send_looks)
        self._to_look.append(token)

    def _send_looks(self) -> None:
        tokens, self._to_look = self._to_look, []
        if self.known is None or self.known.closed:
            return
        for first in range(0, len(tokens), AT_ONCE):
            self.known.tell("look", *tokens[first : first + AT_ONCE])

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.known is None or self.known.closed:
            return
        self._timer = asyncio.get_running_loop().call_later(LOOK_AGAIN, self._tick)
        self.known.tell("beat")
        for token in list(self._waiting):
            self._look(token)

    # --- news ---------------------------------------------------------------------------------------------------
    def _news(self, kind: str, rest: str) -> None:
        if kind == "t":
            self.trouble = rest or None
            return
        token, _, fact = rest.partition(" ")
        end = _read(kind, fact)
        if end is None:
            return
        self._begun.discard(token)
        self._ended[token] = end
        while len(self._ended) > RECENT:
            self._ended.popitem(last=False)
        for told in self._waiting.pop(token, ()):
            if not told.done():
                told.set_result(None)

    def _lost(self, agent: Agent) -> None:
        if agent is not self.known:
            return
        self._begun.clear()
        waiting, self._waiting = self._waiting, {}
        for told in (told for group in waiting.values() for told in group):
            if not told.done():
                told.set_exception(BackendUnavailable(f"the connection to `{agent.name}` was lost"))


def _read(kind: str, fact: str) -> End | None:
    if kind == "n":
        return End(NeverRan("its token was fenced before it started"), frozenset())
    if kind == "l":
        if fact == "unbegun":
            return End(NeverRan(UNBEGUN), frozenset())
        return End(Lost(WHY[fact]), frozenset()) if fact in WHY else None  # `stuck`: it may end yet
    flags, _, text = fact.partition(" ")
    try:
        record = json.loads(text)
    except ValueError:
        return None
    outcome = folders.exited(record) if isinstance(record, dict) else None
    if outcome is None:
        return None
    words = frozenset(flags.split("-"))
    # A host that goes down sends SIGTERM to all, which nobody can tell from somebody's wish.
    if "rebooted" in words and (outcome.cancelled or outcome.signal == 15):
        return End(Lost("host rebooted"), words)
    return End(outcome, words & {"stdout", "stderr", "metrics.jsonl"})
