"""Outputs: where they lie, for a client on the same machine, and their bytes for any other."""

from __future__ import annotations

import os
import secrets
import stat
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from aiohttp import web

from mlpiped.control.answers import WRITE_LIMIT
from mlpiped.errors import Conflict, UnknownName

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mlpiped.control.route import Ask
    from mlpiped.ledger.rows import RunRow, StepRow
    from mlpiped.model import OutputFact

CHUNK = 1 << 20
SPARE = 64 << 20  # bytes that a copy must leave free: the ledger needs them more
_BLOCK = 512  # bytes, of a tar


async def outputs(ask: Ask) -> Any:
    """Everything that the run made or reused. `path` is null when `gc` has taken the bytes, and while `compute` alone
    has them."""
    run = await ask.service.lookup.run(ask.names["run"])
    found = [
        {
            "step": step.name,
            "name": fact.name,
            "kind": fact.kind,
            "digest": fact.digest,
            "size": fact.size,
            "path": _path(fact),
            "compute": fact.compute,
            "file_name": os.path.basename(fact.path) or fact.name,
            "reused_from": None if step.reused_from is None else f"{step.reused_from[0]}/{step.reused_from[1]}",
        }
        for step, fact in await _facts(ask, run)
    ]
    return {"run": run.id, "pipeline": run.pipeline, "outputs": found}


async def _facts(ask: Ask, run: RunRow) -> list[tuple[StepRow, OutputFact]]:
    found = []
    for step in await ask.service.lookup.steps(run):
        if step.outcome is not None and step.outcome.good:
            found.extend([(step, fact) for fact in await ask.service.ledger.outputs(run.id, step.idx)])
    return found


async def output(ask: Ask) -> web.StreamResponse:
    """A file as its bytes, a folder as a tar."""
    run = await ask.service.lookup.run(ask.names["run"])
    step = await ask.service.lookup.step(run, ask.names["step"])
    facts = {fact.name: fact for fact in await ask.service.ledger.outputs(run.id, step.idx)}
    fact = facts.get(ask.names["output"])
    if fact is None:
        if not facts:
            raise Conflict(f"step `{step.name}` of run {run.id} has no outputs: it {step.outcome or step.state}")
        raise UnknownName.among(f"output of `{step.name}`", ask.names["output"], facts)
    if fact.compute is not None and ask.service.bring_home is not None:
        await ask.service.bring_home(fact)
    path = Path(fact.path) if fact.path else None
    if path is None or not await anyio.to_thread.run_sync(_there, path, fact.kind):
        hint = f"`mlpipectl run {run.pipeline} --force {step.name}` makes it again"
        raise Conflict(f"the bytes of `{fact.name}` of run {run.id} are gone from the store", hint=hint)
    return await (_send_file if fact.kind == "file" else _send_tar)(ask, path, fact)


async def backup(ask: Ask) -> web.StreamResponse:
    """Made beside the ledger, by the only process that has it open, and sent: the caller need not reach the folder."""
    service = ask.service
    copy = service.about.state_dir / "incoming" / f"{secrets.token_hex(8)}.backup"

    def room() -> int:
        copy.parent.mkdir(exist_ok=True)
        disk = os.statvfs(copy.parent)
        return disk.f_bavail * disk.f_frsize - os.stat(service.ledger.path).st_size - SPARE

    if await anyio.to_thread.run_sync(room) < 0:
        hint = "free space on that disk, or stop the daemon: a copy is then made where you want it"
        raise Conflict(f"there is no room for a copy of the ledger in `{copy.parent}`", hint=hint)
    try:
        await service.ledger.backup(copy)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = (await anyio.to_thread.run_sync(os.lstat, copy)).st_size
        await response.prepare(ask.request)
        async for data in _bytes(copy, response.content_length):
            await _write(response, data)
    finally:
        copy.unlink(missing_ok=True)
    return response


def _path(fact: OutputFact) -> str | None:
    return (fact.path or None) if fact.compute is None or os.path.lexists(fact.path) else None


def _there(path: Path, kind: str) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) if kind == "file" else stat.S_ISDIR(mode)


async def _send_file(ask: Ask, path: Path, fact: OutputFact) -> web.StreamResponse:
    response = _response(fact, "application/octet-stream")
    response.content_length = (await anyio.to_thread.run_sync(os.lstat, path)).st_size
    await response.prepare(ask.request)
    async for data in _bytes(path, response.content_length):
        await _write(response, data)
    return response


async def _send_tar(ask: Ask, path: Path, fact: OutputFact) -> web.StreamResponse:
    """Written member by member, so that a large folder needs neither memory nor a thread of its own."""
    response = _response(fact, "application/x-tar")
    await response.prepare(ask.request)
    members = await anyio.to_thread.run_sync(lambda: list(_members(path)))
    for member, source in members:
        await _write(response, member.tobuf(tarfile.PAX_FORMAT))
        if source is not None:
            async for data in _bytes(source, member.size):
                await _write(response, data)
            await _write(response, b"\0" * (-member.size % _BLOCK))
    await _write(response, b"\0" * (2 * _BLOCK))
    return response


def _response(fact: OutputFact, media: str) -> web.StreamResponse:
    return web.StreamResponse(headers={"Content-Type": media, "X-Digest": fact.digest, "X-Kind": fact.kind})


async def _write(response: web.StreamResponse, data: bytes) -> None:
    try:
        with anyio.fail_after(WRITE_LIMIT):
            await response.write(data)
    except TimeoutError:
        raise ConnectionResetError("the peer does not read") from None


async def _bytes(path: Path, size: int) -> AsyncIterator[bytes]:
    """Exactly `size` bytes; a file that became shorter breaks the connection, so that nobody takes it for whole."""
    fd = await anyio.to_thread.run_sync(os.open, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    at = 0
    try:
        while at < size:
            data = await anyio.to_thread.run_sync(os.pread, fd, min(CHUNK, size - at), at)
            if not data:
                raise ConnectionResetError(f"`{path}` became shorter")
            at += len(data)
            yield data
    finally:
        os.close(fd)


def _members(root: Path) -> Iterator[tuple[tarfile.TarInfo, Path | None]]:
    """Every entry below `root`, by name; nobody's and without times, as content is what counts."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(folder, name)
            found = os.lstat(path)
            member = tarfile.TarInfo(str(path.relative_to(root)))
            member.mode = stat.S_IMODE(found.st_mode)
            if stat.S_ISDIR(found.st_mode):
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                yield member, None
            elif stat.S_ISLNK(found.st_mode):
                member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
                yield member, None
            elif stat.S_ISREG(found.st_mode):
                member.size = found.st_size
                yield member, path
