"""The control server on a real socket with a real ledger; only the scheduler's acts are played."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio

from mlpiped.clock import SystemClock
from mlpiped.control.access import Access
from mlpiped.control.server import ControlServer
from mlpiped.control.service import About, Service
from mlpiped.errors import Fault, UnknownName
from mlpiped.ledger import Ledger, StepRow, moves
from mlpiped.model import AttemptEnd, Cause, CauseKind, Event, OutputFact, RunOutcome, StepOutcome, StepState
from mlpiped.protocol import typed_parameters
from mlpiped.spec import PipelineSpec, canonical, version_of
from mlpiped.triggers.schedule import ScheduleView

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ROOT = Path(__file__).resolve().parent.parent
CTL = Path(sys.executable).parent / "mlpipectl"


def spec(name: str = "digits", file: str = "/plugins/digits.py") -> PipelineSpec:
    where = {"file": file, "line": 3}
    text = {"kind": "text", "text": "true"}
    return PipelineSpec.model_validate(
        {
            "name": name,
            "where": where,
            "experiment": name,
            "parameters": [
                {"name": "rate", "type": "float", "default": 0.1},
                {"name": "epochs", "type": "int", "default": 3},
                {"name": "fast", "type": "bool", "default": False},
                {"name": "label", "type": "str", "default": "x"},
            ],
            "triggers": [
                {"kind": "cron", "where": where, "expression": "0 6 * * mon", "timezone": "Europe/Warsaw"},
                {"kind": "success", "where": where, "pipeline": "other"},
            ],
            "steps": [
                {
                    "name": "prepare",
                    "where": where,
                    "arguments": [text],
                    "inputs": [
                        {"name": "samples", "source": {"kind": "reference", "datastore": "lab", "path": "in/*.csv"}}
                    ],
                    "outputs": [{"name": "clean", "file_name": "clean.csv"}],
                },
                {
                    "name": "train",
                    "where": where,
                    "arguments": [text],
                    "inputs": [{"name": "clean", "source": {"kind": "upstream", "step": "prepare", "output": "clean"}}],
                    "outputs": [{"name": "model", "file_name": "model", "output_kind": "folder"}],
                },
                {"name": "report", "where": where, "arguments": [text], "after": ["train"]},
            ],
        }
    )


@dataclass(frozen=True)
class Loaded:
    spec: PipelineSpec
    version: str


@dataclass(frozen=True)
class Broken:
    faults: tuple[Fault, ...]


@dataclass
class Plugins:
    loaded: dict[str, Loaded] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def get(self, name: str) -> Loaded | None:
        return self.loaded.get(name)

    def all(self) -> list[Loaded]:
        return list(self.loaded.values())

    def broken(self) -> list[Broken]:
        return [Broken(tuple(self.faults))] if self.faults else []


class Acts:
    """Notes what it was asked, and does the little that the answers need."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: dict[str, int] = {}
        self.drained = False
        self.waiting: str | None = "waits for a slot on `local`: 2 slots, 2 in use"
        self.raises: BaseException | None = None

    def _note(self, verb: str, **words: Any) -> None:
        if self.raises is not None:
            raise self.raises
        self.asked.append((verb, words))

    async def start(self, pipeline: str, *, idempotency_key: str | None, **words: Any) -> tuple[int, bool]:
        self._note("start", pipeline=pipeline, idempotency_key=idempotency_key, **words)
        if idempotency_key in self.keys:
            return self.keys[idempotency_key], False
        run = await self.stage.run(pipeline, owner=words["who"], parameters=words["parameters"], tags=words["tags"])
        if idempotency_key is not None:
            self.keys[idempotency_key] = run
        return run, True

    async def submit(self, file: str, **words: Any) -> int:
        self._note("submit", file=file, **words)
        words["parameters"] = typed_parameters(words["parameters"], spec().parameters)
        return await self.stage.run("digits", owner=words["who"])

    async def plan(self, pipeline_or_file: str, **words: Any) -> dict[str, Any]:
        self._note("plan", what=pipeline_or_file, **words)
        steps = [
            {"name": "prepare", "action": "reuse", "why": "reused from run 1", "seconds": None},
            {"name": "train", "action": "run", "why": "code changed: train.py (+3 -1)", "seconds": 61.0},
            {"name": "report", "action": "unknown", "why": "depends on what `train` will make", "seconds": 1.0},
        ]
        return {"pipeline": "digits", "version": "v", "steps": steps, "seconds": 62.0}

    async def cancel(self, run_id: int, step: str | None, who: str) -> None:
        self._note("cancel", run=run_id, step=step, who=who)

    async def retry(self, run_id: int, who: str) -> int:
        self._note("retry", run=run_id, who=who)
        return await self.stage.run("digits", owner=who)

    async def pause(self, pipeline: str, who: str) -> None:
        self._note("pause", pipeline=pipeline, who=who)
        await self.stage.ledger.write(moves.set_paused(pipeline, True, who, self.stage.now))

    async def resume(self, pipeline: str, who: str) -> None:
        self._note("resume", pipeline=pipeline, who=who)
        await self.stage.ledger.write(moves.set_paused(pipeline, False, who, self.stage.now))

    async def drain(self, compute: str, drained: bool, who: str) -> None:
        if compute != "local":
            raise UnknownName.among("compute", compute, ["local"])
        self._note("drain", compute=compute, drained=drained, who=who)
        self.drained = drained

    async def reload(self, who: str) -> dict[str, Any]:
        self._note("reload", who=who)
        return {"pipelines": 1, "broken": [], "config": "unchanged"}

    async def why_waiting(self, run_id: int, step: str) -> str | None:
        return self.waiting

    def stuck(self) -> list[Any]:
        return []

    def active(self) -> list[Any]:
        return [
            {
                "id": 7, "pipeline": "digits", "owner": "alice", "started_at": self.stage.now, "total": 3, "done": 1,
                "running": 1, "failed": 0, "queued": 1,
                "doing": [{"step": "train", "what": "sends input samples to gpu1: 1.2 of 3.4 GB"}],
            }
        ]  # fmt: skip

    def compute(self) -> list[Any]:
        holder = {"run": 7, "step": "train", "since": self.stage.now, "slots": 1}
        return [
            {
                "name": "local", "kind": "local", "slots": 2, "used": 1, "memory": 1 << 30, "memory_used": 0,
                "holders": [holder], "health": None, "unwell_since": None, "drained": self.drained,
                "drained_by": "bob" if self.drained else None,
                "drained_since": self.stage.now if self.drained else None,
                "cards_trouble": None, "cluster": None,
                "cards": [
                    {"uuid": "GPU-1", "index": 0, "name": "RTX", "memory": 24 << 30, "foreign": None,
                     "holders": [holder]},
                    {"uuid": "GPU-2", "index": 1, "name": "RTX", "memory": 24 << 30, "holders": [],
                     "foreign": "in use by python (pid 4242), not ours"},
                ],
            }
        ]  # fmt: skip


class Stage:
    """What a test holds: the service, its parts, and the shortest way to runs with steps and logs."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.folder = folder
        self.ledger = ledger
        self.socket = folder / "run" / "s"
        self.clock = SystemClock()
        self.plugins = Plugins({"digits": Loaded(spec(), version_of(spec()))})
        self.acts = Acts(self)
        self.service = Service(
            access=Access(None, ()),
            ledger=ledger,
            registry=self.plugins,
            actions=self.acts,
            schedules=lambda: [
                ScheduleView(
                    "s1", "digits", "cron", "0 6 * * mon (Europe/Warsaw)", self.now + 3_600_000_000, mode="clock"
                )
            ],
            clock=self.clock,
            about=About("0.1.0", os.getpid(), self.clock.now(), folder, self.socket, sqlite=(3, 53, 4)),
            job_folder=lambda token: folder / "jobs" / token,
            gc_plan=self._gc_plan,
            gc=self._gc,
        )
        self.saved = False

    async def _gc_plan(self) -> dict[str, Any]:
        row = {"digest": "b3:aa", "kind": "file", "size": 10, "path": "/x", "used_at": self.now, "why": "old"}
        return {"artifacts": [{**row, "seconds": 60.0}], **(await self._gc())}

    async def _gc(self) -> dict[str, Any]:
        parts = [
            {"what": "runs", "count": 3, "bytes": 0, "seconds": 0.0},
            {"what": "artifacts", "count": 1, "bytes": 10, "seconds": 60.0},
        ]
        return {"parts": parts, "bytes": 10, "seconds": 60.0, "faults": []}

    @property
    def now(self) -> int:
        return self.clock.now()

    def access(self, *operators: str, group: str | None = None, own_uid: int | None = None) -> None:
        self.service.access = Access(group, operators, own_uid)

    # --- what happens -------------------------------------------------------------------------------------------
    async def run(self, pipeline: str = "digits", *, owner: str = "alice", start: bool = True, **more: Any) -> int:
        version = version_of(spec(pipeline))
        await self.ledger.write(moves.save_definition(version, pipeline, canonical(spec(pipeline)), self.now))
        event = Event(pipeline, Cause(CauseKind.MANUAL, f"by {owner}"), parameters=dict(more.get("parameters") or {}))
        opening = moves.open_run(
            event, version=version, experiment=pipeline, owner=owner, tags=dict(more.get("tags") or {}), options={},
            now=self.now,
        )  # fmt: skip
        [run] = await self.ledger.write(opening)
        if start:
            await self.ledger.write(moves.start_run(run, self.now))
        return int(run)

    def job(self, token: str, *, stdout: bytes = b"", stderr: bytes = b"", metrics: str = "") -> Path:
        folder = self.folder / "jobs" / token
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (("stdout", stdout), ("stderr", stderr), ("metrics.jsonl", metrics.encode())):
            with (folder / name).open("ab") as file:
                file.write(data)
        return folder

    async def begin(self, run: int, idx: int, token: str, *, n: int = 1) -> None:
        name = spec().steps[idx].name
        if await self.ledger.step(run, name) is None:
            await self.ledger.write(
                moves.add_steps(run, [StepRow(idx, name, StepState.QUEUED, why="never ran")], self.now)
            )
        await self.ledger.write(
            moves.intent(run, idx, token, n, "local", f"b3:key{run}-{idx}", '{"command": "x"}', self.now),
            moves.handle(token, '{"v":1}', self.now),
        )

    async def succeed(self, run: int, idx: int, token: str, *outputs: OutputFact) -> None:
        await self.ledger.write(moves.collecting(token, 0, None, self.now))
        await self.ledger.write(moves.commit_result(token, f"b3:key{run}-{idx}", outputs, 1_000_000, self.now, True))

    async def fail(self, run: int, idx: int, token: str, why: str = "exit status 3") -> None:
        await self.ledger.write(
            moves.attempt_ended(token, AttemptEnd.FAILED, None, why, 3, why, None, self.now),
            moves.finish_step(run, idx, StepOutcome.FAILED, why, self.now, exit_code=3),
        )

    async def whole(self, *, outcome: RunOutcome = RunOutcome.SUCCEEDED) -> int:
        """A finished run: prepare and train made something and printed, report was skipped (or train failed)."""
        run = await self.run()
        token = f"tok-{run}"
        await self.begin(run, 0, f"{token}-0")
        self.job(f"{token}-0", stdout=b"prepared\n", metrics='{"name": "rows", "value": 100}\n')
        await self.succeed(run, 0, f"{token}-0", self.file("clean", b"a,b\n1,2\n"))
        await self.begin(run, 1, f"{token}-1")
        if outcome is RunOutcome.FAILED:
            self.job(f"{token}-1", stderr=b"Traceback: boom\n")
            await self.fail(run, 1, f"{token}-1")
        else:
            metrics = '{"kind": "metric", "name": "accuracy", "value": 0.5}\n{"name": "accuracy", "value": 0.97}\n'
            self.job(f"{token}-1", stdout="naïve café\n".encode(), metrics=metrics + "not json\n[1]\n")
            await self.succeed(run, 1, f"{token}-1", self.tree("model"))
        skipped = StepRow(2, "report", StepState.FINISHED, StepOutcome.SKIPPED, "not needed for the target")
        await self.ledger.write(moves.add_steps(run, [skipped], self.now))
        await self.ledger.write(moves.finish_run(run, outcome, self.now))
        return run

    async def reused(self, source: int) -> int:
        """A finished run that took everything from `source`."""
        run = await self.run()
        rows = [
            StepRow(i, name, StepState.FINISHED, StepOutcome.REUSED, f"reused from run {source}",
                    key=f"b3:key{source}-{i}", reused_from=(source, name))
            for i, name in enumerate(("prepare", "train"))
        ]  # fmt: skip
        rows.append(StepRow(2, "report", StepState.FINISHED, StepOutcome.SKIPPED, "not needed for the target"))
        await self.ledger.write(moves.add_steps(run, rows, self.now))
        await self.ledger.write(moves.finish_run(run, RunOutcome.SUCCEEDED, self.now))
        return run

    def file(self, name: str, data: bytes) -> OutputFact:
        path = self.folder / "artifacts" / "aa" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)
        return OutputFact(name, f"b3:{name}", "file", len(data), str(path))

    def tree(self, name: str) -> OutputFact:
        path = self.folder / "artifacts" / "bb" / name
        (path / "deep").mkdir(parents=True, exist_ok=True)
        (path / "weights.bin").write_bytes(bytes(range(256)) * 10)
        (path / "deep" / "run.sh").write_bytes(b"#!/bin/sh\n")
        (path / "deep" / "run.sh").chmod(0o555)
        return OutputFact(name, f"b3t:{name}", "folder", 2570, str(path))

    # --- asking -------------------------------------------------------------------------------------------------
    async def ask(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """(status, document)."""
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as session:
            async with session.request(method, f"http://mlpiped{path}", json=body, headers=headers) as answer:
                return answer.status, await answer.json(content_type=None)

    async def download(self, method: str, path: str, body: Any = None) -> bytes:
        """An answer that is no document."""
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as session:
            async with session.request(method, f"http://mlpiped{path}", json=body) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.read()

    async def get(self, path: str) -> Any:
        status, document = await self.ask("GET", path)
        assert status == 200, document
        return document

    async def raw(self, data: bytes) -> bytes:
        """Everything that comes back for these bytes, until the server closes."""
        stream = await anyio.connect_unix(str(self.socket))
        async with stream:
            await stream.send(data)
            found = b""
            with anyio.fail_after(10):
                try:
                    while True:
                        found += await stream.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return found

    async def post_raw(self, path: str, body: bytes) -> tuple[int, Any]:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as session:
            async with session.post(f"http://mlpiped{path}", data=body) as answer:
                return answer.status, await answer.json(content_type=None)

    async def ctl(self, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
        """The real `mlpipectl`, to its end."""
        done = await anyio.run_process(
            [str(CTL), *(str(word) for word in words)], env=self.env() | dict(env or {}), cwd=cwd or self.folder,
            check=False, stdin=None,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def env(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath), "MLPIPED_SOCKET": str(self.socket), "LANG": "C.UTF-8",
            "MLPIPED_DEBUG": "",
        }  # fmt: skip


@dataclass(frozen=True)
class Done:
    code: int
    raw: bytes
    raw_err: bytes

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def err(self) -> str:
        return self.raw_err.decode()


@asynccontextmanager
async def staged(*, serve: bool = True) -> AsyncIterator[Stage]:
    # In memory where there is such a place: nothing here is about what a disk keeps.
    with tempfile.TemporaryDirectory(prefix="mlpc-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        ledger = await Ledger.open(folder, SystemClock())
        try:
            async with AsyncExitStack() as stack:
                stage = Stage(folder, ledger)
                if serve:
                    await ControlServer(stage.socket, stage.service).start(stack)
                yield stage
        finally:
            await ledger.close()
