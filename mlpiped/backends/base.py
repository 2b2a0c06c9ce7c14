"""The Backend seam: how a job gets to a machine and its exit status comes back.

Backends know nothing of runs or of the ledger.

The job folder, the same on every kind of machine (`FOLDER_*`), named by the attempt's token:

    job.json        what to run (0600: it may hold secrets), where it has to travel as a file: the local backend does so
                    above 100 kB only. The side that executes removes it after the start
    claim/          who executes this token, or the fence: made by one rename, which only one side can win
      handle.json   {"v": 1, "pid": …, "start": …, "boot": "…"}; in a fence {"v": 1, "fenced": true}. It is held (flock)
                    by the supervisor until the witness is there: the process may live on, and be at another job
      exit.json     until the end: the space that the witness will need
    stdout stderr   what the step printed, appended by the step itself
    out/<name>/…    what the step makes, if anything: its path for the output `name` is out/<name>/<file_name>
    work/           its working directory (a copy of the code snapshot, or empty)
    scratch/        thrown away; there with a code snapshot only: without one `work/` serves as both
    metrics.jsonl   one JSON line a metric
    params.json     the parameters that the step uses; missing without any ($MLPIPED_PARAMS is always a JSON file)
    refused         why the command was not started, by what should have made its surroundings and then ended with 78
    exit.json       the witness: {"v": 1, "code": int|null, "signal": int|null, "timed_out": bool, "cancelled": bool,
                    "error": str|null, "final": bool, "out_of_memory": bool, "started": s, "ended": s, "cpu": s,
                    "max_rss": bytes, "synced": bool}, by rename. Not synced: a success is worth nothing after a reboot,
                    for its outputs may not have survived

Trust, in order: exit.json, what the engine or queue says, absence for longer than a deadline. A query that failed is
no answer. Liveness is read *before* the witness: the other order calls a step lost that ended in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AsyncExitStack

Handle = dict[str, Any]
"""Versioned plain JSON (`{"v": 1, …}`): all that `wait` and `cancel` need after a restart of the daemon."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one argument. `input`: all paths of port `value`; `output`: the path of output `value`."""

    kind: Literal["text", "input", "output"]
    value: str


@dataclass(frozen=True, slots=True)
class JobOutput:
    name: str
    file_name: str
    kind: Literal["file", "folder"]


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt of one step, ready to be executed anywhere.

    `arguments` is a list of arguments, each a list of parts that are concatenated; an argument that is a single
    `input` part becomes one argument a path. `inputs` maps a port to its absolute paths on the daemon's host, sorted.
    `env` is added to the backend's clean base environment. Times are seconds, memory is bytes.
    """

    token: str
    arguments: tuple[tuple[Part, ...], ...]
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: tuple[JobOutput, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    input_env: Mapping[str, str] = field(default_factory=dict)  # variable -> port: its paths, newline-separated
    parameters: Mapping[str, Any] = field(default_factory=dict)  # -> params.json
    shell: bool = False  # the one argument is given to /bin/sh -c
    code: str | None = None  # absolute folder of the code snapshot; copied into work/
    requirements: str | None = None  # text of requirements.txt: build (once per content) and use that environment
    python: str | None = None  # "3.11"; None: the daemon's own
    modules: tuple[str, ...] = ()  # names for `module load`, in this order
    image: str | None = None  # `Image.run`: the container's image, by digest
    network: bool = False  # of a container: whether it reaches anything
    shm_size: int | None = None  # of a container: bytes of /dev/shm
    contents: Mapping[str, str] = field(default_factory=dict)  # input path -> digest: what is there needs no sending
    nodes: int = 1
    tasks: int = 1  # processes on each node; it is the command that starts them
    cpus: float = 1  # for each of them
    memory: int | None = None
    gpus: tuple[str, ...] = ()  # UUIDs of the leased cards
    gpu_memory: int | None = None  # bytes of each: the card is shared; None: it is the step's alone
    timeout: float | None = None
    grace: float = 10.0

    def argv(self, output_path: Mapping[str, str], input_paths: Mapping[str, Sequence[str]] | None = None) -> list[str]:
        """The finished command for a machine on which ports and outputs have these paths."""
        paths = self.inputs if input_paths is None else input_paths
        done: list[str] = []
        for parts in self.arguments:
            if len(parts) == 1 and parts[0].kind == "input":
                done.extend(paths[parts[0].value])
                continue
            text = ""
            for part in parts:
                if part.kind == "text":
                    text += part.value
                elif part.kind == "output":
                    text += output_path[part.value]
                else:
                    text += " ".join(paths[part.value])
            done.append(text)
        return done


@dataclass(frozen=True, slots=True)
class Exited:
    """The witness spoke. Success is `code == 0` and nothing else."""

    code: int | None  # None: ended by `signal`, or could not be started (`error`)
    signal: int | None = None
    timed_out: bool = False
    cancelled: bool = False
    error: str | None = None  # the command could not be started: a sentence
    final: bool = False  # … and another try would end as this one
    out_of_memory: bool = False  # it was killed for going over its limit
    started: float | None = None  # seconds since the epoch, by the machine's own clock
    ended: float | None = None
    cpu: float | None = None  # seconds of user and system time, all processes of the step
    max_rss: int | None = None  # bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """It is gone and left no witness. It may have run in part; nothing of it runs now."""

    reason: str


@dataclass(frozen=True, slots=True)
class NeverRan:
    """The fence holds: this token has not started and never can."""

    reason: str


Outcome = Exited | Lost | NeverRan
"""There is no constructor from `int | None`: no answer is not an outcome."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. `foreign` ends a sentence while somebody else's process sits on it: "in use by python (pid 4242)"."""

    uuid: str
    index: int
    name: str
    memory: int  # bytes
    foreign: str | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a compute offers. None: not limited by us."""

    slots: int
    cpus: float | None = None
    memory: int | None = None  # bytes
    cards: tuple[Card, ...] = ()
    images: bool = False  # it runs steps in containers, and those only (`spec_images`: who has one)
    modules: bool = False  # it loads environment modules
    sifs: bool = False  # it runs steps in images that are files, besides others
    no_cards: str | None = None  # why its cards cannot be used, in a sentence
    cluster: bool = False  # it starts steps on several nodes at once
    nodes: int | None = 1  # None: not known yet


@dataclass(frozen=True, slots=True)
class Image:
    """A container's image: `identity` enters the step's key, `run` is what an engine starts."""

    identity: str  # "sha256:…" of an image named by tag; of a Dockerfile "b3:…" over its text and its base images, of a
    # file over its content
    run: str  # "sha256:…"; of a file its stamp, content and path


class Images(Protocol):
    """What a backend with `Capacity.images` or `Capacity.sifs` offers beside `Backend`."""

    async def image(self, reference: str | None, dockerfile: str | None) -> Image:
        """The image of that tag, pulled when it is not there; or the one that the Dockerfile's text makes, built once.

        Raises InvalidJob (no such image, a Dockerfile that does not build: with the engine's words) and
        BackendUnavailable.
        """
        ...

    def bringing(self, reference: str | None, dockerfile: str | None) -> str | None:
        """What is done for that image just now: "pulls image app:1: 40 %". From memory."""
        ...


@runtime_checkable
class BuildsImages(Protocol):
    """What a backend offers beside `Images` whose machine keeps the images that Dockerfiles made."""

    async def drop_images(self, before: float, *, only_look: bool) -> int:
        """Remove those that were asked for last before then (seconds since the epoch), and that nothing uses; how many
        went, or would. Raises BackendUnavailable."""
        ...


@runtime_checkable
class TriesAgain(Protocol):
    """What a backend offers beside `Backend` that for some time does not try what was refused."""

    def try_again(self) -> None:
        """Somebody says that it is mended."""
        ...


@runtime_checkable
class Prunes(Protocol):
    """What a backend offers beside `Backend` whose machine holds on to what was sent to it, for the next job."""

    async def prune(self, *, only_look: bool) -> tuple[int, int]:
        """Remove what is beyond its bounds and no job uses that has not ended: (how many went, or would; their bytes).

        Raises BackendUnavailable.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeptOutput:
    """What a machine keeps of an output: content by the rules of `files.portable`."""

    name: str
    digest: str  # "s2:…" of a file, "s2t:…" of a tree
    size: int  # bytes, all files together


@runtime_checkable
class Keeps(Protocol):
    """What a backend offers beside `Backend` whose machine can keep outputs until they are needed elsewhere."""

    async def keep(self, handle: Handle, outputs: Sequence[JobOutput]) -> list[KeptOutput]:
        """Make these of a job that has succeeded contents of its machine, durable there; before `fetch`, which then has
        the others. May be repeated.

        Raises InvalidJob (the step's fault: missing, wrong kind, a link that leads outside, …) and BackendUnavailable.
        """
        ...

    async def bring(self, digest: str, into: Path) -> Path | None:
        """Copy a content below `into`; None when the machine has it no more. The caller checks what came."""
        ...

    async def changed(self, digests: Sequence[str] | None = None) -> set[str]:
        """Of these contents, or of all that are kept, those that are gone or were changed there."""
        ...

    async def listed(self) -> list[str]:
        """The contents that are kept."""
        ...

    async def drop(self, digests: Sequence[str], min_age: float) -> None:
        """Remove those that were not kept anew in the last so many seconds."""
        ...


@dataclass(frozen=True, slots=True)
class NodesAway:
    """Nodes of a cluster that take no jobs: "n[1-2]", "drained", and whoever did that said why ("": nobody did)."""

    nodes: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """A queue that others fill too. `up` and `down` count nodes, None before they were asked."""

    partition: str | None  # None: the cluster's own choice
    up: int | None
    down: int | None
    away: tuple[NodesAway, ...]
    jobs: Mapping[str, int]  # the queue's own word for a state -> how many of our jobs are in it
    full: str | None  # the queue's own words while it takes no more of them


@runtime_checkable
class Queues(Protocol):
    """What a backend offers beside `Backend` whose jobs wait in a queue of somebody else's."""

    def cluster(self) -> Cluster:
        """As last seen. From memory."""
        ...


@runtime_checkable
class Measures(Protocol):
    """What a backend offers beside `Backend` where metrics.jsonl is not here while its step runs."""

    def measured(self, handle: Handle, offset: int) -> AsyncIterator[bytes]:
        """What is in it by now, from `offset` on. Raises BackendUnavailable."""
        ...


class Backend(Protocol):
    """One compute. All methods are safe to cancel; none raises anything but `InvalidJob` and `BackendUnavailable`."""

    name: str
    kind: str
    logs_here: bool
    """What a step prints is in its folder on this host while it runs, not only once it has ended."""

    async def start(self, stack: AsyncExitStack) -> None:
        """Begin to serve; whatever must end with the daemon goes on `stack`. Steps must not."""

    def capacity(self) -> Capacity:
        """From memory, as `health` last saw it: cards come and go."""
        ...

    def missing(self, contents: Mapping[str, int]) -> int:
        """Of these contents (digest -> bytes), how many bytes would have to travel there. From memory: asks nobody."""
        ...

    def doing(self, token: str) -> str | None:
        """What goes on for this job before and after its command: "sends input samples to gpu1: 1.2 of 3.4 GB", "waits
        in the queue of cluster: Priority". None when nothing does. From memory."""
        ...

    async def submit(self, job: Job) -> Handle:
        """Start `job`, or find that its token was claimed already and give that handle.

        The caller has made the intent durable. Idempotent by token.
        Raises InvalidJob (the command cannot be started anywhere: the attempt has failed) and BackendUnavailable
        (it is not known whether it started: recover with `find`, then `fence`).
        """
        ...

    async def wait(self, handle: Handle) -> Outcome:
        """Until the job has ended; for a handle of an earlier daemon too. Raises BackendUnavailable."""
        ...

    async def cancel(self, handle: Handle) -> None:
        """SIGTERM to everything of the job, SIGKILL after its grace. Returns when that is on its way."""

    async def find(self, tokens: Sequence[str]) -> dict[str, Handle]:
        """The handles of those of `tokens` that were claimed, running or ended."""
        ...

    async def fence(self, token: str) -> NeverRan | Handle:
        """Make it impossible for `token` to start, or give the handle of the one that has."""
        ...

    def logs(
        self, handle: Handle, stream: Literal["stdout", "stderr"], offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        """Its output from byte `offset`, a negative one from the end; with `follow`, until the job has ended."""
        ...

    async def fetch(self, handle: Handle, into: Path) -> Path:
        """Bring out/, stdout, stderr and metrics.jsonl home; returns the folder that holds them."""
        ...

    async def discard(self, token: str, *, keep_logs: bool) -> None:
        """Remove work/, scratch/ and out/ (and, without `keep_logs`, the rest) of a job that has ended.

        What it measured stays in the state folder, for the caller to remove. With `keep_logs` it may return before they
        are gone; `health` tells what cannot be removed. Without, it raises BackendUnavailable when it is not known that
        all of it is gone, or will go without being asked again.
        """

    async def health(self) -> str | None:
        """None when well, else a sentence. Looks at the machine, its cards too."""
        ...
