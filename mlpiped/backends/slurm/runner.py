"""How Slurm's commands are run: on this host, or by whatever the caller hands in (a login node's connection)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
from typing import IO, TYPE_CHECKING, Any, Protocol

import anyio

from mlpiped.backends.environments import clean
from mlpiped.backends.slurm import commands
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Stdin = bytes | asyncio.Future[bytes | None]
Answer = tuple[int, str, str]
PATIENCE = 100.0  # seconds; Slurm's commands give up on a silent controller before
LONGEST = 64 << 20  # bytes of an answer
PIPE = 1 << 16  # bytes that a pipe holds, unless it is told otherwise
SCRUBBED_PREFIXES = ("SBATCH_", "SQUEUE_", "SCANCEL_", "SACCT_", "SINFO_", "SLURM_")  # settings of the commands, and
KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER"})  # what a daemon that itself runs in a job has around it

CLEANED = """\
cd /
for name in $(env | sed -n 's/^\\([A-Z][A-Z0-9_]*\\)=.*/\\1/p'); do
    case $name in KEPT) ;; SCRUBBED) unset "$name" ;; esac
done
exec "$@"
""".replace("KEPT", "|".join(sorted(KEPT))).replace("SCRUBBED", "|".join(f"{one}*" for one in SCRUBBED_PREFIXES))


class Runner(Protocol):
    async def run(self, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
        """(exit status, stdout, stderr). Raises OSError (TimeoutError too), or BackendUnavailable, when there is no
        answer. Safe to cancel.

        `stdin` that is still to come: the command may start meanwhile; None in the end: it is killed, and has read
        nothing. `within`: it is killed after so many seconds, and what it has said until then is the answer.
        """
        ...


class Shell(Protocol):
    """Where commands are run on another machine."""

    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """Raises OSError or BackendUnavailable when there is no answer."""
        ...


class HostRunner:
    """On this host, with the environment that a person has: nothing in it changes what our words mean."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        kept = {
            name: value
            for name, value in clean(environ).items()
            if name in KEPT or not name.startswith(SCRUBBED_PREFIXES)
        }
        self._env = {**kept, **commands.PLAIN}

    async def run(self, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
        with anyio.fail_after(PATIENCE), contextlib.ExitStack() as files:
            out, err = (files.enter_context(_file()) for _ in range(2))  # nobody has to read along
            given = files.enter_context(_file(stdin)) if isinstance(stdin, bytes) else subprocess.PIPE
            process = self._start(list(argv), stdin=given, stdout=out, stderr=err)
            try:
                if isinstance(stdin, bytes) or await _told(process, stdin):
                    with anyio.move_on_after(within):
                        await _ended(process)
            finally:
                if process.poll() is None:
                    process.kill()
                    with anyio.CancelScope(shield=True):
                        await _ended(process)
                if process.stdin is not None:  # not before: an end of its input is a word, too
                    process.stdin.close()
            answers = [os.pread(file.fileno(), LONGEST + 1, 0) for file in (out, err)]
        return _answer(argv, process.wait(), *answers)

    def _start(self, argv: list[str], **files: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, **files, bufsize=0, cwd="/", env=self._env, start_new_session=True)


def _file(content: bytes = b"") -> IO[bytes]:
    """In memory."""
    file = open(os.memfd_create("mlpiped"), "r+b", buffering=0)
    file.write(content)
    file.seek(0)
    return file


async def _told(process: subprocess.Popen[bytes], stdin: asyncio.Future[bytes | None]) -> bool:
    """Whether it has been given its input, in one piece as far as a pipe can be made to hold it."""
    text, pipe = await stdin, process.stdin
    if text is None or pipe is None:
        return False
    with contextlib.suppress(OSError):
        if len(text) > PIPE:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, len(text))
    os.set_blocking(pipe.fileno(), False)
    with contextlib.suppress(BrokenPipeError):  # it has ended: its answer says why
        while text:
            try:
                text = text[os.write(pipe.fileno(), text) :]
            except BlockingIOError:
                await anyio.wait_writable(pipe)
        pipe.close()
    return True


async def _ended(process: subprocess.Popen[bytes]) -> None:
    fd = os.pidfd_open(process.pid)
    try:
        await anyio.wait_readable(fd)
    finally:
        os.close(fd)
    process.wait()


class LoginRunner:
    """On a login node, with the environment that a login has there, cleaned as the host's is."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    async def run(self, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
        text = stdin if isinstance(stdin, bytes) else await stdin
        if text is None:
            return -signal.SIGKILL, "", ""
        words = list(argv)
        if within is not None:
            words = ["timeout", "--signal=KILL", f"{within:.0f}", *words]
        if argv[0] in commands.NAMES:
            words = ["env", *(f"{name}={value}" for name, value in commands.PLAIN.items()), *words]
        with anyio.fail_after(PATIENCE):
            code, stdout, stderr = await self._shell.run(["sh", "-c", CLEANED, "sh", *words], text)
        return _answer(argv, code, stdout, stderr)


def _answer(argv: Sequence[str], code: int, stdout: bytes, stderr: bytes) -> Answer:
    if len(stdout) > LONGEST:
        raise OSError(f"the answer of `{argv[0]}` is longer than {LONGEST >> 20} MiB")
    return code, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")


async def ask(runner: Runner, argv: Sequence[str]) -> str:
    """The answer of a command that has succeeded. Raises BackendUnavailable: a query that failed is no answer."""
    code, stdout, stderr = await attempt(runner, argv)
    if code != 0:
        raise BackendUnavailable(commands.complaint(stderr))
    return stdout


async def attempt(runner: Runner, argv: Sequence[str], stdin: Stdin = b"", within: float | None = None) -> Answer:
    """Raises BackendUnavailable when the command cannot be run at all."""
    try:
        return await runner.run(argv, stdin, within)
    except TimeoutError:
        raise BackendUnavailable(f"`{argv[0]}` does not answer") from None
    except OSError as error:
        raise BackendUnavailable(f"`{argv[0]}` cannot be run: {error.strerror or error}") from error
