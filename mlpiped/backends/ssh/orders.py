"""A job as the text that `step.sh` executes: one line of shell, everything that comes from a person in quotes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlpiped.backends import folder as folders

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlpiped.backends.base import Job

NOT_THE_STEPS = "SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_ORIGINAL_COMMAND SSH_AUTH_SOCK MLPIPED_LAB_BOOT_ID OLDPWD"
FIRST = ("PATH", "PYTHONPATH")  # a step's own come first; the box's stay reachable


@dataclass(frozen=True, slots=True)
class Place:
    """Where things lie on the box, for one job."""

    root: str
    inputs: Mapping[str, Sequence[str]]  # port -> paths there
    needed: Sequence[str] = ()  # paths that must be there, or nothing starts
    uses: Sequence[str] = ()  # contents and environments that stay until it has ended
    code: str | None = None
    sdk: str | None = None
    bins: Sequence[str] = ()  # go before the box's PATH
    env: Mapping[str, str] = field(default_factory=dict)


def order(job: Job, place: Place) -> bytes:
    """Raises InvalidJob for what no machine can execute."""
    home = f"{place.root}/{job.token}"
    env = {"PYTHONUNBUFFERED": "1", **place.env, **folders.variables(home, job, place.inputs)}
    env["MLPIPED_JOB_DIR"] = f"{home}/"  # the mark by which step.sh knows the processes of a step
    argv = folders.order(job.argv(folders.output_paths(home, job), place.inputs), env, job)["argv"]
    make, params = folders.contents(job)
    shown = f"`{argv[0][:200]}`"
    words = {
        "e_missing": json.dumps(f"command not found: {shown}"),
        "e_denied": json.dumps(f"permission denied: {shown} is not an executable file"),
        "code": place.code or "",
        "uses": " ".join(place.uses),
        "params": params or "",
        "timeout": "" if job.timeout is None else f"{job.timeout:.3f}",
        "grace": f"{job.grace * 100:.0f}",
    }
    make.remove("work")  # it is there
    lines = [f"{name}={quote(value)}" for name, value in words.items()]
    lines.append(" ".join(["set --", *map(quote, make)]))
    lines.append("needs() { " + " && ".join([":", *(f"[ -e {quote(path)} ]" for path in place.needed)]) + "; }")
    lines.append("step() { " + "; ".join([f"unset {NOT_THE_STEPS}", *_exports(env, place), _begin(argv)]) + "; }")
    return os.fsencode("; ".join(lines))


def _exports(env: Mapping[str, str], place: Place) -> list[str]:
    found = {"PATH": [*place.bins], "PYTHONPATH": [place.sdk] if place.sdk else []}
    for name in FIRST:
        if env.get(name):
            found[name].insert(0, env[name])
    path = "".join(f"{quote(one)}:" for one in found["PATH"])
    exports = [
        f'export PATH={path}"${{PATH:-/usr/local/bin:/usr/bin:/bin}}"',
        "unset PYTHONHASHSEED PYTHONHOME PYTHONSTARTUP",
    ]
    if found["PYTHONPATH"]:
        exports.append(f"export PYTHONPATH={quote(':'.join(found['PYTHONPATH']))}")
    # `export` refuses what is no name in a shell; such variables reach the step by `env`
    return exports + [
        f"export {name}={quote(value)}" for name, value in env.items() if name not in FIRST and _plain(name)
    ]


def _plain(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def _begin(argv: Sequence[str]) -> str:
    return "begin " + " ".join(quote(word) for word in argv)


def quote(text: str) -> str:
    """Always in quotes, and always on one line."""
    return "'" + text.replace("'", "'\\''").replace("\n", "'\"$N\"'") + "'"
