"""A cluster that shares no files with this machine: its folder is not even there in our mount namespace."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from blake3 import blake3
from lab import slurm_apart, ssh_rig

from mlpiped.backends.base import Exited, Job, JobOutput, NeverRan, Part
from mlpiped.backends.slurm import LoginRunner, StagedSlurmBackend
from mlpiped.backends.ssh import LoginShell, Stage
from mlpiped.config.computes import SlurmCompute
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from contextlib import AsyncExitStack
    from pathlib import Path

    from mlpiped.backends.base import Handle

pytestmark = [pytest.mark.anyio, pytest.mark.lab, pytest.mark.timeout(200)]
WAIT = "echo began; while ! test -e go; do sleep 0.05; done; echo over"


@pytest.fixture(scope="module")
def apart(ssh_lab: ssh_rig.Lab) -> Iterator[slurm_apart.Apart]:
    with slurm_apart.running(ssh_lab) as found:
        yield found


class Desk:
    def __init__(self, apart: slurm_apart.Apart, place: Path, stack: AsyncExitStack) -> None:
        self.apart, self.place, self.stack = apart, place, stack
        self.instance = secrets.token_hex(16)
        self.cable = ssh_rig.Cable(apart.login.box)

    async def life(self) -> StagedSlurmBackend:
        """The backend of the daemon's next life."""
        work_dir = self.apart.work_dir
        compute = SlurmCompute(kind="slurm", via="login", work_dir=work_dir, shared=False, poll_interval="200ms")
        link = self.apart.login.backend(self.place, port=self.cable.port).link
        self.stack.push_async_callback(link.close)
        self.runner = LoginRunner(LoginShell(link))
        stage = Stage(link, work_dir, self.instance, {})
        backend = StagedSlurmBackend(
            "cluster", self.place, compute, instance=self.instance, runner=self.runner, stage=stage, patience=5.0
        )
        await backend.start(self.stack)
        return backend

    def job(self, script: str, **fields: Any) -> Job:
        return Job(token=f"t-{secrets.token_hex(6)}", arguments=((Part("text", script),),), shell=True, **fields)

    def folder(self, token: str) -> str:
        return f"{self.apart.work_dir}/{self.instance}/jobs/{token}"

    def close(self) -> None:
        self.cable.close()
        self.apart.cluster.command("scancel", "-u", "root", check=False)


@pytest.fixture
async def desk(apart: slurm_apart.Apart, tmp_path: Path, stack: AsyncExitStack) -> AsyncIterator[Desk]:
    desk = Desk(apart, tmp_path, stack)
    yield desk
    desk.close()
    assert apart.seen_here() == []  # nothing of all this was ever on our side


async def answered(ask: Callable[[], Awaitable[Any]], within: float = 60) -> Any:
    """As an attempt does: what cannot be asked now is asked again."""
    with anyio.fail_after(within):
        while True:
            try:
                return await ask()
            except BackendUnavailable:
                await anyio.sleep(0.1)


async def log(backend: StagedSlurmBackend, handle: Handle) -> bytes:
    return b"".join([chunk async for chunk in backend.logs(handle, "stdout", 0, follow=False)])


async def test_code_and_inputs_go_there_by_content_and_outputs_come_home(desk: Desk) -> None:
    backend = await desk.life()
    data, code = desk.place / "data.bin", desk.place / "code"
    data.write_bytes(secrets.token_bytes(9 << 20))  # more than goes at once
    code.mkdir()
    (code / "train.py").write_text("import sys, shutil; shutil.copy(sys.argv[1], sys.argv[2]); print('trained')\n")
    digest = f"b3:{blake3(data.read_bytes()).hexdigest()}"
    sent = backend._stage._staging.carrier  # type: ignore[attr-defined]

    def job() -> Job:
        arguments = (Part("text", "python3"),), (Part("text", "train.py"),), (Part("input", "x"),)
        return Job(
            token=f"t-{secrets.token_hex(6)}", arguments=(*arguments, (Part("output", "y"),)), code=str(code),
            inputs={"x": (str(data),)}, contents={str(data): digest}, outputs=(JobOutput("y", "y.bin", "file"),),
        )  # fmt: skip

    for round in range(2):
        before = sent.sent
        handle = await backend.submit(job())
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.code == 0, outcome
        home = await backend.fetch(handle, desk.place)
        assert (home / "out/y/y.bin").read_bytes() == data.read_bytes()
        assert (home / "stdout").read_text() == "trained\n"
        assert round == 0 or sent.sent == before  # what is there is not sent again
        assert backend.missing({digest: 9 << 20}) == 0
    await backend.discard(handle["token"], keep_logs=False)
    assert handle["token"] not in desk.apart.there("ls", f"{desk.apart.work_dir}/{desk.instance}/jobs")
    assert not home.exists()


async def test_what_a_step_prints_is_followed_and_the_next_daemon_goes_on_with_it(desk: Desk) -> None:
    backend = await desk.life()
    handle = await backend.submit(desk.job(WAIT))
    seen = b""
    with anyio.fail_after(60):
        async for chunk in backend.logs(handle, "stdout", 0, follow=True):
            seen += chunk
            if seen == b"began\n":
                break
        backend = await desk.life()
        assert await backend.find([handle["token"]]) == {handle["token"]: handle}
        assert await backend.fence(handle["token"]) == handle
        desk.apart.there("touch", f"{desk.folder(handle['token'])}/work/go")
        async for chunk in backend.logs(handle, "stdout", len(seen), follow=True):
            seen += chunk
    assert seen == b"began\nover\n"
    assert isinstance(outcome := await backend.wait(handle), Exited) and outcome.code == 0
    assert (desk.place / "jobs" / handle["token"] / "stdout").read_bytes() == seen


@pytest.mark.parametrize("what", ["build", "settle", "released", "sbatch", "install"])
async def test_J2_a_step_starts_once_when_the_connection_is_cut_after(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The call was carried out, and its answer is lost."""
    backend = await desk.life()
    run, lost = desk.runner.run, []

    async def cut(argv: Any, stdin: Any = b"", within: float | None = None) -> tuple[int, str, str]:
        text = stdin if isinstance(stdin, bytes) else await stdin or b""
        answer = await run(argv, text, within)
        mark = {"sbatch": "sbatch" in argv, "install": "zipfile" in " ".join(argv)}
        if not lost and mark.get(what, f'"name": "{what}"'.encode() in text):
            lost.append(what)
            desk.cable.cut()
            raise ConnectionError("cut")
        return answer

    monkeypatch.setattr(desk.runner, "run", cut)
    effects = f"{desk.apart.work_dir}/effects.{secrets.token_hex(4)}"
    job = desk.job(f"echo $MLPIPED_TOKEN >> {effects}")

    async def go_on() -> Handle:
        try:
            return await backend.submit(job)
        except BackendUnavailable:
            found = await answered(lambda: backend.find([job.token]))
            if job.token in found:
                return found[job.token]
            raise

    handle = await answered(go_on)
    outcome = await answered(lambda: backend.wait(handle))
    assert isinstance(outcome, Exited) and outcome.code == 0, outcome
    assert lost == [what]
    assert desk.apart.there("cat", effects).split() == [job.token]


async def test_J1_a_login_node_that_is_away_is_no_answer_and_the_step_goes_on(desk: Desk) -> None:
    backend = await desk.life()
    handle = await backend.submit(desk.job(WAIT))
    desk.apart.login.box.stop()
    with pytest.raises(BackendUnavailable):
        await backend.wait(handle)
    assert await backend.health() is not None
    with pytest.raises(BackendUnavailable):
        await backend.fence(handle["token"])
    backend = await desk.life()  # it starts while the login node is away
    desk.apart.login.box.start()
    desk.apart.there("mkdir", "-p", f"{desk.folder(handle['token'])}/work")
    desk.apart.there("touch", f"{desk.folder(handle['token'])}/work/go")
    outcome = await answered(lambda: backend.wait(handle))
    assert isinstance(outcome, Exited) and outcome.code == 0, outcome
    assert await log(backend, handle) == b"began\nover\n"


async def test_J2_a_fenced_token_never_starts_there(desk: Desk) -> None:
    backend = await desk.life()
    job = desk.job("true")
    assert isinstance(await backend.fence(job.token), NeverRan)
    with pytest.raises(BackendUnavailable, match="was fenced"):
        await backend.submit(job)
    assert await backend.find([job.token]) == {}
