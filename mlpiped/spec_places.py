"""Whether a step can run anywhere: what it asks for against what the computes of the config are. PURE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpiped.spec import MODULES, SIF, is_sif, runs_in_container
from mlpiped.spec_images import defaults, offered

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from mlpiped.spec import StepSpec
    from mlpiped.spec_images import Images

    Faults = Iterator[tuple[str, str | None]]
    """(sentence, hint)"""

FILE_HINT = 'where the nodes of a compute with `kind = "slurm"` have Apptainer, write `apptainer = true` there'
SRUN_HINT = 'give it its packages by `requirements=`, or start it on one machine: `launcher="torchrun"`'


def faults_of_place(step: StepSpec, images: Images | None, clusters: Collection[str] | None) -> Faults:
    """None: not known, and not checked. Names of computes that are not in `images` are somebody else's to find."""
    environment, resources = step.environment, step.resources
    bases = {"an image": environment.image, "a Dockerfile": environment.dockerfile}
    bases["requirements"] = environment.requirements
    given = [name for name, value in bases.items() if value is not None]
    if len(given) > 1:
        yield f"step `{step.name}` has {' and '.join(given)}: an environment is of one kind", None
    if resources.gpu_memory is not None and not resources.gpus:
        yield f"step `{step.name}` asks for memory of a card, and for no card", "add `gpus=1`"
    if resources.cluster and runs_in_container(step):
        yield f"step `{step.name}` is started by srun, which its container does not have", SRUN_HINT
    if images:
        known = [name for name in step.compute if name in images]
        if len(known) == len(step.compute):
            lacking = list(_what_clusters_have(step, known, images))
            yield from lacking or _container(step, known, images)
    if clusters is not None and resources.cluster:
        yield from _cluster(step, clusters)


def _container(step: StepSpec, known: Sequence[str], images: Images) -> Faults:
    """A step with an image runs in a container; one without does where every compute of its would give it the same
    image, and else nowhere in one."""
    wanted = runs_in_container(step)
    found = offered(step, images) if wanted else defaults(step, images)
    if is_sif(step) or (True in found if wanted else len(found) == 1):
        return
    names = _names(known) or "no compute of the config"
    if wanted:
        able = " or ".join(f"`{name}`" for name, each in images.items() if True in each)
        verb = ("runs none" if len(known) == 1 else "run none") if known else "runs any"
        hint = f"{able} can" if able else 'add a compute with `kind = "docker"`'
        yield f"step `{step.name}` runs in a container, and {names} {verb}", hint
    elif found:
        ways = (f"in image `{one}`" if one else "outside of a container" for one in sorted(found, key=str))
        rest = f"{names if known else 'the computes of the config'} would run it {' or '.join(ways)}"
        hint = "give it `Environment(image=…)`, or name computes that treat it alike"
        yield f"step `{step.name}` has no image, and {rest}: it may make something else", hint
    else:
        verb = "runs" if len(known) == 1 else "run"
        rest = f"{names} {verb} containers only" if known else "every compute of the config runs containers only"
        hint = "give it `Environment(image=…)`" + (", or name another compute" if known else "")
        yield f"step `{step.name}` has no image, and {rest}", hint


def _what_clusters_have(step: StepSpec, known: Sequence[str], images: Images) -> Faults:
    """It needs modules or an image that is a file, and no compute that it may run on has that."""
    where_to = offered(step, images)
    if step.environment.modules and MODULES not in where_to:
        what, verb, hint = "needs environment modules", "load", 'name a compute with `kind = "slurm"`'
    elif is_sif(step) and SIF not in where_to:
        what, verb, hint = "runs in an image that is a file", "run", FILE_HINT
    else:
        return
    rest = f"{_names(known)} {verb}{'s' if len(known) == 1 else ''} none" if known else f"no compute {verb}s any"
    yield f"step `{step.name}` {what}, and {rest}", hint


def _cluster(step: StepSpec, clusters: Collection[str]) -> Faults:
    nodes = step.resources.nodes
    asked = f"needs {nodes} nodes" if nodes > 1 else "is started by srun"
    able = " or ".join(f"`{name}`" for name in sorted(clusters))
    hint = f"{able} can start it" if able else 'add a compute with `kind = "slurm"`'
    if step.compute and set(step.compute).isdisjoint(clusters):
        verb = "is no cluster" if len(step.compute) == 1 else "are no clusters"
        yield f"step `{step.name}` {asked}, and {_names(step.compute)} {verb}", hint
    elif not step.compute and not clusters:
        yield f"step `{step.name}` {asked}, and the config has no cluster", hint


def _names(computes: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in computes)
