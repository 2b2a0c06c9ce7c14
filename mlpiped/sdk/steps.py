"""The steps. `CommandStep` is the primitive; the others are written in its terms.

What every step takes: `inputs=` data that is not in the arguments; `outputs=` what it makes; `params=` parameters
that reach it through its environment only; `after=` steps to wait for, without data; `compute_target=` computes or
pools, in order of preference; `timeout=` and `grace=` (between SIGTERM and SIGKILL) durations; `allow_reuse=False`
or `effect=True` (it does something outside) always run; `version=` any text whose change makes it run again.
"""

from __future__ import annotations

import os

from mlpiped.sdk import place, values
from mlpiped.sdk.data import DataReference, PipelineData, PipelineParameter, Placeholder
from mlpiped.sdk.errors import DefinitionError
from mlpiped.sdk.settings import Environment, Resources, Retry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, TypedDict, Unpack

    Argument = str | int | float | os.PathLike[str] | Placeholder
    Data = DataReference | PipelineData

    class Settings(TypedDict, total=False):
        """What every step takes besides its command."""

        name: str | None
        inputs: Sequence[Data] | None
        outputs: Sequence[PipelineData] | None
        params: Sequence[PipelineParameter] | None
        source_directory: str | os.PathLike[str] | None
        compute_target: str | Sequence[str] | None
        after: Step | Sequence[Step] | None
        resources: Resources | None
        retry: Retry | int | None
        timeout: str | float | None
        grace: str | float
        environment: Environment | None
        allow_reuse: bool
        effect: bool
        version: str | None
        priority: int
        description: str


class Step:
    """One node of a pipeline: a command, its data, and how it runs."""

    kind = "command"
    shell: str | None = None  # the text for `/bin/sh -c`, in place of `arguments`
    script: str | None = None
    mode = "tree"

    def __init__(
        self,
        default_name: str,
        *,
        name: str | None = None,
        inputs: Sequence[Data] | None = None,
        outputs: Sequence[PipelineData] | None = None,
        params: Sequence[PipelineParameter] | None = None,
        source_directory: str | os.PathLike[str] | None = None,
        compute_target: str | Sequence[str] | None = None,
        after: Step | Sequence[Step] | None = None,
        resources: Resources | None = None,
        retry: Retry | int | None = None,
        timeout: str | float | None = None,
        grace: str | float = "10s",
        environment: Environment | None = None,
        allow_reuse: bool = True,
        effect: bool = False,
        version: str | None = None,
        priority: int = 0,
        description: str = "",
    ) -> None:
        where = self.where
        self.named = name is not None
        self.name = default_name if name is None else values.name(name, "the name of a step", where)
        self.inputs: list[Data] = values.listed(inputs, "inputs", where)
        values.only(self.inputs, (DataReference, PipelineData), "inputs", where, "it holds data objects")
        self.outputs: list[PipelineData] = values.listed(outputs, "outputs", where)
        values.only(self.outputs, PipelineData, "outputs", where, "it holds `PipelineData`")
        self.params: list[PipelineParameter] = values.listed(params, "params", where)
        values.only(self.params, PipelineParameter, "params", where, "it holds `PipelineParameter`")
        self.compute = values.words(compute_target, "compute_target", where)
        self.after: list[Step] = []
        for earlier in values.listed(after, "after", where):
            self.run_after(earlier)
        self.directory = None
        if source_directory is not None:
            form = values.text(source_directory, "source_directory", where)
            self.directory = place.absolute(form, where)
        values.one(resources, Resources, "resources", where)
        self.resources = resources
        if isinstance(retry, int) and not isinstance(retry, bool):
            retry = Retry(retry)
        values.one(retry, Retry, "retry", where)
        self.retry: Retry | None = retry  # type: ignore[assignment]
        values.one(environment, Environment, "environment", where)
        self.environment = environment
        self.timeout = None if timeout is None else values.seconds(timeout, "timeout", where, least=0.001)
        self.grace = values.seconds(grace, "grace", where)
        self.allow_reuse = values.flag(allow_reuse, "allow_reuse", where)
        self.effect = values.flag(effect, "effect", where)
        self.salt = "" if version is None else values.text(version, "version", where, empty=True)
        self.priority = values.whole(priority, "priority", where, least=-(10**9))
        self.description = values.text(description, "description", where, empty=True)
        for made in self.outputs:
            if self not in made.producers:
                made.producers.append(self)

    arguments: list[Argument]
    where: place.Place

    def start(self) -> list[str]:
        """What the command begins with, before `arguments`."""
        return [] if self.script is None else ["python", self.script]

    def shape(self) -> dict[str, object]:
        """What the step needs of a compute besides `resources`."""
        return {}

    def run_after(self, step: Step) -> None:
        """Wait for `step`, without data from it."""
        if not isinstance(step, Step):
            raise DefinitionError(f"`after` cannot hold {values.shown(step)}", place.here(), "it holds steps")
        if step not in self.after:
            self.after.append(step)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class PythonScriptStep(Step):
    """Runs `script_name`, a file in `source_directory` (default: the plugin's folder), with `arguments`.

    `code="imports"`: only the script and the modules of `source_directory` that it reaches count as its code,
    in place of the whole folder.
    """

    kind = "python"

    def __init__(
        self,
        script_name: str | os.PathLike[str],
        *,
        arguments: Sequence[Argument] = (),
        code: Literal["tree", "imports"] = "tree",
        **settings: Unpack[Settings],
    ) -> None:
        self.where = place.here()
        self.script = os.path.normpath(values.text(script_name, "script_name", self.where))
        if os.path.isabs(self.script) or self.script.split(os.sep)[0] == "..":
            raise DefinitionError(
                f"the script lies outside its source_directory: `{self.script}`",
                self.where,
                "name its folder in `source_directory=`",
            )
        self.mode = values.choice(code, ("tree", "imports"), "code", self.where)
        self.arguments = _arguments(arguments, self.where)
        stem = os.path.basename(self.script).rpartition(".")[0] or self.script
        if settings.get("source_directory") is None:
            settings["source_directory"] = "."
        super().__init__(values.name_from(stem, "script"), **settings)


class CommandStep(Step):
    """Runs `command`: a list of arguments, or a string for the shell.

    In a string, data and parameters are handed to the shell as values: it never parses what is in them.
    """

    def __init__(self, command: str | Sequence[Argument], **settings: Unpack[Settings]) -> None:
        self.where = place.here()
        first = ""
        if isinstance(command, str):
            self.shell = command
            self.arguments = []
            if not command.strip():
                raise DefinitionError("the command is empty", self.where)
            first = command.split()[0]
        else:
            self.arguments = _arguments(command, self.where)
            if not self.arguments:
                raise DefinitionError("the command is empty", self.where)
            if not isinstance(self.arguments[0], Placeholder):
                first = str(self.arguments[0])
        default = "command" if values.MARK in first else values.name_from(os.path.basename(first), "command")
        super().__init__(default, **settings)


class DataTransferStep(Step):
    """Copies `source` to `destination`: a place in a datastore, or `PipelineData` for a later step.

    `kind` says whether a file or a folder is copied; the default is the source's: a folder for a glob or a path
    that ends with `/`. `output` is the copy, for steps that come after.
    """

    kind = "transfer"
    script = "transfer.py"
    mode = "imports"

    def __init__(
        self,
        source: Data,
        destination: Data,
        *,
        kind: Literal["file", "folder"] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        self.where = place.here()
        for what, data in (("source", source), ("destination", destination)):
            if not isinstance(data, (DataReference, PipelineData)):
                raise DefinitionError(
                    f"the {what} is {values.shown(data)}", self.where, "it is a `DataReference` or `PipelineData`"
                )
        if kind is not None:
            values.choice(kind, ("file", "folder"), "kind", self.where)
        copied = kind or _kind_of(source)
        if isinstance(destination, PipelineData):
            self.output = destination
            if kind is None and isinstance(source, DataReference) and not source.glob:
                copied = "folder" if destination.kind == "folder" else "file"
            if copied != destination.kind:
                raise DefinitionError(f"a {copied} is copied to `{destination.name}`, a {destination.kind}", self.where)
        else:
            self.output = _landing(destination, copied, self.where)
        if settings.get("source_directory") is not None:
            raise DefinitionError("a DataTransferStep takes no source_directory", self.where)
        settings["source_directory"] = os.path.dirname(os.path.abspath(__file__))
        settings["outputs"] = [self.output]
        self.arguments = [f"--{copied}", source, self.output]
        super().__init__("transfer", **settings)

    def get_output(self) -> PipelineData:
        return self.output


def _kind_of(source: Data) -> Literal["file", "folder"]:
    if isinstance(source, PipelineData):
        return "folder" if source.kind == "folder" else "file"
    return "folder" if source.glob or source.path.endswith("/") else "file"


def _landing(destination: DataReference, kind: Literal["file", "folder"], where: place.Place) -> PipelineData:
    """The output that publishes itself at `destination`."""
    if destination.glob:
        raise DefinitionError(f"the destination is a glob: `{destination.path}`", where, "name one path")
    path = destination.path.rstrip("/")
    if not path:
        raise DefinitionError("the destination is the datastore's root", where, "name a path in it")
    return PipelineData(values.name_from(destination.shown_name, "copy"), destination.datastore, path, kind=kind)


def _arguments(given: object, where: place.Place) -> list[Argument]:
    done: list[Argument] = []
    for value in values.listed(given, "arguments", where):
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float, Placeholder)):
            hint = "an argument is a string, a number, a data object or a parameter"
            if isinstance(value, Step):
                hint = "pass the `PipelineData` that it makes"
            raise DefinitionError(f"arguments cannot hold {values.shown(value)}", where, hint)
        done.append(value)
    return done
