"""Pipeline -> plain data for `spec.PipelineSpec`: who makes what, ports, placeholders, parameters.

Faults are collected, so that an author sees all of them at once.
"""

from __future__ import annotations

import os

from mlpiped.sdk import place
from mlpiped.sdk.data import DataReference, PipelineData, PipelineParameter, Placeholder, split
from mlpiped.sdk.errors import DefinitionError
from mlpiped.sdk.shell import hand_over
from mlpiped.sdk.steps import Step
from mlpiped.sdk.triggers import OnArrival

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mlpiped.sdk.pipeline import Pipeline

    Plain = dict[str, Any]


def lower(pipeline: Pipeline) -> tuple[Plain, list[DefinitionError]]:
    """The plain data and every fault found; the data is of use only if there is none."""
    graph = _Graph(pipeline)
    steps = [_StepLowering(step, graph).plain() for step in graph.steps]
    parameters = _parameters(pipeline, graph)
    plain = {
        "name": pipeline.name,
        "where": _where(pipeline.where),
        "steps": steps,
        "parameters": [one.plain() for one in parameters],
        "triggers": [{**trigger.plain(), "where": _where(trigger.where)} for trigger in pipeline.triggers],
        "experiment": pipeline.experiment,
        "description": pipeline.description,
        "overlap": pipeline.overlap,
        "max_parallel": pipeline.max_parallel,
        "priority": pipeline.priority,
        "tags": pipeline.tags,
    }
    return plain, graph.faults


def _where(where: place.Place) -> Plain:
    return {"file": where[0], "line": where[1]}


class _Graph:
    """The steps of a pipeline, listed and reached; who makes which data; the faults found so far."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.faults: list[DefinitionError] = []
        self.used: list[PipelineParameter] = []
        self.maker: dict[PipelineData, Step] = {}
        self.steps = list(dict.fromkeys(pipeline.steps))
        self.members = set(self.steps)
        if not self.steps:
            self.fault(f"pipeline `{pipeline.name}` has no steps", pipeline.where)
        for step in self.steps:
            self._claim(step)
        for step in self.steps:  # grows while it is walked
            self._reach(step)
        self._names()
        self._order()

    def fault(self, message: str, where: place.Place, hint: str | None = None) -> None:
        self.faults.append(DefinitionError(message, where, hint))

    def _claim(self, step: Step) -> None:
        for made in step.outputs:
            other = self.maker.setdefault(made, step)
            if other is not step:
                self.fault(
                    f"`{made.name}` is made by two steps: `{other.name}` ({_line(other)}) and `{step.name}`",
                    step.where,
                    "give each its own `PipelineData`",
                )

    def _reach(self, step: Step) -> None:
        for data in taken(step):
            if data in self.maker or not isinstance(data, PipelineData):
                continue
            if len(data.producers) == 1:
                self._add(data.producers[0])
            elif not data.producers:
                self.fault(
                    f"step `{step.name}` takes `{data.name}`, which no step makes",
                    step.where,
                    "list it in `outputs=` of the step that makes it",
                )
                self.maker[data] = step  # said once
            else:
                makers = " or ".join(f"`{one.name}` ({_line(one)})" for one in data.producers)
                self.fault(
                    f"step `{step.name}` takes `{data.name}`, which several steps make: {makers}",
                    step.where,
                    "list the one that belongs to this pipeline in `steps=`",
                )
                self.maker[data] = step
        for earlier in step.after:
            self._add(earlier)

    def _add(self, step: Step) -> None:
        if step not in self.members:
            self.members.add(step)
            self.steps.append(step)
            self._claim(step)

    def _names(self) -> None:
        seen: dict[str, Step] = {}
        for step in self.steps:
            other = seen.setdefault(step.name, step)
            if other is not step:
                self.fault(
                    f"two steps are named `{step.name}`: {_line(other)} and {_line(step)}",
                    step.where,
                    "give one of them `name=`",
                )

    def _order(self) -> None:
        """Makers before takers, otherwise as listed. What is in a cycle stays at the end, for the check to name."""
        before = {
            step: {self.maker[data] for data in taken(step) if isinstance(data, PipelineData) and data in self.maker}
            | set(step.after)
            for step in self.steps
        }
        after: dict[Step, list[Step]] = {step: [] for step in self.steps}
        for step, earlier in before.items():
            for one in earlier:
                after[one].append(step)
        position = {step: number for number, step in enumerate(self.steps)}
        import heapq

        ready = [position[step] for step in self.steps if not before[step]]
        heapq.heapify(ready)
        done: list[Step] = []
        while ready:
            step = self.steps[heapq.heappop(ready)]
            done.append(step)
            for later in after[step]:
                before[later].discard(step)
                if not before[later]:
                    heapq.heappush(ready, position[later])
        rest = set(done)
        self.steps = done + [step for step in self.steps if step not in rest]

    def use(self, parameter: PipelineParameter) -> str:
        self.used.append(parameter)
        return parameter.name


def _line(step: Step) -> str:
    return f"{os.path.basename(step.where[0])}:{step.where[1]}"


def _pieces(text: str) -> list[str | Placeholder]:
    try:
        return split(text)
    except ValueError:
        return []


def taken(step: Step) -> list[DataReference | PipelineData]:
    """The data that `step` is given, in the order of its arguments, each once."""
    made = set(step.outputs)
    found: dict[DataReference | PipelineData, None] = {}
    texts = [step.shell] if step.shell is not None else step.arguments
    for argument in texts:
        for piece in _pieces(argument) if isinstance(argument, str) else (argument,):
            if isinstance(piece, (DataReference, PipelineData)) and piece not in made:
                found[piece] = None
    found.update(dict.fromkeys(step.inputs))
    return list(found)


class _StepLowering:
    """One step on its way to plain data."""

    def __init__(self, step: Step, graph: _Graph) -> None:
        self.step = step
        self.graph = graph
        self.ports: dict[str, Plain] = {}
        self.port_of: dict[object, str] = {}
        self.in_arguments: set[str] = set()

    def plain(self) -> Plain:
        step = self.step
        shell, arguments = self._command()
        for data in step.inputs:
            if isinstance(data, PipelineData) and data in step.outputs:
                self.graph.fault(f"step `{step.name}` takes `{data.name}`, which it makes itself", step.where)
            else:
                self._port(data)
        in_arguments = self.in_arguments
        return {
            "name": step.name,
            "where": _where(step.where),
            "kind": step.kind,
            "arguments": arguments,
            "shell": shell,
            "source": self._source(),
            "inputs": [{**port, "in_arguments": name in in_arguments} for name, port in self.ports.items()],
            "outputs": [self._output(made) for made in step.outputs],
            "parameters": sorted({self.graph.use(one) for one in step.params}),
            "after": [earlier.name for earlier in step.after],
            "compute": step.compute,
            "resources": {**(step.resources.plain() if step.resources is not None else {}), **step.shape()},
            "retry": step.retry.plain() if step.retry is not None else {},
            "timeout": step.timeout,
            "grace": step.grace,
            "environment": step.environment.plain() if step.environment is not None else {},
            "allow_reuse": step.allow_reuse,
            "effect": step.effect,
            "salt": step.salt,
            "priority": step.priority,
            "description": step.description,
        }

    def _command(self) -> tuple[bool, list[Plain]]:
        step = self.step
        if step.shell is None:
            return False, [_text(one) for one in step.start()] + [self._argument(one) for one in step.arguments]
        pieces = self._split(step.shell)
        try:
            command, handed = hand_over(pieces)
        except ValueError as problem:
            self.graph.fault(
                f"a value cannot be put into the shell command of `{step.name}`: {problem}",
                step.where,
                "give the command as a list",
            )
            return True, [_text("true")]
        if not handed:
            return True, [_text(command)]
        for one in handed:
            if isinstance(one, DataReference) and one.glob:
                self.graph.fault(
                    f"the glob `{one.path}` in the shell command of `{step.name}` may be many paths",
                    step.where,
                    "give the command as a list: there each path becomes an argument",
                )
        start = ["/bin/sh", "-c", command, "sh"]
        return False, [_text(one) for one in start] + [self._placeholder(one) for one in handed]

    def _split(self, text: str) -> list[str | Placeholder]:
        try:
            return split(text)
        except ValueError:
            self.graph.fault(f"an argument of `{self.step.name}` holds a NUL", self.step.where)
            return ["?"]

    def _argument(self, argument: object) -> Plain:
        if isinstance(argument, Placeholder):
            return self._placeholder(argument)
        if not isinstance(argument, str):
            return _text(str(argument))
        parts = [
            _text(piece) if isinstance(piece, str) else self._placeholder(piece) for piece in self._split(argument)
        ]
        if len(parts) == 1:
            return parts[0]
        return {"kind": "concat", "parts": parts} if parts else _text("")

    def _placeholder(self, piece: Placeholder) -> Plain:
        if isinstance(piece, PipelineParameter):
            return {"kind": "parameter", "name": self.graph.use(piece)}
        if isinstance(piece, PipelineData) and piece in self.step.outputs:
            return {"kind": "output", "port": piece.name}
        assert isinstance(piece, (DataReference, PipelineData))
        port = self._port(piece)
        self.in_arguments.add(port)
        return {"kind": "input", "port": port}

    def _port(self, data: DataReference | PipelineData) -> str:
        """The name of the port that brings `data`: one port for one thing, however often it is named."""
        if isinstance(data, DataReference):
            identity: object = (data.datastore, data.path, data.glob)
            wanted = data.shown_name
            source: Plain = {"kind": "reference", "datastore": data.datastore, "path": data.path, "glob": data.glob}
        else:
            identity, wanted = data, data.name
            maker = self.graph.maker.get(data)
            source = {"kind": "upstream", "step": maker.name if maker else "", "output": data.name}
        if identity not in self.port_of:
            name, number = wanted, 1
            while name in self.ports:
                number += 1
                name = f"{wanted[:60]}_{number}"
            self.port_of[identity] = name
            self.ports[name] = {"name": name, "source": source}
        return self.port_of[identity]

    def _output(self, made: PipelineData) -> Plain:
        return {
            "name": made.name,
            "output_kind": made.kind,
            "file_name": made.file_name,
            "datastore": made.datastore,
            "publish": made.published,
            "keep": made.keep,
        }

    def _source(self) -> Plain | None:
        step = self.step
        if step.directory is None:
            return None
        if not os.path.isdir(step.directory):
            place.absent.add(step.directory)
            self.graph.fault(
                f"no such folder: `{step.directory}`",
                step.where,
                "`source_directory` is relative to the plugin's folder",
            )
        elif step.script is not None and not os.path.isfile(os.path.join(step.directory, step.script)):
            place.absent.add(os.path.join(step.directory, step.script))
            self.graph.fault(f"no such script: `{os.path.join(step.directory, step.script)}`", step.where)
        return {"directory": step.directory, "mode": step.mode, "script": step.script}


def _text(text: str) -> Plain:
    return {"kind": "text", "text": text}


def _parameters(pipeline: Pipeline, graph: _Graph) -> list[PipelineParameter]:
    """Declared ones first, then as used. One name, one definition."""
    by_trigger = [
        one.parameter for one in pipeline.triggers if isinstance(one, OnArrival) and one.parameter is not None
    ]
    found: dict[str, PipelineParameter] = {}
    for parameter in [*pipeline.parameters, *graph.used, *by_trigger]:
        other = found.setdefault(parameter.name, parameter)
        if other is not parameter and other.plain() != parameter.plain():
            graph.fault(
                f"parameter `{parameter.name}` has two definitions: lines {other.where[1]} and {parameter.where[1]}",
                parameter.where,
                "define it once and use that object",
            )
            found[parameter.name] = parameter
    return list(found.values())
