"""A box over SSH against OpenSSH's own commands: a step, many steps at once, a large input."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from blake3 import blake3

from mlpiped.backends.base import Exited, Job, JobOutput, Part
from mlpiped.backends.ssh import SshBackend
from mlpiped.config.computes import SshCompute
from tests.bench.figures import Figure
from tests.bench.gauges import status_kb, wall
from tests.lab import packages, ssh_rig

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

ROUNDS = 60
MANY = 500
LARGE, LARGE_ROUNDS = 1 << 30, 3
TIMES_SSH = 1.3
MOST_MEMORY = 30.0  # MB
LEAST_SHARE = 0.8
AGAIN = 1.0  # seconds


class Place:
    """A box, its user's key, and a folder of ours that knows it."""

    def __init__(self, lab: ssh_rig.Lab) -> None:
        self.box = lab.box()
        self.folder = lab.folder / "state"
        self.folder.mkdir()
        (self.folder / "known_hosts").write_text(self.box.known())
        self.options = ["-F", "/dev/null", "-oBatchMode=yes", f"-oUserKnownHostsFile={self.folder / 'known_hosts'}"]
        self.options += ["-i", str(lab.key), f"-oControlPath={lab.folder / 'control'}"]

    def ssh(self, *words: str) -> list[str]:
        return ["ssh", *self.options, "-p", str(self.box.port), *words]

    async def backend(self, stack: AsyncExitStack) -> SshBackend:
        settings = SshCompute(**self.box.settings())
        backend = SshBackend("box", self.folder, settings, instance="bench", datastores={})
        await backend.start(stack)
        assert await backend.health() is None
        return backend


@contextmanager
def place() -> Iterator[Place]:
    if (reason := ssh_rig.why_not()) is not None:
        raise RuntimeError(reason)
    packages.install(ssh_rig.PACKAGES)
    lab = ssh_rig.Lab()
    try:
        yield Place(lab)
    finally:
        lab.close()


def on_a_box(measure: Callable[[Place, SshBackend], Coroutine[Any, Any, list[Figure]]]) -> Iterator[Figure]:
    async def main(there: Place) -> list[Figure]:
        async with AsyncExitStack() as stack:
            return await measure(there, await there.backend(stack))

    with place() as there:
        yield from anyio.run(main, there)


async def one(backend: SshBackend, job: Job) -> float:
    """Seconds from the submission to the outcome."""
    before = time.perf_counter()
    found = await backend.wait(await backend.submit(job))
    took = time.perf_counter() - before
    assert isinstance(found, Exited) and found.code == 0, found
    return took


def true(token: str) -> Job:
    return Job(token=token, arguments=((Part("text", "true"),),))


# --- a step -----------------------------------------------------------------------------------------------------------
def step() -> Iterator[Figure]:
    yield from on_a_box(_step)


async def _step(there: Place, backend: SshBackend) -> list[Figure]:
    """Taken in turn, so that both suffer the same from whoever else is here."""
    master = subprocess.Popen(there.ssh("-oControlMaster=yes", "-N", there.box.address))
    try:
        await anyio.sleep(1)
        command = there.ssh(there.box.address, "true")
        raw, ours = [], []
        await one(backend, true("warm"))
        for number in range(ROUNDS):
            raw.append(wall(lambda: subprocess.run(command, check=True, stdin=subprocess.DEVNULL)))
            ours.append(await one(backend, true(f"step-{number}")))
    finally:
        master.terminate()
        master.wait()
    least, middle = min(ours) / min(raw), statistics.median(ours) / statistics.median(raw)
    note = f"median {statistics.median(ours) * 1e3:.1f} ms, ssh {statistics.median(raw) * 1e3:.1f} ms"
    return [
        Figure("`true` over ssh / ControlMaster", middle, "×", TIMES_SSH, note=note),
        Figure("the same, of the best of each", least, "×", note=f"{min(ours) * 1e3:.1f} ms, {min(raw) * 1e3:.1f} ms"),
    ]


# --- many -------------------------------------------------------------------------------------------------------------
def many() -> Iterator[Figure]:
    yield from on_a_box(_many)


async def _many(there: Place, backend: SshBackend) -> list[Figure]:
    await one(backend, true("warm"))
    before = status_kb(os.getpid(), "VmRSS")
    handles = []
    began = time.perf_counter()

    async def wait(number: int) -> None:
        argument = f"while ! test -e {there.folder}/go; do sleep 1; done"
        job = Job(token=f"many-{number}", arguments=((Part("text", argument),),), shell=True)
        handles.append(await backend.submit(job))
        found = await backend.wait(handles[-1])
        assert isinstance(found, Exited) and found.code == 0, found

    async with anyio.create_task_group() as group:
        for number in range(MANY):
            group.start_soon(wait, number)
        while len(handles) < MANY:
            await anyio.sleep(0.1)
        launched = time.perf_counter() - began
        held = status_kb(os.getpid(), "VmRSS") - before
        connections = there.box.connections()
        (there.folder / "go").touch()
    most = status_kb(os.getpid(), "VmRSS") - before
    return [
        Figure(f"connections for {MANY} steps at once", connections, "", 1),
        Figure(f"memory for {MANY} steps at once", max(held, most), "MB", MOST_MEMORY, note="more than with none"),
        Figure(f"until {MANY} steps run", launched, "s"),
    ]


# --- large things -----------------------------------------------------------------------------------------------------
def large() -> Iterator[Figure]:
    yield from on_a_box(_large)


async def _large(there: Place, backend: SshBackend) -> list[Figure]:
    """There and home, in turn with scp and rsync, so that all suffer the same from whoever else is here."""
    await one(backend, true("warm"))
    with tempfile.TemporaryDirectory(prefix="mlpd-large-") as folder:
        path, back, target = Path(folder, "large.bin"), Path(folder, "back.bin"), there.box.home / "copied"
        block, remote = os.urandom(1 << 20), f"{there.box.address}:{target}"
        with path.open("wb") as file:
            for _ in range(LARGE >> 20):
                file.write(block)
        scp = ["scp", "-q", *there.options, "-P", str(there.box.port)]
        rsync = ["rsync", "--whole-file", "-e", " ".join(there.ssh())]
        out: dict[str, list[float]] = {"scp": [], "rsync": [], "ours": []}
        home: dict[str, list[float]] = {"scp": [], "rsync": [], "ours": []}
        for number in range(LARGE_ROUNDS):
            digest = _changed(path, number)
            for name, copy in (("scp", scp), ("rsync", rsync)):
                out[name].append(_run([*copy, str(path), remote]))
                home[name].append(_run([*copy, remote, str(back)]))
                target.unlink()
                back.unlink()
            os.sync()
            out["ours"].append(await one(backend, _reads(f"first-{number}", path, digest)))
            home["ours"].append(await _fetched(backend, f"made-{number}", path, Path(folder)))
        second = await one(backend, _reads("second", path, digest))
    return [
        *_shares("1 GiB to a box", out, LEAST_SHARE),
        Figure("the second time", second, "s", AGAIN),
        *_shares("1 GiB home", home, None),
    ]


def _run(command: list[str]) -> float:
    os.sync()  # what was written before is nobody's to pay for
    return wall(lambda: subprocess.run(command, check=True))


def _changed(path: Path, number: int) -> str:
    """Another content, of which the box has nothing; its digest."""
    with path.open("r+b") as file:
        file.write(b"%d" % number)
    with path.open("rb") as file:
        hasher = blake3()
        while data := file.read(1 << 20):
            hasher.update(data)
    return f"b3:{hasher.hexdigest()}"


def _reads(token: str, path: Path, digest: str) -> Job:
    arguments = ((Part("text", "test"),), (Part("text", "-s"),), (Part("input", "x"),))
    return Job(token=token, arguments=arguments, inputs={"x": (str(path),)}, contents={str(path): digest})


async def _fetched(backend: SshBackend, token: str, path: Path, into: Path) -> float:
    """Seconds for an output of a step there, which is this file: until it is on the disk here, unlike a copy."""
    arguments = ((Part("text", "cp"),), (Part("text", str(path)),), (Part("output", "y"),))
    job = Job(token=token, arguments=arguments, outputs=(JobOutput("y", "y", "file"),))
    handle = await backend.submit(job)
    found = await backend.wait(handle)
    assert isinstance(found, Exited) and found.code == 0, found
    os.sync()
    before = time.perf_counter()
    await backend.fetch(handle, into)
    took = time.perf_counter() - before
    await backend.discard(token, keep_logs=False)
    await backend.removed()
    return took


def _shares(what: str, took: dict[str, list[float]], least: float | None) -> list[Figure]:
    speeds = {name: LARGE / 1e6 / statistics.median(times) for name, times in took.items()}
    ours = speeds.pop("ours")
    best = max(speeds, key=lambda name: speeds[name])
    share = statistics.median(theirs / mine for theirs, mine in zip(took[best], took["ours"], strict=True))
    note = ", ".join(f"{name} {speed:.0f} MB/s" for name, speed in speeds.items())
    return [
        Figure(f"{what} / {best}", share, "×", least, floor=True, note=f"median of {LARGE_ROUNDS}; {note}"),
        Figure("the same", ours, "MB/s"),
    ]
