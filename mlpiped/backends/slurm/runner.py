"""How Slurm's commands are run: on this host, or by whatever the caller hands in (a login node's connection)."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Protocol

import anyio

from mlpiped.backends.environments import clean
from mlpiped.backends.slurm import commands
from mlpiped.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PATIENCE = 100.0  # seconds; Slurm's commands give up on a silent controller before
LONGEST = 64 << 20  # bytes of an answer
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
    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, str, str]:
        """(exit status, stdout, stderr). Raises OSError (TimeoutError too), or BackendUnavailable, when there is no
        answer. Safe to cancel."""
        ...


class Shell(Protocol):
    """Where commands are run on another machine."""

    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """Raises OSError or BackendUnavailable when there is no answer."""
        ...


class HostRunner:
    """On this host, with the environment that a person has: nothing in it changes what our words mean."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._env = {
            name: value
            for name, value in clean(environ).items()
            if name in KEPT or not name.startswith(SCRUBBED_PREFIXES)
        }

    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, str, str]:
        with anyio.fail_after(PATIENCE):
            done = await anyio.run_process(
                list(argv), input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False, cwd="/",
                env=self._env, start_new_session=True,
            )  # fmt: skip
        return _answer(argv, done.returncode, done.stdout, done.stderr)


class LoginRunner:
    """On a login node, with the environment that a login has there, cleaned as the host's is."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    async def run(self, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, str, str]:
        with anyio.fail_after(PATIENCE):
            code, stdout, stderr = await self._shell.run(["sh", "-c", CLEANED, "sh", *argv], stdin)
        return _answer(argv, code, stdout, stderr)


def _answer(argv: Sequence[str], code: int, stdout: bytes, stderr: bytes) -> tuple[int, str, str]:
    if len(stdout) > LONGEST:
        raise OSError(f"the answer of `{argv[0]}` is longer than {LONGEST >> 20} MiB")
    return code, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")


async def ask(runner: Runner, argv: Sequence[str], stdin: bytes = b"") -> str:
    """The answer of a command that has succeeded. Raises BackendUnavailable: a query that failed is no answer."""
    code, stdout, stderr = await attempt(runner, argv, stdin)
    if code != 0:
        raise BackendUnavailable(commands.complaint(stderr))
    return stdout


async def attempt(runner: Runner, argv: Sequence[str], stdin: bytes = b"") -> tuple[int, str, str]:
    """Raises BackendUnavailable when the command cannot be run at all."""
    try:
        return await runner.run(argv, stdin)
    except TimeoutError:
        raise BackendUnavailable(f"`{_name(argv)}` does not answer") from None
    except OSError as error:
        raise BackendUnavailable(f"`{_name(argv)}` cannot be run: {error.strerror or error}") from error


def _name(argv: Sequence[str]) -> str:
    """Of the command, less what is around it."""
    return next((word for word in argv if word in commands.NAMES), argv[0])
