"""What a step of a cluster finds around it on its node: environment modules, loaded before its command, or an image of
Apptainer, in which it is run. Either is a script in front of the command, which makes that and then becomes it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpiped.backends.slurm import apptainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpiped.backends.base import Job
    from mlpiped.config.computes import SlurmCompute

MODULES = Path(__file__).with_name("modules.sh")
SCRIPTS = (MODULES, apptainer.SCRIPT)
LOADED = ("LOADEDMODULES", "_LMFILES_", "_ModuleTable", "__LMOD_", "__MODULES_")  # what module systems remember by


def around(order: dict[str, Any], job: Job, folder: str, tools: str, compute: SlurmCompute) -> dict[str, Any]:
    """`order` (of `folder.order`) with what the job asks for around its command. `tools`: where SCRIPTS lie on nodes.

    Raises InvalidJob.
    """
    if job.image is not None:
        argv, env = apptainer.inside(order["argv"], order["env"], job, folder, tools, compute.apptainer)
    elif job.modules:
        init = "" if compute.modules_init is None else os.fspath(compute.modules_init)
        own = " ".join(sorted(name for name in job.env if name not in ("PATH", "PYTHONPATH")))
        lead = ["/bin/sh", f"{tools}/{MODULES.name}", folder, init, " ".join(job.modules), own]
        argv, env = lead + order["argv"], without_loaded(order["env"])
    else:
        return order
    return {**order, "argv": argv, "env": env}


def without_loaded(env: Mapping[str, str]) -> dict[str, str]:
    """A daemon that was started from somebody's shell has their modules around it; on a node none is loaded."""
    return {name: value for name, value in env.items() if not name.startswith(LOADED)}
