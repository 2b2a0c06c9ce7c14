"""What a job needs on the box: brought there once per content, or not at all where the box has it mounted.

<root>/.cas/<content>/<name>    a content under the names that steps know it by; read-only, shared
<root>/<token>/in/<n>/<name>    inputs of which nobody told the digest: for this one job
<root>/.envs/<digest>           virtual environments
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import asyncssh
import structlog

import mlpiped
from mlpiped.backends.ssh.agent import encoded
from mlpiped.backends.ssh.carrier import LARGE
from mlpiped.backends.ssh.orders import Place
from mlpiped.backends.ssh.parcels import Changed, Piece, Start, outgoing, size_of
from mlpiped.backends.ssh.progress import Progress
from mlpiped.errors import BackendUnavailable, InvalidJob
from mlpiped.files.hashing import hash_fd, open_file, tree_digest
from mlpiped.files.portable import is_portable
from mlpiped.files.walking import PathRefused, walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mlpiped.backends.base import Job
    from mlpiped.backends.ssh.agent import Agent, Box
    from mlpiped.backends.ssh.carrier import Carrier
    from mlpiped.backends.ssh.keeper import Keeper

log = structlog.get_logger("ssh")
DIGEST = re.compile(r"b3t?:[0-9a-f]{64}")
BUILD = 1800.0  # seconds for a virtual environment


class Staging:
    def __init__(
        self, keeper: Keeper, carrier: Carrier, datastores: Mapping[str, Path], mounts: Mapping[str, str]
    ) -> None:
        self.keeper, self.carrier = keeper, carrier
        self._mounted = sorted(
            ((os.path.abspath(datastores[name]), there) for name, there in mounts.items() if name in datastores),
            key=lambda pair: -len(pair[0]),
        )
        self.progress = Progress()
        self._sdk: tuple[str, list[Piece]] | None = None
        self._codes: dict[tuple[object, ...], str] = {}
        self._names: set[tuple[str, str]] = set()  # (content, name) that are there
        self._environments: set[str] = set()
        self._locks: dict[str, anyio.Lock] = {}
        self._uses: dict[str, set[str]] = {}  # token -> contents and environments, until its job is there

    def missing(self, contents: Mapping[str, int]) -> int:
        known = self.keeper.known
        there = known.box.contents if known is not None else ()
        return sum(size for digest, size in contents.items() if _content(digest) not in there)

    def forget(self) -> None:
        """The box lacks what we believed it had."""
        self._names.clear()
        self._environments.clear()
        if self.keeper.known is not None:
            self.keeper.known.box.contents.clear()

    def lost(self, names: Iterable[str]) -> None:
        """These contents and environments are gone from the box."""
        gone = set(names)
        self._names = {(content, name) for content, name in self._names if content not in gone}
        self._environments -= gone
        if self.keeper.known is not None:
            self.keeper.known.box.contents -= gone

    def used(self) -> set[str]:
        """What is brought for jobs that are not there yet."""
        return set().union(*self._uses.values())

    def placed(self, token: str) -> None:
        """The job itself says what it uses, or will not start."""
        self._uses.pop(token, None)

    async def place(self, job: Job, env: Mapping[str, str]) -> Place:
        """Bring what is missing. `env` comes with the machine. Raises InvalidJob, BackendUnavailable."""
        agent = await self.keeper.agent()
        root = agent.box.root
        uses = self._uses[job.token] = set()
        try:
            there = await self._inputs(job, root)
            code = await self._code(job)
            sdk = await self._own_sdk(job.token)
        except FileNotFoundError as fault:
            raise InvalidJob(f"an input is gone: {fault.filename}") from fault
        except OSError as fault:
            why = f"{fault.strerror}: {fault.filename}"
            raise BackendUnavailable(f"what the step needs cannot be read here: {why}") from fault
        bins, needed = [f"{root}/.python"], [path for path in there.values() if path.startswith(f"{root}/")]
        needed += [f"{root}/{place}" for place in (code, sdk) if place is not None]
        if job.requirements is not None or job.python is not None:
            home = await self._environment(agent, job)
            bins, env = [f"{home}/bin", *bins], {**env, "VIRTUAL_ENV": home}
            needed.append(f"{home}/.mlpiped-complete")
        paths = {port: [there[path] for path in mine] for port, mine in job.inputs.items()}
        return Place(root, paths, needed, sorted(uses), code, f"{root}/{sdk}", bins, env)

    # --- inputs -------------------------------------------------------------------------------------------------
    def _mapped(self, path: str) -> str | None:
        for here, there in self._mounted:
            if path == here or path.startswith(here + "/"):
                return there.rstrip("/") + path[len(here) :]
        return None

    async def _inputs(self, job: Job, root: str) -> dict[str, str]:
        """Path here -> path there, of every input."""
        there: dict[str, str] = {}
        loose: dict[str, str] = {}
        for path, port in {path: port for port, paths in job.inputs.items() for path in paths}.items():
            what = f"sends input {port} to {self.keeper.link.name}"
            mapped, digest = self._mapped(path), job.contents.get(path, "")
            if mapped is not None:
                there[path] = mapped
            elif is_portable(digest) and await self._kept(_content(digest), _name(path)):
                there[path] = f"{root}/.cas/{_content(digest)}/{_name(path)}"
            elif DIGEST.fullmatch(digest) and await self._bring(
                job.token, what, _content(digest), [Piece(path, _name(path), digest)], _name(path)
            ):
                there[path] = f"{root}/.cas/{_content(digest)}/{_name(path)}"
            else:
                loose[path] = f"{len(loose)}/{_name(path)}"
                there[path] = f"{root}/{job.token}/in/{loose[path]}"
        if loose:
            what = f"sends {' and '.join(job.inputs)} to {self.keeper.link.name}"
            try:
                await self._put(job.token, what, f"{job.token}/in", [Piece(path, name) for path, name in loose.items()])
            except Changed as fault:
                raise BackendUnavailable(f"an input cannot be sent: {fault}") from fault
        return there

    async def _kept(self, content: str, name: str) -> bool:
        """Whether what was made on this box is there under `name`."""
        agent = await self.keeper.agent()
        said, _ = await agent.ask("alias", content, encoded(name).decode("ascii"))
        return said == "ok"

    async def bring(self, token: str, content: str, path: str) -> str | None:
        """Where a file of this content lies there, brought for a job that has its place; None: it is another by now.

        Raises InvalidJob, BackendUnavailable.
        """
        name = _name(path)
        what = f"sends {name} to {self.keeper.link.name}"
        try:
            came = await self._bring(token, what, content, [Piece(path, name, content.replace("-", ":", 1))], name)
        except FileNotFoundError as fault:
            raise InvalidJob(f"there is no file `{path}`") from fault
        except OSError as fault:
            raise BackendUnavailable(f"`{path}` cannot be read: {fault.strerror}") from fault
        return f"{(await self.keeper.agent()).box.root}/.cas/{content}/{name}" if came else None

    # --- contents -----------------------------------------------------------------------------------------------
    async def _bring(self, token: str, what: str, content: str, pieces: Sequence[Piece], name: str) -> bool:
        """Make `content` be there under `name`. False: what lies here is not that content."""
        self._uses[token].add(content)
        if (content, name) in self._names and content in self._contents():
            return True
        with self.progress.wait(token, f".cas/{content}"):
            return await self._bring_alone(token, what, content, pieces, name)

    async def _bring_alone(self, token: str, what: str, content: str, pieces: Sequence[Piece], name: str) -> bool:
        async with self._locks.setdefault(content, anyio.Lock()):
            if content in self._contents():
                if (content, name) in self._names:
                    return True
                agent = await self.keeper.agent()
                said, _ = await agent.ask("alias", content, encoded(name).decode("ascii"))
                if said == "ok":
                    self._names.add((content, name))
                    return True
            try:
                await self._put(token, what, f".cas/{content}", pieces)
            except Changed as fault:
                log.warning("what was to be sent is not what it was", content=content, why=str(fault))
                return False
            self._contents().add(content)
            self._names.add((content, name))
            return True

    def _contents(self) -> set[str]:
        assert self.keeper.known is not None
        return self.keeper.known.box.contents

    async def _put(self, token: str, what: str, place: str, pieces: Sequence[Piece]) -> None:
        agent = await self.keeper.agent()
        size = await anyio.to_thread.run_sync(lambda: sum(size_of(piece.path) for piece in pieces))
        command = agent.box.script("tree.sh", "put", agent.box.root, place)
        try:
            with self.progress.wait(token, place), self.progress.move(place, what, size) as moving:
                if size <= LARGE:
                    await self.carrier.put(command, moving.counted(outgoing(pieces, tar=agent.box.tar)))
                    return

                def stream(start: Start) -> Iterator[bytes]:
                    return moving.counted(outgoing(pieces, tar=agent.box.tar, start=start, skipped=moving.moved))

                await self.carrier.put_large([*command, _key(place, agent.box)], stream)
        except PathRefused as fault:
            raise InvalidJob(fault.message) from fault

    async def _code(self, job: Job) -> str | None:
        """Where the snapshot lies below the root."""
        if job.code is None:
            return None
        path = job.code
        try:
            digest = await anyio.to_thread.run_sync(self._code_digest, path)
        except (NotADirectoryError, FileNotFoundError):
            raise InvalidJob(f"its code is gone: {path}") from None
        content = f"code-{_content(digest)}"
        what = f"sends its code to {self.keeper.link.name}"
        if not await self._bring(job.token, what, content, [Piece(path, "code", digest)], "code"):
            raise BackendUnavailable(f"the snapshot of the step's code changes while it is sent: {path}")
        return f".cas/{content}/code"

    def _code_digest(self, path: str) -> str:
        members = walk(path)
        stamps = (path, *sorted((member.rel, member.kind, member.stamp, member.target) for member in members))
        if stamps not in self._codes:
            lines = []
            for member in members:
                payload = member.target
                if member.stamp is not None:
                    fd = open_file(member.path)
                    try:
                        payload = hash_fd(fd).digest
                    finally:
                        os.close(fd)
                lines.append((os.fsencode(member.rel), member.kind, payload))
            while len(self._codes) > 500:
                del self._codes[next(iter(self._codes))]
            self._codes[stamps] = tree_digest(lines)
        return self._codes[stamps]

    async def _own_sdk(self, token: str) -> str:
        if self._sdk is None:
            self._sdk = await anyio.to_thread.run_sync(_sdk)
        content, pieces = self._sdk
        await self._bring(token, f"sends the SDK to {self.keeper.link.name}", content, pieces, "mlpiped")
        return f".cas/{content}"

    # --- environments -------------------------------------------------------------------------------------------
    async def _environment(self, agent: Agent, job: Job) -> str:
        python = agent.box.python if job.python is None else "python" + ".".join(job.python.split(".")[:2])
        if not python:
            raise InvalidJob(
                f"there is no python on `{agent.name}`", hint="install one there, or name it: `python` in its config"
            )
        text = f"{python}\0{job.requirements or ''}".encode("utf-8", "surrogateescape")
        name = hashlib.blake2b(text, digest_size=16).hexdigest()
        self._uses[job.token].add(name)
        if name not in self._environments:
            with self.progress.wait(job.token, name):
                await self._built_once(agent, name, python, job.requirements or "")
        return f"{agent.box.root}/.envs/{name}"

    async def _built_once(self, agent: Agent, name: str, python: str, requirements: str) -> None:
        async with self._locks.setdefault(name, anyio.Lock()):
            if name not in self._environments:
                with self.progress.move(name, f"builds its environment on {agent.name}"):
                    await self._build(agent, name, python, requirements)
                self._environments.add(name)

    async def _build(self, agent: Agent, name: str, python: str, requirements: str) -> None:
        command = agent.box.script("env.sh", agent.box.root, name, python)
        async with self.carrier.link.channel() as connection:
            try:
                process = await self.carrier.link.process(connection, command)
                try:
                    process.stdin.write(requirements.encode("utf-8", "surrogateescape"))
                    process.stdin.write_eof()
                    with anyio.fail_after(BUILD):
                        said = (await process.stdout.read()).decode("utf-8", "replace").strip()
                finally:
                    process.channel.abort()
            except TimeoutError:
                raise BackendUnavailable(
                    f"the step's environment is not built on `{agent.name}` in {BUILD:.0f} s"
                ) from None
            except (OSError, asyncssh.Error) as fault:
                raise BackendUnavailable(f"the connection to `{agent.name}` was lost") from fault
        verdict, _, words = said.rpartition("\n")[2].partition(" ")
        if verdict == "bad":
            raise InvalidJob(words, hint=f"see .envs/{name}.log in the work folder on `{agent.name}`")
        if verdict != "ok":
            raise BackendUnavailable(f"`{agent.name}`: {words or 'the environment could not be built'}")


def _content(digest: str) -> str:
    return digest.replace(":", "-")


def _name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or "root"


def _key(place: str, box: Box) -> str:
    """What may go on where another try broke off: the same units of the same thing."""
    return hashlib.sha256(f"{mlpiped.__version__}\0{box.scripts}\0{box.tar}\0{place}".encode()).hexdigest()[:32]


def _sdk() -> tuple[str, list[Piece]]:
    """(content, its pieces): what `import mlpiped` needs in a step."""
    home = Path(mlpiped.__file__).parent
    pieces = [Piece(str(path), f"mlpiped/{path.relative_to(home)}") for path in _sdk_files(home)]
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece.name.encode() + b"\0" + Path(piece.path).read_bytes() + b"\0")
    return f"sdk-{hasher.hexdigest()[:32]}", pieces


def _sdk_files(home: Path) -> Iterator[Path]:
    yield from (home / "__init__.py", home / "errors.py")
    yield from sorted((home / "sdk").rglob("*.py"))
