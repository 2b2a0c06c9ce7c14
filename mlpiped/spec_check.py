"""What the shapes of `spec` cannot say: `faults_of(spec)` -> every fault, each at the author's line.

PURE, and linear in the size of the pipeline. Names of datastores and computes, and the reading of a crontab
expression, are handed in by who knows them.
"""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from string import Formatter
from typing import TYPE_CHECKING

from mlpiped.errors import Fault
from mlpiped.spec import (
    NAME,
    ArrivalSpec,
    Concat,
    CronSpec,
    EverySpec,
    InputArg,
    OutputArg,
    ParameterArg,
    Reference,
    SuccessSpec,
    Text,
    Upstream,
)
from mlpiped.spec_cycles import cycles_of
from mlpiped.spec_places import faults_of_place

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from mlpiped.spec import Arg, Output, ParameterSpec, PipelineSpec, StepSpec, Trigger, Where
    from mlpiped.spec_images import Images

    CheckCron = Callable[[str, str], str | None]
    """(expression, time zone) -> a sentence, or None when it can be used."""

PUBLISH_FIELDS = ("pipeline", "run_id", "step", "output")
"""What `{…}` may name in the path that an output is published at."""

NAME_RULE = "at most 64 of A-Z a-z 0-9 _ . - and the first a letter or digit"
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
_FINITE = float("-inf"), float("inf")


def faults_of(
    spec: PipelineSpec,
    datastores: Collection[str] | None = None,
    computes: Collection[str] | None = None,
    check_cron: CheckCron | None = None,
    images: Images | None = None,
    clusters: Collection[str] | None = None,
) -> list[Fault]:
    """Every fault of `spec`, in the order of the file. What is None is not checked; `computes` includes pools, and so
    does `clusters`: those that start steps on several nodes."""
    check = _Check(spec, datastores, computes, check_cron, images, clusters)
    check.pipeline()
    for step in spec.steps:
        check.step(step)
    check.published()
    for trigger in spec.triggers:
        check.trigger(trigger)
    check.cycles()
    return sorted(check.faults, key=lambda fault: fault.line)


def path_fault(path: str) -> str | None:
    """Why `path` may lead out of the folder that it is relative to, or None."""
    if "\0" in path:
        return "holds a NUL"
    if not path:
        return "is empty"
    if path.startswith("/"):
        return "is absolute"
    if ".." in path.split("/"):
        return "leaves its folder by `..`"
    return "is too long" if len(path.encode(errors="replace")) > 4096 else None


class _Check:
    """The faults of one spec as they are found."""

    def __init__(
        self,
        spec: PipelineSpec,
        datastores: Collection[str] | None,
        computes: Collection[str] | None,
        check_cron: CheckCron | None,
        images: Images | None,
        clusters: Collection[str] | None,
    ) -> None:
        self.spec = spec
        self.datastores = datastores
        self.computes = computes
        self.check_cron = check_cron
        self.images = images
        self.clusters = clusters
        self.faults: list[Fault] = []
        self.declared = {parameter.name: parameter for parameter in spec.parameters}
        self.outputs = {step.name: {output.name for output in step.outputs} for step in spec.steps}

    def fault(self, where: Where, message: str, hint: str | None = None) -> None:
        self.faults.append(Fault(where.file, where.line, message, hint))

    def _near(self, kind: str, name: str, known: Iterable[str], where: Where, otherwise: str | None = None) -> None:
        near = get_close_matches(name, list(known), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else otherwise
        self.fault(where, f"no {kind} named `{name}`", hint)

    def _name(self, kind: str, name: str, where: Where) -> None:
        if not NAME.match(name):
            shown = name.encode("unicode_escape").decode()
            self.fault(where, f"not a name for a {kind}: `{shown[:80]}`", NAME_RULE)

    def _twice(self, kind: str, names: Iterable[str], where: Where) -> None:
        for name, count in Counter(names).items():
            if count > 1:
                self.fault(where, f"two {kind} are named `{name}`")

    def _path(self, what: str, path: str, where: Where) -> None:
        problem = path_fault(path)
        if problem:
            self.fault(where, f"{what} {problem}: `{path.encode('unicode_escape').decode()[:200]}`")

    def _datastore(self, name: str, where: Where) -> None:
        if self.datastores is not None and name not in self.datastores:
            self._near("datastore", name, self.datastores, where, "add it to the config: `[datastores.NAME]`")

    # --- the pipeline -----------------------------------------------------------------------------------
    def pipeline(self) -> None:
        spec = self.spec
        self._name("pipeline", spec.name, spec.where)
        self._name("experiment", spec.experiment, spec.where)
        if not spec.steps:
            self.fault(spec.where, f"pipeline `{spec.name}` has no steps")
        self._twice("parameters", (parameter.name for parameter in spec.parameters), spec.where)
        for parameter in spec.parameters:
            self._parameter(parameter)
        variables = Counter(variable_of(name) for name in self.declared)
        for variable in (one for one, count in variables.items() if count > 1):
            same = " and ".join(f"`{name}`" for name in self.declared if variable_of(name) == variable)
            self.fault(spec.where, f"parameters {same} would share the variable `MLPIPED_PARAM_{variable}`")
        seen: dict[str, StepSpec] = {}
        for step in spec.steps:
            other = seen.setdefault(step.name, step)
            if other is not step:
                lines = f"lines {other.where.line} and {step.where.line}"
                self.fault(step.where, f"two steps are named `{step.name}`: {lines}", "give one of them `name=`")

    def _parameter(self, parameter: ParameterSpec) -> None:
        where = self.spec.where
        self._name("parameter", parameter.name, where)
        values = [*parameter.choices, *([] if parameter.default is None else [parameter.default])]
        for value in values:
            if type(value) is not _TYPES[parameter.type]:
                self.fault(where, f"parameter `{parameter.name}` is of type {parameter.type}, not {value!r}")
            elif isinstance(value, float) and not _FINITE[0] < value < _FINITE[1]:
                self.fault(where, f"parameter `{parameter.name}` is not a finite number: {value}")
            elif isinstance(value, str) and "\0" in value:
                self.fault(where, f"parameter `{parameter.name}` holds a NUL")
        if parameter.choices and parameter.default is not None and parameter.default not in parameter.choices:
            self.fault(where, f"the default of parameter `{parameter.name}` is none of its choices")

    # --- steps ------------------------------------------------------------------------------------------
    def step(self, step: StepSpec) -> None:
        where = step.where
        self._name("step", step.name, where)
        self._twice("inputs", (port.name for port in step.inputs), where)
        self._twice("outputs", (output.name for output in step.outputs), where)
        for port in step.inputs:
            self._name("input", port.name, where)
            if isinstance(port.source, Reference):
                self._datastore(port.source.datastore, where)
                self._path(f"the path of `{port.name}`", port.source.path, where)
            else:
                self._upstream(port.source, where)
        for output in step.outputs:
            self._output(output, where)
        for earlier in step.after:
            if earlier not in self.outputs:
                self._near("step", earlier, self.outputs, where)
        for name in step.parameters:
            self._uses(name, where)
        self._arguments(step)
        self._code(step)
        if self.computes is not None:
            for name in step.compute:
                if name not in self.computes:
                    self._near("compute or pool", name, self.computes, where, "add it to the config: `[compute.NAME]`")
        for message, hint in faults_of_place(step, self.images, self.clusters):
            self.fault(where, message, hint)
        for what, seconds in (("timeout", step.timeout), ("grace", step.grace)):
            if seconds is not None and not 0 <= seconds < _FINITE[1]:
                self.fault(where, f"{what} is not a duration: {seconds}")

    def _upstream(self, source: Upstream, where: Where) -> None:
        if source.step not in self.outputs:
            self._near("step", source.step, self.outputs, where)
        elif source.output not in self.outputs[source.step]:
            self._near(f"output of step `{source.step}`", source.output, self.outputs[source.step], where)

    def _output(self, output: Output, where: Where) -> None:
        self._name("output", output.name, where)
        name = output.file_name
        if not name or "/" in name or "\0" in name or name in (".", "..") or len(name.encode(errors="replace")) > 255:
            shown = name.encode("unicode_escape").decode()[:80]
            self.fault(where, f"the file name of output `{output.name}` is not one: `{shown}`")
        if output.datastore is not None:
            self._datastore(output.datastore, where)
        if output.publish is None:
            return
        if output.datastore is None:
            self.fault(where, f"no datastore to publish `{output.name}` in", "add `datastore=`")
        self._path(f"the path to publish `{output.name}` at", output.publish, where)
        try:
            fields = [field for _, field, _, _ in Formatter().parse(output.publish) if field is not None]
        except ValueError:
            self.fault(where, f"the path to publish `{output.name}` at has an odd brace: `{output.publish}`")
            return
        for field in fields:
            if field not in PUBLISH_FIELDS:
                known = ", ".join(f"{{{one}}}" for one in PUBLISH_FIELDS)
                self.fault(
                    where, f"`{output.publish}` names `{{{field}}}`, which nobody fills in", f"known are {known}"
                )

    def _uses(self, name: str, where: Where) -> None:
        if name not in self.declared:
            self._near("parameter", name, self.declared, where, "declare it in `parameters=` of the pipeline")

    def _arguments(self, step: StepSpec) -> None:
        if not step.arguments:
            self.fault(step.where, f"step `{step.name}` has no command")
        if step.shell and not (len(step.arguments) == 1 and isinstance(step.arguments[0], (Text, Concat))):
            self.fault(step.where, f"the shell command of step `{step.name}` is not one text")
        ports = {port.name: port for port in step.inputs}
        for argument in step.arguments:
            for part in argument.parts if isinstance(argument, Concat) else (argument,):
                self._part(step, part)
                port = ports.get(part.port) if isinstance(part, InputArg) else None
                if isinstance(part, InputArg) and port is None:
                    self._near("input", part.port, ports, step.where)
                several = port is not None and isinstance(port.source, Reference) and port.source.glob
                if several and isinstance(argument, Concat):
                    hint = "make it an argument of its own"
                    self.fault(step.where, f"the glob `{part.port}` is a part of an argument", hint)  # type: ignore[union-attr]

    def _part(self, step: StepSpec, part: Arg) -> None:
        if isinstance(part, Text) and "\0" in part.text:
            self.fault(step.where, f"an argument of step `{step.name}` holds a NUL")
        elif isinstance(part, OutputArg) and part.port not in self.outputs[step.name]:
            self._near("output", part.port, self.outputs[step.name], step.where)
        elif isinstance(part, ParameterArg):
            self._uses(part.name, step.where)

    def _code(self, step: StepSpec) -> None:
        source = step.source
        if source is None:
            if step.kind == "python":
                self.fault(step.where, f"step `{step.name}` runs a script, but has no source_directory")
            return
        if not source.directory.startswith("/") or "\0" in source.directory:
            self.fault(step.where, f"the source_directory of step `{step.name}` is not absolute: `{source.directory}`")
        if source.script is not None:
            self._path(f"the script of step `{step.name}`", source.script, step.where)
        elif source.mode == "imports":
            self.fault(step.where, f'step `{step.name}` has code="imports", but no script to start from')

    def published(self) -> None:
        """Two outputs in one place: the later would overwrite the earlier."""
        seen: dict[tuple[str | None, str], tuple[StepSpec, Output]] = {}
        for step in self.spec.steps:
            for output in step.outputs:
                if output.publish is None:
                    continue
                filled = output.publish.replace("{step}", step.name).replace("{output}", output.name)
                other = seen.setdefault((output.datastore, filled), (step, output))
                if other[1] is not output:
                    makers = f"`{other[0].name}/{other[1].name}` and `{step.name}/{output.name}`"
                    self.fault(step.where, f"two outputs are published at `{output.publish}`: {makers}")

    # --- triggers ---------------------------------------------------------------------------------------
    def trigger(self, trigger: Trigger) -> None:
        where = trigger.where
        bound = trigger.parameter if isinstance(trigger, ArrivalSpec) else None
        for parameter in self.spec.parameters:
            if parameter.required and parameter.name != bound:
                self.fault(
                    where, f"a trigger cannot choose the required parameter `{parameter.name}`", "give it a default"
                )
        if isinstance(trigger, CronSpec):
            problem = self.check_cron(trigger.expression, trigger.timezone) if self.check_cron else None
            if problem:
                self.fault(where, problem)
        elif isinstance(trigger, EverySpec):
            if not 1 <= trigger.seconds < _FINITE[1]:
                self.fault(where, f"the interval must be at least a second: {trigger.seconds}")
        elif isinstance(trigger, SuccessSpec):
            self._name("pipeline", trigger.pipeline, where)
            if trigger.pipeline == self.spec.name:
                self.fault(where, f"pipeline `{trigger.pipeline}` would start itself for ever")
        else:
            self._arrival(trigger)

    def _arrival(self, trigger: ArrivalSpec) -> None:
        where = trigger.where
        self._datastore(trigger.source.datastore, where)
        self._path("the path that OnArrival watches", trigger.source.path, where)
        if trigger.marker is not None:
            problem = "names a folder" if "/" in trigger.marker else path_fault(trigger.marker)
            if problem:
                self.fault(where, f"the marker {problem}: `{trigger.marker}`", "it is a file name, like `_SUCCESS`")
        if trigger.min_files < 1:
            self.fault(where, f"min_files must be at least 1: {trigger.min_files}")
        if trigger.parameter is not None:
            self._uses(trigger.parameter, where)
            declared = self.declared.get(trigger.parameter)
            if declared is not None and declared.type != "str":
                self.fault(where, f"parameter `{trigger.parameter}` takes a path, but is of type {declared.type}")
            if trigger.batch != "file":
                self.fault(where, "`parameter` takes the path of one file", 'add `batch="file"`')

    def cycles(self) -> None:
        before = {
            step.name: [
                *(port.source.step for port in step.inputs if isinstance(port.source, Upstream)),
                *step.after,
            ]
            for step in self.spec.steps
        }
        known = {name: [one for one in earlier if one in before] for name, earlier in before.items()}
        place = {step.name: step.where for step in self.spec.steps}
        for cycle in cycles_of(known):
            if len(cycle) == 2:
                self.fault(place[cycle[0]], f"step `{cycle[0]}` waits for itself: {' -> '.join(cycle)}")
            else:
                self.fault(place[cycle[0]], f"steps wait for each other: {' -> '.join(cycle)}")


def variable_of(name: str) -> str:
    """The part of an environment variable's name that stands for `name`."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name).upper()
