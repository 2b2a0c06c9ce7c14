"""A pipeline: steps, what starts it, and what a run may choose."""

from __future__ import annotations

from mlpiped.sdk import values
from mlpiped.sdk.data import PipelineParameter
from mlpiped.sdk.place import here
from mlpiped.sdk.steps import Step
from mlpiped.sdk.triggers import Trigger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal

_OVERLAP = ("queue", "skip", "parallel", "cancel_previous")


class Pipeline:
    """A graph of steps under a name. Every module-level `Pipeline` of a plugin is loaded.

    Steps that make data for the listed ones, or that these wait for, belong to it without being listed; so do
    the parameters that its steps and triggers use (`parameters=` adds others). `overlap` says what a start means
    while a run is under way: "queue" (at most one waits), "skip", "parallel" or "cancel_previous".
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        *,
        triggers: Sequence[Trigger] | Trigger = (),
        parameters: Sequence[PipelineParameter] = (),
        experiment: str | None = None,
        overlap: Literal["queue", "skip", "parallel", "cancel_previous"] = "queue",
        max_parallel: int | None = None,
        priority: int = 0,
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        where = self.where = here()
        self.name = values.name(name, "the name of a pipeline", where)
        self.steps: list[Step] = values.listed(steps, "steps", where)
        values.only(self.steps, Step, "steps", where, "it holds steps")
        self.triggers: list[Trigger] = values.listed(triggers, "triggers", where)
        values.only(self.triggers, Trigger, "triggers", where, "it holds `Cron`, `Every`, `OnArrival` or `OnSuccess`")
        self.parameters: list[PipelineParameter] = values.listed(parameters, "parameters", where)
        values.only(self.parameters, PipelineParameter, "parameters", where, "it holds `PipelineParameter`")
        self.experiment = self.name if experiment is None else values.name(experiment, "experiment", where)
        self.overlap = values.choice(overlap, _OVERLAP, "overlap", where)
        self.max_parallel = None if max_parallel is None else values.whole(max_parallel, "max_parallel", where, least=1)
        self.priority = values.whole(priority, "priority", where, least=-(10**9))
        self.description = values.text(description, "description", where, empty=True)
        self.tags = values.pairs(None if tags is None else dict(tags), "tags", where)

    def to_plain(self) -> dict[str, Any]:
        """What `spec.PipelineSpec.model_validate` accepts. Raises DefinitionError; its `more` has the other faults."""
        from mlpiped.sdk.lowering import lower

        plain, faults = lower(self)
        if faults:
            faults[0].more = tuple(faults[1:])
            raise faults[0]
        return plain

    def __repr__(self) -> str:
        return f"Pipeline({self.name!r})"
