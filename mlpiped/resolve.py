"""What runs and what is reused. Pure: a graph, what is known of the world, and past results in; decisions out.

Rule 1: a step is decided when everything before it has ended: its inputs are then content digests, so a step that ran
        again and made the same bytes stops the wave.
Rule 2: only a committed, intact result of the very same key is reused; everything else runs, and says why.
Rule 3: the world comes in as facts. Nothing here reads a file, a clock or the ledger.

`Graph` is built once per version of a pipeline; a `Plan` is one walk over it. Both are linear in steps and edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlpiped.errors import UnknownName
from mlpiped.keys import StaticParts
from mlpiped.model import OutputFact, StepOutcome
from mlpiped.spec import Concat, ParameterArg, Reference, Upstream

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mlpiped.spec import PipelineSpec, Scalar, StepSpec


class Graph:
    """The shape of one version of a pipeline: dense integers for steps, in the order of the definition."""

    __slots__ = ("after", "before", "index", "parameters", "publishing", "references", "spec", "static", "steps")

    def __init__(self, spec: PipelineSpec) -> None:
        self.spec = spec
        self.steps: Sequence[StepSpec] = spec.steps
        self.index = {step.name: i for i, step in enumerate(spec.steps)}
        self.before: list[tuple[int, ...]] = []  # all that must have ended first
        self.after: list[list[int]] = [[] for _ in spec.steps]
        self.static = [StaticParts(step) for step in spec.steps]
        self.parameters = [_used_parameters(step) for step in spec.steps]
        self.publishing = {i for i, step in enumerate(spec.steps) if any(o.publish for o in step.outputs)}
        self.references: list[tuple[Reference, ...]] = []
        for i, step in enumerate(spec.steps):
            names = dict.fromkeys(port.source.step for port in step.inputs if isinstance(port.source, Upstream))
            names.update(dict.fromkeys(step.after))
            needs = tuple(self.index[name] for name in names)
            self.before.append(needs)
            for need in needs:
                self.after[need].append(i)
            self.references.append(tuple(p.source for p in step.inputs if isinstance(p.source, Reference)))

    def step(self, name: str) -> int:
        """The step's index. Raises UnknownName with the nearest names."""
        if name not in self.index:
            raise UnknownName.among("step", name, self.index)
        return self.index[name]

    def needed_for(self, target: int) -> set[int]:
        """`target` and everything that it is made from."""
        found, stack = {target}, [target]
        while stack:
            for need in self.before[stack.pop()]:
                if need not in found:
                    found.add(need)
                    stack.append(need)
        return found


Action = Literal["run", "reuse", "skip", "fail", "cancel", "hold", "away", "unknown"]
"""`hold`: it cannot be told now; decide it again when that may have changed."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one step and the sentence that says why."""

    index: int
    action: Action
    why: str
    key: str | None = None
    outputs: tuple[OutputFact, ...] = ()
    reused_from: tuple[int, str] | None = None  # run id, step name


@dataclass(frozen=True, slots=True)
class PastResult:
    """A committed result under a key. `intact` is False when what it made is missing or was changed since."""

    run: int
    step: str
    outputs: tuple[OutputFact, ...]
    intact: bool = True


class Plan:
    """One walk over a graph: `ready()`, `finished()`, `more_to_do()`."""

    def __init__(self, graph: Graph, *, target: int | None = None, force: Collection[int] = ()) -> None:
        self.graph = graph
        self.force = frozenset(force)
        self.outcome: list[StepOutcome | None] = [None] * len(graph.steps)
        self.outputs: list[dict[str, OutputFact] | None] = [None] * len(graph.steps)
        self.unneeded: set[int] = set()
        if target is not None:
            self.unneeded = set(range(len(graph.steps))) - graph.needed_for(target)
        self._missing = [len(needs) for needs in graph.before]
        self._ready = [i for i, n in enumerate(self._missing) if n == 0]
        self._open = len(graph.steps)

    def ready(self) -> list[int]:
        """The steps that can be decided now and have not been handed out before."""
        found, self._ready = self._ready, []
        return [i for i in found if self.outcome[i] is None]

    def finished(self, index: int, outcome: StepOutcome, outputs: Iterable[OutputFact] = ()) -> None:
        """Step `index` has ended. What comes after it may be ready now."""
        if self.outcome[index] is not None:
            return
        self.outcome[index] = outcome
        self.outputs[index] = {fact.name: fact for fact in outputs}
        self._open -= 1
        for later in self.graph.after[index]:
            self._missing[later] -= 1
            if self._missing[later] == 0:
                self._ready.append(later)

    def more_to_do(self) -> bool:
        return self._open > 0

    def blocked_by(self, index: int) -> str | None:
        """Why step `index` cannot run at all, or None."""
        if index in self.unneeded:
            return "not needed for the target"
        for need in self.graph.before[index]:
            outcome = self.outcome[need]
            if outcome is not None and not outcome.good:
                return f"`{self.graph.steps[need].name}` {_ended(outcome)}"
        return None

    def waits_for(self, index: int) -> list[int]:
        return [need for need in self.graph.before[index] if self.outcome[need] is None]

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for outcome in self.outcome:
            word = "open" if outcome is None else outcome.value
            found[word] = found.get(word, 0) + 1
        return found


@dataclass(frozen=True, slots=True)
class Known:
    """What one ready step's decision rests on."""

    key: str
    past: PastResult | None = None
    last: Mapping[str, object] | None = None  # the parts under which it last succeeded in this pipeline
    changes: Sequence[str] = field(default_factory=tuple)  # differences from `last`


def always_runs(plan: Plan, index: int) -> str | None:
    """The sentence for a step that runs whatever the past says, or None."""
    step = plan.graph.steps[index]
    if index in plan.force:
        return "forced"
    if step.effect:
        return "always runs: it has an effect (effect=True)"
    if not step.allow_reuse:
        return "always runs: allow_reuse=False"
    return None


def decide(plan: Plan, index: int, known: Known) -> Decision:
    """Rule 2, with its reason."""
    always = always_runs(plan, index)
    if always is not None:
        return Decision(index, "run", always, known.key)
    past = known.past
    if past is not None and past.intact:
        why = f"reused from run {past.run}"
        if past.step != plan.graph.steps[index].name:
            why += f" (`{past.step}`)"
        return Decision(index, "reuse", why, known.key, past.outputs, (past.run, past.step))
    if past is not None:
        return Decision(index, "run", f"what run {past.run} made is missing or was changed since", known.key)
    if known.last is None:
        return Decision(index, "run", "has not succeeded before", known.key)
    if known.changes:
        return Decision(index, "run", "; ".join(known.changes), known.key)
    return Decision(index, "run", "its last result is gone from the ledger", known.key)


def parameter_values(plan: Plan, index: int, values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {name: values[name] for name in plan.graph.parameters[index]}


def _used_parameters(step: StepSpec) -> tuple[str, ...]:
    names = dict.fromkeys(step.parameters)
    for argument in step.arguments:
        for part in argument.parts if isinstance(argument, Concat) else (argument,):
            if isinstance(part, ParameterArg):
                names[part.name] = None
    return tuple(names)


def _ended(outcome: StepOutcome) -> str:
    return {
        StepOutcome.FAILED: "failed",
        StepOutcome.TIMED_OUT: "timed out",
        StepOutcome.CANCELLED: "was cancelled",
        StepOutcome.SKIPPED: "was skipped",
        StepOutcome.LOST: "was lost",
    }.get(outcome, str(outcome))
