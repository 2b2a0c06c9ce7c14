"""What `mlpiped check` can say of the computes without asking any: files, sockets and host keys on this machine."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlpiped.config.computes import DockerCompute, SlurmCompute, SshCompute, absent_files
from mlpiped.errors import MlpipedError

if TYPE_CHECKING:
    from mlpiped.config.settings import Settings

SLURM = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")  # sacct: only where there is accounting


def warnings_of(settings: Settings) -> list[str]:
    """What may be well at another time, or on another machine, and is not now on this one."""
    found = list(absent_files(settings.compute))
    for name, compute in settings.compute.items():
        if isinstance(compute, DockerCompute):
            found += _of_engine(name, Path(compute.url.removeprefix("unix://")))
        elif isinstance(compute, SshCompute):
            found += _of_box(name, compute, settings.daemon.state_dir / "known_hosts")
        elif isinstance(compute, SlurmCompute) and compute.via == "local":
            absent = [f"`{program}`" for program in SLURM if shutil.which(program) is None]
            found += [f"compute `{name}`: not on the PATH: {', '.join(absent)}"] if absent else []
    return found


def _of_engine(name: str, socket: Path) -> list[str]:
    try:
        found = os.stat(socket)
    except PermissionError:
        return []  # who asks may not look; the daemon's user may
    except OSError:
        return [f"compute `{name}`: no Docker engine has its socket at `{socket}`"]
    return [] if stat.S_ISSOCK(found.st_mode) else [f"compute `{name}`: `{socket}` is no socket"]


def _of_box(name: str, compute: SshCompute, own: Path) -> list[str]:
    from mlpiped.backends import host_keys  # asyncssh takes its time

    found = []
    try:
        if compute.key_file is not None and compute.key_file.stat().st_mode & 0o077:
            found.append(f"others may read the private key of compute `{name}`: `chmod 600 {compute.key_file}`")
    except OSError:
        pass  # absent, which is said already, or not ours to look at
    path = compute.known_hosts or own
    try:
        os.stat(path.parent)
        if not host_keys.trusted(path, anyio.run(host_keys.box_of, compute)):
            found.append(f"no host key of compute `{name}` is trusted yet: `mlpiped trust {name}`")
    except PermissionError:
        pass
    except OSError:
        found.append(f"no host key of compute `{name}` is trusted yet: `mlpiped trust {name}`")
    except MlpipedError as fault:
        found.append(f"compute `{name}`: {fault.message}")
    return found
