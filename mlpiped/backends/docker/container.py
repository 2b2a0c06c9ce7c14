"""A job as the engine is told of it: the configuration of its container. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpiped.backends.docker import script
from mlpiped.errors import InvalidJob

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.backends.base import Job

INSTANCE, TOKEN = "mlpiped.instance", "mlpiped.token"  # labels
PROCESSES = 16384  # and threads, of one container: a fork bomb stays in it
LOG = {"Type": "local", "Config": {"max-size": "64m", "max-file": "2"}}  # byte by byte: json-file knows text alone
NO_CARDS = "NVIDIA_VISIBLE_DEVICES=void"  # images of CUDA ask for all, and an engine of NVIDIA's gives what images ask
OOM_SCORE = 500  # when the host runs out of memory, steps go before the daemon


def labels(instance: str, token: str) -> dict[str, str]:
    return {INSTANCE: instance, TOKEN: token}


def configuration(
    job: Job, folder: str, instance: str, user: str, mounts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Of a container whose image has a shell, which executes the folder's script.

    The image's ENTRYPOINT is not: the step says the whole command. The engine stops a container by SIGKILL, so that an
    engine that goes down is not mistaken for a step that ended.
    """
    return {
        "Image": job.image,
        "Entrypoint": [script.SHELL, f"{folder}/{script.START}"],
        "Cmd": [],
        "User": user,
        "WorkingDir": f"{folder}/work",
        "Env": [] if job.gpus else [NO_CARDS],
        "Labels": labels(instance, job.token),
        "StopSignal": "SIGKILL",
        "Healthcheck": {"Test": ["NONE"]},
        "NetworkDisabled": not job.network,
        "HostConfig": {
            "Mounts": list(mounts),
            "NetworkMode": "default" if job.network else "none",
            "Init": True,
            "Privileged": False,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "PidsLimit": PROCESSES,
            "NanoCpus": int(job.cpus * job.tasks * 1e9),
            "OomScoreAdj": OOM_SCORE,
            "RestartPolicy": {"Name": "no"},
            "AutoRemove": False,
            "LogConfig": LOG,
            **({"Memory": job.memory, "MemorySwap": job.memory} if job.memory else {}),
            **({"ShmSize": job.shm_size} if job.shm_size else {}),
            **({"DeviceRequests": [_cards(job.gpus)]} if job.gpus else {}),
        },
    }


def bare(config: dict[str, Any], argv: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """The same without a shell: the engine starts the command itself, and keeps what it prints. Raises InvalidJob."""
    texts = [*argv, *env.values()]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise InvalidJob("an image without /bin/sh cannot be given an argument that is no UTF-8 text") from None
    own = {name: env[name].rstrip(":") for name in ("PATH", "PYTHONPATH") if name in env}
    return {
        **config,
        "Entrypoint": [argv[0]],
        "Cmd": list(argv[1:]),
        "Env": config["Env"] + [f"{name}={value}" for name, value in {**env, **own}.items()],
    }


def _cards(uuids: Sequence[str]) -> dict[str, Any]:
    return {"Driver": "", "DeviceIDs": list(uuids), "Capabilities": [["gpu"]]}
