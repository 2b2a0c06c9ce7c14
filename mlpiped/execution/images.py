"""Which image a step in a container runs: asked of the engines once a run, and kept for all of it.

A tag that moves meanwhile moves the next run, not this one: not its retries either, nor what a restarted daemon goes on
with (`recall`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import anyio

from mlpiped.backends.base import Image
from mlpiped.errors import BackendUnavailable, InvalidJob
from mlpiped.spec import runs_in_container

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from anyio.abc import TaskGroup

    from mlpiped.backends.base import Backend
    from mlpiped.backends.base import Images as Engine
    from mlpiped.clock import Clock
    from mlpiped.spec import StepSpec

    Find = Callable[["Wanted"], Awaitable[Image]]
    """Raises InvalidJob (there is no such image: in the engine's words), BackendUnavailable (nobody can tell now)."""


FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries to reach an engine


class Wanted(NamedTuple):
    """What a step says of its image, and where it may run: names of computes and pools, none for any."""

    reference: str | None
    dockerfile: str | None
    computes: tuple[str, ...]

    def label(self) -> str:
        return f"image `{self.reference}`" if self.reference is not None else "the image of its Dockerfile"


def wanted_by(step: StepSpec) -> Wanted | None:
    """None for a step that does not run in a container."""
    if not runs_in_container(step):
        return None
    return Wanted(step.environment.image, step.environment.dockerfile, step.compute)


class RunImages:
    """The images of one run, as far as they are known."""

    def __init__(self, find: Find | None) -> None:
        self._find = find
        self._known: dict[Wanted, Image] = {}
        self._faults: dict[Wanted, str] = {}
        self._troubles: dict[Wanted, str] = {}  # why it is not known yet

    def of(self, wanted: Wanted) -> Image | None:
        """None: not known yet (see `why_not`). Raises InvalidJob."""
        if wanted in self._faults:
            raise InvalidJob(self._faults[wanted])
        return self._known.get(wanted)

    def why_not(self, wanted: Wanted) -> str:
        return self._troubles.get(wanted) or f"{wanted.label()} is looked up"

    async def look_up(self, wanted: Wanted) -> None:
        """Until it is known what `wanted` is, or that it is nothing. Raises BackendUnavailable."""
        if wanted in self._known or wanted in self._faults:
            return
        try:
            if self._find is None:
                raise InvalidJob("no compute of the config runs containers")
            self._known[wanted] = await self._find(wanted)
        except InvalidJob as fault:
            words = fault.message if fault.hint is None else f"{fault.message}; {fault.hint}"
            self._faults[wanted] = f"{wanted.label()}: {words}"
        except BackendUnavailable as fault:
            self._troubles[wanted] = f"{wanted.label()}: {fault.message}"
            raise

    def recall(self, wanted: Wanted, parts: Mapping[str, Any]) -> Image | None:
        """What an attempt of this run was given, by the parts of its key."""
        identity, kept = parts.get("environment", {}).get("image"), parts.get("image")
        if identity is None or kept is None:
            return None
        return self._known.setdefault(wanted, Image(identity, kept["run"]))


class Lookups:
    """What goes on beside a run's driver: one look-up for all steps that want the same image.

    `hold(steps, why)` is told why they wait, and with None that they can be decided again.
    """

    def __init__(self, images: RunImages, clock: Clock, hold: Callable[[Iterable[int], str | None], None]) -> None:
        self._images = images
        self._clock = clock
        self._hold = hold
        self._going: dict[Wanted, tuple[anyio.CancelScope, set[int]]] = {}

    def begin(self, tasks: TaskGroup | None, index: int, step: StepSpec, why: str) -> None:
        wanted = wanted_by(step)
        assert tasks is not None and wanted is not None
        if wanted not in self._going:
            self._going[wanted] = (anyio.CancelScope(), set())
            tasks.start_soon(self._until_known, wanted, name=wanted.label())
        self._going[wanted][1].add(index)
        self._hold([index], why)

    async def _until_known(self, wanted: Wanted) -> None:
        """Known, or known not to be; engines that do not answer are asked again."""
        scope, waiting = self._going[wanted]
        pause = FIRST_PAUSE
        with scope:
            while True:
                try:
                    await self._images.look_up(wanted)
                    break
                except BackendUnavailable:
                    self._hold(waiting, self._images.why_not(wanted))
                await self._clock.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
        del self._going[wanted]
        self._hold(waiting, None)

    def stop(self) -> None:
        """Nobody waits any more: a pull that goes on would keep the run from ending."""
        for scope, _ in self._going.values():
            scope.cancel()


class Finder:
    """The `Find` of a daemon. `pools`: name -> names of computes."""

    def __init__(self, backends: Mapping[str, Backend], pools: Mapping[str, Sequence[str]]) -> None:
        self._backends = backends
        self._pools = pools

    async def __call__(self, wanted: Wanted) -> Image:
        """By the first engine, in the step's order of preference, that can tell."""
        named = [n for name in wanted.computes for n in self._pools.get(name, (name,))]
        names = [n for n in dict.fromkeys(named or self._backends) if n in self._backends]
        file = (wanted.reference or "").endswith(".sif")
        offers = {name: self._backends[name].capacity() for name in names}
        engines = [self._backends[name] for name in names if (offers[name].sifs if file else offers[name].images)]
        if not engines:
            where = " and ".join(f"`{name}`" for name in wanted.computes) or "the config"
            raise InvalidJob(f"no compute of {where} runs {'images that are files' if file else 'containers'}")
        away: list[str] = []
        absent: list[InvalidJob] = []
        for backend in engines:
            try:
                return await cast("Engine", backend).image(wanted.reference, wanted.dockerfile)
            except BackendUnavailable as fault:
                away.append(f"{backend.name}: {fault.message}")
            except InvalidJob as fault:
                absent.append(fault)
        if away:  # one of these may have it
            raise BackendUnavailable("; ".join(away))
        raise absent[0]
