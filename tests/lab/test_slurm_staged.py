"""A cluster that shares no files with this machine: its folder is not even there in our mount namespace."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from blake3 import blake3
from lab import slurm_apart, ssh_rig
from lab.ssh_daemon import make_wheel

from mlpiped.backends.base import Exited, Job, JobOutput, NeverRan, Part, Prunes
from mlpiped.backends.slurm import LoginRunner, StagedSlurmBackend, commands
from mlpiped.backends.ssh import LoginShell, Stage
from mlpiped.config.computes import SlurmCompute
from mlpiped.errors import BackendUnavailable, InvalidJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from contextlib import AsyncExitStack
    from pathlib import Path

    from mlpiped.backends.base import Handle

pytestmark = [pytest.mark.anyio, pytest.mark.lab, pytest.mark.timeout(200)]
MANY = 100  # jobs
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

    async def life(self, store: int | None = None) -> StagedSlurmBackend:
        """The backend of the daemon's next life."""
        work_dir = self.apart.work_dir
        compute = SlurmCompute(kind="slurm", via="login", work_dir=work_dir, shared=False, poll_interval="200ms")
        link = self.apart.login.backend(self.place, port=self.cable.port).link
        self.stack.push_async_callback(link.close)
        self.runner = LoginRunner(LoginShell(link))
        stage = Stage(link, work_dir, self.instance, {}, store)
        backend = StagedSlurmBackend(
            "cluster", self.place, compute, instance=self.instance, runner=self.runner, stage=stage, patience=5.0
        )
        await backend.start(self.stack)
        return backend

    def job(self, script: str, **fields: Any) -> Job:
        return Job(token=f"t-{secrets.token_hex(6)}", arguments=((Part("text", script),),), shell=True, **fields)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """All that is submitted meanwhile waits in the queue."""
        self.apart.cluster.command("scontrol", "update", "partitionname=main", "state=down")
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        self.apart.cluster.command("scontrol", "update", "partitionname=main", "state=up")

    @property
    def root(self) -> str:
        return f"{self.apart.work_dir}/{self.instance}"

    def folder(self, token: str) -> str:
        return f"{self.root}/jobs/{token}"

    def there(self, *argv: str) -> list[str]:
        """The lines that a command says on the cluster's side."""
        return self.apart.there("sh", "-c", 'cd "$0" && exec "$@"', self.root, *argv).splitlines()

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


async def test_requirements_are_built_there_once_per_content_by_the_login_node(desk: Desk) -> None:
    """The nodes need no network for it; neither for `import mlpiped`."""
    wheel = make_wheel(desk.place)
    python = "import sys, os, tiny, mlpiped; print(tiny.WORD, sys.prefix, os.environ['VIRTUAL_ENV'])"

    def job() -> Job:
        return desk.job(f'python -c "{python}"', requirements=f"{wheel}\n")

    async def one(backend: StagedSlurmBackend) -> None:
        handle = await backend.submit(job())
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.code == 0, (outcome, await log(backend, handle))
        word, prefix, home = (await log(backend, handle)).decode().split()
        assert word == "tiny" and prefix == home and home.startswith(f"{desk.root}/.envs/")

    for _ in range(2):  # the next daemon finds it there
        backend = await desk.life()
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(one, backend)
    built = desk.there("sh", "-c", "cat .envs/*.log")
    assert sum("Successfully installed tiny" in line for line in built) == 1
    with pytest.raises(InvalidJob, match="cannot install the step's requirements"):
        await backend.submit(desk.job("true", requirements="/no/such.whl\n"))
    assert (await backend.prune(only_look=False))[0] == 0  # for ever, unless the config says how much


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
    assert (desk.place / "jobs" / job.token).is_dir()  # by which `gc` finds what is there
    await backend.discard(job.token, keep_logs=False)
    assert job.token not in desk.there("ls", "jobs")


async def test_many_jobs_are_asked_for_together(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one request all that is asked for while the one before is under way; and for jobs that wait, none at all."""
    backend = await desk.life()
    await backend.wait(await backend.submit(desk.job("true")))
    run, asked = desk.runner.run, Counter[str]()

    async def counted(argv: Any, stdin: bytes = b"") -> tuple[int, str, str]:
        asked[next((word for word in argv if word in commands.NAMES), "request")] += 1
        return await run(argv, stdin)

    monkeypatch.setattr(desk.runner, "run", counted)
    handles = []

    async def submit() -> None:
        handles.append(await backend.submit(desk.job("true")))

    async def looks(count: int) -> None:
        until = backend._queue.looks + count
        while backend._queue.looks < until:
            await anyio.sleep(0.05)

    with desk.closed():
        async with anyio.create_task_group() as group:
            for _ in range(MANY):
                group.start_soon(submit)
        assert asked["request"] < MANY / 2, asked
        async with anyio.create_task_group() as group:
            for handle in handles:
                group.start_soon(backend.wait, handle)
            asked.clear()
            await looks(8)
            assert asked["squeue"] <= 9 and asked["request"] <= 6, asked
            asked.clear()
            desk.apart.cluster.command("scancel", "-u", "root")  # all change at once
        assert asked["request"] < MANY / 2, asked


# --- what lies there goes again -------------------------------------------------------------------------------------
class Data:
    """A file here, its content there, and jobs that read it."""

    def __init__(self, desk: Desk, name: str) -> None:
        self.desk, self.path = desk, desk.place / name
        self.path.write_bytes(secrets.token_bytes(1 << 20))
        self.digest = f"b3:{blake3(self.path.read_bytes()).hexdigest()}"
        self.content = self.digest.replace(":", "-")

    def job(self) -> Job:
        given, told = {"x": (str(self.path),)}, {str(self.path): self.digest}
        return replace(
            self.desk.job(""), arguments=((Part("text", "b2sum "), Part("input", "x")),), inputs=given, contents=told
        )

    def is_there(self) -> bool:
        return self.content in self.desk.there("ls", ".cas")

    async def read_by(self, backend: StagedSlurmBackend, handle: Handle) -> None:
        """What the job has read is what lies here."""
        outcome = await backend.wait(handle)
        assert isinstance(outcome, Exited) and outcome.code == 0, outcome
        assert (await log(backend, handle)).split()[0].decode() == hashlib.blake2b(self.path.read_bytes()).hexdigest()


async def test_what_nobody_uses_goes_and_never_what_a_job_in_the_queue_will_read(desk: Desk) -> None:
    """Another life of the daemon prunes; it knows nothing of the job."""
    backend = await desk.life()
    used, idle = Data(desk, "used"), Data(desk, "idle")
    await idle.read_by(backend, await backend.submit(idle.job()))
    with desk.closed():
        handle = await backend.submit(used.job())
        backend = await desk.life(store=1024)
        assert isinstance(backend, Prunes)
        would = await backend.prune(only_look=True)
        assert would[0] == 1 and would[1] >= 1 << 20 and idle.is_there()
        assert await backend.prune(only_look=False) == would
        assert used.is_there() and not idle.is_there()
    await used.read_by(backend, handle)
    await backend.prune(only_look=False)
    assert not used.is_there()
    assert backend.missing({used.digest: 1}) == 1
    await used.read_by(backend, await backend.submit(used.job()))  # which is sent again
    await backend.discard(handle["token"], keep_logs=True)
    assert handle["token"] not in desk.there("ls", "slurm/uses")


async def test_what_a_fenced_job_would_have_used_goes(desk: Desk) -> None:
    backend = await desk.life(store=1024)
    data = Data(desk, "data")
    token = data.job().token
    await backend._files.build(replace(data.job(), token=token))
    await backend.prune(only_look=False)
    assert data.is_there()
    assert isinstance(await backend.fence(token), NeverRan)
    await backend.prune(only_look=False)
    assert not data.is_there()


async def test_a_job_waits_for_who_prunes_and_has_sent_again_what_went(desk: Desk) -> None:
    backend = await desk.life()
    data = Data(desk, "data")
    await data.read_by(backend, await backend.submit(data.job()))
    began = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    mark = f".pruning/{os.getpid()}.{began}"
    desk.there("touch", mark)
    job = data.job()
    handles = []
    async with anyio.create_task_group() as group:

        async def submit() -> None:
            handles.append(await backend.submit(job))

        group.start_soon(submit)
        while job.token not in desk.there("ls", "slurm/uses"):
            await anyio.sleep(0.05)
        desk.there("mv", f".cas/{data.content}", ".new/gone")  # which it has not looked for yet
        assert job.token not in desk.there("ls", "jobs") and not handles
        desk.there("rm", mark)
    await data.read_by(backend, handles[0])
    assert data.is_there()
