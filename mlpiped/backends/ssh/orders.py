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
    words = {
        "shown": json.dumps(f"`{argv[0][:200]}`")[1:-1],
        "code": place.code or "",
        "uses": " ".join(place.uses),
        "params": params or "",
        "timeout": "" if job.timeout is None else f"{job.timeout:.3f}",
        "grace": f"{job.grace * 100:.0f}",
    }
    make.remove("work")  # it is there
    lines = [f"{name}={quote(value)}" for name, value in words.items()]
    lines.append(" ".join(["set --", *map(quote, make)]))
    lines.append("needs() { " + " && ".join([":", *(f"[ -e {_short(path, place)} ]" for path in place.needed)]) + "; }")
    path, others = _exports(env, place)
    command = " ".join(map(quote, argv))  # `leader`: its own session, signals as a program expects them
    step = [f"export {path}", f"begin {quote(argv[0])}", f"set -- $leader {command}", f"export {others}", 'exec "$@"']
    lines.append("step() { " + "; ".join(step) + "; }")
    return os.fsencode("; ".join(lines))


def _exports(env: Mapping[str, str], place: Place) -> tuple[str, str]:
    """PATH, and the others as one command: none of them is in the way of another's `$root`."""
    found = {"PATH": [*place.bins], "PYTHONPATH": [place.sdk] if place.sdk else []}
    for name in FIRST:
        if env.get(name):
            found[name].insert(0, env[name])
    words = []
    if found["PYTHONPATH"]:
        words.append("PYTHONPATH=" + ":".join(_short(one, place) for one in found["PYTHONPATH"]))
    # `export` refuses what is no name in a shell; such variables reach the step by `env`
    words += [f"{name}={_short(value, place)}" for name, value in env.items() if name not in FIRST and _plain(name)]
    return "PATH=" + "".join(f"{_short(one, place)}:" for one in found["PATH"]) + '"$PATH"', " ".join(words)


def _plain(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def _short(text: str, place: Place) -> str:
    """In quotes; the box reads byte by byte."""
    below = text.startswith(f"{place.root}/")
    return '"$root"' + quote(text[len(place.root) :]) if below else quote(text)


def quote(text: str) -> str:
    """Always in quotes, and always on one line."""
    return "'" + text.replace("'", "'\\''").replace("\n", "'\"$N\"'") + "'"
