"""Daemons with one promise broken, each in one place. A harness that does not notice them proves nothing.

    python mutants.py NAME serve --config FILE

The product knows nothing of this: what is broken is put in its place here, before the daemon starts. A mutant whose
place is gone ends at once, with an AttributeError.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

GAP = 0.06
"""Seconds by which the race of `liveness_after_exit` is widened: in the wild it is lost once in thousands of steps."""


def fence_removed() -> None:
    """After a crash it is taken for granted that a token without a handle has never started."""
    from mlpiped.backends.local import LocalBackend

    _replace(LocalBackend, "fence", _no_fence)


def fence_removed_from_boxes() -> None:
    """The same, of a token whose box was out of reach when its launch was asked for, too."""
    from mlpiped.backends.ssh import SshBackend

    _replace(SshBackend, "fence", _no_fence)


async def _no_fence(self: Any, token: str) -> Any:
    from mlpiped.backends.base import NeverRan

    return NeverRan("the fence has been removed")


def sbatch_believed() -> None:
    """What sbatch did not say it had submitted was not submitted, and need not be looked for."""
    from mlpiped.backends.slurm import SlurmBackend, submission

    async def recorded(self: Any, tokens: Any) -> dict[str, Any]:
        standing = await self._files.standing(tokens)
        return {token: submission.handle_of(token, one.record) for token, one in standing.items() if one.record}

    _replace(SlurmBackend, "find", recorded)
    _replace(SlurmBackend, "fence", _no_fence_without_record)


async def _no_fence_without_record(self: Any, token: str) -> Any:
    return (await self.find([token])).get(token) or await _no_fence(self, token)


def liveness_after_exit() -> None:
    """The exit file is read first, and then whether the supervisor lives: it may end between the two.

    Every wait is by the folder, as it is after a restart: what a supervisor says to the daemon is not heard.
    """
    from mlpiped.backends import folder, launcher
    from mlpiped.backends.local import LocalBackend

    watch, witness = LocalBackend._watch, folder.witness
    early: ContextVar[tuple[Any, ...]] = ContextVar("early", default=())  # what the exit file said before the look

    async def late_watch(self: LocalBackend, at: Any, handle: Any) -> Any:
        token = early.set((witness(at),))
        try:
            await asyncio.sleep(GAP)
            return await watch(self, at, handle)
        finally:
            early.reset(token)

    def early_witness(at: Any) -> Any:
        said = early.get()
        return said[0] if said else witness(at)

    _replace(launcher, "IDLE", 0.05)  # the folder's end is seen when the supervisor ends too
    _replace(launcher.Launcher, "known", lambda self, token: None)
    _replace(LocalBackend, "_watch", late_watch)
    _replace(folder, "witness", early_witness)


def synchronous_normal() -> None:
    """The ledger's commits are told before they are on the disk."""
    from mlpiped.ledger import db, opening

    connect = db.connect

    def careless(*args: Any, **options: Any) -> Any:
        connection = connect(*args, **options)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    _replace(db, "connect", careless)
    _replace(opening, "connect", careless)


def commit_before_rename() -> None:
    """The row that says where an output lies is written before the output lies there."""
    from mlpiped.artifacts import Store, checking, places
    from mlpiped.execution.attempt import Attempt
    from mlpiped.model import OutputFact

    place, rest = Store.collect, Attempt._collect
    due: dict[str, Callable[[], Any]] = {}

    async def only_look(self: Store, folder: Any, outputs: Any, wanted: Any = None) -> list[OutputFact]:
        def look() -> list[OutputFact]:
            store = f"{self.state_dir}/artifacts"
            found = [checking.check(str(folder), output, store) for output in outputs]
            return [
                OutputFact(
                    each.output.name,
                    each.digest,
                    each.output.kind,
                    each.size,
                    f"{places.place_of(store, each.digest)}/{each.output.file_name}",
                )
                for each in found
            ]

        facts = await self._hop(look)
        due[str(folder).rstrip("/").rpartition("/")[2]] = lambda: place(self, folder, outputs)
        return facts

    async def too_late(self: Attempt, *args: Any) -> Any:
        ended = await rest(self, *args)
        if self.token in due:
            await due.pop(self.token)()
        return ended

    _replace(Store, "collect", only_look)
    _replace(Attempt, "_collect", too_late)


def witness_before_outputs() -> None:
    """The witness is durable before the outputs that it vouches for."""
    import shutil
    import tempfile

    from mlpiped.backends import memory_group, supervisor

    folder = Path(tempfile.mkdtemp(prefix="supervisor-", dir=Path.cwd()))  # the trial's own, and removed with it
    text = Path(supervisor.__file__).read_text()
    weak = text.replace("def sync_tree(path: str) -> None:\n", "def sync_tree(path: str) -> None:\n    return\n")
    if weak == text:
        raise AttributeError("the supervisor has no sync_tree")
    shutil.copy(memory_group.__file__, folder)
    (folder / "supervisor.py").write_text(weak)
    supervisor.__file__ = str(folder / "supervisor.py")  # the zygote is started from it


def intent_after_submit() -> None:
    """What is to be submitted is written down when there is time for it."""
    from mlpiped.backends.local import LocalBackend
    from mlpiped.execution.attempt import Attempt

    run, submit = Attempt.run, LocalBackend.submit
    due: ContextVar[Callable[[], Any]] = ContextVar("due")

    class Hasty:
        """A ledger whose first write waits."""

        def __init__(self, ledger: Any) -> None:
            self.ledger, self.first = ledger, True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.ledger, name)

        async def write(self, *ops: Any) -> Any:
            if not self.first:
                return await self.ledger.write(*ops)
            self.first = False
            due.set(lambda: self.ledger.write(*ops))
            return [None] * len(ops)

    async def hasty(self: Attempt, *args: Any) -> Any:
        self.world = dataclasses.replace(self.world, ledger=cast("Any", Hasty(self.world.ledger)))
        return await run(self, *args)

    async def told_later(self: LocalBackend, job: Any) -> Any:
        handle = await submit(self, job)
        await due.get()()
        return handle

    _replace(Attempt, "run", hasty)
    _replace(LocalBackend, "submit", told_later)


def _replace(where: Any, name: str, by: Any) -> None:
    getattr(where, name)  # it must be there, or the mutant is none
    setattr(where, name, by)


def replace_default(function: Callable[..., Any], name: str, by: Any) -> None:
    defaults = function.__kwdefaults__
    defaults[name]  # as above
    defaults[name] = by


MUTANTS = {
    each.__name__: each
    for each in (
        fence_removed,
        fence_removed_from_boxes,
        sbatch_believed,
        liveness_after_exit,
        synchronous_normal,
        commit_before_rename,
        witness_before_outputs,
        intent_after_submit,
    )
}


if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules are not for the daemon
    MUTANTS[sys.argv.pop(1)]()
    from mlpiped.cli.admin import main

    sys.exit(main(sys.argv[1:]))
