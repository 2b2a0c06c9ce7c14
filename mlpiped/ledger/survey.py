"""What retention and `doctor` ask: long reads, on a connection of their own, so that nobody waits behind them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from mlpiped.ledger.db import Reads
from mlpiped.ledger.rows import ArtifactRow
from mlpiped.ledger.text import fs_text

if TYPE_CHECKING:
    from collections.abc import Sequence


class JobRow(NamedTuple):
    """An attempt that the ledger knows. `finished_at`: when its run ended; None while it has not."""

    token: str
    compute: str
    finished_at: int | None


class Survey(Reads):
    """Times are microseconds. The connection can neither write nor checkpoint."""

    async def old_runs(self, before: int, limit: int, *, after: tuple[int, int] = (-1, 0)) -> list[tuple[int, int]]:
        """(created_at, id) of finished runs that may be forgotten, in order, after the last of an earlier page.

        The newest run of a pipeline is kept, and a run whose outputs were reused since `before`.
        """
        created, last = after
        found = await self._every("old_runs", before=before, created=created, after=last, limit=limit)
        return [(row[0], row[1]) for row in found]

    async def tokens_of(self, run_id: int) -> list[tuple[str, str]]:
        """(token, compute) of the run's attempts."""
        return [(row[0], row[1]) for row in await self._every("tokens_of_run", run_id=run_id)]

    async def jobs(self, tokens: Sequence[str]) -> dict[str, JobRow]:
        """What is known of each token; an unknown one is absent."""
        found = await self._every("jobs", tokens=json.dumps(list(tokens)))
        return {row[0]: JobRow(*row) for row in found}

    async def live_tokens(self, tokens: Sequence[str], since: int) -> set[str]:
        """Those whose attempt has not ended, or not before `since`."""
        return {row[0] for row in await self._every("live_tokens", tokens=json.dumps(list(tokens)), since=since)}

    async def oldest_intent(self) -> int | None:
        """When the oldest attempt that lives began."""
        row = await self._one("oldest_intent")
        return None if row is None else row[0]

    async def oldest_run(self) -> int | None:
        """When the oldest run that has not finished was made."""
        row = await self._one("oldest_run")
        return None if row is None else row[0]

    async def artifact_bytes(self) -> int:
        return int((await self._one("artifact_bytes"))[0])

    async def artifacts(self) -> list[ArtifactRow]:
        """Everything that has bytes."""
        rows = await self._every("artifacts")
        return [ArtifactRow(digest, kind, fs_text(path), *rest) for digest, kind, path, *rest in rows]

    async def needed(self) -> set[str]:
        """Digests that unfinished runs build on."""
        return {row[0] for row in await self._every("needed_digests")}

    async def unknown(self, hexes: Sequence[str]) -> set[str]:
        """Of digests without their prefix those that no output has."""
        return {row[0] for row in await self._every("unknown_hexes", hexes=json.dumps(list(hexes)))}

    async def code_in_use(self) -> set[str]:
        """Raw digests of code that a step's last good state, or an attempt that lives, has."""
        return {row[0] for row in await self._every("code_in_use") if row[0] is not None}

    async def stat_page(self, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        """(path, hashed_ns) in the order of paths."""
        return [(row[0], row[1]) for row in await self._every("stat_page", after=after, limit=limit)]

    async def newest_event(self) -> int | None:
        """When something happened last."""
        row = await self._one("newest_event")
        return None if row is None else row[0]

    async def faults(self) -> list[str]:
        """What SQLite finds wrong in the file, its indexes too; empty when it is well. Reads the whole file."""
        rows = await self._reader.call(lambda c: c.execute("PRAGMA integrity_check(10)").fetchall())
        return [row[0] for row in rows if row[0] != "ok"]

    async def schema(self) -> int:
        """The version of the schema."""
        return int((await self._reader.call(lambda c: c.execute("PRAGMA user_version").fetchone()))[0])
