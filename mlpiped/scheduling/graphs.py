"""Versions of pipelines, ready to run: their graphs by version, in memory for as many as are about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpiped.errors import Conflict, UnknownName
from mlpiped.ledger import moves
from mlpiped.resolve import Graph
from mlpiped.spec import PipelineSpec

if TYPE_CHECKING:
    from mlpiped.clock import Clock
    from mlpiped.ledger import Ledger, RunRow

KEPT = 64


class Graphs:
    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self.ledger = ledger
        self.clock = clock
        self._kept: dict[str, Graph] = {}

    async def of(self, row: RunRow) -> Graph:
        """That of the version that the run started with. Raises UnknownName, Conflict (nobody here can read it)."""
        if row.version not in self._kept:
            text = await self.ledger.definition(row.version)
            if text is None:
                raise UnknownName(f"the definition of `{row.pipeline}` version {row.version} is not in the ledger")
            try:
                graph = Graph(PipelineSpec.model_validate_json(text))
            except (ValueError, TypeError, KeyError) as fault:
                raise Conflict(
                    f"this mlpiped cannot read the definition that run {row.id} of `{row.pipeline}` began with",
                    hint="another version has written it: with that one installed, the run goes on",
                ) from fault
            self._keep(row.version, graph)
        return self._kept[row.version]

    async def known(self, spec: PipelineSpec, version: str) -> Graph:
        """The graph of a version that is durable in the ledger from then on."""
        if version not in self._kept:
            await self.ledger.write(moves.save_definition(version, spec.name, spec.model_dump_json(), self.clock.now()))
            self._keep(version, Graph(spec))
        return self._kept[version]

    def _keep(self, version: str, graph: Graph) -> None:
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[version] = graph
