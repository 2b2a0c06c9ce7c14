"""The job folders of containers (their format: `base.py`), and what is only in them. All of it blocks.

start.sh          the script that the container executes; it empties itself
ended             the script's last word
timed-out         it went over its time: made in the container, or by the daemon
claim/cancelled   somebody asked for its end
claim/withdrawn   it was claimed and can never start
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlpiped
from mlpiped.backends import folder as folders
from mlpiped.backends.base import Handle, Job, Lost, NeverRan, Outcome
from mlpiped.backends.docker import judging, script
from mlpiped.backends.supervisor import WITNESS_SIZE, claim, start_time, testify

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

CANCELLED, WITHDRAWN = "claim/cancelled", "claim/withdrawn"
LONGEST_ERROR = 1000  # characters: the witness has little room
SDK = ("__init__.py", "errors.py", "sdk")  # of this package: what `from mlpiped import Run` needs
NEVER_STARTED = "its container was never started"
FORGOTTEN = "whether its container had started is not known; it has been removed"
UNEXECUTABLE = b"[FATAL tini"


def record(job: Job, container: str, shell: bool, boot: str) -> Handle:
    """The claim's handle.json; with the token, the handle."""
    command = "".join(part.value for part in job.arguments[0] if part.kind == "text")[:200] if job.arguments else ""
    return {
        "v": 1,
        "id": container,
        "shell": shell,
        "boot": boot,
        "timeout": job.timeout,
        "grace": job.grace,
        "memory": job.memory,
        "command": command.encode(errors="replace").decode(),
    }


def runs_since(state: Mapping[str, Any]) -> float:
    """Seconds that a container has run, by its first process: wall clocks jump. By them where it cannot be seen."""
    ticks = start_time(state["Pid"]) if state.get("Pid") else None
    if ticks is not None:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    began = judging.moment(state.get("StartedAt"))
    return 0.0 if began is None else time.time() - began


class Folders:
    def __init__(self, state_dir: Path, compute: str, user: str, boot: str) -> None:
        self.state_dir = os.fspath(state_dir)
        self.jobs_dir = os.fspath(state_dir / "jobs")
        self.user = user
        self.boot = boot
        self._sdk = state_dir / "docker-sdk" / compute / _digest()

    @property
    def readable(self) -> tuple[str, ...]:
        """What every container may read besides its inputs."""
        return os.fspath(self._sdk), f"{self.jobs_dir}/{folders.NO_PARAMETERS}"

    def prepare(self) -> None:
        folders.prepare(Path(self.jobs_dir))
        if self._sdk.is_dir():
            return
        draft = self._sdk.parent / f".{secrets.token_hex(6)}"
        for source in _sdk_files():
            target = draft / "mlpiped" / source.relative_to(_package())
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        try:
            draft.rename(self._sdk)
        except OSError:
            shutil.rmtree(draft)
            if not self._sdk.is_dir():
                raise

    def drop_sdks(self, seen: Collection[str | None]) -> None:
        """Those of other versions, but what containers see."""
        for path in self._sdk.parent.iterdir():
            if path != self._sdk and os.fspath(path) not in seen:
                shutil.rmtree(path, ignore_errors=True)

    def at(self, token: str) -> str:
        return folders.at(self.jobs_dir, token)

    # --- made
    def environment(self, job: Job, folder: str) -> dict[str, str]:
        """What the step finds besides the image's own; a value that ends in a colon goes before the image's."""
        env = {"HOME": f"{folder}/{'work' if job.code is None else 'scratch'}", "PYTHONUNBUFFERED": "1"}
        env.update(folders.variables(folder, job))
        own = env.get("PYTHONPATH")
        env["PYTHONPATH"] = f"{own}:{self._sdk}:" if own else f"{self._sdk}:"
        if "PATH" in env:
            env["PATH"] = env["PATH"].rstrip(":") + ":"
        if job.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        return env

    def build(self, job: Job, folder: str, start: bytes | None) -> None:
        """Make the folder, unless it is there; the claim decides who may use it. `start`: the script."""
        folders.build(folder, job, None)
        if start is None:
            _empty(f"{folder}/{script.START}")  # made when it was not known yet that the image has no shell
        else:
            for name, content in ((script.START, start), (script.ENDED, b" " * script.ENDED_SIZE)):
                draft = f"{folder}/.{name}.{secrets.token_hex(6)}"
                fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with open(fd, "wb") as file:
                    file.write(content)
                os.rename(draft, f"{folder}/{name}")
        uid, gid = (int(number) for number in self.user.split(":"))
        if (uid, gid) != (os.geteuid(), os.getegid()):
            for path in (folder, *_below(folder)):
                os.chown(path, uid, gid, follow_symlinks=False)

    def claim(self, folder: str, record: Handle) -> bool:
        """Whether we won it. It is on the disk then."""
        lock = claim(folder, record, {"exit.json": b" " * WITNESS_SIZE})
        if lock is None:
            if folders.fenced(folder):
                _empty(f"{folder}/{script.START}")
            return False
        os.close(lock)
        return True

    # --- ended
    def told(self, folder: str) -> Outcome | None:
        """What the folder alone says."""
        if folders.fenced(folder):
            return NeverRan("its token was fenced before it started")
        if os.path.exists(f"{folder}/{WITHDRAWN}"):
            return NeverRan(NEVER_STARTED)
        return folders.witness(folder)

    def end(self, handle: Handle, folder: str, state: dict[str, Any] | None) -> Outcome:
        """Judge a container that does not run (None: there is none), and write the witness of a step that ended."""
        said = self.told(folder)  # somebody else may have been here, and have removed the container
        if said is not None:
            return said
        if not os.path.isdir(folder):
            return Lost("its job folder is gone")
        if state is None and not self._began(handle, folder):
            return self._never(folder)
        outcome = judging.judge(self._evidence(handle, folder, state))
        if isinstance(outcome, Lost):
            return outcome
        names = ("code", "signal", "timed_out", "cancelled", "out_of_memory", "started", "ended", "cpu", "max_rss")
        error = None if outcome.error is None else outcome.error[:LONGEST_ERROR]
        try:
            testify(folder, {"v": 1, "error": error, **{name: getattr(outcome, name) for name in names}}, durable=True)
        except FileNotFoundError:  # somebody else did; or the folder is going
            return self.told(folder) or outcome
        return self.told(folder) or outcome

    def _evidence(self, handle: Handle, folder: str, state: dict[str, Any] | None) -> judging.Evidence:
        return judging.Evidence(
            state,
            script.read(folders.read_stream(folder, script.ENDED, 0)),
            cancelled=os.path.exists(f"{folder}/{CANCELLED}"),
            timed_out=os.path.exists(f"{folder}/{script.TIMED_OUT}"),
            shell=bool(handle.get("shell", True)),
            command=str(handle.get("command", "")),
            memory=handle.get("memory"),
            rebooted=handle.get("boot") != self.boot,
        )

    def _began(self, handle: Handle, folder: str) -> bool:
        """The script empties itself first of all; of a container without a shell nobody knows."""
        return not handle.get("shell") or _size(f"{folder}/{script.START}") == 0

    def withdrawn(self, handle: Handle, folder: str) -> Outcome:
        """The engine called its container created, and has removed it. It may have run all the same: an engine that is
        killed during a start forgets it. The script tells; of a container without a shell nobody does."""
        return self.end(handle, folder, None) if handle.get("shell", True) else Lost(FORGOTTEN)

    def _never(self, folder: str) -> NeverRan:
        """There is no container that could start it any more."""
        Path(folder, WITHDRAWN).touch()
        _empty(f"{folder}/{script.START}")
        return NeverRan(NEVER_STARTED)

    def mark_cancelled(self, folder: str) -> None:
        Path(folder, CANCELLED).touch()

    def mark_timed_out(self, folder: str) -> None:
        Path(folder, script.TIMED_OUT).touch()

    def asked_to_end(self, folder: str) -> float | None:
        """Seconds since it was cancelled or went over its time."""
        for name in (CANCELLED, script.TIMED_OUT):
            try:
                return max(0.0, time.time() - os.stat(f"{folder}/{name}").st_mtime)
            except OSError:
                pass
        return None

    def note_fault(self, folder: str, code: int) -> None:
        """Of a container without our script: the engine's init complains of what it cannot execute."""
        if folders.read_stream(folder, "stderr", 0, len(UNEXECUTABLE)) == UNEXECUTABLE:
            Path(folder, script.ENDED).write_bytes(b"fault %d - - - ." % code)

    def needs_no_container(self, token: str) -> bool:
        """Whether the container of this token is of no use any more."""
        if not folders.TOKEN.fullmatch(token):
            return False
        folder = self.at(token)
        return not os.path.isdir(folder) or self.told(folder) is not None


def _below(folder: str) -> Iterator[str]:
    for above, names, files in os.walk(folder):
        yield from (os.path.join(above, name) for name in (*names, *files))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _empty(path: str) -> None:
    """It may hold secrets, and nobody will read it."""
    try:
        os.truncate(path, 0)
    except OSError:
        pass


def _package() -> Path:
    return Path(mlpiped.__file__).absolute().parent


def _sdk_files() -> list[Path]:
    found: list[Path] = []
    for name in SDK:
        path = _package() / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


def _digest() -> str:
    content = hashlib.blake2b(digest_size=8)
    for path in _sdk_files():
        content.update(f"{path.relative_to(_package())}\0".encode() + path.read_bytes() + b"\0")
    return content.hexdigest()
