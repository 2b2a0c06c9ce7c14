"""The Spec: a pipeline as typed plain data. What the SDK writes, the loader checks, the ledger keeps, the core reads.

`PipelineSpec.from_plain` is the only door for data from outside (a plugin's child process, a request): it reports
every fault of shape at once. `faults_of` then checks what shapes cannot say: cycles, two producers of one output,
unknown steps, names. The canonical form is `canonical(spec)`: compact JSON with sorted keys; `version` is its hash
less everything that says where a thing was written (`where`).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
"""What people may call a pipeline, step, output, parameter or datastore: names never become paths unchecked."""

T = TypeVar("T")
Scalar = str | int | float | bool | None


_STRICT = ConfigDict(extra="forbid")


class _Plain:
    """Slotted and frozen: a pipeline of 10,000 steps stays in memory."""

    __slots__ = ()

    @classmethod
    def model_validate(cls, plain: Any) -> Self:
        """From plain data. Raises pydantic.ValidationError with every fault."""
        return _adapter(cls).validate_python(plain)

    @classmethod
    def model_validate_json(cls, text: str | bytes) -> Self:
        return _adapter(cls).validate_json(text)

    def model_dump(self, *, exclude: set[str] | None = None) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        found: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json", exclude=exclude)
        return found

    def model_dump_json(self) -> str:
        return _adapter(type(self)).dump_json(self).decode()


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Where(_Plain):
    """The line of the author's file that made this object."""

    file: str
    line: int


# --- arguments: typed placeholders, never finished strings ------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Text(_Plain):
    kind: Literal["text"] = "text"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class InputArg(_Plain):
    """The path or, for a glob, the sorted paths of the input `port`, each an argument of its own."""

    kind: Literal["input"] = "input"
    port: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class OutputArg(_Plain):
    kind: Literal["output"] = "output"
    port: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ParameterArg(_Plain):
    kind: Literal["parameter"] = "parameter"
    name: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Concat(_Plain):
    """Parts that make one argument: `f"--rate={rate}"`. A glob is not allowed in it."""

    kind: Literal["concat"] = "concat"
    parts: tuple[Annotated[Text | InputArg | OutputArg | ParameterArg, Field(discriminator="kind")], ...]


Arg = Annotated[Text | InputArg | OutputArg | ParameterArg | Concat, Field(discriminator="kind")]


# --- data ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Reference(_Plain):
    """Data that lies in a datastore: one path (file or folder) or a glob, relative to the datastore's root."""

    kind: Literal["reference"] = "reference"
    datastore: str
    path: str
    glob: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Upstream(_Plain):
    """Data that another step of the pipeline makes."""

    kind: Literal["upstream"] = "upstream"
    step: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Port(_Plain):
    """One input. `name` is for people; `in_arguments` is False for one named only in `inputs=`
    (the script then finds its path(s), newline-separated, in `MLPIPED_INPUT_<NAME>`)."""

    name: str
    source: Annotated[Reference | Upstream, Field(discriminator="kind")]
    in_arguments: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Output(_Plain):
    """One output. `file_name` is the last part of the path the script is given (default: the name).
    `publish` is a path template in `datastore`, or None."""

    name: str
    output_kind: Literal["file", "folder"] = "file"
    file_name: str
    datastore: str | None = None
    publish: str | None = None
    keep: Literal["home", "remote"] = "home"  # remote: on the machine that made it until it is needed elsewhere

    @property
    def stays(self) -> bool:
        """What is published comes home anyway."""
        return self.keep == "remote" and self.publish is None


# --- steps --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ResourceSpec(_Plain):
    cpus: float = 1
    memory: int | None = None  # bytes
    gpus: int = 0
    gpu_memory: int | None = None  # bytes of each, for sharing it
    shm_size: int | None = None  # bytes of a container's /dev/shm
    network: bool = False  # of a container: whether it reaches anything
    nodes: int = 1
    tasks: int = 1  # processes on each node, `cpus` for each of them
    cluster: bool = False  # only a cluster can start it
    slots: int = 1
    scratch: int | None = None  # bytes


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class RetrySpec(_Plain):
    attempts: int = Field(default=1, ge=1, le=1000)  # in all, the first included; faults of machines do not count
    delay: float = Field(default=10.0, ge=0)  # seconds before the second attempt
    backoff: float = Field(default=2.0, ge=1)  # factor from one pause to the next
    max_delay: float = Field(default=3600.0, ge=0)  # seconds


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class EnvironmentSpec(_Plain):
    requirements: str | None = None  # the file's text, read at load
    python: str | None = None  # "3.11"
    image: str | None = None
    dockerfile: str | None = None  # the file's text
    conda: str | None = None  # the file's text
    modules: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class SourceSpec(_Plain):
    """A step's code: an absolute folder and how it is read."""

    directory: str
    mode: Literal["tree", "imports"] = "tree"
    script: str | None = None  # relative to `directory`


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class StepSpec(_Plain):
    name: str
    where: Where
    kind: Literal["command", "python", "transfer"] = "command"
    arguments: tuple[Arg, ...]  # the whole command; argv[0] is `python` for kind "python"
    shell: bool = False  # arguments is then one Text/Concat given to `/bin/sh -c`
    source: SourceSpec | None = None
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Output, ...] = ()
    parameters: tuple[str, ...] = ()  # used but not in arguments
    after: tuple[str, ...] = ()
    compute: tuple[str, ...] = ()  # names of computes or pools, in order of preference; empty: any
    resources: ResourceSpec = ResourceSpec()
    retry: RetrySpec = RetrySpec()
    timeout: float | None = None  # seconds
    grace: float = 10.0  # seconds between SIGTERM and SIGKILL
    environment: EnvironmentSpec = EnvironmentSpec()
    allow_reuse: bool = True
    effect: bool = False
    salt: str = ""  # the author's `version=`
    priority: int = 0
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ParameterSpec(_Plain):
    name: str
    type: Literal["str", "int", "float", "bool"]
    default: Scalar = None
    required: bool = False
    choices: tuple[Scalar, ...] = ()
    description: str = ""


# --- triggers -----------------------------------------------------------------------------------------------
CatchUp = Literal["skip", "latest", "all"]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class CronSpec(_Plain):
    kind: Literal["cron"] = "cron"
    where: Where
    expression: str
    timezone: str = "UTC"
    catch_up: CatchUp = "latest"
    jitter: float = 0.0  # seconds at most, a fixed delay per schedule
    start: str | None = None  # RFC 3339
    end: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class EverySpec(_Plain):
    kind: Literal["every"] = "every"
    where: Where
    seconds: float
    catch_up: CatchUp = "latest"
    jitter: float = 0.0
    start: str | None = None
    end: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ArrivalSpec(_Plain):
    kind: Literal["arrival"] = "arrival"
    where: Where
    source: Reference
    settle: float = 5.0  # seconds
    marker: str | None = None
    batch: Literal["all", "file"] = "all"
    parameter: str | None = None
    min_files: int = 1
    catch_up: CatchUp = "latest"


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class SuccessSpec(_Plain):
    kind: Literal["success"] = "success"
    where: Where
    pipeline: str


Trigger = Annotated[CronSpec | EverySpec | ArrivalSpec | SuccessSpec, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class PipelineSpec(_Plain):
    name: str
    where: Where
    steps: tuple[StepSpec, ...]
    parameters: tuple[ParameterSpec, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    experiment: str
    description: str = ""
    overlap: Literal["queue", "skip", "parallel", "cancel_previous"] = "queue"
    max_parallel: int | None = None
    priority: int = 0
    tags: dict[str, str] = Field(default_factory=dict)


def runs_in_container(step: StepSpec) -> bool:
    return step.environment.image is not None or step.environment.dockerfile is not None


SIF, MODULES = "*.sif", "module load"
"""What a compute may offer besides containers, in `spec_images.Images`: images that are files, environment modules."""


def is_sif(step: StepSpec) -> bool:
    """Whether its image is a file, as Apptainer runs them."""
    return (step.environment.image or "").endswith(".sif")


def canonical(value: _Plain | dict[str, Any] | list[Any]) -> str:
    """Compact JSON with sorted keys: the form that is hashed."""
    plain = value.model_dump() if isinstance(value, _Plain) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def version_of(spec: PipelineSpec) -> str:
    """12 hex digits over everything but the places where things were written."""
    found = hashlib.sha256(canonical(_placeless(spec.model_dump(exclude={"steps"}))).encode())
    for step in spec.steps:  # one by one: the plain form of a large pipeline would not be small
        plain = step.model_dump()
        resources = plain["resources"]
        plain["resources"] = {k: v for k, v in resources.items() if k not in _ADDED or v != _ADDED[k]}
        plain["outputs"] = [{k: v for k, v in o.items() if (k, v) != ("keep", "home")} for o in plain["outputs"]]
        found.update(canonical(_placeless(plain)).encode())
    return found.hexdigest()[:12]


_ADDED: dict[str, Scalar] = {"shm_size": None, "network": False, "tasks": 1, "cluster": False}
"""Resources that came later: with these values they leave the version of a pipeline what it was."""


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _placeless(v) for k, v in value.items() if k != "where"}
    return [_placeless(v) for v in value] if isinstance(value, list) else value
