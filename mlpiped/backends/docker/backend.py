"""The seam over a Docker engine: every arrow durable before the next.

    create    a container by the token's name: a second create finds the name taken, and takes the container over
    claim     by the same rename in the job folder as everywhere; the container's id lies in it
    start     by whoever made the claim, at once, and by nobody else ever
    watch     events are hints; the engine is asked, and what it does not answer is no answer
    judge     by the word that the script in the container left, and by what the engine says
    witness   exit.json: from then on nobody asks the engine, and the container is removed

After a crash, a container that is claimed and not started may be about to start: it is removed without force, which the
engine refuses for one that runs. Removed: it never ran. Refused: it is adopted.

Promised of times: the timeout and the grace are kept by the container itself, also while there is no daemon; where the
image has no shell or no `sleep`, by the daemon, and so by the next one at the latest. stdout and stderr go straight to
the job folder; of an image without a shell they come there from the engine's log, while a daemon lives.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import anyio

from mlpiped.backends import folder as folders
from mlpiped.backends import streams
from mlpiped.backends.base import Capacity, Exited, Handle, Image, Job, Lost, NeverRan, Outcome
from mlpiped.backends.docker import container as containers
from mlpiped.backends.docker import jobs, script
from mlpiped.backends.docker.engine import Engine, Facts, Refused
from mlpiped.backends.docker.images import ImageRoom
from mlpiped.backends.docker.making import Maker, Settings
from mlpiped.backends.docker.printing import Printing
from mlpiped.backends.docker.removing import Remover
from mlpiped.backends.docker.watching import Watch
from mlpiped.backends.host_cards import HostCards
from mlpiped.backends.leases import Leases
from mlpiped.backends.supervisor import boot_id
from mlpiped.backends.threads import Threads
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AsyncExitStack

PATIENCE = 10.0  # seconds that an engine may be away before whoever waits is told
AWAY = 0.5  # seconds between two questions to it meanwhile
GOING = 1.0  # seconds in which a container is gone that somebody removes, once it has ended
LATE = 2.0  # seconds that a container is given to end its step by itself, before the daemon does
LOOK_AGAIN = 1.0  # seconds between two looks at whether a step whose log is followed has ended
LITTLE_SPACE = 64 << 20


class DockerBackend:
    kind = "docker"
    logs_here = True

    def __init__(
        self,
        name: str,
        state_dir: Path,
        settings: Settings,
        *,
        instance: str,
    ) -> None:
        self.name = name
        self._settings = settings
        self._instance = instance
        self._cards = HostCards(name, settings.gpus, instance, state_dir.absolute() / "gpus")
        self._engine = Engine(settings.url)
        self._images = ImageRoom(self._engine, name, instance, settings.pull, state_dir.absolute() / "docker-images")
        self._watch = Watch(self._engine, instance, name, self._connected)
        self._remover: Remover
        user = settings.user or f"{os.geteuid()}:{os.getegid()}"
        self._folders = jobs.Folders(state_dir.absolute(), name, user, boot_id())
        self._do = Threads(name)
        self._leases = Leases(self._cards, self._do)
        self._printing = Printing(self._engine, self._do)
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()  # token -> who may start it
        self._maker = Maker(self._engine, self._folders, settings, name, instance, self._do)

    async def start(self, stack: AsyncExitStack) -> None:
        def make() -> None:
            self._folders.prepare()
            self._cards.set_right(lambda token: not self._folders.needs_no_container(token))

        await self._do("make its folders", make)
        self._engine.open()
        stack.push_async_callback(self._engine.close)
        self._remover = Remover(self._engine, self._instance, self.name)
        self._remover.start()
        stack.push_async_callback(self._remover.close)
        stack.push_async_callback(self._printing.close)
        self._watch.start()
        stack.push_async_callback(self._watch.close)

    def capacity(self) -> Capacity:
        s = self._settings
        cards, trouble = self._cards.seen, self._cards.trouble
        return Capacity(s.slots, cpus=s.cpus, memory=s.memory, cards=cards, no_cards=trouble, images=True)

    def missing(self, contents: Mapping[str, int]) -> int:
        return 0

    def doing(self, token: str) -> str | None:
        return None

    async def image(self, reference: str | None, dockerfile: str | None) -> Image:
        if dockerfile is not None:
            return await self._images.made(dockerfile)
        if reference is not None:
            return await self._images.named(reference)
        raise InvalidJob("the step names neither an image nor a Dockerfile")

    def bringing(self, reference: str | None, dockerfile: str | None) -> str | None:
        return self._images.bringing(reference, dockerfile)

    async def drop_images(self, before: float, *, only_look: bool) -> int:
        gone = await self._images.built.drop(before, only_look=only_look)
        if not only_look:
            await self._drop_sdks()
        return len(gone)

    async def _drop_sdks(self) -> None:
        """Copies of the SDK that an earlier version of mlpiped made, and no container of it sees any more."""
        try:
            found = await self._engine.list([f"{containers.INSTANCE}={self._instance}"])
        except Refused:
            return
        seen = {mount.get("Source") for each in found for mount in each["Mounts"]}
        await self._do("remove what is old", lambda: self._folders.drop_sdks(seen))

    # --- started ----------------------------------------------------------------------------------------------------
    async def submit(self, job: Job) -> Handle:
        async with self._leases.of(job):
            return await self._submit(job)

    async def _submit(self, job: Job) -> Handle:
        folder = self._folders.at(job.token)
        if job.image is None:
            raise InvalidJob(f"`{self.name}` runs containers only, and the step names no image")
        if job.requirements is not None:
            raise InvalidJob("a step in a container finds its packages in the image: `requirements` does nothing there")
        async with self._alone(job.token):
            if (known := await self._claimed(folder)) is not None:
                return known
            container, shell = await self._maker.made(job, job.image, folder)
            record = jobs.record(job, container, shell, self._folders.boot)
            if not await self._do("claim the job", lambda: self._folders.claim(folder, record)):
                return await self._claimed_by_another(folder, container)
            try:
                await self._engine.start(container)
            except Refused:
                pass  # the engine keeps its reason with the container, and `wait` reads it there
            return {**record, "token": job.token}

    async def _claimed(self, folder: str) -> Handle | None:
        known = await self._do("look for the job", lambda: folders.read_claim(folder))
        if known is None and await self._do("look for the job", lambda: folders.fenced(folder)):
            raise BackendUnavailable(f"token `{os.path.basename(folder)}` was fenced and cannot start")
        return known

    async def _claimed_by_another(self, folder: str, container: str) -> Handle:
        known = await self._do("look for the job", lambda: folders.read_claim(folder))
        if known is None:  # it was the fence
            self._remover.add(container)
            raise BackendUnavailable(f"token `{os.path.basename(folder)}` was fenced and cannot start")
        return known

    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        def look() -> dict[str, Handle]:
            found = {token: folders.read_claim(self._folders.at(token)) for token in tokens}
            return {token: handle for token, handle in found.items() if handle is not None}

        return await self._do("look for jobs", look)

    async def fence(self, token: str) -> NeverRan | Handle:
        folder = self._folders.at(token)
        found = await self._do("fence the job", lambda: folders.fence(folder))
        if isinstance(found, NeverRan):
            await self._leases.give_back(token)
            self._remover.add(token)  # made, and never to be started
        return found

    # --- ended ------------------------------------------------------------------------------------------------------
    async def wait(self, handle: Handle) -> Outcome:
        outcome = await self._ended(handle)
        await self._leases.give_back(handle["token"])
        return outcome

    async def _ended(self, handle: Handle) -> Outcome:
        folder = self._folder(handle)
        token, away_since = handle["token"], None
        while True:
            with self._watch.listen(token) as news:
                pause: float | None = None
                try:
                    outcome, state = await self._look(handle, folder)
                    if outcome is not None:
                        return outcome
                    away_since, pause = None, await self._enforce(handle, folder, state)
                except BackendUnavailable:
                    now = time.monotonic()
                    away_since = away_since or now
                    if now - away_since > PATIENCE:
                        raise
                    pause = AWAY
                with anyio.move_on_after(pause):
                    await news.wait()

    async def _look(self, handle: Handle, folder: str) -> tuple[Outcome | None, Facts]:
        """How it ended, or the engine's state of what has not."""
        said = await self._do("look at the job", lambda: self._folders.told(folder))
        if said is not None:
            return said, {}
        found = await self._engine.look(handle.get("id") or handle["token"])
        state: Facts | None = None if found is None else found["State"]
        status = None if state is None else state["Status"]
        if state is not None and status in ("running", "paused", "restarting", "removing"):
            if found is not None and not handle.get("shell", True):
                self._printing.begin(found["Id"], folder)
            return None, state
        if state is not None and status == "created" and not state["Error"] and not state["ExitCode"]:
            return await self._withdraw(handle, folder, found or {}), state
        if found is not None and not handle.get("shell", True):
            await self._bring_all(found, folder)
        outcome = await self._do("end the job", lambda: self._folders.end(handle, folder, state))
        if found is not None and isinstance(outcome, Lost) and await self._goes(found["Id"]):
            outcome = await self._do("end the job", lambda: self._folders.end(handle, folder, None))
        elif found is not None and isinstance(outcome, Exited):
            self._remover.add(found["Id"])
        return outcome, state or {}

    async def _goes(self, container: str) -> bool:
        """Whether somebody removes it: `docker rm --force` first ends it."""
        until = time.monotonic() + GOING
        while time.monotonic() < until:
            if await self._engine.look(container) is None:
                return True
            await anyio.sleep(GOING / 10)
        return False

    async def _bring_all(self, found: Facts, folder: str) -> None:
        """Of an image without a shell: all that it printed, and whether its command could be started."""
        try:
            await self._printing.finish(found["Id"], folder)
        except Refused as no:
            raise BackendUnavailable(f"the log of a container cannot be read on `{self.name}`: {no.words}") from None
        code = found["State"]["ExitCode"]
        await self._do("look at the job", lambda: self._folders.note_fault(folder, code))

    async def _withdraw(self, handle: Handle, folder: str, found: Facts) -> Outcome | None:
        """Claimed and not started: make it impossible, or find that it has started."""
        async with self._alone(handle["token"]):  # not while we are about to start it
            again = await self._engine.look(found["Id"])
            if again is None or again["State"]["Status"] != "created" or again["State"]["Error"]:
                return None
            try:
                await self._engine.remove(found["Id"], force=False)
            except Refused as no:
                if no.status == 409:  # it runs
                    return None
                raise BackendUnavailable(f"a container cannot be removed on `{self.name}`: {no.words}") from None
            return await self._do("end the job", lambda: self._folders.withdrawn(handle, folder))

    async def _enforce(self, handle: Handle, folder: str, state: Facts) -> float | None:
        """Do what the container should have done by itself; seconds until there may be more to do."""
        if state.get("Status") in (None, "removing"):
            return AWAY
        over = await self._do("look at the job", lambda: self._folders.asked_to_end(folder))
        late = LATE if handle.get("shell") else 0.0
        if over is None and handle.get("timeout") is not None:
            left: float = handle["timeout"] + late - jobs.runs_since(state)
            if left > 0:
                return left
            await self._do("end the job", lambda: self._folders.mark_timed_out(folder))
            await self._terminate(handle)
            over = 0.0
        if over is None:
            return None
        remaining: float = handle.get("grace", 0.0) + late - over
        if remaining <= 0:
            await self._engine.kill(handle["id"], "SIGKILL")
        return max(remaining, LOOK_AGAIN)

    async def _terminate(self, handle: Handle) -> None:
        """SIGTERM to all in the container, SIGKILL after the grace, by a process in it; else to the first one."""
        if handle.get("shell"):
            command = [script.SHELL, "-c", f"trap '' TERM; {script.kill(handle['grace'])}"]
            try:
                await self._engine.execute(handle["id"], command, self._folders.user)
                return
            except Refused:
                pass
        await self._engine.kill(handle["id"], "SIGTERM")

    async def cancel(self, handle: Handle) -> None:
        folder = self._folder(handle)
        if await self._do("look at the job", lambda: self._folders.told(folder)) is not None:
            return
        async with self._alone(handle["token"]):
            found = await self._engine.look(handle.get("id") or handle["token"])
            if found is None or found["State"]["Status"] in ("exited", "dead", "removing"):
                return
            await self._do("cancel the job", lambda: self._folders.mark_cancelled(folder))
            if found["State"]["Status"] != "created":
                await self._terminate({**handle, "id": found["Id"]})
        self._watch.tell(handle["token"])

    # --- read and removed -------------------------------------------------------------------------------------------
    async def logs(
        self, handle: Handle, stream: Literal["stdout", "stderr"], offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        folder = self._folder(handle)
        look_at = 0.0

        async def over() -> bool:
            nonlocal look_at
            if not follow or time.monotonic() < look_at:
                return not follow
            outcome, _ = await self._look(handle, folder)
            look_at = time.monotonic() + LOOK_AGAIN if outcome is None else 0.0
            return outcome is not None

        async def news() -> None:
            nonlocal look_at
            with self._watch.listen(handle["token"]) as news, anyio.move_on_after(streams.EVERY):
                await news.wait()
                look_at = 0.0

        async for chunk in streams.read(self._do, folder, stream, offset, over, news):
            yield chunk

    async def fetch(self, handle: Handle, into: Path) -> Path:
        return Path(self._folder(handle))

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        folder = self._folders.at(token)

        def remove() -> str | None:
            claim = folders.read_claim(folder)
            ended = folders.witness(folder) is not None  # its container is on its way out
            folders.discard(folder, keep_logs=keep_logs, keep_metrics=True)
            return None if ended else str((claim or {}).get("id") or token)

        container = await self._do("remove the job", remove)
        if container is not None:
            self._remover.add(container)

    async def removed(self) -> None:
        """All containers that were given up until now are removed, if the engine can be asked."""
        await self._remover.flush()

    async def _connected(self) -> None:
        """The engine is there, again: containers of jobs that nobody knows, or that have ended, are removed."""
        self._remover.again()
        try:
            found = await self._engine.list([f"{containers.INSTANCE}={self._instance}"])
        except Refused:
            return
        for each in found:
            token = each["Labels"].get(containers.TOKEN, "")
            if await self._do("look at the job", partial(self._folders.needs_no_container, token)):
                self._remover.add(each["Id"])

    async def health(self) -> str | None:
        def look() -> str | None:
            space = os.statvfs(self._folders.jobs_dir)
            free = space.f_bavail * space.f_frsize
            return f"only {free >> 20} MiB are free in {self._folders.jobs_dir}" if free < LITTLE_SPACE else None

        try:
            await self._do("look at the cards", self._cards.look)
            await self._engine.well()
            return await self._do("look at its folders", look) or self._remover.trouble
        except BackendUnavailable as fault:
            return fault.advice

    def _alone(self, token: str) -> anyio.Lock:
        return self._locks.setdefault(token, anyio.Lock())

    def _folder(self, handle: Handle) -> str:
        if handle.get("v") != 1 or not isinstance(handle.get("token"), str):
            raise InvalidJob(f"no handle of a container: {handle!r:.200}")
        return self._folders.at(handle["token"])
