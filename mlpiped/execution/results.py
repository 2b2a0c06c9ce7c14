"""What steps make: brought home, into the store, and to where it is published."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpiped.errors import StorageAway
from mlpiped.execution.job import outputs_of
from mlpiped.files.roots import passing
from mlpiped.publish import destination

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.backends.base import Backend, Handle
    from mlpiped.execution.attempt import Attempt
    from mlpiped.execution.facts import World
    from mlpiped.model import OutputFact
    from mlpiped.spec import PipelineSpec, StepSpec

Made = tuple[dict[str, "OutputFact"], "Path"]
"""(the outputs that stay where they were made, where the others lie at home)"""


class Changed(Exception):
    """An input is not what it was: the end of a sentence."""


async def fetch(world: World, backend: Backend, handle: Handle, step: StepSpec) -> Made:
    """Raises InvalidJob, BackendUnavailable."""
    into = world.store.incoming
    kept = await world.kept.take(backend, handle, step) if world.kept is not None else {}
    stays = len(kept) == len(step.outputs)
    return kept, into if stays else await backend.fetch(handle, into)


async def take(attempt: Attempt, made: Made | None) -> tuple[OutputFact, ...]:
    """Into the store, and published, if its inputs are what they were. May be repeated.

    Raises Changed, MlpipedError (StorageAway, BackendUnavailable: nobody can tell yet), OSError.
    """
    if made is None:
        await same_inputs(attempt)
        return ()
    (kept, folder), step, run = made, attempt.step, attempt.execution
    facts, store, index = run.facts, run.world.store, attempt.index
    outputs = [output for output in outputs_of(step) if output.name not in kept]
    taken = None
    with passing("its outputs cannot be kept"):
        if outputs:
            taken = await store.collect(folder, outputs, lambda: facts.known_unchanged(index, run.plan))
        if taken is None:
            await same_inputs(attempt)
            taken = await store.collect(folder, outputs) or [] if outputs else []
    await publish(run.world, run.graph.spec, step, run.id, taken)
    return tuple({**{fact.name: fact for fact in taken}, **kept}[output.name] for output in step.outputs)


async def same_inputs(attempt: Attempt) -> None:
    """Raises Changed, StorageAway."""
    changed = await attempt.execution.facts.changed_since(attempt.index, attempt.execution.plan)
    if changed is not None:
        raise Changed(changed)


async def publish(world: World, spec: PipelineSpec, step: StepSpec, run_id: int, outputs: Sequence[OutputFact]) -> None:
    """Put what a step made where it is published. Raises MlpipedError (StorageAway; BackendUnavailable: a machine that
    keeps it is away), OSError."""
    made = {fact.name: fact for fact in outputs}
    for output in step.outputs:
        if output.publish is not None:
            root, path = destination(output, spec, step, run_id, world.datastores)
            if world.kept is not None:
                await world.kept.bring_home(made[output.name])
            if away := await world.fingerprinter.hop(lambda root=str(root): world.fingerprinter.roots.away(root)):  # type: ignore[misc]
                raise StorageAway(f"output `{output.name}` cannot be published: {away}")
            with passing(f"output `{output.name}` cannot be published"):
                await world.store.publish(made[output.name], path, root=root)
