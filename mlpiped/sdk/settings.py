"""How a step runs: Resources, Retry, Environment."""

from __future__ import annotations

import os
import re

from mlpiped.sdk import place, values
from mlpiped.sdk.errors import DefinitionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DEEPEST_INCLUDE = 10
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/@:=~-]*\Z")


class Resources:
    """What a step needs of a machine. `memory` is a limit: "16G", "512M" or bytes.

    `gpus` cards are the step's alone, or with `gpu_memory=` it shares each with steps that together fit.
    `shm_size` and `network` are for a step in a container, which otherwise has 64M of /dev/shm and reaches nothing.
    """

    def __init__(
        self,
        *,
        cpus: float = 1,
        memory: str | int | None = None,
        gpus: int = 0,
        gpu_memory: str | int | None = None,
        shm_size: str | int | None = None,
        network: bool = False,
        slots: int = 1,
    ) -> None:
        where = self.where = place.here()
        self.cpus = values.number(cpus, "cpus", where, least=0.001)
        self.memory = None if memory is None else values.size(memory, "memory", where)
        self.gpus = values.whole(gpus, "gpus", where, least=0)
        self.gpu_memory = None if gpu_memory is None else values.size(gpu_memory, "gpu_memory", where)
        if self.gpu_memory is not None and not self.gpus:
            raise DefinitionError(
                "gpu_memory is of a card, and gpus is 0", where, "add `gpus=1`, or use `memory=` for the machine's own"
            )
        self.shm_size = None if shm_size is None else values.size(shm_size, "shm_size", where)
        self.network = values.flag(network, "network", where)
        self.slots = values.whole(slots, "slots", where, least=0)

    def plain(self) -> dict[str, object]:
        return {
            "cpus": self.cpus,
            "memory": self.memory,
            "gpus": self.gpus,
            "gpu_memory": self.gpu_memory,
            "shm_size": self.shm_size,
            "network": self.network,
            "slots": self.slots,
        }


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

    With `image=` ("name:tag", or a `.sif` file that a cluster runs by Apptainer) or `dockerfile=` (a file beside the
    plugin, without a build context) the step runs in a container, which brings its own Python and packages. `modules=`
    are loaded before the step, in this order, on a compute that has environment modules (Slurm). Built once per content
    and cached; a part of the step's identity. Files are read when the plugin is loaded; what a tag means and what an
    image file holds is asked before each run.
    """

    def __init__(
        self,
        *,
        requirements: str | None = None,
        python: str | None = None,
        image: str | None = None,
        dockerfile: str | None = None,
        env: Mapping[str, str] | None = None,
        modules: Sequence[str] | None = None,
    ) -> None:
        where = self.where = place.here()
        _one_base({"image": image, "dockerfile": dockerfile, "requirements": requirements}, python, where)
        self.modules = [] if modules is None else _modules(modules, where)
        if self.modules and (image is not None or dockerfile is not None):
            raise DefinitionError("`modules=` beside a container's image", where, "a container brings its own packages")
        self.image = None if image is None else _image(image, where)
        self.dockerfile: str | None = None
        if dockerfile is not None:
            path = place.absolute(values.text(dockerfile, "dockerfile", where), where)
            self.dockerfile = place.read_text(path, "the Dockerfile", where)
            if not self.dockerfile.strip():
                raise DefinitionError("the Dockerfile is empty", (path, 1), "it begins with `FROM image`")
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
        return {
            "requirements": self.requirements,
            "python": self.python,
            "image": self.image,
            "dockerfile": self.dockerfile,
            "env": self.env,
            "modules": self.modules,
        }


def _modules(modules: Sequence[str], where: place.Place) -> list[str]:
    if isinstance(modules, str) or not isinstance(modules, (list, tuple)):
        raise DefinitionError(f"modules is not a list: {values.shown(modules)}", where, 'write `modules=["cuda/12"]`')
    for name in modules:
        if not isinstance(name, str) or not _MODULE.match(name):
            raise DefinitionError(f"not the name of a module: {values.shown(name)}", where, 'write it like "cuda/12"')
    return list(modules)


def _one_base(given: Mapping[str, object], python: object, where: place.Place) -> None:
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise DefinitionError(
            f"an environment is of one kind: {' and '.join(f'`{name}=`' for name in named)}",
            where,
            "what a container needs is installed by its Dockerfile",
        )
    if python is not None and named and named[0] != "requirements":
        raise DefinitionError(f"`python=` beside `{named[0]}=`", where, "a container brings its own Python")


def _image(image: object, where: place.Place) -> str:
    form = values.text(image, "image", where)
    if form.startswith("-") or any(c.isspace() or not c.isprintable() for c in form):
        raise DefinitionError(
            f"not the name of an image: {values.shown(form)}", where, 'write it like "name:tag" or "name@sha256:…"'
        )
    return place.absolute(form, where) if form.endswith(".sif") else form


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
