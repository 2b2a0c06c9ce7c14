"""What people make the daemon do, by name or by file: the scheduler's acts with a plugin found or loaded first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpiped import inquiry
from mlpiped.errors import MlpipedError, PluginError, UsageError
from mlpiped.scheduling.scheduler import parameters_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from mlpiped.loader import LoadResult, Registry
    from mlpiped.protocol import ActiveJson, ComputeJson
    from mlpiped.scheduling.scheduler import Scheduler
    from mlpiped.spec import PipelineSpec


class Actions:
    """The `Actions` of `control/service.py`. `load_file` imports a plugin in a child, `reread` checks the config."""

    def __init__(
        self,
        scheduler: Scheduler,
        registry: Registry,
        load_file: Callable[[Path], Awaitable[LoadResult]],
        reread: Callable[[], str],
        drain: Callable[[str, bool, str], Awaitable[None]],
        look_again: Callable[[], None],
    ) -> None:
        self.scheduler = scheduler
        self.registry = registry
        self.load_file = load_file
        self.reread = reread
        self.start = scheduler.start
        self.cancel = scheduler.cancel
        self.retry = scheduler.retry
        self.pause = scheduler.pause
        self.resume = scheduler.resume
        self._drain = drain
        self._look_again = look_again

    async def drain(self, compute: str, drained: bool, who: str) -> None:
        """Nothing new starts there, or it does again. Raises UnknownName."""
        await self._drain(compute, drained, who)

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
        """Run the one pipeline of a file that is not installed. Raises PluginError with its faults."""
        spec = await self._from_file(file)
        return await self.scheduler.submit(spec, parameters=parameters, force=force, target=target, tags=tags, who=who)

    async def plan(
        self, pipeline_or_file: str, *, parameters: dict[str, Any], force: bool | list[str], target: str | None
    ) -> dict[str, Any]:
        """See `inquiry.plan`. What has a `/` in it is a plugin file."""
        if "/" in pipeline_or_file:
            spec = await self._from_file(pipeline_or_file)
        else:
            spec = self.scheduler.loaded(pipeline_or_file).spec
        values = parameters_for(spec, parameters)
        never = self.scheduler.dispatch.never
        return await inquiry.plan(self.scheduler.world, spec, values, force, target, never)

    async def _from_file(self, file: str) -> PipelineSpec:
        result = await self.load_file(Path(file))
        if result.faults:
            raise PluginError(result.faults)
        if len(result.pipelines) != 1:
            names = ", ".join(f"`{spec.name}`" for spec in result.pipelines) or "none"
            raise UsageError(f"`{file}` must have one pipeline: {names}", hint="put each in a file of its own")
        return result.pipelines[0]

    async def reload(self, who: str) -> dict[str, Any]:
        """Read the plugins again, now, check the config, and look at the computes."""
        try:
            config = self.reread()
        except MlpipedError as fault:
            config = f"refused: {fault.message}"
        self._look_again()
        await self.registry.reload()
        broken = [fault for each in self.registry.broken() for fault in each.faults]
        return {
            "pipelines": len(self.registry.all()),
            "broken": [{"file": f.file, "line": f.line, "message": f.message, "hint": f.hint} for f in broken],
            "config": config,
        }

    async def why_waiting(self, run_id: int, step: str) -> str | None:
        return inquiry.why_waiting(self.scheduler, run_id, step)

    def stuck(self) -> Sequence[tuple[str, str]]:
        return inquiry.stuck(self.scheduler)

    def active(self) -> Sequence[ActiveJson]:
        return inquiry.active(self.scheduler.dispatch)

    def compute(self) -> Sequence[ComputeJson]:
        return inquiry.compute(self.scheduler.dispatch, self.scheduler.backends)
