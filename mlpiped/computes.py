"""From the config's computes to backends; a kind's module is imported only where the config has one of that kind."""

from __future__ import annotations

import os
import re
import secrets
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from mlpiped.backends.local import LocalBackend
from mlpiped.config.computes import DockerCompute, SlurmCompute, SshCompute
from mlpiped.errors import MlpipedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mlpiped.backends.base import Backend
    from mlpiped.config.settings import Settings

_INSTANCE = re.compile(r"[0-9a-f]{32}\Z")


def instance_of(state_dir: Path) -> str:
    """Which daemon this is, to machines that several share: a random id, made once. The caller owns the folder.

    Raises MlpipedError when it cannot be read: with another one, what runs elsewhere would be somebody else's.
    """
    path = state_dir / "instance"
    try:
        found = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return _new_instance(path)
    except (OSError, ValueError) as fault:
        raise MlpipedError(f"the daemon's id cannot be read: `{path}`: {fault}") from None
    if not _INSTANCE.match(found):
        hint = "bring it back from a backup, or remove it when nothing of this daemon's runs on other machines"
        raise MlpipedError(f"the daemon's id is damaged: `{path}`", hint=hint)
    return found


def _new_instance(path: Path) -> str:
    made = secrets.token_hex(16)
    new = path.with_name("instance.new")
    try:
        with open(new, "w", encoding="ascii") as file:
            file.write(made + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as fault:
        raise MlpipedError(f"the daemon's id cannot be written: `{path}`: {fault.strerror}") from None
    return made


def backends_of(settings: Settings) -> dict[str, Backend]:
    """A backend for each compute, none of them started."""
    state = settings.daemon.state_dir
    instance = instance_of(state)
    datastores = {name: each.path for name, each in settings.datastores.items()}
    python = str(settings.daemon.python or sys.executable)
    found: dict[str, Backend] = {}
    for name, compute in settings.compute.items():
        if isinstance(compute, DockerCompute):
            docker = import_module("mlpiped.backends.docker")
            found[name] = docker.DockerBackend(name, state, compute, instance=instance)
        elif isinstance(compute, SshCompute):
            ssh = import_module("mlpiped.backends.ssh")
            if compute.known_hosts is None:  # empty, it trusts nobody: that is then said in place of "no such file"
                (state / "known_hosts").touch(0o644)
            found[name] = ssh.SshBackend(name, state, compute, instance=instance, datastores=datastores)
        elif isinstance(compute, SlurmCompute):
            continue  # it may go through one of the others
        else:
            found[name] = LocalBackend(
                name,
                state / "jobs",
                state / "envs",
                slots=compute.slots,
                memory=compute.memory,
                cpus=compute.cpus,
                python=python,
                gpus=compute.gpus,
                instance=instance,
            )
    for name, compute in settings.compute.items():
        if isinstance(compute, SlurmCompute):
            found[name] = _cluster(name, compute, settings, found, python)
    return {name: found[name] for name in settings.compute}


def _cluster(
    name: str, compute: SlurmCompute, settings: Settings, others: Mapping[str, Backend], python: str
) -> Backend:
    state, instance = settings.daemon.state_dir, instance_of(settings.daemon.state_dir)
    slurm, runner = import_module("mlpiped.backends.slurm"), None
    if compute.via != "local":
        ssh = import_module("mlpiped.backends.ssh")
        link = others[compute.via].link  # type: ignore[attr-defined]
        runner = slurm.LoginRunner(ssh.LoginShell(link))
        if not compute.shared:
            datastores = {each: store.path for each, store in settings.datastores.items()}
            stage = ssh.Stage(link, compute.work_dir, instance, datastores, compute.store)
            staged: Backend = slurm.StagedSlurmBackend(
                name, state, compute, instance=instance, runner=runner, stage=stage
            )
            return staged
    shared: Backend = slurm.SlurmBackend(name, state, compute, instance=instance, runner=runner, python=python)
    return shared
