"""What is said to Slurm's commands, and what their answers mean. Pure.

Answers are read line by line, each matched as a whole: names of jobs are free text, so whatever has another shape is
nobody's answer. A job is ours when its name is; its id alone says nothing, for a controller that was killed gives ids
out again.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mlpiped.backends.base import Job
    from mlpiped.config.computes import SlurmCompute

PREFIX = "mlp-"
LEAST_CONFIG = ("AccountingStorageType", "MinJobAge")
OVERHEAD = 32  # MiB of a job that are the supervisor's
HELD = "JobHeldUser"  # Slurm's reason for a job that was submitted with --hold
IMPOSSIBLE = "BadConstraints"  # … for one that no node can ever hold: sbatch does not look for that in a held job

WAITING = frozenset(
    "PENDING CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT RESV_DEL_HOLD".split()
)  # not (or not any more) on a node
ENDED = frozenset(
    "COMPLETED FAILED TIMEOUT DEADLINE OUT_OF_MEMORY CANCELLED NODE_FAIL BOOT_FAIL PREEMPTED REVOKED "
    "LAUNCH_FAILED".split()
)  # COMPLETING is none of them; nor is a state that is not known here

_LISTED = re.compile(r"([0-9]{1,10})\|([A-Z_]{1,32})\|mlp-([a-z0-9][a-z0-9_.-]{0,127})\|([ -{}~]{0,500})")
_ACCOUNTED = re.compile(r"([0-9]{1,10})\|([A-Z_]{1,32})(?: by [0-9]{1,10})?")
_SUBMITTED = re.compile(r"([0-9]{1,10})(?:;[A-Za-z0-9_.-]+)?\n?")
_CONFIG = re.compile(r"([A-Za-z]+) *= (.*)")
_NODES = re.compile(r"([0-9]{1,9})\|([a-z_]+)([^|a-z_]?)\|([^|]*)")
_GPUS = re.compile(r"\bgpu(?::[A-Za-z0-9_.-]+)?:([0-9]{1,6})")
_NOT_UP = ("down", "drain", "fail", "unk", "err", "maint", "reboot", "power", "futur", "perf", "inval", "block")
_FULL = re.compile(
    r"(?:QOS|Assoc)\w*Submit\w*|temporarily unable to accept job|Resource temporarily unavailable", re.IGNORECASE
)
_NEVER = (
    "Requested node configuration is not available",
    "More processors requested than permitted",
    "Memory specification can not be satisfied",
    "Memory required by task is not available",
    "CPU count per node can not be satisfied",
    "CPU count specification invalid",
    "Requested time limit is invalid",
    "Invalid generic resource (gres) specification",
    "Invalid Trackable RESource (TRES) specification",
    "Job violates accounting/QOS policy",
    "Pathname of a file, directory or other parameter too long",
)
_UNREACHABLE = ("Unable to contact", "Socket timed out", "Connection refused", "Zero Bytes", "connect failure")
_GONE = ("Invalid job id", "already finished", "already completing", "already completed", "Job/step already")


@dataclass(frozen=True, slots=True)
class Listed:
    """A job of ours as squeue shows it."""

    job: int
    token: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Nodes:
    up: int
    down: int
    gpus: int  # of all of them


def command(*argv: str) -> list[str]:
    """In words that do not depend on the machine's language."""
    return ["env", "LC_ALL=C", *argv]


# --- submitted


def sbatch(job: Job, folder: str, compute: SlurmCompute, comment: str) -> list[str]:
    """The script comes on stdin. Held, so that nothing runs of which the id is not durable."""
    argv = [
        "sbatch",
        *compute.options,
        "--hold",
        "--parsable",
        "--no-requeue",
        f"--job-name={PREFIX}{job.token}",
        f"--comment={comment}",
        "--export=NONE",
        "--open-mode=append",
        f"--output={folder}/slurm.out",
        f"--chdir={folder}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={max(1, math.ceil(job.cpus))}",
    ]
    for name in ("partition", "account", "qos"):
        value = getattr(compute, name)
        if value is not None:
            argv.append(f"--{name}={value}")
    if job.memory is not None:
        argv.append(f"--mem={math.ceil(job.memory / 2**20) + OVERHEAD}M")
    if job.gpus:
        argv.append(f"--gres=gpu:{len(job.gpus)}")
    seconds = compute.time if job.timeout is None else job.timeout + job.grace
    if seconds is not None:  # the supervisor ends the step in time; Slurm, which counts in minutes, is the backstop
        argv.append(f"--time={math.ceil(seconds / 60) + (job.timeout is not None)}")
    return command(*argv)


def submitted(stdout: str) -> int | None:
    """The job's id; None when it names none."""
    found = _SUBMITTED.fullmatch(stdout)
    return int(found[1]) if found else None


def is_full(stderr: str) -> bool:
    """Whether it was refused for there being too many jobs: it may be submitted when some have ended."""
    return _FULL.search(stderr) is not None


def is_never(stderr: str) -> bool:
    """Whether it was refused for what it asks for."""
    return not is_full(stderr) and any(words in stderr for words in _NEVER)


def is_unreachable(stderr: str) -> bool:
    return any(words in stderr for words in _UNREACHABLE)


def is_gone(stderr: str) -> bool:
    """Whether the job has ended, or is not known any more."""
    return any(words in stderr for words in _GONE)


def complaint(stderr: str) -> str:
    """The last thing that a command complained of, on one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    words = re.sub(r"^[a-z_]+: (?:error: |fatal: )?", "", lines[-1]) if lines else "it said nothing"
    return re.sub(r"[^ -~]", "?", words)[:300]


def release(jobs: Iterable[int]) -> list[str]:
    return command("scontrol", "release", ",".join(map(str, jobs)))


def scancel(job: int, token: str) -> list[str]:
    """Ends it, or takes it from the queue; a job with that id and another name is left alone."""
    return command("scancel", f"--name={PREFIX}{token}", str(job))


def terminate(job: int, token: str) -> list[str]:
    """SIGTERM to its supervisor, which knows the step's grace."""
    return command("scancel", "--batch", "--signal=TERM", f"--name={PREFIX}{token}", str(job))


# --- asked


def squeue() -> list[str]:
    return command("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%j|%r")


def listed(stdout: str) -> dict[int, Listed]:
    """Our jobs by id. An id that has two different lines has none: one of them is part of some job's name."""
    found: dict[int, Listed] = {}
    twice: set[int] = set()
    for line in stdout.split("\n"):
        match = _LISTED.fullmatch(line)
        if match is None:
            continue
        one = Listed(int(match[1]), match[3], match[2], match[4])
        if found.setdefault(one.job, one) != one:
            twice.add(one.job)
    return {job: one for job, one in found.items() if job not in twice}


def sacct(jobs: Mapping[int, str], since: str) -> list[str]:
    """`jobs`: id -> token. `since`: a time before their submission, as Slurm writes it."""
    names = ",".join(f"{PREFIX}{token}" for token in jobs.values())
    return command(
        "sacct", "-X", "-n", "-P", "-D", f"--jobs={','.join(map(str, jobs))}", f"--name={names}",
        f"--starttime={since}", "--format=JobIDRaw,State",
    )  # fmt: skip


def accounted(stdout: str) -> dict[int, str]:
    """Id -> state, of those that have ended; of records of the same job, the last."""
    matches = (_ACCOUNTED.fullmatch(line) for line in stdout.split("\n"))
    found = {int(match[1]): match[2] for match in matches if match is not None}
    return {job: state for job, state in found.items() if state in ENDED}


def show_config() -> list[str]:
    return command("scontrol", "show", "config")


def config(stdout: str) -> dict[str, str] | None:
    """None when it is no config: an answer without what every Slurm has is no answer."""
    matches = (_CONFIG.fullmatch(line.rstrip()) for line in stdout.split("\n"))
    found = {match[1]: match[2] for match in matches if match is not None}
    return found if all(name in found for name in LEAST_CONFIG) else None


def seconds(text: str) -> float:
    """ "300 sec" """
    found = re.match(r"[0-9]+", text)
    return float(found[0]) if found else 0.0


def sinfo(partition: str | None) -> list[str]:
    where = [] if partition is None else [f"--partition={partition}"]
    return command("sinfo", "--noheader", *where, "--format=%D|%T|%G")


def nodes(stdout: str) -> Nodes:
    """With no partition named, a node counts once for each that has it."""
    up = down = gpus = 0
    for line in stdout.split("\n"):
        match = _NODES.fullmatch(line)
        if match is None:
            continue
        count = int(match[1])
        if match[2].startswith(_NOT_UP) or match[3] == "*":
            down += count
        else:
            up += count
        gpus += count * sum(int(number) for number in _GPUS.findall(match[4]))
    return Nodes(up, down, gpus)
