"""`[compute.NAME]` of the kinds that are not local."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class SshCompute(BaseModel):
    """kind = "ssh": another machine. `work_dir`, `mounts` and `python` are paths there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["ssh"]
    host: str
    user: str | None = None
    port: int = 22
    key_file: Path | None = None
    known_hosts: Path | None = None  # None: <state_dir>/known_hosts
    ssh_config: Path | None = None
    agent: bool = False
    work_dir: str = "~/.mlpiped"
    slots: int
    memory: int | None = None
    cpus: float | None = None
    gpus: Literal["auto"] | int = "auto"
    mounts: Mapping[str, str] = {}  # datastore -> where the same files lie there
    max_sessions: int = 8
    keepalive: float = 15.0
    unreachable_timeout: float = 86_400.0
    python: str = "python3"
