"""The work folder of a cluster that this machine does not see, as its login node shows it: what jobs need is brought
there by content, and what they have made comes home.

Another work folder than the box's own steps have, on the same connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpiped.backends.ssh.carrier import Carrier
from mlpiped.backends.ssh.homecoming import Homecoming
from mlpiped.backends.ssh.keeper import Keeper
from mlpiped.backends.ssh.pruning import Pruning
from mlpiped.backends.ssh.returning import Returning
from mlpiped.backends.ssh.staging import Staging
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mlpiped.backends.base import Job
    from mlpiped.backends.ssh.link import Link
    from mlpiped.backends.ssh.orders import Place


class Stage:
    def __init__(
        self, link: Link, work_dir: Path, instance: str, datastores: Mapping[str, Path], store: int | None = None
    ) -> None:
        """`work_dir`: on the cluster. `store`: bytes of what is brought there that may stay; None: all."""
        link.lasts()
        self.root = f"{work_dir}/{instance}"
        self._keeper = Keeper(link, str(work_dir), instance, link.settings.python, steady=True)
        carrier = Carrier(link)
        self._staging = Staging(self._keeper, carrier, datastores, link.settings.mounts)
        self._pruning = Pruning(self._keeper, carrier, self._staging, store)
        self._homecoming = Homecoming(self._keeper, Returning(carrier), self._staging.progress)

    async def python(self) -> str:
        """The login node's interpreter; "" without one. Raises BackendUnavailable."""
        return (await self._keeper.agent()).box.python

    async def place(self, job: Job) -> Place:
        """Bring what is missing; it stays until `placed`. Raises InvalidJob, BackendUnavailable."""
        return await self._staging.place(job, {})

    async def content(self, token: str, content: str, path: str) -> str | None:
        """Where a file that is here at `path` lies there; None: it is not that content any more. After `place`."""
        return await self._staging.bring(token, content, path)

    def placed(self, token: str) -> None:
        """The job itself says there what it uses, or will not start."""
        self._staging.placed(token)

    async def prune(self, *, only_look: bool) -> tuple[int, int]:
        return await self._pruning.prune(only_look=only_look)

    def forget(self) -> None:
        """Something is not there that we believed there."""
        self._staging.forget()

    async def bring(self, token: str, what: str, folder: Path, names: Sequence[str]) -> None:
        """`names` in the job's folder, into this one. Raises BackendUnavailable."""
        await self._homecoming.bring(token, what, folder, names, below="jobs/")

    async def discard(self, token: str) -> None:
        """What was brought for this job alone. Raises BackendUnavailable."""
        if not await (await self._keeper.agent()).discard("all", token):
            raise BackendUnavailable(f"it is not known that what was brought for `{token}` is gone")

    def missing(self, contents: Mapping[str, int]) -> int:
        return self._staging.missing(contents)

    def doing(self, token: str) -> str | None:
        return self._staging.progress.of(token)

    async def close(self) -> None:
        self._keeper.close()
