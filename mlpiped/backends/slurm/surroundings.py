"""What a step of a cluster finds around it on its node: environment modules, loaded before its command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.backends.base import Job
    from mlpiped.config.computes import SlurmCompute

SCRIPT = Path(__file__).with_name("modules.sh")
LOADED = ("LOADEDMODULES", "_LMFILES_", "_ModuleTable", "__LMOD_", "__MODULES_")  # what module systems remember by


def before(job: Job, folder: str, tools: str, compute: SlurmCompute) -> list[str]:
    """The words in front of the command: a script that makes its surroundings and takes its place."""
    if not job.modules:
        return []
    init = "" if compute.modules_init is None else os.fspath(compute.modules_init)
    own = " ".join(sorted(name for name in job.env if name not in ("PATH", "PYTHONPATH")))
    return ["/bin/sh", f"{tools}/{SCRIPT.name}", folder, init, " ".join(job.modules), own]


def without_loaded(env: Mapping[str, str]) -> dict[str, str]:
    """A daemon that was started from somebody's shell has their modules around it; on a node none is loaded."""
    return {name: value for name, value in env.items() if not name.startswith(LOADED)}
