"""How a step runs: Resources, Retry, Environment."""

from __future__ import annotations

import os

from mlpiped.sdk import place, values
from mlpiped.sdk.errors import DefinitionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_DEEPEST_INCLUDE = 10


class Resources:
    """What a step needs of a machine. `memory` is a limit: "16G", "512M" or bytes."""

    def __init__(self, *, cpus: float = 1, memory: str | int | None = None, gpus: int = 0, slots: int = 1) -> None:
        where = self.where = place.here()
        self.cpus = values.number(cpus, "cpus", where, least=0.001)
        self.memory = None if memory is None else values.size(memory, "memory", where)
        self.gpus = values.whole(gpus, "gpus", where, least=0)
        self.slots = values.whole(slots, "slots", where, least=0)

    def plain(self) -> dict[str, object]:
        return {"cpus": self.cpus, "memory": self.memory, "gpus": self.gpus, "slots": self.slots}


class Retry:
    """How often a step that failed is tried, the first attempt included. Faults of machines do not count.

    The second attempt waits for `delay`, each later one `backoff` times longer, at most `max_delay`.
    """

    def __init__(
        self,
        attempts: int = 3,
        delay: str | float = "10s",
        backoff: float = 2.0,
        max_delay: str | float = "1h",
    ) -> None:
        where = self.where = place.here()
        self.attempts = values.whole(attempts, "attempts", where, least=1)
        if self.attempts > 1000:
            raise DefinitionError(f"attempts must be at most 1000: {attempts}", where)
        self.delay = values.seconds(delay, "delay", where)
        self.backoff = values.number(backoff, "backoff", where, least=1)
        self.max_delay = values.seconds(max_delay, "max_delay", where)

    def plain(self) -> dict[str, object]:
        return {
            "attempts": self.attempts,
            "delay": self.delay,
            "backoff": self.backoff,
            "max_delay": self.max_delay,
        }


class Environment:
    """What a step's code finds around it: packages (`requirements=`, a file beside the plugin), Python, variables.

    Built once per content and cached; a part of the step's identity. The file is read when the plugin is loaded.
    """

    def __init__(
        self,
        *,
        requirements: str | None = None,
        python: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        where = self.where = place.here()
        self.requirements: str | None = None
        if requirements is not None:
            path = place.absolute(values.text(requirements, "requirements", where), where)
            self.requirements = _requirements(path, where, 0)
        self.python = None if python is None else _version(python, where)
        self.env = values.pairs(None if env is None else dict(env), "env", where)
        for key in self.env:
            if not key.isidentifier() or not key.isascii():
                raise DefinitionError(f"not the name of an environment variable: {values.shown(key)}", where)
            if key.startswith("MLPIPED_"):
                raise DefinitionError(f"`{key}` is set by mlpiped itself", where, "choose a name without `MLPIPED_`")

    def plain(self) -> dict[str, object]:
        return {"requirements": self.requirements, "python": self.python, "env": self.env}


def _version(python: object, where: place.Place) -> str:
    form = values.text(python, "python", where)
    parts = form.split(".")
    if len(parts) not in (2, 3) or not all(part.isdigit() and part.isascii() for part in parts):
        raise DefinitionError(f"not a version of Python: {values.shown(form)}", where, 'write it like "3.11"')
    return form


def _requirements(path: str, where: place.Place, depth: int) -> str:
    """The text of a requirements file, with the files that it includes in place of their `-r` lines.

    The text alone must say what is installed, so a line that points to another file is refused.
    """
    if depth > _DEEPEST_INCLUDE:
        raise DefinitionError("requirements include each other without end", (path, 1))
    lines = []
    for number, line in enumerate(place.read_text(path, "the requirements file", where).splitlines(), 1):
        word = line.split("#")[0].strip()
        if word.startswith(("-r", "--requirement")):
            target = word.removeprefix("--requirement").removeprefix("-r").lstrip(" =\t")
            lines.append(_requirements(os.path.join(os.path.dirname(path), target), (path, number), depth + 1))
        elif word.startswith(("-e", "--editable", "-c", "--constraint", ".", "/", "file:")):
            raise DefinitionError(
                f"a requirement that lies outside the requirements file: `{word}`",
                (path, number),
                "its content would be no part of the step's identity: name a released package",
            )
        else:
            lines.append(line)
    return "\n".join(lines)
