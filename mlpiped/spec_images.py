"""Which image a step runs in that names none: its computes' own, where they give it one. PURE.

The image enters the step's definition before it has a key or a place, as if its author had written it there: so what it
makes is reused where that image ran it, and nowhere else. For that it must be the same wherever the step may go. A step
whose computes would not all treat it alike is a fault of the plugin; one that names no compute stays out of containers
as long as any compute has room for it there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlpiped.spec import MODULES, SIF, runs_in_container

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.spec import EnvironmentSpec, PipelineSpec, StepSpec

    Images = Mapping[str, frozenset[bool | str]]
    """Name of a compute or pool -> what those in it do: False runs steps on the machine, True in containers, SIF in
    images that are files, MODULES loads environment modules; another text runs in a container of that image also those
    that name none. A pool may have all of them."""


def offered(step: StepSpec, images: Images) -> frozenset[bool | str]:
    """By all computes that it may run on. Names that are not known offer nothing."""
    names = [name for name in step.compute if name in images] if step.compute else list(images)
    return frozenset(one for name in names for one in images[name])


def defaults(step: StepSpec, images: Images) -> frozenset[bool | str]:
    """What would become of a step that names no image: False for the machine itself, or the images it would get."""
    found = offered(step, images) - {True, SIF, MODULES}
    if _brings_packages(step.environment) or (not step.compute and False in found):
        return found & {False}
    return found


def with_images(spec: PipelineSpec, images: Images | None) -> PipelineSpec:
    """`spec`, which has no fault, with an image for each step that gets one from its computes."""
    if images is None:
        return spec
    steps = tuple(_with_image(step, images) for step in spec.steps)
    return (
        spec if all(one is other for one, other in zip(steps, spec.steps, strict=True)) else replace(spec, steps=steps)
    )


def _with_image(step: StepSpec, images: Images) -> StepSpec:
    if runs_in_container(step):
        return step
    found = defaults(step, images)
    image = next(iter(found)) if len(found) == 1 else False
    return replace(step, environment=replace(step.environment, image=image)) if isinstance(image, str) else step


def _brings_packages(environment: EnvironmentSpec) -> bool:
    """A container brings its own."""
    e = environment
    return e.requirements is not None or e.python is not None or e.conda is not None or bool(e.modules)
