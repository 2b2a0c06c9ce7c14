"""From a graph to decisions: gathers what is known of the world for the steps that are ready, and asks `resolve`.

Everything is asked in bulk, a wave of ready steps at a time: one look at the files, one at the ledger's results. The
same walk serves a run and `plan`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mlpiped import keys, resolve
from mlpiped.errors import InvalidJob, MlpipedError, StorageAway
from mlpiped.execution.images import RunImages, wanted_by
from mlpiped.files.fingerprint import Missing, RefFact
from mlpiped.resolve import Decision, Graph, Known, PastResult, Plan
from mlpiped.spec import Reference, SourceSpec, Upstream

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from mlpiped.artifacts import Store
    from mlpiped.backends.base import Backend, Image
    from mlpiped.code import CodeFact, CodeReader
    from mlpiped.execution.images import Find
    from mlpiped.execution.kept import Kept
    from mlpiped.files.fingerprint import Fingerprinter
    from mlpiped.ledger import Ledger
    from mlpiped.model import OutputFact
    from mlpiped.spec import Port, Scalar, StepSpec


@dataclass(frozen=True, slots=True)
class World:
    """The rooms that facts come from, and what has begun on which backend."""

    ledger: Ledger
    fingerprinter: Fingerprinter
    code: CodeReader
    store: Store
    datastores: Mapping[str, Path]
    find_image: Find | None = None  # None: nothing here runs containers
    kept: Kept | None = None  # None: no machine keeps what is made on it
    begun: dict[str, Backend] = field(default_factory=dict)  # by token of the attempt, which has not ended


@dataclass(frozen=True, slots=True)
class Outside:
    """An input from a datastore, as it was when the key was made. `entries` None: there were too many to keep."""

    reference: Reference
    digest: str
    entries: Mapping[str, str] | None
    size: int = 0  # bytes, all files together; 0 after a restart

    def change(self, now: RefFact) -> str | None:
        """What of it is no longer so, or None. Files that are new in a glob were not passed, and do not count."""
        if now.digest == self.digest:
            return None
        if self.entries is None:
            return "its content is another"
        seen = now.entries
        if self.reference.glob:
            seen = {name: digest for name, digest in now.entries.items() if name in self.entries}
            if seen == self.entries:
                return None
        return keys.describe_entries(self.entries, seen)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What one step that will run rests on: everything its job is made from, as it was when the key was made."""

    key: str
    parts: Mapping[str, object]
    parameters: Mapping[str, Scalar]
    paths: Mapping[str, tuple[str, ...]]  # port -> absolute paths
    outside: Mapping[str, Outside]  # by port
    upstream: tuple[tuple[int, str], ...]  # (step, output) of inputs that other steps made
    source: SourceSpec | None
    code: CodeFact | None
    image: Image | None = None  # of a step that runs in a container


class Facts:
    """The facts of one run of one version of a pipeline, gathered as its steps become ready."""

    def __init__(self, world: World, graph: Graph, parameters: Mapping[str, Scalar]) -> None:
        self.world = world
        self.graph = graph
        self.parameters = parameters
        self.images = RunImages(world.find_image)
        self.steps: dict[int, StepFacts] = {}
        self.pins: dict[SourceSpec, str] = {}  # the code as it was when the run began, by its raw digest

    async def pin(self, plan: Plan, begun: Collection[int]) -> list[list[str | None]]:
        """Keep the code of all steps: it may be edited, or removed, while they wait. Those of `begun` make their copies
        themselves. [folder, mode, script, raw digest] of each, for `unpin` after a restart."""
        later: dict[SourceSpec, CodeFact | None] = {}
        for i, step in enumerate(self.graph.steps):
            if step.source is not None and plan.outcome[i] is None:
                code = self.steps[i].code if i in self.steps else None
                if code is not None and i in begun:
                    self.pins[step.source] = code.raw
                else:
                    later[step.source] = code or later.get(step.source)
        for source, known in later.items():
            if source in self.pins:
                continue
            try:
                fact = known or await self.world.code.read(source)
                await self.world.code.snapshot(source, fact)
            except (MlpipedError, OSError):
                continue  # the step that wants it says so in its turn
            self.pins[source] = fact.raw
        return [[source.directory, source.mode, source.script, raw] for source, raw in self.pins.items()]

    def unpin(self, kept: Iterable[Any]) -> None:
        for directory, mode, script, raw in kept:
            self.pins[SourceSpec(directory=directory, mode=mode, script=script)] = raw

    async def decide(self, plan: Plan, indexes: Sequence[int]) -> list[Decision]:
        """A decision for each of `indexes`, all of them ready. Facts of those that run are kept in `steps`.

        "hold" is for a step whose image is not known: `images.look_up` it, and decide the step again. "away" is for one
        whose input lies in a datastore that cannot be read now: decide it again after a while.
        """
        decisions: list[Decision] = []
        open_: list[int] = []
        for i in indexes:
            blocked = plan.blocked_by(i)
            if blocked is None:
                open_.append(i)
            else:
                decisions.append(Decision(i, "skip", blocked))
        references = await self._references(open_)
        codes = await self._codes(open_)
        keyed: dict[int, tuple[str, dict[str, keys.InputPart]]] = {}
        for i in open_:
            try:
                inputs = self._inputs(plan, i, references)
            except _NoInput as fault:
                decisions.append(Decision(i, "away" if fault.away else "fail", fault.message))
                continue
            fault_or_code = self._code_of(i, codes)
            if isinstance(fault_or_code, str):
                decisions.append(Decision(i, "fail", fault_or_code))
                continue
            undecided = self._without_image(i)
            if undecided is not None:
                decisions.append(undecided)
                continue
            values = resolve.parameter_values(plan, i, self.parameters)
            code = fault_or_code.key if fault_or_code else None
            keyed[i] = (self.graph.static[i].key(code, values, inputs, self._image_part(i)), inputs)
        past = await self._past({key for i, (key, _) in keyed.items() if resolve.always_runs(plan, i) is None})
        to_run: list[int] = []
        for i, (key, _) in keyed.items():
            found = resolve.decide(plan, i, Known(key, past.get(key)))
            if found.action == "reuse":
                decisions.append(found)
            else:
                to_run.append(i)
        decisions += await self._decide_runs(plan, to_run, keyed, past, references, codes)
        return decisions

    async def adopt(self, plan: Plan, began: Mapping[int, str]) -> None:
        """After a restart: the facts of steps whose attempts run already, from the parts of their keys."""
        for i, key in began.items():
            text = await self.world.ledger.parts(key)
            parts: dict[str, Any] = json.loads(text) if text else {}
            step = self.graph.steps[i]
            kept: Mapping[str, Any] = parts.get("inputs", {})
            outside = {}
            for port in step.inputs:
                if isinstance(port.source, Reference):
                    part = kept.get(self.graph.static[i].ports[port.name], {})
                    outside[port.name] = Outside(port.source, part.get("digest", ""), part.get("entries"))
            values = resolve.parameter_values(plan, i, self.parameters)
            wanted = wanted_by(step)
            image = None if wanted is None else self.images.recall(wanted, parts)
            self.steps[i] = StepFacts(key, parts, values, {}, outside, self._upstream(step), None, None, image)

    async def recall_images(self, keys: Mapping[int, str]) -> None:
        """After a restart: what attempts of this run were given, so that their retries are given no other."""
        for i, key in keys.items():
            wanted = wanted_by(self.graph.steps[i])
            text = None if wanted is None else await self.world.ledger.parts(key)
            if wanted is not None and text:
                self.images.recall(wanted, json.loads(text))

    async def changed_since(self, index: int, plan: Plan) -> str | None:
        """What of the inputs of step `index` is no longer what its key says, as a sentence's end, or None. Raises
        StorageAway: nobody can tell now."""
        step = self.steps[index]
        if step.outside:
            found = await self._references_of([o.reference for o in step.outside.values()])
            for port, before in step.outside.items():
                now = found[before.reference]
                if isinstance(now, Missing):
                    if now.away:
                        raise StorageAway(f"input {port}: {now.sentence}")
                    return f"input {port}: {now.sentence}"
                change = before.change(now)
                if change is not None:
                    return f"input {port}: {change}"
        made = self.made(step, plan)
        for bad in await self.world.store.intact(made):
            return f"input {made[bad].name}: it was changed in the store"
        return None

    def known_unchanged(self, index: int, plan: Plan) -> bool:
        """Whether `changed_since` would say None without reading a byte; for threads."""
        step, known = self.steps[index], self.world.datastores
        before = [each for port, each in step.outside.items() if not self._same_file(each, step.paths.get(port, ()))]
        if any(each.reference.datastore not in known for each in before):
            return False
        wanted = [(known[each.reference.datastore], each.reference) for each in before]
        found = self.world.fingerprinter.at_hand(wanted) if wanted else []
        if found is None:
            return False
        same = all(isinstance(now, RefFact) and was.change(now) is None for was, now in zip(before, found, strict=True))
        return same and self.world.store.intact_at_hand(self.made(step, plan)) == set()

    def _same_file(self, before: Outside, paths: Sequence[str]) -> bool:
        """Whether it is one file that is still the one that the key was made of: what most inputs are."""
        if len(paths) != 1 or before.reference.glob:
            return False
        return self.world.fingerprinter.recall_now(paths[0]) == before.digest

    def made(self, step: StepFacts, plan: Plan) -> list[OutputFact]:
        return [(plan.outputs[i] or {})[output] for i, output in step.upstream]

    # --- gathering ------------------------------------------------------------------------------------------
    async def _references(self, indexes: Sequence[int]) -> dict[Reference, RefFact | Missing]:
        return await self._references_of(ref for i in indexes for ref in self.graph.references[i])

    async def _references_of(self, references: Iterable[Reference]) -> dict[Reference, RefFact | Missing]:
        wanted = list(dict.fromkeys(references))
        if not wanted:
            return {}
        known = [(self.world.datastores[r.datastore], r) for r in wanted if r.datastore in self.world.datastores]
        found = dict(zip((r for _, r in known), await self.world.fingerprinter.references(known), strict=True))
        lost = {r: Missing(f"no datastore named `{r.datastore}` in the config") for r in wanted if r not in found}
        return {**found, **lost}

    async def _codes(self, indexes: Sequence[int]) -> dict[SourceSpec, CodeFact | str]:
        found: dict[SourceSpec, CodeFact | str] = {}
        for i in indexes:
            source = self.graph.steps[i].source
            if source is not None and source not in found:
                try:
                    found[source] = await self.world.code.read(source)
                except MlpipedError as fault:
                    found[source] = await self._pinned(source) or fault.message
                except OSError as fault:
                    found[source] = f"its code cannot be read: {fault.filename}: {fault.strerror}"
        return found

    def _without_image(self, index: int) -> Decision | None:
        """The decision for a step that cannot have a key for want of its image; else None."""
        wanted = wanted_by(self.graph.steps[index])
        if wanted is None:
            return None
        try:
            found = self.images.of(wanted)
        except InvalidJob as fault:
            return Decision(index, "fail", fault.message)
        return Decision(index, "hold", self.images.why_not(wanted)) if found is None else None

    def _image_part(self, index: int) -> keys.ImagePart | None:
        wanted = wanted_by(self.graph.steps[index])
        image = None if wanted is None else self.images.of(wanted)
        if wanted is None or image is None:
            return None
        text = wanted.dockerfile
        source = None if text is None else "b3:" + blake3(text.encode()).hexdigest()
        return keys.ImagePart(image.identity, image.run, wanted.reference or "", source)

    async def _pinned(self, source: SourceSpec) -> CodeFact | None:
        """The code that is no longer where it was, as it was when the run began."""
        if source not in self.pins:
            return None
        kept = replace(source, directory=str(self.world.code.place(self.pins[source])))
        try:
            return await self.world.code.read(kept)
        except (MlpipedError, OSError):
            return None

    def _code_of(self, index: int, codes: Mapping[SourceSpec, CodeFact | str]) -> CodeFact | str | None:
        source = self.graph.steps[index].source
        return None if source is None else codes[source]

    def _inputs(
        self, plan: Plan, index: int, references: Mapping[Reference, RefFact | Missing]
    ) -> dict[str, keys.InputPart]:
        found: dict[str, keys.InputPart] = {}
        for port in self.graph.steps[index].inputs:
            if isinstance(port.source, Upstream):
                made = plan.outputs[self.graph.index[port.source.step]] or {}
                found[port.name] = keys.InputPart(made[port.source.output].digest, port.name, upstream=port.source.step)
                continue
            fact = references[port.source]
            if isinstance(fact, Missing):
                raise _NoInput(f"input {port.name}: {fact.sentence}", fact.away)
            found[port.name] = keys.InputPart(fact.digest, port.name, fact.entries)
        return found

    async def _past(self, wanted: set[str]) -> dict[str, PastResult]:
        if not wanted:
            return {}
        results = await self.world.ledger.results(list(wanted))
        flat = [(key, fact) for key, result in results.items() for fact in result.outputs]
        broken = {flat[n][0] for n in await self.world.store.intact([fact for _, fact in flat])}
        if (kept := self.world.kept) is not None:
            broken.update(key for key, fact in flat if not kept.within_reach(fact))
        return {
            key: PastResult(result.run_id, result.step_name, result.outputs, key not in broken)
            for key, result in results.items()
        }

    async def _decide_runs(
        self,
        plan: Plan,
        indexes: Sequence[int],
        keyed: Mapping[int, tuple[str, dict[str, keys.InputPart]]],
        past: Mapping[str, PastResult],
        references: Mapping[Reference, RefFact | Missing],
        codes: Mapping[SourceSpec, CodeFact | str],
    ) -> list[Decision]:
        """Decisions for steps that run, each with what changed since the step last succeeded in this pipeline."""
        if not indexes:
            return []
        spec = self.graph.spec
        heads = await self.world.ledger.heads(spec.name, [spec.steps[i].name for i in indexes])
        found = []
        for i in indexes:
            key, inputs = keyed[i]
            step = spec.steps[i]
            code = self._code_of(i, codes)
            assert not isinstance(code, str)
            values = resolve.parameter_values(plan, i, self.parameters)
            part = keys.CodePart(code.key, code.raw, code.files) if code else None
            wanted = wanted_by(step)
            parts = self.graph.static[i].parts(part, values, inputs, self._image_part(i))
            head = heads.get(step.name)
            changes: list[str] = []
            last = json.loads(head.parts) if head is not None and head.parts else None
            if last is not None:
                changes = keys.changes(last, parts, await self._code_change(last, code))
            self.steps[i] = StepFacts(
                key=key,
                parts=parts,
                parameters=values,
                paths={port.name: self._paths(plan, port, references) for port in step.inputs},
                outside=_outside(step, references),
                upstream=self._upstream(step),
                source=step.source,
                code=code,
                image=None if wanted is None else self.images.of(wanted),
            )
            found.append(resolve.decide(plan, i, Known(key, past.get(key), last, changes)))
        return found

    def _upstream(self, step: StepSpec) -> tuple[tuple[int, str], ...]:
        sources = (port.source for port in step.inputs)
        return tuple((self.graph.index[s.step], s.output) for s in sources if isinstance(s, Upstream))

    async def _code_change(self, last: Mapping[str, object], code: CodeFact | None) -> str | None:
        before = keys.code_of(last)
        if before is None or code is None or before.digest == code.key:
            return None
        return await self.world.code.diff(before.raw, before.files, code)

    def _paths(self, plan: Plan, port: Port, references: Mapping[Reference, RefFact | Missing]) -> tuple[str, ...]:
        if isinstance(port.source, Upstream):
            made = plan.outputs[self.graph.index[port.source.step]] or {}
            return (made[port.source.output].path,)
        fact = references[port.source]
        assert isinstance(fact, RefFact)
        return fact.paths


class _NoInput(Exception):
    def __init__(self, message: str, away: bool) -> None:
        self.message, self.away = message, away


def _outside(step: StepSpec, references: Mapping[Reference, RefFact | Missing]) -> dict[str, Outside]:
    found = {}
    for port in step.inputs:
        if isinstance(port.source, Reference):
            fact = references[port.source]
            assert isinstance(fact, RefFact)
            found[port.name] = Outside(port.source, fact.digest, fact.entries, fact.size)
    return found
