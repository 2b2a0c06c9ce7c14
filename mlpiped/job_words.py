"""A step's arguments and parameters as words of its job, and words for how the job ended."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from mlpiped.backends.base import Part
from mlpiped.spec import Concat

if TYPE_CHECKING:
    from mlpiped.backends.base import Exited
    from mlpiped.facts import StepFacts
    from mlpiped.spec import Arg


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


def exit_words(outcome: Exited) -> str:
    if outcome.signal is None:
        return f"exited with status {outcome.code}"
    try:
        name = signal.Signals(outcome.signal).name
    except ValueError:
        name = str(outcome.signal)
    return f"was ended by {name}"
