"""`[compute.NAME]`: a class for each kind, and what can only be said about them with the rest of the file at hand."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from mlpiped.config.fields import AbsolutePath, Amount, Bytes, Count, KeptBytes, Seconds, Section, Text, filled
from mlpiped.spec import MODULES, SIF

if TYPE_CHECKING:
    from mlpiped.config.faults import FaultList

NEEDS = {"docker": "aiodocker", "ssh": "asyncssh"}
"""The package that a kind of compute cannot do without; the extra that brings it has the kind's name."""

DOCKER_SOCKET = "/var/run/docker.sock"
_USER = re.compile(r"[0-9]+:[0-9]+\Z")
_LOGIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?\Z")
_SLURM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*\Z")
_SLURM_OPTION = re.compile(r"--([a-z][a-z0-9-]*)(?:=.*)?\Z")
_SLURM_OURS = frozenset(
    "array chdir error export hold input job-name no-requeue ntasks open-mode output parsable requeue test-only wait "
    "wrap".split()
)


def cpu_count() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _gpus(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError('must be "auto" or a number of cards\nwrite "auto" for all that there are, or 0 for none')


def _engine(url: str) -> str:
    path = PurePosixPath(url.removeprefix("unix://"))
    if not url.startswith("unix://") or not path.is_absolute() or len(path.parts) == 1:
        raise ValueError(
            f"must be the engine's Unix socket\nwrite `unix://{DOCKER_SOCKET}`: an engine on another machine does not "
            "see the folders of this one"
        )
    return url


def _mount(text: str) -> str:
    path = PurePosixPath(filled(text).removesuffix(":rw"))
    if ":" in str(path):
        raise ValueError('has an option that is not known\nwrite "/data" to be read, or "/data:rw" to be written too')
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError('must be an absolute path without `..`\nwrite "/data" or "/data:rw"')
    if len(path.parts) == 1:
        raise ValueError("would give every container the whole machine\nname the folders that steps need")
    return text


def _container_user(text: str) -> str:
    if not _USER.match(text):
        raise ValueError('must be "uid:gid"\nwrite numbers, as `id` shows them: "1000:1000"')
    return text


def _host(text: str) -> str:
    name, at, rest = filled(text).rpartition("@")
    if at:
        raise ValueError(f'holds a user\nwrite `host = "{rest}"` and `user = "{name}"`')
    if text.startswith("-") or any(c.isspace() or c == "/" for c in text):
        raise ValueError(
            'is not the name of a host\nwrite "gpu1.lab", an address, or a name that `ssh_config` explains'
        )
    return text


def _login(text: str) -> str:
    if not _LOGIN.match(text):
        raise ValueError("is not the name of a user")
    return text


def _remote(text: str) -> str:
    """A folder on another machine: `/absolute`, or `~/below the home of who logs in`."""
    path = PurePosixPath(filled(text))
    if not (text.startswith(("/", "~/")) and len(path.parts) > 1) or ".." in path.parts:
        raise ValueError('must be a folder on that machine\nwrite "/scratch/mlpiped", or "~/…" for one in the home')
    return text


def _remote_mount(text: str) -> str:
    path = PurePosixPath(filled(text))
    if not path.is_absolute() or len(path.parts) == 1 or ".." in path.parts:
        raise ValueError('must be an absolute path on that machine\nwrite where the datastore is mounted: "/mnt/lab"')
    return text


def _image(text: str) -> str:
    if filled(text).startswith("-") or any(c.isspace() for c in text):
        raise ValueError('is not the name of an image\nwrite it as `docker pull` takes it: "python:3.11-slim"')
    return text


def _command(text: str) -> str:
    if filled(text).startswith("-") or any(c.isspace() for c in text):
        raise ValueError('is not one command\nwrite "python3", or the absolute path of a Python on that machine')
    return text


def _apptainer(value: object) -> object:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value or value.startswith("-") or any(c.isspace() for c in value):
        raise ValueError('must be true, or one command\nwrite true, or its path on the nodes: "/opt/bin/apptainer"')
    return value


def _slurm_name(text: str) -> str:
    if not _SLURM_NAME.match(text):
        raise ValueError("is not a name that Slurm knows: letters, digits, `_`, `.`, `-` and `,` alone")
    return text


def _slurm_option(text: str) -> str:
    found = _SLURM_OPTION.match(filled(text))
    if found is None:
        raise ValueError('is not an option of sbatch\nwrite it as one word: "--constraint=a100"')
    if found[1] in _SLURM_OURS:
        raise ValueError(f"sets `--{found[1]}`, which mlpiped sets itself")
    return text


Gpus = Annotated[Literal["auto"] | int, BeforeValidator(_gpus)]
EngineUrl = Annotated[Text, AfterValidator(_engine)]
Mount = Annotated[str, AfterValidator(_mount)]
ContainerUser = Annotated[Text, AfterValidator(_container_user)]
ImageName = Annotated[str, AfterValidator(_image)]
Host = Annotated[str, AfterValidator(_host)]
Flag = Annotated[bool, Field(strict=True)]
Login = Annotated[Text, AfterValidator(_login)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Places = Annotated[int, Field(strict=True, ge=0)]  # 0: for the cluster behind it alone
RemoteFolder = Annotated[str, AfterValidator(_remote)]
RemoteMount = Annotated[str, AfterValidator(_remote_mount)]
SlurmName = Annotated[str, AfterValidator(_slurm_name)]
SlurmOption = Annotated[str, AfterValidator(_slurm_option)]
Apptainer = Annotated[bool | str, BeforeValidator(_apptainer)]
RemoteCommand = Annotated[str, AfterValidator(_command)]


class LocalCompute(Section):
    """kind = "local": this machine. None: not limited by us."""

    kind: Literal["local"]
    slots: Count = Field(default_factory=cpu_count)
    memory: Bytes | None = None
    cpus: Amount | None = None
    gpus: Gpus = "auto"


class DockerCompute(Section):
    """kind = "docker": containers on this machine's engine."""

    kind: Literal["docker"]
    url: EngineUrl = f"unix://{DOCKER_SOCKET}"
    slots: Count = Field(default_factory=cpu_count)
    memory: Bytes | None = None
    cpus: Amount | None = None
    gpus: Gpus = 0
    allow_mounts: tuple[Mount, ...] = ()  # "/data", "/data:rw": in every container, at the same path
    user: ContainerUser | None = None  # None: the daemon's own
    image: ImageName | None = None  # of steps that name none; None: those do not run here
    pull: Literal["missing", "never"] = "missing"


class SshCompute(Section):
    """kind = "ssh": another machine. `work_dir`, `mounts` and `python` are paths there."""

    kind: Literal["ssh"]
    host: Host
    user: Login | None = None
    port: Port = 22
    key_file: AbsolutePath | None = None
    known_hosts: AbsolutePath | None = None  # None: <state_dir>/known_hosts
    ssh_config: AbsolutePath | None = None
    agent: Flag = False
    work_dir: RemoteFolder = "~/.mlpiped"
    slots: Places
    memory: Bytes | None = None
    cpus: Amount | None = None
    gpus: Gpus = "auto"
    mounts: Mapping[str, RemoteMount] = {}  # datastore -> where the same files lie there
    max_sessions: Count = 8
    keepalive: Seconds = 15.0
    unreachable_timeout: Seconds = 86_400.0
    python: RemoteCommand = "python3"
    store: KeptBytes = 100 << 30  # of what is sent to it and built there; None: whatever room it takes


class SlurmCompute(Section):
    """kind = "slurm": a cluster that sees the same files at the same paths."""

    kind: Literal["slurm"]
    slots: Count = 1000  # how many of our jobs it may know of at once
    max_jobs: Count | None = None  # the site's own limit, where that is lower
    partition: SlurmName | None = None
    account: SlurmName | None = None
    qos: SlurmName | None = None
    time: Seconds | None = None  # the limit of a step that has no timeout; None: the partition's
    via: Text = "local"  # who runs Slurm's commands: this host, or the ssh compute of that name
    poll_interval: Seconds = 10.0
    work_dir: AbsolutePath | None = None  # None: the state folder
    shared: Flag = True  # whether this machine sees `work_dir` too
    store: KeptBytes = 100 << 30  # of what is sent there and built there, where it does not; None: whatever it takes
    options: tuple[SlurmOption, ...] = ()
    apptainer: Apptainer = False  # whether the nodes have it; or what it is called there
    modules_init: AbsolutePath | None = None  # on the nodes: what defines `module` in a shell; None: the usual places


KINDS: dict[str, type[Section]] = {
    "local": LocalCompute,
    "docker": DockerCompute,
    "ssh": SshCompute,
    "slurm": SlurmCompute,
}
Compute = Annotated[LocalCompute | DockerCompute | SshCompute | SlurmCompute, Field(discriminator="kind")]


def check(raw: Mapping[str, Any], base: Path, state_dir: Path, socket: Path, faults: FaultList) -> None:
    """What the classes alone cannot see. `raw` is the file's content, `base` its folder."""
    found = raw.get("compute")
    for name, table in found.items() if isinstance(found, dict) else ():
        if not isinstance(table, dict):
            continue
        kind = table.get("kind")
        if isinstance(kind, str) and kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
            message = f"compute `{name}` needs {NEEDS[kind]}, which is not installed"
            faults.add(("compute", name, "kind"), message, f"pip install 'mlpiped[{kind}]'")
        if kind == "docker":
            _check_mounts(name, table, {"the state folder": state_dir, "the control socket": socket}, faults)
        if kind == "slurm" and isinstance(via := table.get("via", "local"), str) and via != "local":
            _check_via(name, via, raw["compute"], faults)
        if kind == "slurm" and table.get("shared") is False:
            _check_staged(name, table, faults)
        if kind == "ssh" and isinstance(mounts := table.get("mounts"), dict):
            known = faults.names_written("datastores")
            for datastore in mounts:
                if datastore not in known:
                    message = f"no datastore named `{datastore}` in `mounts` of `[compute.{name}]`"
                    faults.add_unknown(("compute", name, "mounts", datastore), message, datastore, known)


def _check_via(name: str, via: str, computes: Mapping[str, Any], faults: FaultList) -> None:
    table = computes[name]
    kinds = {each: table.get("kind") for each, table in computes.items() if isinstance(table, dict)}
    boxes = [each for each, kind in kinds.items() if kind == "ssh"]
    path = ("compute", name, "via")
    if via not in kinds:
        message = f"no compute named `{via}`, which is the `via` of `[compute.{name}]`"
        faults.add_unknown(path, message, via, ["local", *boxes])
    elif via not in boxes:
        message = f'the `via` of `[compute.{name}]` must have `kind = "ssh"`: `{via}` has not'
        faults.add(path, message, f"known: {', '.join(f'`{each}`' for each in ('local', *boxes))}")
    elif "work_dir" not in table:
        message = f"`[compute.{name}]` needs `work_dir` beside `via`"
        seen = (
            "the login node and the nodes see"
            if table.get("shared") is False
            else "this machine, the login node and the nodes see"
        )
        faults.add(path, message, f"name a folder that {seen} at the same path")


def _check_staged(name: str, table: Mapping[str, Any], faults: FaultList) -> None:
    path = ("compute", name, "shared")
    if table.get("via", "local") == "local":
        message = f"`[compute.{name}]` has `shared = false` and no `via`: what runs sbatch here must see the files"
        faults.add(path, message, "name the compute of the login node: `via`")


def _check_mounts(name: str, table: Mapping[str, Any], ours: Mapping[str, Path], faults: FaultList) -> None:
    """A container that sees the engine's socket, or the daemon's, is root on this machine; the state folder holds
    what other people's steps were given."""
    url, mounts = table.get("url"), table.get("allow_mounts")
    sockets = [DOCKER_SOCKET, *([url.removeprefix("unix://")] if isinstance(url, str) else [])]
    forbidden = [("the Docker engine's socket", Path(one)) for one in sockets] + list(ours.items())
    for i, mount in enumerate(mounts if isinstance(mounts, list) else ()):
        folder = Path(mount.removesuffix(":rw")) if isinstance(mount, str) else Path()
        if not folder.is_absolute() or len(folder.parts) == 1:
            continue  # named by its type's check
        for what, path in forbidden:
            if any(one == two or one in two.parents for one in _names(folder) for two in _names(path)):
                message = f"`allow_mounts` in `[compute.{name}]` would give every container {what}: `{mount}`"
                faults.add(("compute", name, "allow_mounts", i), message, "name the folders that steps need")
                break
        else:
            if any(state in one.parents for one in _names(folder) for state in _names(ours["the state folder"])):
                message = f"`allow_mounts` in `[compute.{name}]` lies in the state folder: `{mount}`"
                faults.add(("compute", name, "allow_mounts", i), message, "inputs and outputs are mounted without it")


def _names(path: Path) -> set[Path]:
    """As written, and with its links followed: `/var/run` is `/run`."""
    return {Path(os.path.normpath(path)), Path(os.path.realpath(path))}


def absent_files(computes: Mapping[str, Section]) -> Iterator[str]:
    """A sentence for each file that a config names and that is not there now: it may come, so it is no fault."""
    for name, compute in computes.items():
        if not isinstance(compute, SshCompute):
            continue
        files = {"key_file": compute.key_file, "known_hosts": compute.known_hosts, "ssh_config": compute.ssh_config}
        for key, path in files.items():
            if path is not None and not _there(path):
                yield f"the `{key}` of compute `{name}` is not there: `{path}`"


def _there(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # who asks may not look; the daemon's user may
    return True


def own_image(table: Mapping[str, Any]) -> str | None:
    """What a compute's table, as written or as read, adds to what its kind offers: see `images_of`."""
    if table.get("kind") == "slurm":
        return SIF if table.get("apptainer") else None
    image = table.get("image") if table.get("kind") == "docker" else None
    return image if isinstance(image, str) else None


def clusters_of(computes: Mapping[str, str], pools: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """The computes that start steps on several nodes, and the pools with such a one. `computes`: name -> kind."""
    found = {name for name, kind in computes.items() if kind == "slurm"}
    return frozenset(found | {pool for pool, members in pools.items() if found.intersection(members)})


def images_of(
    computes: Mapping[str, str], pools: Mapping[str, tuple[str, ...]], images: Mapping[str, str]
) -> dict[str, frozenset[bool | str]]:
    """What `spec_images.Images` says of each compute and pool.

    `computes` maps a name to its kind, `images` to its `image`, or to SIF.
    """
    found: dict[str, frozenset[bool | str]] = {name: frozenset({kind == "docker"}) for name, kind in computes.items()}
    for name in (name for name, kind in computes.items() if kind == "slurm"):
        found[name] |= {MODULES}
    for name, image in images.items():
        found[name] |= {image}
    for pool, members in pools.items():
        found[pool] = frozenset(one for member in members for one in found.get(member, ()))
    return found
