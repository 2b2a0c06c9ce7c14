"""The daemon's own host as a compute. A zygote forks supervisors, each for one job after the other; no job needs the
daemon to live on."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import structlog

from mlpiped.backends import folder as folders
from mlpiped.backends import processes, streams
from mlpiped.backends.base import Capacity, Handle, Job, Lost, NeverRan, Outcome
from mlpiped.backends.environments import Environments
from mlpiped.backends.host_cards import HostCards
from mlpiped.backends.launcher import MESSAGE, Launcher
from mlpiped.backends.leases import Leases
from mlpiped.backends.memory_group import MemoryGroup
from mlpiped.backends.supervisor import boot_id
from mlpiped.backends.threads import Threads
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AsyncExitStack

    from mlpiped.backends.launcher import Call

log = structlog.get_logger("local")
LOOK_AGAIN = 1.0  # seconds: hints may be lost, the folder is not
QUIET, NOT_LATER = 0.5, 5.0  # seconds: what is discarded is removed when nothing more comes for so long, at the latest
MANY_PATHS = 256  # a command with more is put together in a thread
NO_ANSWER = 30.0  # seconds without a claim until a submit gives up
FILES = 65536  # the daemon waits with one descriptor a job
LITTLE_SPACE = 64 << 20


class LocalBackend:
    kind = "local"
    logs_here = True

    def __init__(
        self,
        name: str,
        jobs_dir: Path,
        envs_dir: Path,
        *,
        slots: int,
        memory: int | None,
        cpus: float | None,
        python: str = sys.executable,
        gpus: Literal["auto"] | int = 0,
        instance: str = "",
    ) -> None:
        self.name = name
        self.jobs_dir = jobs_dir.absolute()
        self._jobs = os.fspath(self.jobs_dir)
        self._capacity = Capacity(slots=slots, cpus=cpus, memory=memory)
        self._environments = Environments(envs_dir.absolute(), python)
        self._launcher = Launcher(python)
        self._cards = HostCards(name, gpus, instance, self.jobs_dir.parent / "gpus")
        self._boot = boot_id()
        self._base: dict[str, str] | None = None  # of a job that wants no environment of its own
        self._remover = _Remover(name)
        self._do = Threads(name)
        self._leases = Leases(self._cards, self._do)

    async def start(self, stack: AsyncExitStack) -> None:
        stack.push_async_callback(self._launcher.close)
        stack.push_async_callback(self.removed)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

        def make() -> None:
            folders.prepare(self.jobs_dir)
            self._environments.prepare()
            self._cards.set_right(self._lives)

        await self._do("make its folders", make)
        try:
            await self._launcher.zygote()
        except OSError as error:
            raise self._no_process(error) from error

    def capacity(self) -> Capacity:
        return replace(self._capacity, cards=self._cards.seen, no_cards=self._cards.trouble)

    def missing(self, contents: Mapping[str, int]) -> int:
        return 0

    def doing(self, token: str) -> str | None:
        return None

    async def submit(self, job: Job) -> Handle:
        async with self._leases.of(job):
            return await self._submit(job)

    async def _submit(self, job: Job) -> Handle:
        folder = folders.at(self._jobs, job.token)
        if self._environments.wanted(job):
            known = await self._do("look for the job", lambda: folders.read_claim(folder))
            if known is not None:
                return known
            base = await self._environments.of(job)
        else:
            base = self._base = self._base or await self._environments.of(job)
        if job.code is None and sum(map(len, job.inputs.values())) <= MANY_PATHS:
            order = self._order(folder, job, base)
            if len(order) <= MESSAGE - 1000:
                return await self._launch(folder, order)
        order = await self._do("make the job's folder", lambda: self._build(folder, job, base))
        return await self._launch(folder, order)

    def _order(self, folder: str, job: Job, base: dict[str, str]) -> str:
        """For a supervisor that makes the folder. Touches no disk."""
        env = {**base, **folders.variables(folder, job)}
        for name in ("PATH", "PYTHONPATH"):  # the step's own come first; the environment's stay reachable
            if name in job.env:
                env[name] = f"{job.env[name]}:{base[name]}"
        env.update(self._cards.environment(job))
        order = folders.order(job.argv(folders.output_paths(folder, job)), env, job)
        make, params = folders.contents(job)
        return json.dumps({**order, "make": make, "params": params})

    def _build(self, folder: str, job: Job, base: dict[str, str]) -> str:
        """Make the folder here; the order that is left for the packet."""
        if job.code is not None and not os.path.isdir(job.code):
            raise BackendUnavailable(f"the code snapshot is missing: {job.code}")
        order = json.dumps({**json.loads(self._order(folder, job, base)), "make": [], "params": None})
        short = len(order) <= MESSAGE - 1000
        folders.build(folder, job, None if short else order)
        return order if short else "null"

    def _claimed(self, folder: str) -> Handle | None:
        """Raises BackendUnavailable when it is fenced: its submitter is late, and will find that out by `fence`."""
        handle = folders.read_claim(folder)
        if handle is None and folders.fenced(folder):
            raise BackendUnavailable(f"token `{os.path.basename(folder)}` was fenced and cannot start")
        return handle

    async def _launch(self, folder: str, order: str) -> Handle:
        token, until = os.path.basename(folder), time.monotonic() + NO_ANSWER
        message = f'{{"folder": {json.dumps(folder)}, "until": {until}, "order": {order}}}'.encode("ascii")
        while time.monotonic() < until:
            call = await self._ask(token, message)
            timer = asyncio.get_running_loop().call_later(NO_ANSWER, call.tell)
            try:
                while not (call.claim or call.trouble or call.over) and time.monotonic() < until:
                    await call.changed.wait()
            finally:
                timer.cancel()
            if call.claim is not None:
                return {**call.claim, "token": token}
            if call.trouble is not None and call.trouble["kind"] in ("refused", "failed"):
                raise BackendUnavailable(f"the job could not be started on `{self.name}`: {call.trouble['fact']}")
            known = await self._do("look for the claim", lambda: self._claimed(folder))
            if known is not None:
                return known
        raise BackendUnavailable(f"no supervisor has claimed `{token}` on `{self.name}` in {NO_ANSWER:.0f} s")

    async def _ask(self, token: str, message: bytes) -> Call:
        try:
            return await self._launcher.ask(token, message)
        except OSError as error:
            raise self._no_process(error) from error

    def _no_process(self, error: OSError) -> BackendUnavailable:
        return BackendUnavailable(f"no process can be started on `{self.name}`: {error.strerror}")

    async def wait(self, handle: Handle) -> Outcome:
        outcome = await self._ended(handle)
        await self._leases.give_back(handle["token"])
        return outcome

    async def _ended(self, handle: Handle) -> Outcome:
        folder = self._folder(handle)
        call = self._launcher.known(handle["token"])
        if call is not None:  # its supervisor is ours, and says so or ends
            while not call.over:
                await call.changed.wait()
            told = folders.exited(call.exit) if call.exit is not None else None
            self._launcher.forget(call)
            if told is not None:
                return told  # said after exit.json was there
        while True:
            outcome = await self._watch(folder, handle)
            if outcome is not None:
                return outcome

    async def _watch(self, folder: str, handle: Handle) -> Outcome | None:
        """How it ended, by its folder; None when it may have ended meanwhile."""
        pidfd = self._supervisor(handle)
        try:
            outcome = await self._do("look at the job", lambda: self._look(folder, handle))
            if outcome is not None:
                return outcome
            if pidfd is None:  # its pid may mean nothing to us: we were started in another container
                await anyio.sleep(LOOK_AGAIN)
                return None
            ended, loop = anyio.Event(), asyncio.get_running_loop()
            loop.add_reader(pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(pidfd)
        finally:
            if pidfd is not None:
                os.close(pidfd)
        return None

    def _supervisor(self, handle: Handle) -> int | None:
        """A pidfd of it while it lives. Of an earlier daemon's it ends with the attempt: nobody gives it more."""
        try:
            pidfd = processes.open_supervisor(handle, self._boot)
        except OSError as error:
            raise BackendUnavailable(f"cannot watch the job on `{self.name}`: {error.strerror}") from error
        if pidfd is not None and processes.ended(pidfd):
            os.close(pidfd)
            return None
        return pidfd

    def _look(self, folder: str, handle: Handle) -> Outcome | None:
        """How it ended; None while it lives. Liveness first: it may end between the two.

        It lives while its claim is locked: its supervisor may be at another job by now.
        """
        alive = folders.held(folder)
        said = folders.witness(folder)
        if said is None and not alive:
            return self._lost(folder, handle)
        if said is not None and handle.get("boot") not in (self._boot, ""):
            # A host that goes down sends SIGTERM to all, which a supervisor takes for a cancellation.
            if said.cancelled or said.signal == signal.SIGTERM or not folders.outlives(folder, said):
                return Lost("host rebooted")
        return said

    def _lives(self, token: str) -> bool:
        """Whether a job that has cards runs, or may yet start."""
        folder = folders.at(self._jobs, token)
        handle = folders.read_claim(folder)
        if handle is None:
            return not folders.fenced(folder)
        try:
            return self._look(folder, {**handle, "token": token}) is None
        except BackendUnavailable:
            return True

    def _lost(self, folder: str, handle: Handle) -> Lost | NeverRan:
        if folders.fenced(folder):
            return NeverRan("its token was fenced before it started")
        if handle.get("boot") not in (self._boot, ""):
            return Lost("host rebooted")
        if not processes.sweep(handle["token"]):
            raise BackendUnavailable(f"processes of `{handle['token']}` survive SIGKILL: they hang in the kernel")
        MemoryGroup.forget(handle["token"])
        if not os.path.exists(folder):
            return Lost("its job folder is gone")
        return Lost("its supervisor was killed; what was left of the step has been killed too")

    async def cancel(self, handle: Handle) -> None:
        folder, call = self._folder(handle), self._launcher.known(handle["token"])
        if call is not None:
            if not call.over:  # asked here on the loop, which alone gives out the next job: it cannot be at that yet
                processes.terminate(handle, self._boot)
            return
        await self._do("cancel the job", lambda: folders.held(folder) and processes.terminate(handle, self._boot))

    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        def look() -> dict[str, Handle]:
            found = {token: folders.read_claim(folders.at(self._jobs, token)) for token in tokens}
            return {token: handle for token, handle in found.items() if handle is not None}

        return await self._do("look for jobs", look)

    async def fence(self, token: str) -> NeverRan | Handle:
        folder = folders.at(self._jobs, token)
        found = await self._do("fence the job", lambda: folders.fence(folder))
        if isinstance(found, NeverRan):
            await self._leases.give_back(token)
        return found

    async def logs(
        self, handle: Handle, stream: Literal["stdout", "stderr"], offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        folder = self._folder(handle)

        def ended() -> bool:
            return not follow or folders.over(folder) or not os.path.exists(folder)

        async for chunk in streams.read(self._do, folder, stream, offset, lambda: self._do("look at the job", ended)):
            yield chunk

    async def fetch(self, handle: Handle, into: Path) -> Path:
        return Path(self._folder(handle))

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        self._remover.add(folders.at(self._jobs, token), keep_logs)

    async def removed(self) -> None:
        """All that was discarded until now is removed, or `health` tells why not."""
        await self._remover.flush()

    async def health(self) -> str | None:
        def look() -> str | None:
            self._cards.look()
            if not os.access(self.jobs_dir, os.W_OK | os.X_OK):
                return f"the folder of its jobs cannot be written: {self.jobs_dir}"
            space = os.statvfs(self.jobs_dir)
            free = space.f_bavail * space.f_frsize
            return (
                f"only {free >> 20} MiB are free in {self.jobs_dir}" if free < LITTLE_SPACE else self._remover.trouble
            )

        return await self._do("look at its folders", look)

    def _folder(self, handle: Handle) -> str:
        if handle.get("v") != 1 or not isinstance(handle.get("token"), str):
            raise InvalidJob(f"no handle of a local job: {handle!r:.200}")
        return folders.at(self._jobs, handle["token"])


class _Remover:
    """Removes the files of jobs, in one hop to a thread for all that gather until nobody else is busy with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.trouble: str | None = None  # a sentence, until a removal goes well
        self._wanted: list[tuple[str, bool]] = []
        self._first = self._last = 0.0  # when the first of them came, and the last
        self._timer: asyncio.TimerHandle | None = None
        self._going: set[asyncio.Future[None]] = set()

    def add(self, folder: str, keep_logs: bool) -> None:
        loop = asyncio.get_running_loop()
        self._wanted.append((folder, keep_logs))
        self._last = loop.time()
        if self._timer is None:
            self._first = self._last
            self._timer = loop.call_later(QUIET, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        due = min(self._last + QUIET, self._first + NOT_LATER)
        if loop.time() >= due:
            self._go()
        else:
            self._timer = loop.call_at(due, self._look)

    def _go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        batch, self._wanted, self._timer = self._wanted, [], None
        if batch:
            going = asyncio.get_running_loop().run_in_executor(None, self._remove, batch)
            self._going.add(going)
            going.add_done_callback(self._going.discard)

    def _remove(self, batch: list[tuple[str, bool]]) -> None:
        errors = folders.discard_all(batch)
        self.trouble = None
        for error in errors:
            self.trouble = f"files of ended jobs cannot be removed: {error.strerror}: {error.filename}"
            log.warning(self.trouble, compute=self.name)

    async def flush(self) -> None:
        self._go()
        while self._going:
            await asyncio.wait(self._going)
