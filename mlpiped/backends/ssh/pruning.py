"""What was sent to a box, and built there, is removed again: by age since its last use, and beyond a size.

What decides is `prune.sh`, which sees what jobs of any daemon use; a job that comes too late for what went is told so,
and has it sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlpiped.backends.ssh.carrier import Carrier
    from mlpiped.backends.ssh.keeper import Keeper
    from mlpiped.backends.ssh.staging import Staging

UNUSED = 30 * 86_400  # seconds
ANSWER = 3600.0  # seconds: it adds up what lies there


class Pruning:
    def __init__(self, keeper: Keeper, carrier: Carrier, staging: Staging, store: int | None) -> None:
        """`store`: bytes; None: nothing goes."""
        self.keeper, self.carrier, self._staging = keeper, carrier, staging
        self._store = store

    async def prune(self, *, only_look: bool) -> tuple[int, int]:
        """(how many went, or would go; their bytes). Raises BackendUnavailable."""
        if self._store is None:
            return 0, 0
        agent = await self.keeper.agent()
        words = [str(UNUSED), str(self._store >> 10), "look" if only_look else "go"]
        command = agent.box.script("prune.sh", agent.box.root, *words)
        stays = " ".join(sorted(self._staging.used())) + "\n"
        gone = _gone(await self.carrier.lines(command, ANSWER, stays.encode()))
        if not only_look:
            self._staging.lost(gone)
        return len(gone), sum(gone.values()) << 10


def _gone(lines: Sequence[str]) -> dict[str, int]:
    """Name -> KiB."""
    words = [line.split() for line in lines]
    return {found[1]: int(found[2]) for found in words if found[:1] == ["gone"] and found[-1].isdigit()}
