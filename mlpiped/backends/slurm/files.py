"""How the daemon gets at the folders of a cluster's jobs: what it needs of them, and the way where it sees them itself.

The backend knows no path of its own: whoever builds it may hand in `Files` that lie where only the cluster sees them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
import anyio.to_thread

from mlpiped.backends import folder as folders
from mlpiped.backends.base import Exited, NeverRan
from mlpiped.backends.environments import Environments
from mlpiped.backends.slurm import commands, surroundings, tools
from mlpiped.backends.slurm.records import Records
from mlpiped.backends.slurm.submission import Look
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mlpiped.backends.base import Handle, Job, Outcome
    from mlpiped.backends.slurm.commands import Ref
    from mlpiped.config.computes import SlurmCompute

T = TypeVar("T")
Fault = BackendUnavailable | InvalidJob
Phase = Literal["waits", "started", "over"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What the folder of a token says of its submission. `record`: of slurm.json; `over`: it has ended, or cannot
    start on a node."""

    record: dict[str, Any] | None
    built: bool
    fenced: bool
    over: bool


class Files(ABC):
    """All that waits raises BackendUnavailable when it is not known whether it was done, or how it is."""

    logs_here: bool
    place: str
    """As the nodes see it: where the folders `jobs` and `slurm` are."""
    follow: float
    """Seconds between two looks at a log that is followed."""

    # --- where they lie decides -------------------------------------------------------------------------------
    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    def folder(self, token: str) -> str:
        """As the nodes see it. Raises InvalidJob for what is no token."""

    @abstractmethod
    def at_once(self, job: Job) -> bool:
        """Whether `ready` has nothing to wait for."""

    @abstractmethod
    async def ready(self, job: Job) -> Any:
        """All that may take long; what `build` then has use for. Raises InvalidJob."""

    @abstractmethod
    async def build(self, jobs: Sequence[Job], ready: Sequence[Any]) -> dict[str, Fault]:
        """Write their orders, and make what else they need; by token, what cannot be run."""

    @abstractmethod
    def script(self, token: str) -> bytes:
        """What is to be submitted, for one job."""

    @abstractmethod
    async def fetch(self, token: str) -> Path: ...

    @abstractmethod
    async def discard(self, token: str, *, keep_logs: bool) -> None: ...

    @abstractmethod
    async def call(self, what: str, name: str, *facts: Any) -> Any:
        """What that method of `Records` answers. `what`: for a complaint, "cannot …"."""

    def left(self, token: str) -> None:  # noqa: B027
        """Nobody submits it any more: what was made `ready` for it, and not built, is of no use."""

    async def ended(self, token: str, outcome: Outcome) -> None:  # noqa: B027
        """It has ended so: bring home what the daemon wants to have of it."""

    def missing(self, contents: Mapping[str, int]) -> int:
        """As `Backend.missing`."""
        return 0

    def doing(self, token: str) -> str | None:
        """As `Backend.doing`, of what is done to the job's files."""
        return None

    async def health(self) -> str | None:
        found: str | None = await self.call("look at its folders", "health")
        return found

    # --- the same everywhere ----------------------------------------------------------------------------------
    async def standing(self, tokens: Sequence[str]) -> dict[str, Standing]:
        found = await self.call("look for jobs", "standing", list(tokens))
        return {token: Standing(**one) for token, one in found.items()}

    async def enlist(self, array: str | None, tokens: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The records of those that have been submitted, or fenced. When there are none, these are the elements of
        the new `array`, durable at the return."""
        found: dict[str, dict[str, Any]] = await self.call("look for jobs", "enlist", array, list(tokens))
        return found

    async def settle(self, records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Make these, by token, the records of the submissions, unless there are others; those that stand, durable."""
        found: dict[str, dict[str, Any]] = await self.call("record the jobs", "settle", dict(records))
        return found

    async def adopt(self, token: str, job: Ref, array: str | None) -> dict[str, Any] | None:
        """The same of a job that is in the queue. None: it has no order to carry out, and must not be released."""
        found: dict[str, Any] | None = await self.call("record the jobs", "adopt", token, job, array)
        return found

    async def released(self, tokens: Sequence[str]) -> None:
        """Remember that they were released."""
        await self.call("record the jobs", "released", list(tokens))

    async def fence(self, token: str) -> NeverRan | Handle:
        """No submission counts from now on, and nothing starts on a node; or the handle of the one that came first."""
        found: Handle | None = await self.call("fence the job", "fence", token)
        return NeverRan("its token was fenced before it started") if found is None else found

    async def bar(self, token: str) -> None:
        """Nothing starts on a node, unless it has."""
        await self.call("fence the job", "bar", token)

    async def drop(self, token: str) -> None:
        """Remember that we take it out of the queue."""
        await self.call("record the job", "drop", token)

    async def look(self, token: str) -> Look:
        found = await self.call("look at the job", "look", token)
        said = found["witness"]
        return Look(**{**found, "witness": None if said is None else Exited(**said)})

    async def cancelling(self, token: str) -> Phase:
        """Remember that we end it; one that has not started never will. How far it is."""
        found: Phase = await self.call("cancel the job", "cancelling", token)
        return found

    async def from_start(self, token: str, stream: str, offset: int) -> int:
        """A negative offset as one from the start."""
        found: int = await self.call("read the log", "from_start", token, stream, offset)
        return found

    async def read(self, token: str, stream: str, offset: int) -> tuple[bool, bytes]:
        """(whether nothing is printed any more, some bytes from `offset` on): asked in this order."""
        over, text = await self.call("read the log", "read", token, stream, offset)
        return over, text.encode("latin-1")

    async def arrays(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """The elements of those arrays that are known here."""
        found: dict[str, list[str]] = await self.call("look for jobs", "arrays", list(ids))
        return found


class SharedFiles(Files):
    """The `work_dir` is seen here and on the nodes at the same path; logs are found from the state folder too."""

    logs_here = True  # by a link, where `work_dir` is set
    follow = 0.2

    def __init__(self, name: str, state_dir: Path, compute: SlurmCompute, python: str) -> None:
        self.name = name
        self.compute = compute
        self.root = (compute.work_dir or state_dir).absolute()
        self.place = os.fspath(self.root)
        self._records = Records(self.place)
        self._home = state_dir.absolute() / "jobs"  # where the daemon looks for logs
        self._python = python
        self._environments = Environments(self.root / "envs", python)
        self._tools = ""
        self._trouble: str | None = None
        self._threads = anyio.CapacityLimiter(4)

    async def start(self) -> None:
        def make() -> None:
            self._records.prepare()
            self._environments.prepare()
            self._tools = tools.install(self.root)
            self._home.mkdir(parents=True, exist_ok=True)

        await self._do("make its folders", make)

    def folder(self, token: str) -> str:
        return self._records.at(token)

    def at_once(self, job: Job) -> bool:
        return not Environments.wanted(job)

    async def ready(self, job: Job) -> dict[str, str]:
        """The environment."""
        return await self._environments.of(job)

    async def build(self, jobs: Sequence[Job], ready: Sequence[dict[str, str]]) -> dict[str, Fault]:
        wrong: dict[str, Fault] = {}

        def make() -> None:
            orders: dict[str, dict[str, Any]] = {}
            for job, base in zip(jobs, ready, strict=True):
                try:
                    if job.code is not None and not os.path.isdir(job.code):
                        raise BackendUnavailable(f"the code snapshot is missing: {job.code}")
                    orders[job.token] = order_of(job, self.folder(job.token), base, self._tools, self.compute)
                except (BackendUnavailable, InvalidJob) as fault:
                    wrong[job.token] = fault
            self._records.build([described(job) for job in jobs if job.token in orders], list(orders.values()))
            for token in orders:
                self._link(token)

        await self._do("write the job's order", make)
        return wrong

    async def fence(self, token: str) -> NeverRan | Handle:
        await self._do("fence the job", lambda: self._link(token))
        return await super().fence(token)

    def _link(self, token: str) -> None:
        """What has no folder here is not found again by who cleans up."""
        link = self._home / token
        if os.fspath(self._home) != self._records.jobs and not os.path.lexists(link):
            link.symlink_to(self.folder(token))

    def script(self, token: str) -> bytes:
        return tools.script(self.place, token, self._tools, self._python)

    async def fetch(self, token: str) -> Path:
        return Path(self.folder(token))

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        def remove() -> None:
            os.stat(self._records.jobs)  # what is not mounted now has nothing to remove, and is not done with
            trouble = self._records.discard(token, keep_logs, keep_metrics=True)
            self._trouble = trouble and f"files of ended jobs cannot be removed: {trouble}"
            link = self._home / token
            if not keep_logs and link.is_symlink() and not link.exists():
                link.unlink()

        await self._do("remove the job's files", remove)

    async def health(self) -> str | None:
        return await super().health() or self._trouble

    async def call(self, what: str, name: str, *facts: Any) -> Any:
        return await self._do(what, lambda: getattr(self._records, name)(*facts))

    async def _do(self, what: str, function: Callable[[], T]) -> T:
        """In a thread; no foreign exception gets out."""
        try:
            return await anyio.to_thread.run_sync(function, limiter=self._threads)
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise BackendUnavailable(f"cannot {what} on `{self.name}`: {error.strerror}{place}") from error


def order_of(job: Job, folder: str, base: Mapping[str, str], home: str, compute: SlurmCompute) -> dict[str, Any]:
    """What the supervisor executes, for a job whose paths are those of the nodes. `home`: of the tools."""
    env = {**base, "SRUN_CPUS_PER_TASK": str(commands.cpus_of(job)), **folders.variables(folder, job)}
    for name in ("PATH", "PYTHONPATH"):  # the step's own come first; the environment's stay reachable
        if name in job.env:
            env[name] = f"{job.env[name]}:{base[name]}"
    order = folders.order(job.argv(folders.output_paths(folder, job)), env, job)
    order = surroundings.around(order, job, folder, home, compute)
    return {**order, "inherit": list(tools.INHERITED)}


def described(job: Job) -> dict[str, Any]:
    """For `Records.build`."""
    outputs = [asdict(output) for output in job.outputs]
    return {"token": job.token, "outputs": outputs, "parameters": dict(job.parameters), "code": job.code}
