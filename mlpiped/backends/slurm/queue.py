"""The queue as Slurm shows it: one squeue for all of our jobs, however many wait for it.

It asks no more often than it was told to, less often while nothing changes, and rarely while nobody waits: only for
what a daemon that died, or a controller that did, has left there. What it cannot find out it does not guess: a query
that failed tells those who wait why, and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import structlog

from mlpiped.backends.slurm import commands
from mlpiped.backends.slurm.runner import ask
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from mlpiped.backends.slurm.commands import Listed, Ref
    from mlpiped.backends.slurm.runner import Runner

log = structlog.get_logger("slurm")
QUIET_SHARE = 0.1  # of the time in which nothing has changed: so long it looks away
LONGEST_LOOK_AWAY = 60.0  # seconds
NOBODY_WAITS = 600.0  # seconds: the same, while nobody waits
MOST_DOUBLINGS = 16  # of the pause after failures: a controller that is away for a weekend fails more often than that
A_DAY = 86_400.0
UNKNOWN = "UNKNOWN"  # not asked yet, or not known to Slurm
NO_REASON = "Slurm has given no reason yet"
MOST = 1000  # jobs that one sacct is asked for: a command line has an end


@dataclass(eq=False, slots=True)
class Watch:
    """Somebody who waits for news of one job."""

    token: str
    job: Ref
    name: str  # by which Slurm's answers know it
    submitted: float  # seconds since the epoch, by this host's clock
    state: str | None = ""  # Slurm's word; "": it was not asked yet; None: it does not know the job
    reason: str = ""
    trouble: str | None = None
    news: anyio.Event = field(default_factory=anyio.Event)

    def tell(self, state: str | None, reason: str = "") -> None:
        changed = state != self.state
        self.state, self.reason, self.trouble = state, reason, None
        if changed or reason in (commands.HELD, commands.IMPOSSIBLE):
            self.news.set()

    async def changed(self, within: float | None) -> None:
        """Until there is news, or so many seconds. Raises BackendUnavailable when Slurm cannot be asked."""
        with anyio.move_on_after(within):
            await self.news.wait()
        self.news = anyio.Event()
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise BackendUnavailable(trouble)


class Queue:
    def __init__(
        self, name: str, runner: Runner, interval: float, on_strangers: Callable[[list[Listed]], Awaitable[None]]
    ) -> None:
        """`on_strangers` is given held jobs with names of ours that nobody waits for."""
        self.name = name
        self.interval = interval
        self.looks = 0
        self.trouble: str | None = None
        self.listing: Mapping[Ref, Listed] = {}
        self.config: Mapping[str, str] | None = None
        self._runner = runner
        self._on_strangers = on_strangers
        self._watches: dict[Ref, set[Watch]] = {}
        self._of: dict[str, Watch] = {}  # token -> the last that was begun for it
        self._said = ""  # what squeue printed last
        self._asking: list[_Question] = []
        self._wanted = anyio.Event()  # something is expected soon
        self._began = float("-inf")
        self._changed = 0.0
        self._failures = 0
        self._accounting: bool | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ends by `close`, whichever task has started it."""
        self._task = asyncio.get_running_loop().create_task(self._serve(), name=f"the queue of {self.name}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- who asks ---------------------------------------------------------------------------------------------
    @contextmanager
    def watch(self, token: str, job: Ref, name: str, submitted: float) -> Iterator[Watch]:
        watch = Watch(token, job, name, submitted)
        self._watches.setdefault(job, set()).add(watch)
        self._of[token] = watch
        self.expect()
        try:
            yield watch
        finally:
            watches = self._watches[job]
            watches.discard(watch)
            if not watches:
                del self._watches[job]
            if self._of.get(token) is watch:
                del self._of[token]

    async def fresh(self) -> Mapping[Ref, Listed]:
        """What squeue says when asked after now. Raises BackendUnavailable."""
        question = _Question()
        self._asking.append(question)
        self.expect()
        await question.answered.wait()
        if question.answer is None:
            raise BackendUnavailable(self.trouble or "squeue has not answered")
        return question.answer

    def expect(self) -> None:
        """Something is about to happen: look as often as allowed, for a while."""
        self._changed = time.monotonic()
        self._wanted.set()

    def seen(self, job: Ref, name: str) -> Listed | None:
        """As it was listed last."""
        one = self.listing.get(job)
        return one if one is not None and one.name == name else None

    def delay(self) -> float:
        """Seconds between the beginnings of two looks, as things are."""
        waited_for = self._watches or self._asking
        longest = LONGEST_LOOK_AWAY if waited_for else NOBODY_WAITS
        if self._failures:
            pause = self.interval * 2.0 ** min(self._failures, MOST_DOUBLINGS)
            return min(pause, max(self.interval, longest))
        if waited_for and self.config is not None and (age := commands.seconds(self.config["MinJobAge"])):
            longest = min(longest, age / 3)  # a job that has ended is shown for so long
        quiet = (time.monotonic() - self._changed) * QUIET_SHARE
        return max(self.interval, min(quiet, longest))

    def waiting(self, token: str) -> str | None:
        """Slurm's reason, as those who wait for this job have heard it last; None when it does not wait."""
        watch = self._of.get(token)
        if watch is not None and watch.state == "":
            return "Slurm has not been asked about it yet"
        if watch is not None and watch.state in commands.WAITING:
            return NO_REASON if watch.reason in ("", "None") else watch.reason
        return None

    def states(self) -> dict[str, int]:
        """Slurm's state -> how many of the jobs that somebody waits for were in it when last listed."""
        told = {watch.token: watch.state for some in self._watches.values() for watch in some}
        return dict(Counter(state or UNKNOWN for state in told.values()))

    # --- who answers ------------------------------------------------------------------------------------------
    async def _serve(self) -> None:
        while True:
            while (left := self._began + self.delay() - time.monotonic()) > 0:
                await self._sleep(left)
            asking, self._asking = self._asking, []
            watches = [watch for some in self._watches.values() for watch in some]
            try:
                await self._look(asking, watches)
            except Exception as fault:  # of ours: it must not leave anybody waiting for ever
                log.exception("the queue cannot be looked at", compute=self.name)
                self._fail(f"its answer is not understood: {fault}", watches)
            for question in asking:
                question.answered.set()

    async def _sleep(self, seconds: float) -> None:
        self._wanted = anyio.Event()
        with anyio.move_on_after(seconds):
            await self._wanted.wait()

    async def _look(self, asking: Sequence[_Question], watches: Sequence[Watch]) -> None:
        self._began = time.monotonic()
        self.looks += 1
        try:
            if self.config is None:
                await self.configure()
            said = await ask(self._runner, commands.squeue())
        except BackendUnavailable as fault:
            self._fail(fault.message, watches)
            return
        if said != self._said:  # while nothing happens, it is the same for thousands of jobs
            self.listing, self._said = commands.listed(said), said
        listing, self.trouble, self._failures = self.listing, None, 0
        for question in asking:
            question.answer = listing
            question.answered.set()
        await self._tell(listing, watches)

    def _fail(self, why: str, watches: Sequence[Watch]) -> None:
        self.trouble = f"the Slurm of `{self.name}` does not answer: {why}"
        self._failures += 1
        for watch in watches:
            watch.trouble = self.trouble
            watch.news.set()

    async def _tell(self, listing: Mapping[Ref, Listed], watches: Sequence[Watch]) -> None:
        before = [watch.state for watch in watches]
        gone = []
        for watch in watches:
            one = listing.get(watch.job)
            if one is not None and one.name == watch.name:
                watch.tell(one.state, one.reason)
            elif watch.state not in commands.ENDED:
                gone.append(watch)
        arrays = _arrays(listing) if gone else set()
        for first in range(0, len(gone), MOST):
            await self._tell_gone(gone[first : first + MOST], arrays)
        if [watch.state for watch in watches] != before:
            self._changed = time.monotonic()
        held = [one for one in listing.values() if one.reason == commands.HELD and one.job not in self._watches]
        if held:
            await self._on_strangers(held)

    async def _tell_gone(self, gone: Sequence[Watch], arrays: set[tuple[int, str]]) -> None:
        """squeue does not know them any more: accounting does, where there is one. An element that waited and is no
        more part of an array that is still there was cancelled: nothing else is left of it."""
        found: Mapping[Ref, str] = {}
        if self._accounting:
            since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(min(one.submitted for one in gone) - A_DAY))
            jobs = {watch.job: watch.name for watch in gone}
            try:
                found = commands.accounted(await ask(self._runner, commands.sacct(jobs, since)))
            except BackendUnavailable as fault:
                if "disabled" in fault.message:
                    self._accounting = False
                else:  # no answer: their states stay what they were
                    for watch in gone:
                        watch.trouble = f"the accounting of `{self.name}` does not answer: {fault.message}"
                        watch.news.set()
                    return
        for watch in gone:
            waited = watch.state in commands.WAITING and _array(watch.job, watch.name) in arrays
            watch.tell(found.get(watch.job, "CANCELLED" if waited else None))

    async def configure(self) -> None:
        """Read, once, how this Slurm is set up. Raises BackendUnavailable."""
        config = commands.config(await ask(self._runner, commands.show_config()))
        if config is None:
            raise BackendUnavailable("`scontrol show config` shows no config")
        self.config = config
        self._accounting = not config["AccountingStorageType"].endswith("/none")
        age = commands.seconds(config["MinJobAge"])
        if 0 < age < 3 * self.interval:
            what = "accounting knows what has ended" if self._accounting else "the exit file alone tells what has ended"
            log.warning("Slurm forgets jobs sooner than `poll_interval` sees them", compute=self.name, why=what)


def _arrays(listing: Mapping[Ref, Listed]) -> set[tuple[int, str]]:
    """(id, name) of those that are listed, or elements of them."""
    return {_array(one.job, one.name) for one in listing.values() if isinstance(one.job, str)}


def _array(job: Ref, name: str) -> tuple[int, str]:
    return commands.array_of(job), name.partition("/")[0]


@dataclass(eq=False, slots=True)
class _Question:
    answered: anyio.Event = field(default_factory=anyio.Event)
    answer: Mapping[Ref, Listed] | None = None
