"""A cluster whose files this machine does not see: what jobs need goes through its login node, and comes home from it.

`Records` is asked there, by a program of ours that lies in the work folder under the digest of what it is. A call whose
answer was lost is made again.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Exited
from mlpiped.backends.environments import clean
from mlpiped.backends.slurm import apptainer, commands, tools
from mlpiped.backends.slurm.asking import Asking
from mlpiped.backends.slurm.backend import PATIENCE, SlurmBackend
from mlpiped.backends.slurm.files import Fault, Files, described, order_of
from mlpiped.backends.slurm.runner import attempt
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AsyncExitStack

    from mlpiped.backends.base import Handle, Job, NeverRan, Outcome
    from mlpiped.backends.slurm.runner import Runner
    from mlpiped.config.computes import SlurmCompute

SMALL_FILES = ("stdout", "stderr", "metrics.jsonl")
INSTALL = """\
import io, os, shutil, sys, zipfile
home = sys.argv[1]
if not os.path.isdir(home):
    draft = home + "." + sys.argv[2]
    os.makedirs(draft)
    zipfile.ZipFile(io.BytesIO(sys.stdin.buffer.read())).extractall(draft)
    try:
        os.rename(draft, home)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not os.path.isdir(home):
            raise
"""
ASK = "import sys; sys.path.insert(0, sys.argv[1]); from mlpiped.backends.slurm.there import main; main()"
LOGIN = ("SSH_", "OLDPWD")  # of a login alone


class Placed(Protocol):
    """Where things lie on the cluster, for one job."""

    inputs: Mapping[str, Sequence[str]]
    needed: Sequence[str]
    uses: Sequence[str]
    code: str | None
    sdk: str | None
    bins: Sequence[str]
    env: Mapping[str, str]
    root: str


class Stage(Protocol):
    """Who brings content there and home. What waits raises BackendUnavailable."""

    root: str

    async def python(self) -> str: ...
    async def place(self, job: Job) -> Any:
        """Bring what is missing; a `Placed`. Raises InvalidJob too."""

    async def content(self, token: str, content: str, path: str) -> str | None:
        """Where this file of ours lies there; None: it has changed. After `place`; raises InvalidJob too."""

    def placed(self, token: str) -> None:
        """Nothing has to stay any more for this job that it does not name itself."""

    async def prune(self, *, only_look: bool) -> tuple[int, int]: ...
    def forget(self) -> None: ...
    async def bring(self, token: str, what: str, folder: Path, names: Sequence[str]) -> None: ...
    async def discard(self, token: str) -> None: ...
    def missing(self, contents: Mapping[str, int]) -> int: ...
    def doing(self, token: str) -> str | None: ...
    async def close(self) -> None: ...


class StagedFiles(Files):
    logs_here = False
    follow = 1.0

    def __init__(self, name: str, state_dir: Path, compute: SlurmCompute, runner: Runner, stage: Stage) -> None:
        self.name = name
        self.compute = compute
        self.stage = stage
        self._runner = runner
        self.place = stage.root
        self._jobs = f"{stage.root}/jobs"
        self._home = state_dir.absolute() / "jobs"
        digest, self._shipped = tools.program()
        self._tools = f"{stage.root}/slurm/{digest}"
        self._python = ""
        self._environ: dict[str, str] | None = None  # None: it is not known whether our program is there
        self._asking = Asking(self._send)
        self._preparing = anyio.Lock()
        self._bringing: dict[str, anyio.Lock] = {}

    async def start(self) -> None:
        """A login node that is away keeps nobody from starting."""
        await _here(lambda: folders.prepare(self._home))

    def folder(self, token: str) -> str:
        return folders.at(self._jobs, token)

    # --- asked there ------------------------------------------------------------------------------------------
    async def call(self, what: str, name: str, *facts: Any) -> Any:
        await self._prepared()
        return self._answer(what, await self._asking.ask(name, facts))

    async def _prepared(self) -> dict[str, str]:
        """Our program is there, and the folder of the jobs; what a login finds around it."""
        async with self._preparing:
            if self._environ is None:
                self._python = await self.stage.python()
                if not self._python:
                    raise BackendUnavailable(f"there is no python on the login node of `{self.name}`")
                words = ["env", self._python, "-I", "-S", "-c", INSTALL, self._tools, secrets.token_hex(6)]
                code, _, stderr = await attempt(self._runner, words, self._shipped)
                if code != 0:
                    raise self._failed("install its tools", stderr)
                said = await self._send([{"name": name, "facts": []} for name in ("prepare", "environment")])
                self._answer("make its folders", said[0])
                found = clean(self._answer("look around", said[1]))
                self._environ = {name: text for name, text in found.items() if not name.startswith(LOGIN)}
            return self._environ

    async def _send(self, calls: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        request = json.dumps({"root": self.stage.root, "calls": calls}).encode()
        words = ["env", self._python, "-I", "-S", "-c", ASK, self._tools]
        code, stdout, stderr = await attempt(self._runner, words, request)
        try:
            said = json.loads(stdout) if code == 0 else None
        except ValueError:
            said = None
        if not isinstance(said, list) or len(said) != len(calls):
            self._environ = None
            raise self._failed("look at its folders", stderr)
        return said

    def _answer(self, what: str, said: Mapping[str, Any]) -> Any:
        if "answer" in said:
            return said["answer"]
        if "unavailable" in said:
            raise BackendUnavailable(said["unavailable"])
        raise self._failed(what, f"{said.get('error')}: {said.get('file')}")

    def _failed(self, what: str, words: str) -> BackendUnavailable:
        return BackendUnavailable(f"cannot {what} on `{self.name}`: {commands.complaint(words)}")

    # --- the job's files --------------------------------------------------------------------------------------
    def at_once(self, job: Job) -> bool:
        return False

    async def ready(self, job: Job) -> tuple[dict[str, Any], dict[str, Any], list[str], list[str]]:
        """What it needs is there; what `Records.build` is told of it."""
        environ, folder = await self._prepared(), self.folder(job.token)
        await self._home_of(job.token)
        placed: Placed = await self.stage.place(job)
        code = None if placed.code is None else f"{placed.root}/{placed.code}"
        needed, uses, image = list(placed.needed), list(placed.uses), None
        if job.image is not None:
            content, sif = await self._image(job)
            needed, uses, image = [*needed, sif], [*uses, content], f"-:{content}:{sif}"
        inputs = {port: tuple(paths) for port, paths in placed.inputs.items()}
        there = replace(job, inputs=inputs, code=code, image=image)
        path = [*placed.bins, environ.get("PATH", os.defpath)]
        own = {"PATH": ":".join(path), "PYTHONPATH": placed.sdk or "", "PYTHONUNBUFFERED": "1"}
        order = order_of(there, folder, {**environ, **placed.env, **own}, self._tools, self.compute)
        return described(there), order, needed, uses

    async def fence(self, token: str) -> NeverRan | Handle:
        await self._home_of(token)
        return await super().fence(token)

    async def _home_of(self, token: str) -> Path:
        """Its folder here, from before there is one there: what has none here is not found again by who cleans up."""
        folder = Path(folders.at(self._home, token))
        await _here(lambda: folder.mkdir(exist_ok=True))
        return folder

    async def _image(self, job: Job) -> tuple[str, str]:
        """(its content, where it lies there)"""
        assert job.image is not None
        _, content, path = apptainer.parts(job.image)
        there = await self.stage.content(job.token, content, path)
        if there is None:
            raise InvalidJob(f"image {path} has changed since the run looked at it: what it is now is for the next run")
        return content, there

    async def build(self, jobs: Sequence[Job], ready: Sequence[Any]) -> dict[str, Fault]:
        for _ in range(3):
            described, orders, needed, uses = zip(*ready, strict=True)
            wanted = list(dict.fromkeys(path for paths in needed for path in paths))
            if not await self.call("write the jobs' orders", "build", described, orders, wanted, uses):
                return {}
            self.stage.forget()
            ready = [await self.ready(job) for job in jobs]
        raise BackendUnavailable(f"`{self.name}` loses what is sent to it")

    def left(self, token: str) -> None:
        self.stage.placed(token)

    def script(self, token: str) -> bytes:
        return tools.script(self.place, token, self._tools, self._python)

    async def ended(self, token: str, outcome: Outcome) -> None:
        """What it has printed and measured, and then its exit.json."""
        if not isinstance(outcome, Exited):
            return
        folder = await self._home_of(token)
        async with self._bringing.setdefault(token, anyio.Lock()):
            if not await _here((folder / "exit.json").exists):
                await self.stage.bring(token, "its log", folder, SMALL_FILES)
                await _here(lambda: _testify(folder, outcome))
        self._bringing.pop(token, None)

    async def fetch(self, token: str) -> Path:
        folder = Path(folders.at(self._home, token))
        if not await _here((folder / "out").exists):
            await self.stage.bring(token, "its outputs", folder, ["out"])
        return folder

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        folder = folders.at(self._home, token)
        await _here(lambda: folders.discard(folder, keep_logs=keep_logs, keep_metrics=True))
        await self.stage.discard(token)
        trouble = await self.call("remove the job's files", "discard", token, keep_logs)
        if trouble is not None:
            raise BackendUnavailable(f"files of ended jobs cannot be removed on `{self.name}`: {trouble}")

    def missing(self, contents: Mapping[str, int]) -> int:
        return self.stage.missing(contents)

    def doing(self, token: str) -> str | None:
        return self.stage.doing(token)


class StagedSlurmBackend(SlurmBackend):
    def __init__(
        self,
        name: str,
        state_dir: Path,
        compute: SlurmCompute,
        *,
        instance: str,
        runner: Runner,
        stage: Stage,
        patience: float = PATIENCE,
    ) -> None:
        self._stage = stage
        files = StagedFiles(name, state_dir, compute, runner, stage)
        super().__init__(name, state_dir, compute, instance=instance, runner=runner, files=files, patience=patience)

    async def start(self, stack: AsyncExitStack) -> None:
        stack.push_async_callback(self._stage.close)
        await super().start(stack)

    async def measured(self, handle: Handle, offset: int) -> AsyncIterator[bytes]:
        while chunk := (await self._files.read(self._of(handle)[0], "metrics.jsonl", offset))[1]:
            offset += len(chunk)
            yield chunk

    async def prune(self, *, only_look: bool) -> tuple[int, int]:
        return await self._stage.prune(only_look=only_look)


async def _here(function: Callable[[], Any]) -> Any:
    try:
        return await anyio.to_thread.run_sync(function)
    except OSError as error:
        raise BackendUnavailable(f"cannot keep what comes home: {error.strerror}: {error.filename}") from error


def _testify(folder: Path, outcome: Exited) -> None:
    draft = folder / f".exit.{secrets.token_hex(6)}"
    draft.write_text(json.dumps({"v": 1, **asdict(outcome)}))
    draft.rename(folder / "exit.json")
