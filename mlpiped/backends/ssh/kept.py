"""What stays on the box until somebody needs it elsewhere: moved into its contents there, and brought home when asked.

The box tells names, sizes and SHA-256 of what is in an output, and the digest is made of these here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import asyncssh

from mlpiped.backends.base import KeptOutput
from mlpiped.backends.ssh.agent import encoded
from mlpiped.backends.ssh.incoming import decoded
from mlpiped.errors import BackendUnavailable, InvalidJob
from mlpiped.files.portable import PORTABLE, portable_tree

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlpiped.backends.base import JobOutput
    from mlpiped.backends.ssh.carrier import Carrier
    from mlpiped.backends.ssh.keeper import Keeper
    from mlpiped.backends.ssh.returning import Returning

LONGEST = 6 * 3600.0  # seconds in which a box has hashed an output
ANSWER = 300.0  # seconds for anything that reads no file
AT_ONCE = 100  # contents in a command


class KeptThere:
    def __init__(self, keeper: Keeper, carrier: Carrier, returning: Returning) -> None:
        self.keeper, self.carrier, self._returning = keeper, carrier, returning
        self._one = anyio.Lock()

    async def keep(self, token: str, output: JobOutput) -> KeptOutput:
        """May be asked again. Raises InvalidJob (the step's fault), BackendUnavailable."""
        agent = await self.keeper.agent()
        words = [encoded(output.name).decode(), encoded(output.file_name).decode(), output.kind]
        command = agent.box.script("keep.sh", "keep", agent.box.root, token, *words)
        async with self._one, self.carrier.link.channel() as connection:
            try:
                process = await self.carrier.link.process(connection, command)
                try:
                    with anyio.fail_after(LONGEST):
                        lines: list[str] = []
                        while lines[-1:] != ["end"] and (line := await process.stdout.readline()):
                            lines.append(line.decode("ascii", "replace").rstrip("\n"))
                        kept = _judged(output, lines)
                        process.stdin.write(_content(kept.digest).encode() + b"\n")
                        said = (await process.stdout.readline()).strip()
                finally:
                    process.channel.abort()
            except TimeoutError:
                raise BackendUnavailable(f"`{agent.name}` does not keep what the step made") from None
            except (OSError, asyncssh.Error) as fault:
                raise BackendUnavailable(f"the connection to `{agent.name}` was lost") from fault
        if said == b"changed":
            raise InvalidJob(f"output `{output.name}` was changed while it was kept")
        if said != b"ok":
            raise BackendUnavailable(f"`{agent.name}` could not keep output `{output.name}`: is a disk full?")
        agent.box.contents.add(_content(kept.digest))
        return kept

    async def bring(self, digest: str, into: Path) -> Path | None:
        """The content, as it came: what it is, the caller must find out. None: it is not there any more."""
        agent = await self.keeper.agent()
        content = _content(digest)
        command = agent.box.script("tree.sh", "get", agent.box.root, ".cas")
        part = into / f"{self.carrier.link.name}.{content}.part"
        try:
            async with self._returning.brought(command, [content], part):
                return await anyio.to_thread.run_sync(_settled, part, content)
        except OSError as fault:
            why = f"{fault.strerror}: {fault.filename}"
            raise BackendUnavailable(f"cannot keep what comes from `{agent.name}`: {why}") from fault

    async def changed(self, digests: Sequence[str] | None) -> set[str]:
        """Of these, or of all that is kept, what is gone or has been changed. Reads no file."""
        if digests is None:
            lines = await self._said("check")
        else:
            contents = [_content(digest) for digest in digests]
            lines = [line for page in _pages(contents) for line in await self._said("holds", *page)]
        found = {_digest(line.removeprefix("no ")) for line in lines if line.startswith("no ")}
        return {digest for digest in found if PORTABLE.fullmatch(digest)}

    async def listed(self) -> list[str]:
        contents = (await self.keeper.agent()).box.contents
        return sorted(digest for content in contents if PORTABLE.fullmatch(digest := _digest(content)))

    async def drop(self, digests: Sequence[str], min_age: float) -> None:
        async with self._one:
            for page in _pages([_content(digest) for digest in digests]):
                gone = {line.removeprefix("gone ") for line in await self._said("drop", str(int(min_age)), *page)}
                (await self.keeper.agent()).box.contents.difference_update(gone)

    async def _said(self, *words: str) -> list[str]:
        agent = await self.keeper.agent()
        command = agent.box.script("keep.sh", words[0], agent.box.root, *words[1:])
        return await self.carrier.lines(command, ANSWER)


def _pages(contents: Sequence[str]) -> list[Sequence[str]]:
    return [contents[first : first + AT_ONCE] for first in range(0, len(contents), AT_ONCE)]


def _content(digest: str) -> str:
    return digest.replace(":", "-")


def _digest(content: str) -> str:
    return content.replace("-", ":", 1)


# --- what the box tells of an output --------------------------------------------------------------------------------
def _judged(output: JobOutput, lines: Sequence[str]) -> KeptOutput:
    """Raises InvalidJob by the rules of `artifacts.collecting`, BackendUnavailable for what was cut off."""
    last = lines[-1] if lines else ""
    if last == "missing":
        raise InvalidJob(f"output `{output.name}` is missing: the step wrote nothing there")
    if last.startswith("wrong "):
        raise InvalidJob(f"output `{output.name}` should be a {output.kind}, and is {last[6:]}")
    if last != "end":
        raise BackendUnavailable(f"the way broke off while output `{output.name}` was looked at")
    size, entries = 0, []
    for line in lines[:-1]:
        rel, kind, payload, count = _entry(output, line.split(" "))
        size += count
        if rel or output.kind == "file":
            entries.append((os.fsencode(rel), kind, payload))
    if output.kind == "file":
        return KeptOutput(output.name, entries[0][2], size)
    if all(kind == "d" for _, kind, _ in entries):
        raise InvalidJob(f"output `{output.name}` is an empty folder")
    return KeptOutput(output.name, portable_tree(entries), size)


def _entry(output: JobOutput, words: Sequence[str]) -> tuple[str, str, str, int]:
    """(name below the output, kind, payload, bytes)"""
    match words:
        case ["d", name]:
            return _below(name), "d", "", 0
        case ["l", name, target]:
            rel, to = _below(name), decoded(target)
            if not _stays_inside(rel, to):
                raise InvalidJob(f"`{rel}` in output `{output.name}` is a link that leads outside, or may")
            return rel, "l", to, 0
        case [("f" | "x") as kind, size, sha, name] if size.isdigit() and len(sha) == 64:
            return _below(name), kind, f"s2:{sha}", int(size)
        case ["h", _, _, name]:
            raise InvalidJob(f"`{_below(name)}` in output `{output.name}` has another name (a hard link)")
        case ["u", _, _, name]:
            raise InvalidJob(f"`{_below(name)}` in output `{output.name}` has the set-user-id or set-group-id bit")
        case ["s", name]:
            raise InvalidJob(f"`{_below(name)}` in output `{output.name}` is neither a file nor a folder")
    raise BackendUnavailable(f"no entry of an output: {words!r:.200}")


def _below(name: str) -> str:
    """`./model/a/b` -> `a/b`; nothing for the output itself."""
    return decoded(name).removeprefix("./").partition("/")[2]


def _stays_inside(rel: str, target: str) -> bool:
    """`..` only at the front, where no link can be in between, and no more of it than there are folders."""
    parts = target.split("/")
    ups = next((n for n, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and ".." not in parts[ups:] and ups <= rel.count("/")


def _settled(part: Path, content: str) -> Path | None:
    """The one that is no further name of it, out of what came."""
    folder = part / content
    entries = [entry for entry in folder.iterdir() if not entry.is_symlink()] if folder.is_dir() else []
    if len(entries) != 1:
        return None
    return entries[0].rename(part.with_suffix(".came"))
