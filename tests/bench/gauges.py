"""What a process costs and how a daemon is asked without the price of starting a client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Api:
    """The control socket, spoken to directly: one connection, kept open."""

    def __init__(self, path: Path) -> None:
        self.connection = http.client.HTTPConnection("mlpiped", timeout=60)
        self.connection.sock = socket.socket(socket.AF_UNIX)
        self.connection.sock.connect(str(path))

    def ask(self, method: str, path: str, body: object | None = None) -> Any:
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        assert answer.status < 300, f"{method} {path}: {answer.status} {text[:300]!r}"
        return json.loads(text)

    def close(self) -> None:
        self.connection.close()


class Cpu:
    """CPU seconds of a daemon and of everything that it ever starts, by a cgroup of their own.

    A process that was reaped by nobody we know, or by the kernel, is counted too: sums over /proc and wait4 lose those.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        for base in (Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup")):
            if (base / "cpuacct.usage").exists() or (base / "cgroup.controllers").exists():
                folder = base / f"mlpiped-bench-{os.getpid()}"
                with contextlib.suppress(OSError):
                    folder.mkdir()
                    self.folder = folder
                    return

    def join(self) -> None:
        """Put the calling process (a child that is about to become the daemon) and its future children in."""
        assert self.folder is not None
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def seconds(self) -> float:
        assert self.folder is not None
        usage = self.folder / "cpuacct.usage"
        if usage.exists():
            return int(usage.read_text()) / 1e9
        text = (self.folder / "cpu.stat").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("usage_usec")) / 1e6

    def close(self) -> None:
        if self.folder is not None:
            for _ in range(200):  # a cgroup can be removed when its last process has been reaped
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
                    return
                time.sleep(0.02)


def status_kb(pid: int, field: str) -> float:
    """VmRSS or VmHWM of a process, in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:")) / 1000


def thread_seconds(pid: int) -> float:
    """CPU seconds of all threads of a process, to the nanosecond where the kernel keeps them."""
    return (
        sum(int(task.joinpath("schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
        / 1e9
    )


def descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def wall(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    before = time.perf_counter()
    act()
    return time.perf_counter() - before


def shell(script: str, cwd: Path) -> float:
    """Seconds that a shell script takes, the start of the shell included."""
    return wall(lambda: subprocess.run(["/bin/sh", "-c", script], cwd=cwd, check=True))


def command(words: Sequence[str | Path], **options: Any) -> float:
    return wall(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL, **options))


def moment(text: str) -> float:
    """RFC 3339 -> seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


def lasted(run: dict[str, Any]) -> float:
    """Seconds from a run's request to its outcome, by the ledger."""
    return moment(run["finished_at"]) - moment(run["created_at"])
