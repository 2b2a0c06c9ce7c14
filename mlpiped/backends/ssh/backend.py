"""Another machine as a compute, by SSH. It needs nothing but sh and coreutils; a step there needs no connection.

On the box lies `<work_dir>/<instance>/<token>/`, a job folder as in base.py, and what comes home of it lies in
`<state_dir>/jobs/<token>/`: its exit.json is written there last, so where one is, the logs are complete.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
import anyio.to_thread

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Capacity, Exited, Handle, Job, Lost, NeverRan, Outcome
from mlpiped.backends.ssh.carrier import Carrier
from mlpiped.backends.ssh.given_up import GivenUp
from mlpiped.backends.ssh.gpus import BoxCards
from mlpiped.backends.ssh.homecoming import Homecoming
from mlpiped.backends.ssh.keeper import End, Keeper
from mlpiped.backends.ssh.kept import KeptThere
from mlpiped.backends.ssh.link import Link
from mlpiped.backends.ssh.orders import order
from mlpiped.backends.ssh.pruning import Pruning
from mlpiped.backends.ssh.returning import Returning
from mlpiped.backends.ssh.staging import Staging
from mlpiped.backends.ssh.tails import Tails
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AsyncExitStack

    from mlpiped.backends.base import JobOutput, KeptOutput
    from mlpiped.config.computes import SshCompute

T = TypeVar("T")
FOLLOW = 0.2  # seconds between two looks at a log that is followed
FINDS = 40  # tokens in a question
LITTLE_SPACE = 64 << 10  # KiB
SMALL_FILES = ("stdout", "stderr", "metrics.jsonl")


class SshBackend:
    kind = "ssh"
    logs_here = False

    def __init__(
        self, name: str, state_dir: Path, settings: SshCompute, *, instance: str, datastores: Mapping[str, Path]
    ) -> None:
        self.name = name
        self.settings = settings
        self.jobs_dir = state_dir.absolute() / "jobs"
        self.link = Link(name, settings, settings.known_hosts or state_dir / "known_hosts")
        self.keeper = Keeper(self.link, settings.work_dir, instance, settings.python)
        self.carrier = Carrier(self.link)
        self._staging = Staging(self.keeper, self.carrier, datastores, settings.mounts)
        self._pruning = Pruning(self.keeper, self.carrier, self._staging, settings.store)
        self._returning = Returning(self.carrier)
        self._kept = KeptThere(self.keeper, self.carrier, self._returning)
        self._homecoming = Homecoming(self.keeper, self._returning, self._staging.progress)
        self._tails = Tails(self.keeper)
        self._homes: dict[str, anyio.Lock] = {}
        self._cards = BoxCards(self.keeper, settings.gpus, instance, state_dir.absolute() / "gpus" / name)
        self._given_up = GivenUp(self.keeper, self._cards, state_dir.absolute() / "given-up" / name)
        self._threads = anyio.CapacityLimiter(4)

    async def start(self, stack: AsyncExitStack) -> None:
        """A box that is away keeps nobody from starting."""
        stack.push_async_callback(self._stop)
        await self._here("make the folder of its jobs", lambda: folders.prepare(self.jobs_dir))

    async def _stop(self) -> None:
        self._tails.close()
        self.keeper.close()
        await self.link.close()

    def capacity(self) -> Capacity:
        settings, cards = self.settings, self._cards
        return Capacity(settings.slots, settings.cpus, settings.memory, cards.seen, no_cards=cards.trouble)

    def missing(self, contents: Mapping[str, int]) -> int:
        return self._staging.missing(contents)

    def doing(self, token: str) -> str | None:
        return self._staging.progress.of(token)

    # --- the job's life -----------------------------------------------------------------------------------------
    async def submit(self, job: Job) -> Handle:
        folders.at(self.jobs_dir, job.token)
        if not job.gpus:
            return await self._submit(job)
        await self._cards.take(job)
        try:
            return await self._submit(job)
        except InvalidJob:
            await self._cards.give(job.token)
            raise

    async def _submit(self, job: Job) -> Handle:
        for again in range(3):
            agent = await self.keeper.agent()
            if again or job.inputs or job.code is not None or job.requirements is not None:
                known = (await self.find([job.token])).get(job.token)
                if known is not None:
                    return known
            try:
                text = order(job, await self._staging.place(job, self._cards.environment(job)))
                said = await agent.launch(job.token, text)
            finally:
                self._staging.placed(job.token)
            self.keeper.began(job.token)
            if said.startswith("handle "):
                return _handle(job.token, said.partition(" ")[2])
            if said == "fenced":
                raise BackendUnavailable(f"token `{job.token}` was fenced and cannot start")
            self._staging.forget()
        raise BackendUnavailable(f"`{self.name}` loses what is sent to it")

    async def wait(self, handle: Handle) -> Outcome:
        token = _token(handle)
        if token in self._given_up:
            return self._stayed_away()
        try:
            end = await self.keeper.end(token)
            if isinstance(end.outcome, Exited):
                await self._bring_logs(token, end)
            if self._cards.leased(token):
                await self._cards.give(token)
            return end.outcome
        except BackendUnavailable:
            since = self.keeper.silent_since
            if since is not None and time.monotonic() - since > self.settings.unreachable_timeout:
                await self._here("note what is given up", lambda: self._given_up.note(token))
                return self._stayed_away()
            raise

    def _stayed_away(self) -> Lost:
        return Lost(f"`{self.name}` has not been reached for {self.settings.unreachable_timeout / 3600:.0f} h")

    async def cancel(self, handle: Handle) -> None:
        agent = await self.keeper.agent()
        await agent.ask("cancel", _token(handle))

    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        agent = await self.keeper.agent()
        wanted = [token for token in tokens if folders.TOKEN.fullmatch(token)]
        found: dict[str, Handle] = {}
        for first in range(0, len(wanted), FINDS):
            _, lines = await agent.ask("find", *wanted[first : first + FINDS])
            for line in lines:  # of others who ask at the same time, too
                kind, _, rest = line.partition(" ")
                token, _, record = rest.partition(" ")
                if kind == "f" and token in wanted:
                    found[token] = _handle(token, record)
        return found

    async def fence(self, token: str) -> NeverRan | Handle:
        folders.at(self.jobs_dir, token)
        agent = await self.keeper.agent()
        said, _ = await agent.ask("fence", token)
        if said.startswith("handle "):
            return _handle(token, said.partition(" ")[2])
        if self._cards.leased(token):
            await self._cards.give(token)
        return NeverRan("its token was fenced before it started")

    # --- what it prints and makes -------------------------------------------------------------------------------
    async def logs(
        self, handle: Handle, stream: Literal["stdout", "stderr"], offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        token = _token(handle)
        folder = folders.at(self.jobs_dir, token)
        while True:
            if await self._here("read the log", lambda: os.path.exists(f"{folder}/exit.json")):
                if offset < 0:
                    offset = max(0, offset + await self._here("read the log", lambda: _size(f"{folder}/{stream}")))
                chunk = await self._here("read the log", lambda: folders.read_stream(folder, stream, offset))  # noqa: B023
                over = True
            else:
                over, chunk = await self._tails.read(token, stream, offset)
            if chunk:
                offset = offset + len(chunk) if offset >= 0 else 0
                yield chunk
            elif over or not follow:
                return
            else:
                await anyio.sleep(FOLLOW)

    async def measured(self, handle: Handle, offset: int) -> AsyncIterator[bytes]:
        while chunk := (await self._tails.read(_token(handle), "metrics.jsonl", offset))[1]:
            offset += len(chunk)
            yield chunk

    async def _bring_logs(self, token: str, end: End) -> None:
        """What it has printed and measured, and then its exit.json."""
        folder = Path(folders.at(self.jobs_dir, token))
        if await self._here("keep how it ended", lambda: _kept(folder, end)):
            return
        async with self._homes.setdefault(token, anyio.Lock()):
            try:
                if end.files:
                    await self._homecoming.bring(
                        token, "its log", folder, [name for name in SMALL_FILES if name in end.files]
                    )
                await self._here("keep how it ended", lambda: _testify(folder, end.outcome))
            finally:
                self._homes.pop(token, None)

    async def fetch(self, handle: Handle, into: Path) -> Path:
        token = _token(handle)
        folder = Path(folders.at(self.jobs_dir, token))
        await self.wait(handle)
        if not await self._here("look for its outputs", (folder / "out").exists):
            await self._homecoming.bring(token, "its outputs", folder, ["out"])
        return folder

    # --- what stays there ---------------------------------------------------------------------------------------
    async def keep(self, handle: Handle, outputs: Sequence[JobOutput]) -> list[KeptOutput]:
        return [await self._kept.keep(_token(handle), output) for output in outputs]

    async def bring(self, digest: str, into: Path) -> Path | None:
        return await self._kept.bring(digest, into)

    async def changed(self, digests: Sequence[str] | None = None) -> set[str]:
        return await self._kept.changed(digests)

    async def listed(self) -> list[str]:
        return await self._kept.listed()

    async def drop(self, digests: Sequence[str], min_age: float) -> None:
        await self._kept.drop(digests, min_age)

    async def prune(self, *, only_look: bool) -> tuple[int, int]:
        return await self._pruning.prune(only_look=only_look)

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        folder = folders.at(self.jobs_dir, token)
        await self._here("remove its files", lambda: folders.discard(folder, keep_logs=keep_logs, keep_metrics=True))
        agent = await self.keeper.agent()
        if keep_logs:
            agent.discard("work", token)
            return
        if token in self._given_up:
            raise BackendUnavailable(f"a step that was called lost has not been ended yet on `{self.name}`")
        self.keeper.forget(token)
        if not await agent.discard("all", token):
            raise BackendUnavailable(f"it is not known that the files of `{token}` are gone on `{self.name}`")

    async def removed(self) -> None:
        """All that was discarded until now is gone, or the connection is."""
        agent = await self.keeper.agent()
        await agent.answered()

    # --- the machine --------------------------------------------------------------------------------------------
    async def health(self) -> str | None:
        try:
            agent = await self.keeper.agent()
            _, lines = await agent.ask("health")
            await self._given_up.end()
            await self._cards.look()
        except BackendUnavailable as fault:
            return fault.advice
        free = next((int(line.split()[1]) for line in lines if line.startswith("d ") and line[2:].isdigit()), None)
        if free is not None and free < LITTLE_SPACE:
            return f"only {free >> 10} MiB are free on `{self.name}` in {agent.box.root}"
        return self.keeper.trouble

    def try_again(self) -> None:
        self.link.try_again()

    async def _here(self, what: str, function: Callable[[], T]) -> T:
        """In a thread; no foreign exception gets out."""
        try:
            return await anyio.to_thread.run_sync(function, limiter=self._threads)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise BackendUnavailable(f"cannot {what}: {error.strerror}{place}") from error


def _token(handle: Handle) -> str:
    token = handle.get("token")
    if handle.get("v") != 1 or not isinstance(token, str) or not folders.TOKEN.fullmatch(token):
        raise InvalidJob(f"no handle of an ssh job: {handle!r:.200}")
    return token


def _handle(token: str, record: str) -> Handle:
    try:
        found = json.loads(record)
        return {**{name: found[name] for name in ("v", "pid", "start", "boot")}, "token": token}
    except (ValueError, KeyError, TypeError):
        raise BackendUnavailable(f"the claim of `{token}` cannot be read: {record!r:.200}") from None


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _kept(folder: Path, end: End) -> bool:
    """Whether all has come home; it has when there was nothing."""
    if (folder / "exit.json").exists():
        return True
    if not end.files:
        _testify(folder, end.outcome)
    return not end.files


def _testify(folder: Path, outcome: Outcome) -> None:
    assert isinstance(outcome, Exited)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("code", "signal", "timed_out", "cancelled", "error", "started", "ended", "cpu", "max_rss")
    draft = folder / f".exit.{secrets.token_hex(6)}"
    draft.write_text(json.dumps({"v": 1, **{name: getattr(outcome, name) for name in names}}))
    draft.rename(folder / "exit.json")
