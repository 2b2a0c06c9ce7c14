"""The daemon's own host as a compute. A zygote forks one supervisor per job; neither needs the daemon to live on."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
import anyio.to_thread

from mlpiped.backends import folder as folders
from mlpiped.backends import processes
from mlpiped.backends.base import Capacity, Handle, Job, Lost, NeverRan, Outcome
from mlpiped.backends.environments import Environments
from mlpiped.backends.launcher import Call, Launcher
from mlpiped.backends.supervisor import MemoryGroup, boot_id
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AsyncExitStack

T = TypeVar("T")
LOOK_AGAIN = 1.0  # seconds: hints may be lost, the folder is not
NO_ANSWER = 30.0  # seconds without a claim until a submit gives up
FOLLOW = 0.1  # seconds between two looks at a log that is followed
FILES = 65536  # the daemon waits with one descriptor a job
LITTLE_SPACE = 64 << 20


class LocalBackend:
    kind = "local"

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
    ) -> None:
        self.name = name
        self.jobs_dir = jobs_dir.absolute()
        self._capacity = Capacity(slots=slots, cpus=cpus, memory=memory)
        self._environments = Environments(envs_dir.absolute(), python)
        self._launcher = Launcher(python)
        self._boot = boot_id()
        self._threads = anyio.CapacityLimiter(4)

    async def start(self, stack: AsyncExitStack) -> None:
        stack.push_async_callback(self._launcher.close)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

        def make() -> None:
            self.jobs_dir.mkdir(parents=True, exist_ok=True)
            folders.sweep_drafts(self.jobs_dir)
            self._environments.prepare()

        await self._do("make its folders", make)
        await self._do_zygote()

    def capacity(self) -> Capacity:
        return self._capacity

    async def submit(self, job: Job) -> Handle:
        folder = folders.at(self.jobs_dir, job.token)
        if self._environments.wanted(job):
            known = await self._do("look for the job", lambda: folders.read_claim(folder))
            if known is not None:
                return known
        base = await self._environments.of(job)
        known = await self._do("make the job's folder", lambda: self._build(folder, job, base))
        return known if known is not None else await self._launch(folder)

    def _build(self, folder: Path, job: Job, base: dict[str, str]) -> Handle | None:
        env = {**base, **folders.variables(folder, job)}
        for name in ("PATH", "PYTHONPATH"):  # the step's own come first; the environment's stay reachable
            if name in job.env:
                env[name] = f"{job.env[name]}:{base[name]}"
        if job.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        if job.code is not None and not os.path.isdir(job.code):
            raise BackendUnavailable(f"the code snapshot is missing: {job.code}")
        argv = job.argv(folders.output_paths(folder, job))
        folders.build(folder, job, folders.order(argv, env, job))
        return self._claimed(folder)

    def _claimed(self, folder: Path) -> Handle | None:
        """Raises BackendUnavailable when it is fenced: its submitter is late, and will find that out by `fence`."""
        handle = folders.read_claim(folder)
        if handle is None and folders.fenced(folder):
            raise BackendUnavailable(f"token `{folder.name}` was fenced and cannot start")
        return handle

    async def _launch(self, folder: Path) -> Handle:
        with self._launcher.listen(folder.name) as call:
            until = anyio.current_time() + NO_ANSWER
            while anyio.current_time() < until:
                await self._do_zygote(call, folder)
                with anyio.move_on_after(LOOK_AGAIN):
                    await call.event.wait()
                said, call.said = call.said or {}, None
                if said.get("kind") == "claimed":
                    return {**said["handle"], "token": folder.name}
                if said.get("kind") in ("refused", "failed"):
                    raise BackendUnavailable(f"the job could not be started on `{self.name}`: {said['error']}")
                known = await self._do("look for the claim", lambda: self._claimed(folder))
                if known is not None:
                    return known
        raise BackendUnavailable(f"no supervisor has claimed `{folder.name}` on `{self.name}` in {NO_ANSWER:.0f} s")

    async def _do_zygote(self, call: Call | None = None, folder: Path | None = None) -> None:
        try:
            if call is None or folder is None:
                await self._launcher.zygote()
            else:
                await self._launcher.ask(call, folder)
        except OSError as error:
            raise BackendUnavailable(f"no process can be started on `{self.name}`: {error.strerror}") from error

    async def wait(self, handle: Handle) -> Outcome:
        folder = self._folder(handle)
        with self._launcher.listen(folder.name) as call:
            while True:
                call.event = anyio.Event()
                pidfd, outcome = await self._do("look at the job", lambda: self._look(folder, handle))
                try:
                    if outcome is not None:
                        return outcome
                    await self._pause(call, pidfd)
                finally:
                    if pidfd is not None:
                        os.close(pidfd)
                if call.said is not None and call.said["kind"] == "exited":
                    told = folders.exited(call.said["exit"])  # said after exit.json was on the disk
                    if told is not None:
                        return told

    def _look(self, folder: Path, handle: Handle) -> tuple[int | None, Outcome | None]:
        """(pidfd while it lives, how it ended). Liveness first: it may end between the two."""
        pidfd = processes.open_supervisor(handle, self._boot)
        alive = pidfd is not None and not processes.ended(pidfd)
        if pidfd is not None and not alive:
            os.close(pidfd)
            pidfd = None
        alive = alive or folders.held(folder)  # its pid may mean nothing to us: we were started in another container
        said = folders.witness(folder)
        if said is None and alive:
            return pidfd, None
        if pidfd is not None:
            os.close(pidfd)
        return None, said if said is not None else self._lost(folder, handle)

    def _lost(self, folder: Path, handle: Handle) -> Lost | NeverRan:
        if folders.fenced(folder):
            return NeverRan("its token was fenced before it started")
        if handle.get("boot") not in (self._boot, ""):
            return Lost("host rebooted")
        if not processes.sweep(folder.name):
            raise BackendUnavailable(f"processes of `{folder.name}` survive SIGKILL: they hang in the kernel")
        MemoryGroup.forget(folder.name)
        if not folder.exists():
            return Lost("its job folder is gone")
        return Lost("its supervisor was killed; what was left of the step has been killed too")

    async def _pause(self, call: Call, pidfd: int | None) -> None:
        """Until a hint, or the supervisor's end."""
        if pidfd is None:
            with anyio.move_on_after(LOOK_AGAIN):
                await call.event.wait()
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, call.event.set)
        try:
            await call.event.wait()
        finally:
            loop.remove_reader(pidfd)

    async def cancel(self, handle: Handle) -> None:
        self._folder(handle)
        await self._do("cancel the job", lambda: processes.terminate(handle, self._boot))

    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        def look() -> dict[str, Handle]:
            found = {token: folders.read_claim(folders.at(self.jobs_dir, token)) for token in tokens}
            return {token: handle for token, handle in found.items() if handle is not None}

        return await self._do("look for jobs", look)

    async def fence(self, token: str) -> NeverRan | Handle:
        folder = folders.at(self.jobs_dir, token)
        return await self._do("fence the job", lambda: folders.fence(folder))

    async def logs(
        self, handle: Handle, stream: Literal["stdout", "stderr"], offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        folder = self._folder(handle)

        def look(offset: int) -> tuple[bool, bytes]:
            over = not follow or folders.over(folder) or not folder.exists()  # before reading: nothing comes after it
            return over, folders.read_stream(folder, stream, offset)

        while True:
            over, chunk = await self._do("read the log", lambda offset=offset: look(offset))  # type: ignore[misc]
            if chunk:
                offset += len(chunk)
                yield chunk
            elif over:
                return
            else:
                await anyio.sleep(FOLLOW)

    async def fetch(self, handle: Handle, into: Path) -> Path:
        return self._folder(handle)

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        folder = folders.at(self.jobs_dir, token)
        await self._do("remove the job's files", lambda: folders.discard(folder, keep_logs=keep_logs))

    async def health(self) -> str | None:
        def look() -> str | None:
            if not os.access(self.jobs_dir, os.W_OK | os.X_OK):
                return f"the folder of its jobs cannot be written: {self.jobs_dir}"
            space = os.statvfs(self.jobs_dir)
            free = space.f_bavail * space.f_frsize
            return f"only {free >> 20} MiB are free in {self.jobs_dir}" if free < LITTLE_SPACE else None

        return await self._do("look at its folders", look)

    def _folder(self, handle: Handle) -> Path:
        if handle.get("v") != 1 or not isinstance(handle.get("token"), str):
            raise InvalidJob(f"no handle of a local job: {handle!r:.200}")
        return folders.at(self.jobs_dir, handle["token"])

    async def _do(self, what: str, function: Callable[[], T]) -> T:
        """In a thread; no foreign exception gets out."""
        try:
            return await anyio.to_thread.run_sync(function, limiter=self._threads)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise BackendUnavailable(f"cannot {what} on `{self.name}`: {error.strerror}{place}") from error
