"""The Docker engine, as far as a step needs it. Of aiodocker nothing gets out of here, its errors neither.

A method either gives the engine's answer, or raises `Refused` (the engine said no), or `BackendUnavailable` (nobody
knows what it would have said, or has done). No API version is pinned: the engine's own is spoken.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio
from aiodocker import Docker
from aiodocker.exceptions import DockerError

from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

SCHEME = "unix://"
ANSWER, CONNECT = 60.0, 5.0  # seconds
AT_ONCE = 16  # questions: more make the engine no faster, and a connection each
NO_CONNECTION = 900  # aiodocker's status for it

Facts = dict[str, Any]


class Refused(Exception):
    """The engine's no. `status` is HTTP's; 0: it came in the middle of a pull or a build."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status, self.words = status, " ".join(words.split())


class Engine:
    def __init__(self, url: str) -> None:
        self.path = url.removeprefix(SCHEME)
        self._docker: Docker | None = None
        self._connector: aiohttp.UnixConnector | None = None

    def open(self) -> None:
        """Connects when something is asked."""
        self._turns = anyio.Semaphore(AT_ONCE)
        self._connector = aiohttp.UnixConnector(self.path, limit=0)
        timeout = aiohttp.ClientTimeout(total=ANSWER, sock_connect=CONNECT)
        self._docker = Docker(url=f"{SCHEME}localhost", connector=self._connector, timeout=timeout)

    async def close(self) -> None:
        if self._docker is not None and self._connector is not None:
            await self._docker.close()
            await self._connector.close()
            self._docker = None

    @asynccontextmanager
    async def _asked(self, *, long: bool = False) -> AsyncIterator[Docker]:
        if self._docker is None:
            raise BackendUnavailable(f"the Docker engine at `{self.path}` is not asked any more")
        try:
            if long:
                yield self._docker
            else:
                async with self._turns:
                    yield self._docker
        except DockerError as error:
            if error.status == NO_CONNECTION:
                raise self._silent(error.__context__ or error) from None
            if error.status in (502, 503, 504):
                raise BackendUnavailable(f"the Docker engine at `{self.path}`: {error.message}") from None
            raise Refused(error.status, error.message) from None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:  # ValueError: half an answer
            raise self._silent(error) from None

    def _silent(self, error: BaseException) -> BackendUnavailable:
        cause = getattr(error, "os_error", error)
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        if isinstance(error, TimeoutError):
            reason = "no answer in time"
        hint = None
        if isinstance(cause, PermissionError):
            hint = "add the daemon's user to the group that owns the socket (`docker`), and restart the daemon"
        elif isinstance(cause, FileNotFoundError | ConnectionRefusedError):
            hint = "see whether the engine runs: `systemctl status docker`"
        return BackendUnavailable(f"the Docker engine at `{self.path}` does not answer: {reason.lower()}", hint=hint)

    # --- containers -------------------------------------------------------------------------------------------------
    async def create(self, name: str, config: Facts) -> str:
        """The new container's id. 409: the name is taken."""
        async with self._asked() as docker:
            return (await docker.containers.create(config, name=name)).id

    async def start(self, container: str) -> None:
        async with self._asked() as docker:
            await docker.containers.container(container).start()

    async def look(self, container: str) -> Facts | None:
        """All about the container of that id or name; None: the engine says that there is none."""
        try:
            async with self._asked() as docker:
                return await docker.containers.container(container).show()
        except Refused as no:
            if no.status == 404:
                return None
            raise BackendUnavailable(f"the Docker engine cannot tell of a container: {no.words}") from None

    async def list(self, labels: Sequence[str]) -> list[Facts]:
        """Id, Labels, State of every container with these labels, running or not."""
        async with self._asked() as docker:
            filters = json.dumps({"label": list(labels)})
            found: list[Facts] = await docker._query_json("containers/json", params={"all": "1", "filters": filters})
            return found

    async def kill(self, container: str, signal: str) -> None:
        """To its first process; SIGKILL ends all of it. Whether it still runs is not told."""
        try:
            async with self._asked() as docker:
                await docker.containers.container(container).kill(signal=signal)
        except Refused as no:
            if no.status not in (404, 409):
                raise BackendUnavailable(f"the Docker engine cannot stop a container: {no.words}") from None

    async def execute(self, container: str, command: Sequence[str], user: str) -> None:
        """Start a further process inside, and let it go."""
        async with self._asked() as docker:
            config = {"Cmd": list(command), "User": user, "AttachStdout": False, "AttachStderr": False}
            made = await docker._query_json(f"containers/{container}/exec", "POST", data=config)
            detached = json.dumps({"Detach": True, "Tty": False})
            async with docker._query(f"exec/{made['Id']}/start", "POST", data=detached) as answer, answer:
                await answer.read()

    async def remove(self, container: str, *, force: bool) -> None:
        """With its anonymous volumes. Gone already is as good; 409: it runs, or is being removed."""
        try:
            async with self._asked() as docker:
                await docker.containers.container(container).delete(force=force, v=True)
        except Refused as no:
            if no.status != 404:
                raise

    async def has_file(self, container: str, path: str) -> bool:
        try:
            async with self._asked() as docker:
                try:
                    query = docker._query(f"containers/{container}/archive", "HEAD", params={"path": path})
                    async with query as answer, answer:
                        return True
                except json.JSONDecodeError:  # aiodocker wants to read why not, and HEAD has no body
                    return False
        except Refused as no:
            if no.status == 404:
                return False
            raise

    async def output(self, container: str, *, follow: bool) -> AsyncGenerator[tuple[bytes, bytes]]:
        """Pieces of (stdout, stderr), as far as the engine keeps them; with `follow`, until it has ended."""
        async with self._asked(long=follow) as docker:
            params = {"stdout": "1", "stderr": "1", "follow": str(int(follow))}
            endless = aiohttp.ClientTimeout(sock_connect=CONNECT)
            async with docker._query(f"containers/{container}/logs", params=params, timeout=endless) as answer, answer:
                rest = b""
                async for piece in answer.content.iter_any():
                    out, err, rest = _apart(rest + piece)
                    yield out, err

    async def events(self, labels: Sequence[str]) -> AsyncGenerator[Facts | None]:
        """What happens to containers with these labels, from now on; first None, once the engine listens."""
        async with self._asked(long=True) as docker:
            filters = {"type": ["container"], "event": ["die", "destroy"], "label": list(labels)}
            endless = aiohttp.ClientTimeout(sock_connect=CONNECT)
            params = {"filters": json.dumps(filters)}
            async with docker._query("events", params=params, timeout=endless) as answer, answer:
                yield None
                while line := await answer.content.readline():
                    yield json.loads(line)

    # --- images -----------------------------------------------------------------------------------------------------
    async def image(self, name: str) -> Facts | None:
        try:
            async with self._asked() as docker:
                return await docker.images.inspect(name)
        except Refused as no:
            if no.status == 404:
                return None
            raise

    async def images(self, labels: Sequence[str]) -> Sequence[Facts]:
        """Id, RepoTags, Created of every image with these labels that has a name or that no other stands on."""
        try:
            async with self._asked() as docker:
                params = {"filters": json.dumps({"label": list(labels)})}
                found: Sequence[Facts] = await docker._query_json("images/json", params=params)
                return found
        except Refused as no:
            raise BackendUnavailable(f"the Docker engine cannot list its images: {no.words}") from None

    async def remove_image(self, name: str) -> None:
        """Or only the name of one that has others; with what it alone stands on. 409: a container is of it."""
        async with self._asked() as docker:
            await docker.images.delete(name)

    async def pull(self, name: str) -> AsyncIterator[Facts]:
        """What the engine says meanwhile."""
        last = name.rpartition("/")[2]
        tag = {} if "@" in name or ":" in last else {"tag": "latest"}
        async for said in self._told("images/create", {"fromImage": name, **tag}):
            yield said

    async def build(self, context: bytes, tag: str) -> AsyncIterator[Facts]:
        """From a tar archive with a Dockerfile in it. What the engine says meanwhile."""
        async for said in self._told("build", {"t": tag, "rm": "1", "forcerm": "1"}, context):
            yield said

    async def _told(self, path: str, params: Mapping[str, str], data: bytes | None = None) -> AsyncIterator[Facts]:
        """The connection ends with whoever listens, and so does what the engine does."""
        async with self._asked(long=True) as docker:
            endless = aiohttp.ClientTimeout(sock_connect=CONNECT)
            headers = {"Content-Type": "application/x-tar"}
            query = docker._query(path, "POST", params=params, data=data, headers=headers, timeout=endless)
            async with query as answer, answer:
                rest = b""
                async for piece in answer.content.iter_any():
                    *lines, rest = (rest + piece).split(b"\n")
                    for said in map(json.loads, filter(None, map(bytes.strip, lines))):
                        if "error" in said:
                            raise Refused(0, said["error"])
                        yield said

    async def well(self) -> None:
        """Raises BackendUnavailable when it is not."""
        try:
            async with self._asked() as docker:
                await docker.version()
        except Refused as no:
            raise BackendUnavailable(f"the Docker engine at `{self.path}` is not well: {no.words}") from None


def _apart(frames: bytes) -> tuple[bytes, bytes, bytes]:
    """(stdout, stderr, half a frame): a byte for the stream, three of nothing, four for the length."""
    found: dict[int, list[bytes]] = {1: [], 2: []}
    at = 0
    while at + 8 <= len(frames):
        end = at + 8 + int.from_bytes(frames[at + 4 : at + 8], "big")
        if end > len(frames):
            break
        found.setdefault(frames[at], []).append(frames[at + 8 : end])
        at = end
    return b"".join(found[1]), b"".join(found[2]), frames[at:]
