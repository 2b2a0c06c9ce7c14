"""Where a published output goes: a template of the author's -> a path that stays inside its datastore. Pure."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mlpiped.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.spec import Output, PipelineSpec, StepSpec


def destination(
    output: Output, spec: PipelineSpec, step: StepSpec, run_id: int, datastores: Mapping[str, Path]
) -> tuple[Path, Path]:
    """(the datastore's root, the very path below it) for `output.publish`, its {fields} filled in.

    Raises UsageError for an unknown datastore or placeholder, or a path that would leave the datastore.
    """
    name = output.datastore or next(iter(datastores), "")
    if name not in datastores:
        raise UsageError(f"no datastore named `{name}` in the config for output `{output.name}`")
    template = output.publish or ""
    try:
        text = template.format(pipeline=spec.name, step=step.name, output=output.name, run_id=run_id)
    except (KeyError, IndexError, ValueError) as fault:
        raise UsageError(f"output `{output.name}` cannot be published to `{template}`: {fault}") from None
    relative = PurePosixPath(text)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in text:
        raise UsageError(f"output `{output.name}` would be published outside its datastore: {text}")
    return datastores[name], datastores[name] / relative
