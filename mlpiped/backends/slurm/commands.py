"""What is said to Slurm's commands, and what their answers mean. Pure.

Answers are read line by line, each matched as a whole: names of jobs are free text, so whatever has another shape is
nobody's answer. A job is ours when its name is; its id alone says nothing, for a controller that was killed gives ids
out again. The elements of an array share one name, the array's: there it is name and index that say whose it is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlpiped.backends.base import NodesAway

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mlpiped.backends.base import Job
    from mlpiped.config.computes import SlurmCompute

NAMES = frozenset("sacct sbatch scancel scontrol sinfo squeue".split())
PLAIN = {"LC_ALL": "C", "SLURM_BITSTR_LEN": "0"}  # around each: words in no language, and lists in full
PREFIX = "mlp-"
ARRAYS = "mlpa-"
Ref = int | str
"""A job's id: 77, or "77_4" for an element of an array."""

LEAST_CONFIG = ("AccountingStorageType", "MinJobAge")
UNKNOWN_PATIENCE = 60.0  # seconds for an sbatch, while it is not known how long an answer may take
MOST = 200  # jobs that one command names
OVERHEAD = 32  # MiB of a job that are the supervisor's
HELD = "JobHeldUser"  # Slurm's reason for a job that was submitted with --hold
MOST_ELEMENTS = 4_000_001  # of an array, whatever its site allows
IMPOSSIBLE = "BadConstraints"  # … for one that no node can ever hold: sbatch does not look for that in a held job

ON_NODE = "on a node"  # … in its place, of one that has ended: it had been given a node

WAITING = frozenset(
    "PENDING CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT RESV_DEL_HOLD".split()
)  # not (or not any more) on a node
ENDED = frozenset(
    "COMPLETED FAILED TIMEOUT DEADLINE OUT_OF_MEMORY CANCELLED NODE_FAIL BOOT_FAIL PREEMPTED REVOKED "
    "LAUNCH_FAILED".split()
)  # COMPLETING is none of them; nor is a state that is not known here

_LISTED = re.compile(
    r"([0-9]{1,10})(?:_([0-9]{1,7}))?\|([A-Z_]{1,32})\|"
    r"(?:mlp-([a-z0-9][a-z0-9_.-]{0,127})|mlpa-([0-9a-f]{16}))\|([ -{}~]{0,500})(?:\|([A-Za-z0-9_.-]{1,255}|n/a))?"
)
_ACCOUNTED = re.compile(
    r"([0-9]{1,10})(?:_([0-9]{1,7})|_\[([0-9,-]{1,200000})(?:%[0-9]+)?\])?\|([A-Z_]{1,32})(?: by [0-9]{1,10})?"
)
_FREED = re.compile(r"([0-9]{1,10})(?:_([0-9]{1,7}))? +([0-9T:-]+|N/A|Unknown) *")
_SUBMITTED = re.compile(r"([0-9]{1,10})(?:;[A-Za-z0-9_.-]+)?\n?")
_CONFIG = re.compile(r"([A-Za-z]+) *= (.*)")
_NODES = re.compile(r"([0-9]{1,9})\|([a-z_]+)([^|a-z_]?)\|([^|]*)")
_REASONS = re.compile(r"([A-Za-z0-9_.,\[\]-]{1,4000})\|([a-z_]+)([^|a-z_]?)\|(.*)")
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
    """A job of ours as squeue shows it. `name`: its token, or "ARRAY/4". Of an array that was cancelled before any of
    it ran, squeue may show nothing but the array itself: its id is a text then ("77"), and its name "ARRAY".
    """

    job: Ref
    name: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Nodes:
    up: int
    down: int
    gpus: int  # of all of them
    away: tuple[NodesAway, ...] = ()  # those that are down


# --- submitted


def sbatch(job: Job, jobs_dir: str, compute: SlurmCompute, comment: str) -> list[str]:
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
        "--output=/dev/null",  # what it prints, the script puts where it belongs
        f"--chdir={jobs_dir}",
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes * job.tasks}",
        f"--ntasks-per-node={job.tasks}",
        f"--cpus-per-task={cpus_of(job)}",
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
    return argv


def likeness(job: Job) -> tuple[object, ...]:
    """Equal for jobs of which `sbatch` says the same, but for their names."""
    return job.nodes, job.tasks, job.cpus, job.memory, len(job.gpus), job.timeout, job.grace


def patience(config: Mapping[str, str] | None) -> float:
    """Seconds for an sbatch. A controller that has all the jobs that it can hold is asked by it again and again, for
    two minutes: it says so at once, and is heard when it has ended."""
    answer = seconds((config or {}).get("MessageTimeout", ""))
    return 2 * answer + 5 if answer else UNKNOWN_PATIENCE


def submitted(stdout: str) -> int | None:
    """The job's id; None when it names none."""
    found = _SUBMITTED.fullmatch(stdout)
    return int(found[1]) if found else None


def is_full(stderr: str) -> bool:
    """Whether it was refused for there being too many jobs: it may be submitted when some have ended."""
    return _FULL.search(stderr) is not None


def full_words(stderr: str) -> str:
    """Which limit it was that `is_full` has seen: sbatch's last line does not say."""
    return complaint(next(line for line in stderr.splitlines() if _FULL.search(line)))


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


def cpus_of(job: Job) -> int:
    """For each of its processes."""
    return max(1, math.ceil(job.cpus))


def as_array(argv: Sequence[str], array: str, count: int) -> list[str]:
    """The words for one job -> for an array of such."""
    named = [f"--job-name={ARRAYS}{array}", f"--array=0-{count - 1}"]
    return [*(word for word in argv if not word.startswith("--job-name=")), *named]


def shown(name: str) -> str:
    """The name that Slurm shows for "TOKEN", and for "ARRAY/4"."""
    array, found, _ = name.partition("/")
    return f"{ARRAYS}{array}" if found else f"{PREFIX}{name}"


def array_of(job: Ref) -> int:
    return int(str(job).partition("_")[0])


def release(jobs: Iterable[Ref]) -> list[str]:
    return ["scontrol", "release", ",".join(map(str, jobs))]


def releases(jobs: Sequence[Ref]) -> bytes:
    """For a scontrol that reads what to do; it ends with 1 when a line of it failed."""
    shares = (jobs[first : first + MOST] for first in range(0, len(jobs), MOST))
    return "".join(f"{' '.join(release(share)[1:])}\n" for share in shares).encode()


def scancel(job: Ref, name: str) -> list[str]:
    """Ends it, or takes it from the queue; a job with that id and another name is left alone. Never for an element
    that waits: as long as an array is one record, a scancel with a filter ends all of it."""
    return ["scancel", f"--name={shown(name)}", str(job)]


def scancel_elements(jobs: Iterable[Ref]) -> list[str]:
    """Whatever their names are: who says this has just seen them."""
    return ["scancel", *map(str, jobs)]


def terminate(job: Ref, name: str) -> list[str]:
    """SIGTERM to its supervisor, which knows the step's grace."""
    return ["scancel", "--batch", "--signal=TERM", f"--name={shown(name)}", str(job)]


# --- asked


def squeue(jobs: Iterable[int] = ()) -> list[str]:
    """All of ours, or these and their elements: a line each."""
    some = f"--jobs={','.join(map(str, jobs))}" if jobs else "--me"
    return ["squeue", some, "--noheader", "--states=all", "--array", "--format=%i|%T|%j|%r|%B"]


def listed(stdout: str) -> dict[Ref, Listed]:
    """Our jobs by id. An id that has two different lines has none: one of them is part of some job's name."""
    found: dict[Ref, Listed] = {}
    twice: set[Ref] = set()
    for line in stdout.split("\n"):
        match = _LISTED.fullmatch(line)
        if match is None:
            continue
        job, index, state, token, array, reason, host = match.groups()
        if state in ENDED and host not in (None, "n/a"):
            reason = ON_NODE
        if token is not None and index is None:
            one = Listed(int(job), token, state, reason)
        elif array is not None:
            one = Listed(job, array, state, reason) if index is None else _element(job, index, array, state, reason)
        else:
            continue  # an array of somebody else, with a name like those of ours
        if found.setdefault(one.job, one) != one:
            twice.add(one.job)
    return {job: one for job, one in found.items() if job not in twice}


def _element(job: str, index: str, array: str, state: str, reason: str) -> Listed:
    return Listed(f"{job}_{index}", f"{array}/{index}", state, reason)


def sacct(jobs: Mapping[Ref, str], since: str) -> list[str]:
    """`jobs`: id -> name. `since`: a time before their submission, as Slurm writes it."""
    names = ",".join(dict.fromkeys(map(shown, jobs.values())))
    return [
        "sacct", "-X", "-n", "-P", "-D", f"--jobs={','.join(map(str, jobs))}",
        f"--name={names}", f"--starttime={since}", "--format=JobID,State",
    ]  # fmt: skip


def accounted(stdout: str) -> dict[Ref, str]:
    """Id -> state, of those that have ended; of records of the same job, the last. The elements of an array that were
    cancelled together before they ran are one record: "77_[0-3,7]"."""
    found: dict[Ref, str] = {}
    for line in stdout.split("\n"):
        match = _ACCOUNTED.fullmatch(line)
        if match is None:
            continue
        job, index, indices, state = match.groups()
        if indices is not None:
            found.update({f"{job}_{one}": state for one in _indices(indices)})
        else:
            found[int(job) if index is None else f"{job}_{index}"] = state
    return {job: state for job, state in found.items() if state in ENDED}


def _indices(text: str) -> Iterator[int]:
    """ "0-3,7" """
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if first.isdecimal() and (not last or last.isdecimal()) and int(last or first) < MOST_ELEMENTS:
            yield from range(int(first), int(last or first) + 1)


def squeue_freed() -> list[str]:
    """Since when each of those that wait has been free to start, held or not."""
    return ["squeue", "--me", "--noheader", "--states=PENDING", "--array", "--Format=JobArrayID,AccrueTime"]


def never_freed(stdout: str) -> set[Ref]:
    """Those that were held from the first, as far as the controller knows. It keeps that time of one that was released
    and is held again."""
    found: set[Ref] = set()
    for match in map(_FREED.fullmatch, stdout.split("\n")):
        if match is not None and not match[3][0].isdigit():
            found.add(int(match[1]) if match[2] is None else f"{match[1]}_{match[2]}")
    return found


def show_config() -> list[str]:
    return ["scontrol", "show", "config"]


def config(stdout: str) -> dict[str, str] | None:
    """None when it is no config: an answer without what every Slurm has is no answer."""
    matches = (_CONFIG.fullmatch(line.rstrip()) for line in stdout.split("\n"))
    found = {match[1]: match[2] for match in matches if match is not None}
    return found if all(name in found for name in LEAST_CONFIG) else None


def longest_array(config: Mapping[str, str]) -> int:
    """So many elements at most; 0: none are allowed."""
    text = config.get("MaxArraySize", "")
    return int(text) if text.isdecimal() else 0


def seconds(text: str) -> float:
    """ "300 sec" """
    found = re.match(r"[0-9]+", text)
    return float(found[0]) if found else 0.0


def sinfo(partition: str | None, form: str = "%D|%T|%G") -> list[str]:
    where = [] if partition is None else [f"--partition={partition}"]
    return ["sinfo", "--noheader", *where, f"--format={form}"]


def nodes(stdout: str) -> Nodes:
    """With no partition named, a node counts once for each that has it."""
    up = down = gpus = 0
    for line in stdout.split("\n"):
        match = _NODES.fullmatch(line)
        if match is None:
            continue
        count = int(match[1])
        if _is_away(match[2], match[3]):
            down += count
        else:
            up += count
        gpus += count * sum(int(number) for number in _GPUS.findall(match[4]))
    return Nodes(up, down, gpus)


def sinfo_away(partition: str | None) -> list[str]:
    """A question of its own: a reason is free text, and what it holds must not change how many nodes there are."""
    return sinfo(partition, "%N|%T|%E")


def away(stdout: str) -> tuple[NodesAway, ...]:
    """The nodes that are not up, those with the same reason together."""
    matches = (_REASONS.fullmatch(line) for line in stdout.split("\n"))
    return tuple(
        NodesAway(match[1], match[2] + match[3], "" if match[4] == "none" else re.sub(r"[^ -~]", "?", match[4])[:300])
        for match in matches
        if match is not None and _is_away(match[2], match[3])
    )


def _is_away(state: str, flag: str) -> bool:
    """`flag`: what Slurm adds to a state; "*": the node does not answer."""
    return state.startswith(_NOT_UP) or flag == "*"
