"""Arrays: which job is which element, durable before Slurm hears of it; and the script that finds its own job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpiped.backends.slurm import commands

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlpiped.backends.slurm.commands import Listed, Ref
    from mlpiped.backends.slurm.files import Files

REMEMBERED = 64  # lists


def script(single: bytes, tokens: Sequence[str]) -> bytes:
    """The script of the first of them -> that of all."""
    line = f"token={tokens[0]}\n".encode()
    assert single.count(line) == 1
    pick = f'set -- {" ".join(tokens)}\nshift "$SLURM_ARRAY_TASK_ID" && test -n "$1" || exit 69\ntoken=$1\n'
    return single.replace(line, pick.encode())


class Lists:
    """The elements of arrays, as `Records` keeps them; read once."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._read: dict[str, tuple[str, ...]] = {}
        self._sorted: tuple[Mapping[Ref, Listed], dict[str, list[Listed]]] = ({}, {})

    async def tokens(self, jobs: Iterable[Listed]) -> dict[Ref, str]:
        """Whose job each of these is; without those that nobody here has submitted."""
        jobs = list(jobs)
        split = {one.job: one.name.partition("/") for one in jobs}
        lists = await self._lists({array for array, slash, _ in split.values() if slash})
        found: dict[Ref, str] = {}
        for job, (name, slash, index) in split.items():
            tokens = lists.get(name, ())
            if not slash:
                found[job] = name
            elif int(index) < len(tokens):
                found[job] = tokens[int(index)]
        return found

    async def by_token(self, listing: Mapping[Ref, Listed]) -> dict[str, list[Listed]]:
        """The jobs of that listing that have not ended."""
        if self._sorted[0] is not listing:
            alive = [
                one
                for one in listing.values()
                if one.state not in commands.ENDED and (isinstance(one.job, int) or "/" in one.name)
            ]
            found: dict[str, list[Listed]] = {}
            tokens = await self.tokens(alive)
            for one in alive:
                if one.job in tokens:
                    found.setdefault(tokens[one.job], []).append(one)
            self._sorted = listing, found
        return self._sorted[1]

    async def _lists(self, ids: set[str]) -> dict[str, tuple[str, ...]]:
        found = {array: self._read[array] for array in ids if array in self._read}
        if unknown := sorted(ids - found.keys()):
            found |= {array: tuple(tokens) for array, tokens in (await self._files.arrays(unknown)).items()}
        for array, tokens in found.items():
            self._read[array] = tokens
        while len(self._read) > REMEMBERED:
            del self._read[next(iter(self._read))]
        return found
