"""What a step needs of a compute, and how much of it would have to travel to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpiped.execution.kept import digest_for, is_home
from mlpiped.placement.decide import Need
from mlpiped.spec import Upstream, is_sif, runs_in_container

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.backends.base import Backend
    from mlpiped.execution.facts import StepFacts
    from mlpiped.resolve import Graph, Plan


def need_of(graph: Graph, index: int, run: int, owner: str) -> Need:
    step = graph.steps[index]
    r = step.resources
    return Need(
        run,
        index,
        graph.spec.priority + step.priority,
        r.slots,
        r.cpus * r.tasks,
        r.memory,
        step.compute,
        gpus=r.gpus,
        gpu_memory=r.gpu_memory,
        owner=owner,
        images=runs_in_container(step) and not is_sif(step),
        sif=is_sif(step),
        nodes=r.nodes,
        cluster=r.cluster,
        modules=bool(step.environment.modules),
    )


def bytes_to_travel(plan: Plan, index: int, facts: StepFacts, backends: Mapping[str, Backend]) -> dict[str, int]:
    """Compute -> bytes of the step's inputs that it lacks; none of one that lacks nothing."""
    contents: dict[str, int] = {}
    away: dict[str, int] = {}  # compute -> bytes that it alone has
    for port in plan.graph.steps[index].inputs:
        if isinstance(port.source, Upstream):
            made = (plan.outputs[plan.graph.index[port.source.step]] or {})[port.source.output]
            if made.compute is not None and not is_home(made):
                away[made.compute] = away.get(made.compute, 0) + made.size
            elif made.compute is None:
                contents[made.digest] = made.size
            else:
                contents[digest_for(made, "")] = made.size
            continue
        outside = facts.outside[port.name]
        if port.source.glob and outside.entries:  # what each file has is not kept, only all of them together
            contents.update(dict.fromkeys(outside.entries.values(), outside.size // len(outside.entries)))
        else:
            contents[outside.digest] = outside.size
    if not contents and not away:
        return {}
    lacking = {name: backend.missing(contents) if contents else 0 for name, backend in backends.items()}
    for name in lacking:
        lacking[name] += sum(size for compute, size in away.items() if compute != name)
    return {name: n for name, n in lacking.items() if n}
