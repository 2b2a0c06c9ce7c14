"""A step's arguments and parameters as words of its job, and the words for its end."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Any

from mlpiped.backends.base import Part
from mlpiped.spec import Concat

if TYPE_CHECKING:
    from mlpiped.backends.base import Exited
    from mlpiped.errors import MlpipedError
    from mlpiped.facts import StepFacts
    from mlpiped.spec import Arg, ResourceSpec

LAUNCHER = re.compile(r"(?:srun|slurmstepd(?:-\S+)?): ")  # of a line that it says itself


def parts_of(argument: Arg, facts: StepFacts) -> tuple[Part, ...]:
    found = []
    for part in argument.parts if isinstance(argument, Concat) else (argument,):
        match part.kind:
            case "text":
                found.append(Part("text", part.text))
            case "parameter":
                found.append(Part("text", as_text(facts.parameters[part.name])))
            case "input":
                found.append(Part("input", part.port))
            case "output":
                found.append(Part("output", part.port))
    return tuple(found)


def as_text(value: object) -> str:
    """A parameter as one argument: `true`, `0.1`, text as it is; nothing for None."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def variable(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).upper()


def asked_of(resources: ResourceSpec) -> dict[str, Any]:
    """What a `Job` says of the machine that it needs, but for its cards."""
    r = resources
    asked: dict[str, Any] = {"nodes": r.nodes, "tasks": r.tasks, "cpus": r.cpus, "memory": r.memory}
    return {**asked, "gpu_memory": r.gpu_memory, "shm_size": r.shm_size, "network": r.network}


def last_words(stderr: str) -> str:
    """`: <the last line of it>`, or nothing. What starts several processes adds how each was ended: that is not it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    own = [line for line in lines if not LAUNCHER.match(line)]
    return f": {(own or lines)[-1][:200]}" if lines else ""


def exit_words(outcome: Exited) -> str:
    if outcome.signal is None:
        return f"exited with status {outcome.code}"
    try:
        name = signal.Signals(outcome.signal).name
    except ValueError:
        name = str(outcome.signal)
    return f"was ended by {name}"


def seconds(outcome: Exited) -> float | None:
    if outcome.started is None or outcome.ended is None:
        return None
    return max(0.0, outcome.ended - outcome.started)


def with_hint(fault: MlpipedError) -> str:
    return fault.message if fault.hint is None else f"{fault.message}; {fault.hint}"
