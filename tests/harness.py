"""A real daemon on a scratch folder: started as a process, spoken to through `mlpipectl`, killed, started again.

End-to-end tests and benchmarks share it. Nothing here waits blindly: each wait looks for what it waits for and names it
when it does not come. `close` ends the daemon and every process that works below the scratch folder, and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

T = TypeVar("T")
BIN = Path(sys.executable).parent
SDK = """\
from mlpiped import (
    CommandStep, Cron, DataReference, Datastore, DataTransferStep, Environment, Every, MpiStep, OnArrival, OnSuccess,
    Pipeline, PipelineData, PipelineParameter, PythonScriptStep, Resources, Retry,
)

lab = Datastore("lab")
"""
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
SOON = 20.0
"""Seconds within which anything that should happen must have: generous, because test machines are busy."""


def until(look: Callable[[], T], what: str, timeout: float = SOON, pause: float = 0.02) -> T:
    """The first true answer of `look`; AssertionError naming `what` when there is none within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}; last seen: {answer!r}")
        time.sleep(pause)


def lines(path: Path) -> list[str]:
    """The lines of a file that steps append to; none when it does not exist yet."""
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


class Daemon:
    """`mlpiped serve` on a folder of its own.

    Below `root`: plugins/, lab/ (the datastore `lab`), state/, run/ and serve.log. The folder is made by us and removed
    by `close`; after `kill9` or `term`, `start` takes the same state up again.
    """

    program: Sequence[str | Path] = (BIN / "mlpiped",)

    def __init__(
        self,
        *,
        slots: int = 2,
        daemon: Mapping[str, str] | None = None,
        extra: str = "",
        env: Mapping[str, str] | None = None,
        where: str | None = None,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mlpd-", dir=where))
        self.plugins, self.lab, self.state = self.root / "plugins", self.root / "lab", self.root / "state"
        self.socket, self.log = self.root / "run" / "s", self.root / "serve.log"
        self.config = self.root / "mlpiped.toml"
        for folder in (self.plugins, self.lab, self.socket.parent):
            folder.mkdir()
        more = "".join(f"{key} = {value}\n" for key, value in (daemon or {}).items())
        self.config.write_text(
            f'[daemon]\nstate_dir = "{self.state}"\nruntime_dir = "{self.socket.parent}"\n'
            f'plugins = ["{self.plugins}"]\nlog = "json"\n{more}\n'
            f'[control]\nsocket = "{self.socket}"\n\n[datastores.lab]\npath = "{self.lab}"\n\n'
            f'[compute.local]\nkind = "local"\nslots = {slots}\n\n{extra}\n'
        )
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MLPIPED_")},
            "PATH": f"{BIN}:{os.environ.get('PATH', os.defpath)}",
            "MLPIPED_SOCKET": str(self.socket),
            "NO_COLOR": "1",
            **(env or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None

    # --- its life ---------------------------------------------------------------------------------------------------
    def start(self, timeout: float = SOON, before: Callable[[], None] | None = None) -> Daemon:
        """Start `mlpiped serve` and return when its socket accepts. `before` runs in the child first.

        The daemon is told to stop should we be killed before we can tell it.
        """
        assert self.process is None

        def prepare() -> None:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if before is not None:
                before()

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, "serve", "--config", self.config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=self.root,
                start_new_session=True,
                preexec_fn=prepare,
            )
        deadline = time.monotonic() + timeout
        while not self.accepts():
            if self.process.poll() is not None:
                raise AssertionError(f"mlpiped ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"mlpiped does not serve after {timeout:g} s:\n{self.tail()}")
            time.sleep(0.005)
        return self

    def accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as knock:
            try:
                knock.connect(str(self.socket))
            except OSError:
                return False
        return True

    def tail(self, size: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-size:]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def _stop(self, number: int, timeout: float) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout)
        self.process = None
        return code

    def term(self, timeout: float = SOON) -> int:
        """SIGTERM, and its exit status."""
        return self._stop(signal.SIGTERM, timeout)

    def kill9(self) -> None:
        self._stop(signal.SIGKILL, SOON)

    def restart(self) -> Daemon:
        self.term()
        return self.start()

    def processes(self) -> set[int]:
        """Every process that belongs to this scratch folder: the daemon, supervisors and steps."""
        return processes_below(self.root)

    def close(self) -> None:
        try:
            if self.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.term(timeout=10)
            if self.process is not None:
                self.kill9()
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: not self.processes(), "the end of every step's process", 5)
            shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Daemon:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    # --- what people do ---------------------------------------------------------------------------------------------
    def ctl(self, *args: object, timeout: float = 60, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One `mlpipectl`, to its end."""
        words = [str(BIN / "mlpipectl"), *(str(arg) for arg in args)]
        return subprocess.run(
            words, env=self.env, cwd=cwd or self.root, capture_output=True, text=True, timeout=timeout, check=False
        )

    def json(self, *args: object, timeout: float = 60) -> Any:
        """The document that `mlpipectl … --json` prints; it must end with 0."""
        done = self.ctl(*args, "--json", timeout=timeout)
        assert done.returncode == 0, f"mlpipectl {args} ended with {done.returncode}: {done.stderr}{done.stdout}"
        return json.loads(done.stdout)

    def plugin(self, name: str, text: str) -> Path:
        """Put a plugin file in place as careful editors do: by rename."""
        path = self.plugins / f"{name}.py"
        fresh = self.root / f".{name}.new"
        fresh.write_text(text)
        fresh.rename(path)
        return path

    def version(self, pipeline: str) -> str | None:
        """The version of a pipeline that is loaded now; None when there is none."""
        return next((p["version"] for p in self.pipelines() if p["name"] == pipeline), None)

    def install(self, name: str, body: str, *pipelines: str, timeout: float = SOON) -> None:
        """Put a plugin (`SDK` and `body`) in place and return when the daemon has taken up this very text."""
        names = pipelines or (name,)
        before = {each: self.version(each) for each in names}
        self.plugin(name, SDK + body)
        until(
            lambda: all(self.version(each) not in (None, before[each]) for each in names),
            f"plugin `{name}` taken up",
            timeout,
        )

    def pipelines(self) -> list[dict[str, Any]]:
        return list(self.json("pipelines")["pipelines"])

    def broken(self) -> list[dict[str, Any]]:
        """The faults of plugins: file, line, message."""
        return list(self.json("pipelines")["broken"])

    def runs(self, pipeline: str | None = None) -> list[dict[str, Any]]:
        """Newest first."""
        words = ("--pipeline", pipeline) if pipeline else ()
        return list(self.json("runs", *words, "-n", 1000)["runs"])

    def run(self, pipeline: str, *args: object) -> int:
        """Ask for a run; its number."""
        return int(self.json("run", pipeline, *args)["id"])

    def show(self, run: int | str) -> dict[str, Any]:
        """The JSON of a run, as the contract has it."""
        document: dict[str, Any] = self.json("show", run)
        return document

    def end(self, run: int | str, timeout: float = 60) -> dict[str, Any]:
        """Wait for a run; its JSON."""
        done = self.ctl("wait", run, "--timeout", f"{timeout:g}s", timeout=timeout + 10)
        assert done.returncode in (0, 1), done.stderr
        document = self.show(run)
        assert document["state"] == "finished", f"run {run} has not ended: {document}\n{self.tail()}"
        return document

    def go(self, pipeline: str, *args: object, timeout: float = 60) -> dict[str, Any]:
        """Ask for a run and wait for its end; its JSON."""
        return self.end(self.run(pipeline, *args), timeout)

    def next_run(self, pipeline: str, known: int = 0, timeout: float = SOON) -> dict[str, Any]:
        """The first run of `pipeline` beyond the number `known`, once it is there."""
        return until(
            lambda: next((r for r in reversed(self.runs(pipeline)) if r["id"] > known), None),
            f"a run of `{pipeline}` after run {known}",
            timeout,
        )

    @contextlib.contextmanager
    def following(self, *args: object) -> Iterator[subprocess.Popen[str]]:
        """An `mlpipectl` that streams, as a process whose stdout is read line by line."""
        words = [str(BIN / "mlpipectl"), *(str(arg) for arg in args)]
        with subprocess.Popen(
            words, env=self.env, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def steps(run: Mapping[str, Any]) -> dict[str, str]:
    """Name -> outcome of a run's steps (state of those that have none)."""
    return {step["name"]: step["outcome"] or step["state"] for step in run["steps"]}


def step(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in run["steps"] if s["name"] == name)
    return found


def processes_below(folder: Path) -> set[int]:
    """Every process but this one that works below `folder`, or names it in its command or environment."""
    return {pid for pid in _pids() if pid != os.getpid() and _mentions(pid, str(folder))}


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _mentions(pid: int, folder: str) -> bool:
    """Whether a process (not a zombie) works below `folder` or was started with it in its command or environment."""
    needle = os.fsencode(folder)
    for name in ("cmdline", "environ"):
        with contextlib.suppress(OSError):
            if needle in Path(f"/proc/{pid}/{name}").read_bytes():
                return True
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd").startswith(folder)
    return False
