"""The daemon's side of a box, for tests: a backend whose state lies in a folder, and the questions that tests ask."""

from __future__ import annotations

import secrets
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from mlpiped.backends.base import Exited, Job, Part
from mlpiped.backends.ssh import SshBackend
from mlpiped.config.computes import SshCompute
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from lab.ssh_rig import Box, Cable

    from mlpiped.backends.base import Handle, Outcome

UNTIL_GO = "echo began; while ! test -e go; do sleep 0.05; done; echo over; exit 3"


def job(*argv: str | Part, **fields: Any) -> Job:
    fields.setdefault("token", f"t-{secrets.token_hex(6)}")
    fields.setdefault("grace", 5.0)
    parts = tuple((word if isinstance(word, Part) else Part("text", word),) for word in argv)
    return Job(arguments=parts, **fields)


def shell(script: str, **fields: Any) -> Job:
    return job(script, shell=True, **fields)


class Daemon:
    """What outlives a life of the daemon: its state folder. `life` is the backend of the next one."""

    def __init__(self, box: Box, state: Path, *, cable: Cable | None = None, **settings: Any) -> None:
        self.box, self.state, self.cable = box, state, cable
        self.instance = secrets.token_hex(6)
        self.datastores: dict[str, Path] = {}
        if cable is not None:
            settings.setdefault("port", cable.port)
        self.settings = settings
        self.trust()

    def trust(self) -> None:
        self.state.mkdir(exist_ok=True)
        (self.state / "known_hosts").write_text(self.box.known(self.settings.get("port")))

    async def life(self, stack: AsyncExitStack, name: str = "box") -> SshBackend:
        settings = SshCompute(**self.box.settings(**self.settings))
        backend = SshBackend(name, self.state, settings, instance=self.instance, datastores=self.datastores)
        await backend.start(stack)
        return backend

    @property
    def root(self) -> Path:
        """Its folder on the box."""
        return self.box.home / "work" / self.instance

    def let_go(self, handle: Handle) -> None:
        (self.root / handle["token"] / "work/go").touch()

    def processes(self, token: str) -> list[int]:
        """Of that step: all whose environment bears its mark."""
        mark = f"MLPIPED_TOKEN={token}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                pass
        return found


async def ended(backend: SshBackend, job: Job) -> tuple[Handle, Exited]:
    handle = await backend.submit(job)
    outcome = await backend.wait(handle)
    assert isinstance(outcome, Exited), outcome
    return handle, outcome


async def log(backend: SshBackend, handle: Handle) -> bytes:
    return b"".join([chunk async for chunk in backend.logs(handle, "stdout", 0, follow=False)])


async def said(backend: SshBackend, handle: Handle, word: bytes) -> None:
    """Until the step has printed this."""
    seen = b""
    with anyio.fail_after(30):
        async for chunk in backend.logs(handle, "stdout", 0, follow=True):
            seen += chunk
            if word in seen:
                return
    raise AssertionError(f"it ended having said {seen!r}")


async def outcome(backend: SshBackend, handle: Handle, within: float = 60) -> Outcome:
    """As an attempt waits: what cannot be asked now is asked again."""
    with anyio.fail_after(within):
        while True:
            try:
                return await backend.wait(handle)
            except BackendUnavailable:
                await anyio.sleep(0.1)


async def well(backend: SshBackend, within: float = 60) -> None:
    """Until the box can be asked again."""
    with anyio.fail_after(within):
        while await backend.health() is not None:
            await anyio.sleep(0.1)


def make_wheel(folder: Path) -> Path:
    """The least that pip installs, without an index."""
    wheel = folder / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "WORD = 'tiny'\n")
        archive.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        archive.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.dist-info/RECORD", "")
    return wheel
