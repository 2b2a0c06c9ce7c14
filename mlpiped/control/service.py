"""What the handlers need of the rest of the house, and nothing else of it. `daemon.py` fills it in."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio

from mlpiped.control.views import Lookup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from mlpiped.clock import Clock
    from mlpiped.control.access import Access
    from mlpiped.errors import Fault
    from mlpiped.ledger.store import Ledger
    from mlpiped.model import OutputFact
    from mlpiped.protocol import ActiveJson, ComputeJson
    from mlpiped.spec import PipelineSpec
    from mlpiped.triggers.schedule import ScheduleView


class Actions(Protocol):
    """What the scheduler does when a person asks. Each raises MlpipedError with the sentence for that person."""

    async def start(
        self,
        pipeline: str,
        *,
        parameters: dict[str, Any],
        force: bool | list[str],
        target: str | None,
        tags: dict[str, str],
        kind: Literal["manual", "api"],
        who: str,
        idempotency_key: str | None,
    ) -> tuple[int, bool]:
        """(run id, whether it was made now)."""
        ...

    async def submit(
        self,
        file: str,
        *,
        parameters: dict[str, Any],
        force: bool | list[str],
        target: str | None,
        tags: dict[str, str],
        who: str,
    ) -> int:
        """Parameters may be `{"text": …}`: give them to `protocol.typed_parameters` when the file is loaded."""
        ...

    async def plan(
        self, pipeline_or_file: str, *, parameters: dict[str, Any], force: bool | list[str], target: str | None
    ) -> dict[str, Any]:
        """{"pipeline", "version", "steps": [{"name", "action", "why", "seconds"}], "seconds"}; `action` is one of
        run, reuse, skip, unknown. A path (it has a `/` in it) is a plugin file; see `submit` for its parameters."""
        ...

    async def cancel(self, run_id: int, step: str | None, who: str) -> None: ...
    async def retry(self, run_id: int, who: str) -> int: ...
    async def pause(self, pipeline: str, who: str) -> None: ...
    async def resume(self, pipeline: str, who: str) -> None: ...
    async def drain(self, compute: str, drained: bool, who: str) -> None: ...
    async def reload(self, who: str) -> dict[str, Any]: ...

    async def why_waiting(self, run_id: int, step: str) -> str | None:
        """The sentence, in the present tense, for a step that has not finished; None when there is none."""
        ...

    def stuck(self) -> Sequence[tuple[str, str]]:
        """What does not go on by itself, and what to do: two sentences each."""
        ...

    def active(self) -> Sequence[ActiveJson]: ...
    def compute(self) -> Sequence[ComputeJson]: ...


class Live(Protocol):
    """Logs and metrics that are elsewhere while their steps run."""

    def far(self, compute: str) -> bool: ...

    async def bring(self, token: str) -> str | None:
        """All that is not here yet into the job folder; why not all of it could be had, as a sentence."""

    async def measured(self, token: str) -> str | None:
        """The same of its metrics."""


class LoadedPipeline(Protocol):
    @property
    def spec(self) -> PipelineSpec: ...
    @property
    def version(self) -> str: ...


class BrokenPlugin(Protocol):
    @property
    def faults(self) -> Sequence[Fault]: ...


class Registry(Protocol):
    """The plugins that are loaded."""

    def get(self, name: str) -> LoadedPipeline | None: ...
    def all(self) -> Iterable[LoadedPipeline]: ...
    def broken(self) -> Iterable[BrokenPlugin]: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What `doctor` says of one thing."""

    name: str
    level: Literal["ok", "warn", "fail"]
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class About:
    """The daemon itself. `started_at` in microseconds."""

    version: str
    pid: int
    started_at: int
    state_dir: Path
    socket: Path | None = None
    plugins: tuple[Path, ...] = ()
    datastores: Mapping[str, Path] = field(default_factory=dict)
    sqlite: tuple[int, ...] = ()  # version of the library that the ledger uses
    python: str = sys.executable  # the interpreter of steps
    watch: Mapping[str, str] = field(default_factory=dict)  # datastore -> auto, inotify or poll


@dataclass(slots=True)
class Service:
    """All of it. `job_folder` gives the folder that holds stdout, stderr and metrics.jsonl of an attempt's token;
    `gc` removes what is old, `gc_plan` says what that would be: {"parts": [{"what", "count", "bytes", "seconds"}],
    "bytes", "seconds", "faults"}, and of the plan "artifacts": [{"digest", "kind", "size", "path", "used_at" (µs),
    "seconds", "why"}], those that took longest to make first; `seconds` is what it took."""

    access: Access
    ledger: Ledger
    registry: Registry
    actions: Actions
    schedules: Callable[[], Iterable[ScheduleView]]  # Clockwork.next_fires and Arrivals.status together
    clock: Clock
    about: About
    job_folder: Callable[[str], Path]
    gc_plan: Callable[[], Awaitable[dict[str, Any]]]
    gc: Callable[[], Awaitable[dict[str, Any]]]
    live: Live | None = None  # None: nothing is elsewhere
    ledger_faults: Callable[[], Awaitable[Sequence[str]]] | None = None  # PRAGMA integrity_check: [] when it is well
    orphans: Callable[[], Awaitable[Mapping[str, Sequence[int]]]] | None = None  # token -> pids that nobody waits for
    healths: Callable[[], Awaitable[Mapping[str, str | None]]] | None = None  # of each compute, asked now
    loop_lag: Callable[[], float] = lambda: 0.0  # seconds
    bring_home: Callable[[OutputFact], Awaitable[None]] | None = None  # what a compute keeps: Conflict if it is gone
    closing: anyio.Event = field(default_factory=anyio.Event)
    lookup: Lookup = field(init=False)
    failures: dict[int, dict[str, Any]] = field(default_factory=dict)  # how runs failed: what has ended never changes

    def __post_init__(self) -> None:
        self.lookup = Lookup(self.ledger, self.registry)
