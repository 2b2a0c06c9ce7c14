"""`Records`, asked on a login node: a request on stdin, its answer on stdout, both one line of JSON.

{"root": …, "calls": [{"name": …, "facts": […]}, …]}
->  of each {"answer": …}, {"unavailable": sentence} or {"error": words, "file": path}

Standard library only, as all that it imports. `environment` is answered here: what a login there finds around it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from mlpiped.backends.slurm.records import Records
from mlpiped.errors import BackendUnavailable


def answered(records: Records, call: dict[str, Any]) -> dict[str, Any]:
    if call["name"] == "environment":
        return {"answer": dict(os.environ)}
    try:
        return {"answer": getattr(records, call["name"])(*call["facts"])}
    except BackendUnavailable as fault:
        return {"unavailable": fault.message}
    except OSError as error:
        return {"error": error.strerror or str(error), "file": os.fspath(error.filename or "")}
    except ValueError as fault:  # a damaged file: the others are answered all the same
        return {"error": str(fault), "file": ""}


def main() -> None:
    request = json.load(sys.stdin)
    records = Records(request["root"])
    json.dump([answered(records, call) for call in request["calls"]], sys.stdout)
    sys.stdout.write("\n")
