"""`Records`, asked on a login node: a request on stdin, its answer on stdout, both one line of JSON.

{"root": …, "name": …, "facts": […]}   ->   {"answer": …}, {"unavailable": sentence} or {"error": words, "file": path}

Standard library only, as all that it imports. `environment` is answered here: what a login there finds around it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from mlpiped.backends.slurm.records import Records
from mlpiped.errors import BackendUnavailable


def answered(request: dict[str, Any]) -> dict[str, Any]:
    if request["name"] == "environment":
        return {"answer": dict(os.environ)}
    try:
        return {"answer": getattr(Records(request["root"]), request["name"])(*request["facts"])}
    except BackendUnavailable as fault:
        return {"unavailable": fault.message}
    except OSError as error:
        return {"error": error.strerror or str(error), "file": os.fspath(error.filename or "")}


def main() -> None:
    json.dump(answered(json.load(sys.stdin)), sys.stdout)
    sys.stdout.write("\n")
